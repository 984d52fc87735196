"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

SHOWN_STEM = 40  # characters of a name in its temporary one, since a name may be as long as the file system allows


def temporary_name(path: Path, number: int) -> Path:
    """Return a hidden name in the folder of `path`, one for each `number`, that `remove_leftovers` knows."""
    return path.with_name(f".{path.stem[:SHOWN_STEM]}.{number}.part{path.suffix}")


@contextmanager
def complete_or_absent(temporary: Path) -> Iterator[None]:
    """Let the block write a file under a temporary name; what it leaves is on the disk, or removed if it fails."""
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield
        temporary.chmod(mode)  # some writers create private files; keep what the user's umask says
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it onto `path` if the block succeeds.

    On any exception, interrupts included, the temporary file is removed and `path` is untouched.
    """
    temporary = temporary_name(Path(path), os.getpid())
    try:
        with complete_or_absent(temporary):
            yield temporary
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
