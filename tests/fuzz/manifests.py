"""Records of output folders, and what killed runs left in them, damaged in any way or written by someone else.

A run is planned and begun on them.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from tudsr_core.batch import MANIFEST, Job, OpenJob, open_manifest, plan_jobs
from tudsr_core.batch.computed import FILE, Computed
from tudsr_core.batch.unfinished import unfinished
from tudsr_core.pictures import Picture, PictureError

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
    """Yield `count` cases: bytes of a sound record damaged, and lines with values of any kind; so of what was left."""
    for number in range(count):
        place = folder / str(number)
        make = damaged if number % 2 else forged
        if number % 4 < 2:
            yield Case(f"{make.__name__} {number}", partial(begin, place, make(rng, lines(place))))
        else:
            left = [make(rng, part(place)) for part in (computed, journal)]
            yield Case(f"left, {make.__name__} {number}", partial(go_on, place, *left))


def lines(place: Path) -> list[dict]:
    """Return what a run over two pictures writes."""
    record = {"bytes": 70, "mtime": 1.5, "output_bytes": 70, "output_mtime": 2.5, "sha256": "0" * 64, "seconds": 0.1}
    made = [record | {"source": str(place / "in" / name), "output": name} for name in ("a.png", "b.png")]
    return [
        {"run": SETTINGS},
        {"begins": "a.png"},
        *made,
        {"source": "x", "bytes": 0, "mtime": 0, "output": "c.png", "error": "none"},
    ]


def computed(place: Path) -> list[dict]:
    """Return the head of a result that was computed and not written."""
    job = job_in(place)
    head = {"output": "a.png", "source": str(job.source), "facts": [4, 1.0], "shape": [1, 3, 4, 4]}
    return [head | {"crc32": zlib.crc32(bytes(192))}]


def journal(place: Path) -> list[dict]:
    """Return what was noted of a large result."""
    bands = [{"end": 40 * (band + 1), "sizes": [15, 25], "crc32": zlib.crc32(bytes(40))} for band in range(1, 4)]
    return [{"run": SETTINGS}, *bands]


def job_in(place: Path) -> Job:
    """Return the job that a killed run had computed."""
    return Job(place / "in" / "a.png", place / "out" / "a.png")


def damaged(rng: random.Random, sound: list[dict]) -> bytes:
    """Return a sound record with damaged bytes."""
    data = bytearray("".join(json.dumps(line) + "\n" for line in sound).encode())
    return bytes(rng.choice((flip_bits, damage_head, truncate, grow))(rng, data))


def forged(rng: random.Random, sound: list[dict]) -> bytes:
    """Return lines of which some fields have other values, or are missing."""
    made = []
    for line in sound * rng.randint(1, 3):
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


class Plan(NamedTuple):
    """A plan of nothing but the result's size."""

    size: tuple[int, int]


def go_on(place: Path, head: bytes, noted: bytes) -> None:
    """Take up what killed runs left: a result is taken whole or not at all, and bands are those that were noted."""
    out = place / "out"
    out.mkdir(parents=True, exist_ok=True)
    (out / FILE).write_bytes(head + bytes(192))
    (out / ".big.unfinished.jsonl").write_bytes(noted)
    (out / ".big.unfinished.tif").write_bytes(bytes(160))
    left = Computed(out)
    taken = left.take(job_in(place), OpenJob(job_in(place), Picture(torch.ones(1, 3, 2, 2)), Plan((4, 4))), (4, 1.0))
    if taken and not (taken.size == (4, 4) and torch.equal(taken.pixels, torch.zeros(1, 3, 4, 4))):
        raise AssertionError("another result than was kept")
    with unfinished(out / "big.tif", SETTINGS) as part:
        if any(sum(map(len, tiles)) > 160 or any(map(any, tiles)) for tiles in part):
            raise AssertionError("bands that were never written")
        part.add([b"more"])
