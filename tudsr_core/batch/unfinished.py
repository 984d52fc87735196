"""A large result while it is written, and the journal that says what of it is whole: a killed run goes on from there.

Beside `huge.tif` lie `.huge.unfinished.tif`, which has its tiles from the first on, and `.huge.unfinished.jsonl`: a
line for the run, and one for every band of tiles that was on the disk when it was written, with its checksum.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..atomic_write import SHOWN_STEM
from ..untrusted import Fields, UntrustedError, parse_json
from .folder_lock import hold
from .settings import Settings

MAX_LINE = 2**18
MAX_BYTES = 10**13


@dataclass(frozen=True)
class _Band:
    """Where in the file a band of tiles ends, how long each is, and the CRC-32 of all."""

    end: int
    sizes: tuple[int, ...]
    crc32: int


class Unfinished:
    """The file of one result: its bands that are whole, as a collection, and where the next ones are noted."""

    def __init__(self, path: Path, file: BinaryIO, journal: BinaryIO, bands: list[_Band]) -> None:
        self.path, self.file, self.bands = path, file, bands
        self._journal = journal

    def __len__(self) -> int:
        return len(self.bands)

    def __iter__(self) -> Iterator[list[bytes]]:
        with self.path.open("rb") as file:
            for band in list(self.bands):
                yield _read_band(file, band)

    def add(self, tiles: list[bytes]) -> None:
        """Note a band that was just written; it is on the disk before its line is."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.bands.append(_Band(self.file.tell(), tuple(map(len, tiles)), _crc32(tiles)))
        band = self.bands[-1]
        _append(self._journal, {"end": band.end, "sizes": band.sizes, "crc32": band.crc32})


@contextmanager
def unfinished(path: Path, run: Settings | None) -> Iterator[Unfinished]:
    """Yield the file that becomes `path` if the block succeeds, for this process alone.

    If it fails, or the process is killed, what is whole stays for the next run that is the same; with `run` None,
    nothing does. Raises PictureError where another process is at it, OSError.
    """
    name = f".{path.stem[:SHOWN_STEM]}.unfinished"
    part, journal = path.with_name(name + path.suffix), path.with_name(name + ".jsonl")
    with journal.open("ab+", buffering=0) as lines:
        hold(lines, path.parent)
        bands, said = _whole_bands(part, journal, run)
        lines.truncate(said)
        if not bands:
            _append(lines, {"run": run})
        with part.open("rb+" if bands else "wb+") as file:
            file.truncate(bands[-1].end if bands else 0)
            try:
                yield Unfinished(part, file, lines, bands)
                file.flush()
                os.fsync(file.fileno())
            except BaseException:
                if run is None or not bands:
                    part.unlink(missing_ok=True)
                    journal.unlink(missing_ok=True)
                raise
        os.replace(part, path)
        journal.unlink(missing_ok=True)


def _whole_bands(part: Path, journal: Path, run: Settings | None) -> tuple[list[_Band], int]:
    """Return the bands that an equal run noted and that are in the file as noted, and the journal's bytes on them."""
    bands, said = [], 0
    if run is None or not part.is_file():
        return bands, said
    with journal.open("rb") as lines, part.open("rb") as file:
        try:
            if dict(_fields(lines).table("run").values) != run:
                return bands, said
            while (band := _band(_fields(lines))) and _crc32(_read_band(file, band)) == band.crc32:
                bands.append(band)
                said = lines.tell()
        except (UntrustedError, UnicodeDecodeError):  # the end of the journal, or a torn line
            pass
    return bands, said


def _fields(lines: BinaryIO) -> Fields:
    return Fields(parse_json(lines.readline(MAX_LINE).decode("utf-8"), "the line"), "the line")


def _band(fields: Fields) -> _Band | None:
    sizes = tuple(map(int, fields.numbers("sizes")))
    band = _Band(fields.whole("end", most=MAX_BYTES), sizes, fields.whole("crc32", most=2**32))
    return band if min(sizes, default=0) > 0 and sum(sizes) < band.end else None


def _append(lines: BinaryIO, values: dict) -> None:
    lines.write(json.dumps(values).encode("ascii") + b"\n")
    os.fsync(lines.fileno())


def _read_band(file: BinaryIO, band: _Band) -> list[bytes]:
    file.seek(band.end - sum(band.sizes))
    return [file.read(size) for size in band.sizes]


def _crc32(tiles: list[bytes]) -> int:
    value = 0
    for tile in tiles:
        value = zlib.crc32(tile, value)
    return value
