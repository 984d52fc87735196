"""Pictures that arrive in a folder, each once it is complete."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..pictures import pictures_in
from .folders import pictures_under
from .manifest import Facts, facts


class HotFolder:
    """Looks at a folder again and again, and gives out every picture that has stopped growing.

    A picture is complete when it has bytes, and its size and time were the same for `settle` seconds. One that
    changes afterwards is given out again: a copy that stood still for longer. `skip` is a folder not to look into.
    """

    def __init__(
        self,
        folder: Path,
        settle: float = 2.0,
        recursive: bool = False,
        skip: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.settle, self.recursive, self.skip, self.clock = folder, settle, recursive, skip, clock
        self._seen: dict[Path, tuple[Facts, float]] = {}
        self._given: dict[Path, Facts] = {}

    def complete(self) -> set[Path]:
        """Return the pictures that have become complete since the last call; raises OSError without the folder."""
        now, found = self.clock(), {}
        for path in pictures_under(self.folder, self.skip) if self.recursive else pictures_in(self.folder):
            try:
                found[path] = facts(path)
            except OSError:  # gone again, or a link that leads nowhere yet
                continue
        self._seen = {path: self._first_seen(path, known, now) for path, known in found.items()}
        self._given = {path: known for path, known in self._given.items() if path in found}
        ready = {
            path
            for path, (known, since) in self._seen.items()
            if known[0] and now - since >= self.settle and self._given.get(path) != known
        }
        self._given |= {path: found[path] for path in ready}
        return ready

    def _first_seen(self, path: Path, known: Facts, now: float) -> tuple[Facts, float]:
        before = self._seen.get(path)
        return before if before and before[0] == known else (known, now)
