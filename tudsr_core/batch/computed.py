"""The result that is computed and not yet written, in a file of plain numbers: no killed run computes it again.

Plain, because that takes a tenth of the time in which a picture is compressed, and float, because nothing is rounded
then. The file is gone, or is no longer looked at, as soon as the picture's own is in its place.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..pictures import Picture
from ..untrusted import Fields, UntrustedError, parse_json
from .jobs import Job, OpenJob
from .manifest import MAX_LINE, Facts

FILE = ".tudsr-computed"


class Computed:
    """The file of one output folder; `output` names whose result a killed run left, None for nobody's.

    A run that is to make everything anew (`anew`) leaves it alone.
    """

    def __init__(self, folder: Path, anew: bool = False) -> None:
        self.path, self.folder = folder / FILE, folder
        self._head = {} if anew else self._read_head()
        self.output = self._head.get("output")

    def keep(self, job: Job, result: Picture, source: Facts) -> bool:
        """Write a result down; returns whether there was room for it."""
        numbers = np.ascontiguousarray(result.pixels.numpy(), np.float32)
        head = self._describe(job, source, numbers.shape) | {"crc32": zlib.crc32(numbers)}
        try:
            with self.path.open("wb") as file:
                file.write(json.dumps(head).encode("ascii") + b"\n")
                file.write(numbers.data)
        except OSError:
            self.remove()
            return False
        return True

    def take(self, job: Job, opened: OpenJob, source: Facts) -> Picture | None:
        """Return the result that a killed run left of this job, once; None where it is not that, or not whole."""
        head, shape = self._head, (1, opened.picture.pixels.shape[1], *opened.plan.size)
        ours = head and head | self._describe(job, source, shape) == head
        if not ours or not all(path.exists() for path in job.also):
            return None
        self._head = {}
        with self.path.open("rb") as file:
            file.readline(MAX_LINE)
            numbers = np.fromfile(file, np.float32, count=int(np.prod(shape)))
        if zlib.crc32(numbers) != head.get("crc32"):  # also where a part is missing
            return None
        notes = (*opened.picture.notes, "it was computed before; only writing it is left")
        return replace(opened.picture, pixels=torch.from_numpy(numbers.reshape(shape)), notes=notes)

    def remove(self) -> None:
        """There is nothing left to write."""
        self.path.unlink(missing_ok=True)

    def _read_head(self) -> dict:
        try:
            with self.path.open("rb") as file:
                line = file.readline(MAX_LINE).decode("utf-8")
            return dict(Fields(parse_json(line, "the line"), "the line").values)
        except (OSError, UnicodeDecodeError, UntrustedError):
            return {}

    def _describe(self, job: Job, source: Facts, shape: tuple[int, ...]) -> dict:
        name = job.output.relative_to(self.folder).as_posix()
        return {"output": name, "source": str(job.source.absolute()), "facts": list(source), "shape": list(shape)}
