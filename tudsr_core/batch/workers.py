"""What a process does that computes pictures for a run elsewhere; and what such a run sees of it.

Paths travel, or with `ship` the bytes of files, never pixels. No library of clusters is known here.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..atomic_write import complete_or_absent
from ..methods import Target
from ..pictures import Picture, PictureError, encode_picture, refusal
from .jobs import Job, OpenJob, Output, Work, compute, plan_job, read_source
from .ledger import explain
from .settings import Settings

AT_ONCE = 3  # pictures a worker has: one is read, one computed, one written, as in a run of one process

Make = Callable[[], tuple[Work, Callable[[], Settings]]]
"""Loads the model; returns what is done to every picture, and what describes a run."""


class WorkerDied(Exception):
    """The process of a worker is gone, and what it was computing with it."""


@dataclass(frozen=True)
class Ready:
    """What a worker says when it has loaded its model: what runs with it are described by, and do."""

    settings: Settings
    target: Target
    output: Output


@dataclass(frozen=True)
class Order:
    """One picture to compute; the finished file goes to `complete`, a name for this once.

    `data` are the bytes of the source where no disk is shared; then those of the result come back.
    """

    job: Job
    output: Output
    complete: Path
    data: bytes | None = None


@dataclass(frozen=True)
class Made:
    """A picture that a worker has finished: its plan (with a single pixel), the file's digest, seconds in all."""

    opened: OpenJob
    sha256: str
    seconds: float
    data: bytes | None = None


class Worker(Protocol):
    """A process that computes pictures, seen from the run: every answer comes later, or `WorkerDied` does.

    Errors that a picture or a setting explains are answers; what else is raised is a mistake of ours.
    """

    def start(self) -> Future[Ready | Exception]:
        """Load the model."""

    def upscale(self, order: Order) -> Future[Made | Exception]:
        """Compute a picture; up to AT_ONCE may be asked for before the first is done."""

    def stop(self) -> None:
        """End the process, whatever it is doing."""


class Workplace:
    """The inside of a worker: one upscaler, and several calls at once that overlap reading and writing with it."""

    def __init__(self) -> None:
        self._computing = threading.Lock()

    def start(self, make: Make) -> Ready | Exception:
        """Load the model."""
        try:
            self.work, describe = make()
            return Ready(describe(), self.work.target, self.work.output)
        except (ValueError, OSError, MemoryError, ImportError) as error:
            return error

    def upscale(self, order: Order) -> Made | Exception:
        """Read, compute and write one picture; called by AT_ONCE threads."""
        began = time.monotonic()
        try:
            with _at_hand(order) as job:
                opened, result, waited = self._compute(job, order.output)
                data = encode_picture(job.output, result, order.output.quality)
                if order.data is None:
                    _write(order, data)
        except Exception as error:
            explained = explain(error, order.job)
            if explained is error and not isinstance(error, ValueError | OSError | MemoryError):
                raise
            return explained
        facts = Picture(result.pixels[..., :1, :1].clone(), notes=opened.picture.notes)
        told = OpenJob(order.job, facts, opened.plan)
        sent = None if order.data is None else data
        return Made(told, hashlib.sha256(data).hexdigest(), time.monotonic() - began - waited, sent)

    def _compute(self, job: Job, output: Output) -> tuple[OpenJob, Picture, float]:
        picture, upscaler = read_source(job, output), self.work.upscaler_for(job)
        asked = time.monotonic()
        with self._computing:
            waited = time.monotonic() - asked
            opened = plan_job(job, picture, upscaler, self.work.target, output)
            return opened, compute(opened, upscaler), waited


@contextmanager
def _at_hand(order: Order):
    """Yield the job with files that are on this machine; errors name those of the order."""
    if order.data is None:
        yield order.job
        return
    with tempfile.TemporaryDirectory(prefix="tudsr-") as folder:
        job = Job(Path(folder, "in", order.job.source.name), Path(folder, order.job.output.name))
        job.source.parent.mkdir()
        job.source.write_bytes(order.data)
        try:
            yield job
        except PictureError as error:
            text = str(error).replace(str(job.source), str(order.job.source))
            raise type(error)(text.replace(str(job.output), str(order.job.output))) from error


def _write(order: Order, data: bytes) -> None:
    try:
        with complete_or_absent(order.complete):
            order.complete.write_bytes(data)
    except OSError as error:
        raise refusal(order.job.output, error) from error
