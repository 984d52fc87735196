"""Records of output folders, damaged in any way or written by someone else: a run is planned and begun on them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from tudsr_core.batch import MANIFEST, open_manifest, plan_jobs
from tudsr_core.pictures import PictureError

from .case import Case
from .damage import EXTREME, damage_head, flip_bits, grow, truncate

CLEAR = (PictureError,)
NAMES = (
    "a.png",
    "../a.png",
    "/a.png",
    "sub/../../a.png",
    "",
    ".",
    "a" * 300 + ".png",
    "sub/a.png",
    "a\0.png",
    "C:\\a.png",
)
VALUES = (None, True, -1, 1.5, float("inf"), float("nan"), *EXTREME, 10**40, "", "x" * 10_000, [], {}, [[[[]]]], *NAMES)
SETTINGS = {"scale": 2, "window": "gaussian"}


def cases(rng: random.Random, folder: Path, count: int) -> Iterator[Case]:
    """Yield `count` cases: bytes of a sound record damaged, then lines with values of any kind."""
    for number in range(count):
        place = folder / str(number)
        make = damaged if number % 2 else forged
        yield Case(f"{make.__name__} {number}", partial(begin, place, make(rng, place)))


def lines(place: Path) -> list[dict]:
    """Return what a run over two pictures writes."""
    record = {"bytes": 70, "mtime": 1.5, "output_bytes": 70, "output_mtime": 2.5, "sha256": "0" * 64, "seconds": 0.1}
    made = [record | {"source": str(place / "in" / name), "output": name} for name in ("a.png", "b.png")]
    return [{"run": SETTINGS}, *made, {"source": "x", "bytes": 0, "mtime": 0, "output": "c.png", "error": "none"}]


def damaged(rng: random.Random, place: Path) -> bytes:
    """Return a sound record with damaged bytes."""
    data = bytearray("".join(json.dumps(line) + "\n" for line in lines(place)).encode())
    return bytes(rng.choice((flip_bits, damage_head, truncate, grow))(rng, data))


def forged(rng: random.Random, place: Path) -> bytes:
    """Return lines of which some fields have other values, or are missing."""
    made = []
    for line in lines(place) * rng.randint(1, 3):
        for _ in range(rng.randint(0, 3)):
            name = rng.choice([*line, "more"])
            if rng.random() < 0.2:
                line.pop(name, None)
            else:
                line[name] = rng.choice(VALUES)
        made.append(json.dumps(line if rng.random() < 0.95 else rng.choice(VALUES)))
    return rng.choice(("\n", "\r\n", "\n\n", "")).join(made).encode()


def begin(place: Path, record: bytes) -> None:
    """Plan a run into a folder with such a record and look at every job; no result may lie outside."""
    for name in ("in", "out"):
        (place / name).mkdir(parents=True, exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (2, 2)).save(place / "in" / name)
    (place / "out" / "a.png").write_bytes(b"x" * 70)
    (place / "out" / MANIFEST).write_bytes(record)
    jobs = plan_jobs([place / "in"], place / "out")
    if len({job.output for job in jobs}) < 2:
        raise AssertionError("two pictures have one name")
    for job in jobs:
        if not job.output.resolve().is_relative_to((place / "out").resolve()):
            raise AssertionError(f"{job.output} lies outside")
    with open_manifest(place / "out", SETTINGS) as manifest:
        for job in jobs:
            manifest.state(job)
            manifest.add_failed(job, ValueError("tried"))
