"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN_STEM = 40  # characters of a name in its temporary one, since a name may be as long as the file system allows


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it onto `path` if the block succeeds.

    On any exception, interrupts included, the temporary file is removed and `path` is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem[:SHOWN_STEM]}.{os.getpid()}.part{path.suffix}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers create private files; keep what the user's umask says
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(paths: Iterable[Path]) -> None:
    """Remove the temporary files that killed processes left of `paths`, none of which anyone is writing now."""
    wanted: dict[Path, set[tuple[str, str]]] = {}
    for path in paths:
        wanted.setdefault(path.parent, set()).add((path.stem[:SHOWN_STEM], path.suffix))
    for folder, names in wanted.items():
        for file in folder.iterdir() if folder.is_dir() else ():
            found = re.fullmatch(r"\.(.*)\.\d+\.part(\..*)?", file.name, re.DOTALL)
            if found and (found[1], found[2] or "") in names:
                file.unlink(missing_ok=True)
