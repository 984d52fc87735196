"""Which file becomes which: the pictures of folders, and a name of its own for every result."""

from __future__ import annotations

import logging
import os
import re
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ..pictures import FORMATS, PictureError, pictures_in
from ..untrusted import printable
from .jobs import Job
from .manifest import Record, facts, results_in

log = logging.getLogger(__name__)


def plan_jobs(inputs: Sequence[Path], output: Path, suffix: str | None = None, recursive: bool = False) -> list[Job]:
    """Pair every input picture with an output path of its own.

    Inputs are files or folders (their pictures, in name order, without hidden ones; with `recursive` also
    those of folders inside, which are kept as folders of `output`). `output` is a file for exactly one input
    file, otherwise a folder. `suffix` (".png") changes the type. Where two would have one name, the later one
    gets its old type added (`a-jpg.png`), then a number; what the output folder's manifest says of a source
    stays. Raises PictureError for missing inputs, empty folders, a type that cannot be written or is named
    twice, and outputs that would replace an input.
    """
    found = [pair for path in inputs for pair in _expand(path, output, recursive)]
    sources = list(dict.fromkeys(source for source, _ in found))
    if _is_one_file(output, inputs, suffix):
        jobs = [Job(sources[0], output)]
    else:
        names = _names(dict(found), output, suffix)
        jobs = [Job(source, output / names[source]) for source in sources]
    originals = {source.resolve() for source in sources}
    for job in jobs:
        if job.output.resolve() in originals:
            raise PictureError(f"{job.output} is an input and would be replaced; choose another folder with -o")
    return jobs


def pictures_under(folder: Path, skip: Path | None = None) -> Iterator[Path]:
    """Yield the pictures in `folder` and in the folders inside, each folder once, in name order.

    Folders that a link leads to come after all others: what is there under its own name keeps it, and
    loops end. Hidden folders and `skip` are left out, folders that cannot be read too, with a warning.
    """
    seen = {_identity(skip)} if skip and skip.is_dir() else set()
    waiting, links = deque([folder]), deque()
    while waiting or links:
        current = (waiting or links).popleft()
        try:
            if (identity := _identity(current)) in seen:
                continue
            seen.add(identity)
            yield from pictures_in(current)
            inside = sorted(path for path in current.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError as error:
            log.warning("%s", printable(f"folder {current} is left out: {error.strerror}"))
            continue
        waiting.extend(path for path in inside if not path.is_symlink())
        links.extend(path for path in inside if path.is_symlink())


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_one_file(output: Path, inputs: Sequence[Path], suffix: str | None) -> bool:
    """Whether `output` names a picture file; raises PictureError where it can be neither file nor folder."""
    ending = output.suffix.lower()
    if output.is_dir():
        return False
    if ending in FORMATS:
        if len(inputs) != 1 or inputs[0].is_dir():
            what = f"{inputs[0]} is a folder" if len(inputs) == 1 else "there are several inputs"
            raise PictureError(f"{output} is one file, but {what}; give a folder: -o {output.with_suffix('')}")
        if suffix and FORMATS[suffix] != FORMATS[ending]:
            raise PictureError(f"{output} is no {FORMATS[suffix]} file, which --format asks for; leave one of them out")
        return True
    if output.exists():
        raise PictureError(f"{output} is a file, not a folder; choose another name with -o")
    # Unknown words after a dot are mistyped formats rather than folders; "v1.2" is a folder.
    if ending[1:].isalpha() or ending in Image.registered_extensions():
        raise PictureError(
            f"{output}: pictures of type {ending} are not written; use {', '.join(FORMATS)}, "
            "or create that folder first if it is one"
        )
    return False


def _expand(path: Path, output: Path, recursive: bool) -> list[tuple[Path, Path]]:
    """Return the pictures that an input names, each with its path inside the output folder."""
    if not path.is_dir():
        return [(path, Path(path.name))]
    found = list(pictures_under(path, output)) if recursive else pictures_in(path)
    if not found:
        nested = "" if recursive or all(not inner.is_dir() for inner in path.iterdir()) else "; --recursive reads more"
        kinds = ", ".join(FORMATS)
        raise PictureError(f"folder {path} holds no pictures ({kinds}; hidden files are not read){nested}")
    return [(picture, picture.relative_to(path)) for picture in found]


def _names(places: Mapping[Path, Path], folder: Path, suffix: str | None) -> dict[Path, Path]:
    """Return a path inside `folder` for every source, from its `places`; what was made of it before keeps its name."""
    results = results_in(folder)
    of_source, of_name = {r.source: r for r in results}, {_folded(r.output): r for r in results}
    taken, named, moved = set(of_name), {}, []

    def ends_as_it_was(pair: tuple[Path, Path]) -> bool:
        return suffix is None or pair[0].suffix.lower() == suffix

    for source, place in sorted(places.items(), key=ends_as_it_was, reverse=True):
        wanted = place.with_suffix(suffix or _writable_suffix(source))
        record = of_source.get(str(source.absolute())) or _before_it_was_moved(source, of_name.get(_folded(wanted)))
        if record and _is_named_after(Path(record.output), wanted):
            named[source] = Path(record.output)
            continue
        named[source] = next(path for path in _candidates(wanted, source) if _folded(path) not in taken)
        taken.add(_folded(named[source]))
        if named[source] != wanted:
            moved.append(f"{source} becomes {named[source]}")
    if moved:
        more = f", and {len(moved) - 3} more" if len(moved) > 3 else ""
        log.warning("%s", f"another picture has the name already: {printable('; '.join(moved[:3]))}{more}")
    return named


def _before_it_was_moved(source: Path, record: Record | None) -> Record | None:
    """Return `record` if it is that of `source` before its folder was moved or renamed: same size, same time."""
    try:
        same = record is not None and facts(source) == record.facts and not Path(record.source).exists()
    except OSError:
        return None
    return record if same else None


def _candidates(wanted: Path, source: Path) -> Iterable[Path]:
    yield wanted
    typed = f"{wanted.stem}-{source.suffix[1:].lower()}"
    if source.suffix.lower() != wanted.suffix.lower():
        yield wanted.with_stem(typed)
    number = 2
    while True:
        yield wanted.with_stem(f"{wanted.stem}-{number}")
        number += 1


def _is_named_after(path: Path, wanted: Path) -> bool:
    """Whether `path` is one of the `_candidates` for `wanted`: a record may say anything."""
    added = path.stem.removeprefix(wanted.stem)
    same = path.parent == wanted.parent and path.suffix.lower() == wanted.suffix.lower()
    return same and path.stem.startswith(wanted.stem) and (not added or re.fullmatch(r"-\w{1,9}", added) is not None)


def _folded(name: Path | str) -> str:
    """Return what file systems that know no case, or one form of an accent, take for the same name."""
    return unicodedata.normalize("NFC", os.fspath(Path(name))).casefold()


def _writable_suffix(source: Path) -> str:
    return source.suffix if source.suffix.lower() in FORMATS else ".png"
