"""The run over many pictures: the next ones are read and the last one is written while one is computed.

At most AHEAD decoded pictures wait, and one result is being written; one failure never stops the rest.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..atomic_write import remove_leftovers
from ..methods import Tick
from ..missing_packages import needs
from ..pictures import NoRoomError, Picture, PictureError
from .jobs import Job, OpenJob, Output, Work, compute, plan_job, read_source, write_result
from .manifest import Facts, Manifest, State, facts

AHEAD = 2


@dataclass
class Summary:
    """How a run ended. `done` counts what became of pictures; `failed` are those with an error.

    `stopped` is why the run ended before its last picture; `mistake` is the first error that no input explains.
    """

    total: int
    done: Counter[str] = field(default_factory=Counter)
    failed: list[Job] = field(default_factory=list)
    seconds: float = 0.0
    stopped: Exception | None = None
    mistake: Exception | None = None

    @property
    def left(self) -> int:
        """Pictures that were not begun, or not finished."""
        return self.total - self.done.total() - len(self.failed)


@dataclass(frozen=True)
class Outcome:
    """One picture of a run that was written: the source as read, the result, and the seconds it took in all."""

    opened: OpenJob
    result: Picture
    seconds: float


class Listener(Protocol):
    """Whoever shows a run; `number` counts pictures from 1. Every call comes from the thread that runs it."""

    def left(self, number: int, job: Job, state: State) -> None:
        """A picture needs nothing: it is done, or a file of its name is there that no run wrote."""

    def begins(self, number: int, opened: OpenJob) -> Tick | None:
        """A picture is about to be computed; returns what counts its tiles."""

    def wrote(self, number: int, outcome: Outcome) -> None:
        """A result is in its place."""

    def failed(self, number: int, job: Job, error: Exception) -> None:
        """A picture has no result; `error` names it."""

    def ended(self, summary: Summary) -> None:
        """The run is over, also where it was interrupted."""


class Together:
    """Several listeners as one; tiles are counted by the first that wants to."""

    def __init__(self, *listeners: Listener) -> None:
        self.listeners = listeners

    def begins(self, number: int, opened: OpenJob) -> Tick | None:
        """Tell all; returns the first counter of tiles."""
        answers = [listener.begins(number, opened) for listener in self.listeners]
        return next((tick for tick in answers if tick), None)

    def left(self, number: int, job: Job, state: State) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.left(number, job, state)

    def wrote(self, number: int, outcome: Outcome) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.wrote(number, outcome)

    def failed(self, number: int, job: Job, error: Exception) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.failed(number, job, error)

    def ended(self, summary: Summary) -> None:
        """Tell all."""
        for listener in self.listeners:
            listener.ended(summary)


@dataclass(frozen=True)
class _Item:
    """A job under way, how it is written, and its picture with what its file was when it was read."""

    number: int
    job: Job
    output: Output
    read: Future[tuple[Facts, Picture, float]]


def run_jobs(
    jobs: Sequence[Job],
    work: Work,
    listener: Listener,
    manifest: Manifest | None = None,
    cancels: tuple[type[BaseException], ...] = (),
) -> Summary:
    """Read, compute and write every job that is not done; returns what became of them.

    Without a manifest nothing counts as done. KeyboardInterrupt, whatever else is no Exception, and `cancels` end
    the run at once; a result that is computed is written before they go on.
    """
    return _Run(jobs, work, listener, manifest, cancels).run()


class _Run:
    def __init__(
        self,
        jobs: Sequence[Job],
        work: Work,
        listener: Listener,
        manifest: Manifest | None,
        cancels: tuple[type[BaseException], ...],
    ) -> None:
        self.jobs, self.work, self.listener, self.manifest = jobs, work, listener, manifest
        self.cancels = cancels
        self.summary = Summary(len(jobs))
        self.readers, self.writers = ThreadPoolExecutor(1, "reading"), ThreadPoolExecutor(1, "writing")
        self.writing: deque[tuple[_Item, OpenJob, Picture, Future[float]]] = deque()

    def run(self) -> Summary:
        began = time.monotonic()
        if self.manifest:  # whoever wrote them is dead: the manifest is held by one process
            remove_leftovers(path for job in self.jobs for path in (job.output, *job.also))
        try:
            for item in self._items():
                self._do(item)
                if self.summary.stopped:
                    break
        finally:
            self.readers.shutdown(cancel_futures=True)
            self._settle(0)
            self.writers.shutdown()
            self.summary.seconds = time.monotonic() - began
            self.listener.ended(self.summary)
        return self.summary

    def _items(self) -> Iterator[_Item]:
        """Yield what there is to do; the pictures of the next ones are being read meanwhile."""
        waiting: deque[_Item] = deque()
        for number, job in enumerate(self.jobs, 1):
            output = self._output_of(number, job)
            if output is None:
                continue
            waiting.append(_Item(number, job, output, self.readers.submit(_read, job, output)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()

    def _output_of(self, number: int, job: Job) -> Output | None:
        """Return how a job is written, None for one that needs nothing."""
        output = self.work.output
        if self.manifest is None or output.overwrite:
            return output
        state = self.manifest.state(job)
        if state in (State.done, State.foreign):
            self.summary.done["done before" if state is State.done else "kept"] += 1
            self.listener.left(number, job, state)
            return None
        return replace(output, overwrite=state is State.outdated)

    def _do(self, item: _Item) -> None:
        began = time.monotonic()
        try:
            source, picture, seconds = item.read.result()
            if self.manifest:
                item.job.output.parent.mkdir(parents=True, exist_ok=True)
            upscaler = self.work.upscaler_for(item.job)
            opened = plan_job(item.job, picture, upscaler, self.work.target, item.output)
            result = compute(opened, upscaler, self.listener.begins(item.number, opened))
        except self.cancels:
            raise
        except Exception as error:
            self._fail(item, error)
            return
        seconds += time.monotonic() - began
        self.writing.append((item, opened, result, self.writers.submit(self._write, item, result, source, seconds)))
        self._settle(1)

    def _write(self, item: _Item, result: Picture, source: Facts, seconds: float) -> float:
        began = time.monotonic()

        def note(complete) -> None:
            if self.manifest:
                self.manifest.add_written(item.job, source, complete, seconds + time.monotonic() - began)

        write_result(item.job, result, item.output, note)
        return seconds + time.monotonic() - began

    def _settle(self, leave: int) -> None:
        """Wait until all results but the last `leave` are in their places, and tell."""
        while len(self.writing) > leave:
            item, opened, result, written = self.writing[0]
            try:
                seconds = written.result()
            except Exception as error:
                self._fail(item, error)
            else:
                self.summary.done["written"] += 1
                self.listener.wrote(item.number, Outcome(opened, result, seconds))
            self.writing.popleft()  # not before: an interrupt while waiting must find it here

    def _fail(self, item: _Item, error: Exception) -> None:
        if isinstance(error, NoRoomError):
            self.summary.stopped = error
            return
        explained = explain(error, item.job)
        if explained is error and not isinstance(error, ValueError | OSError | MemoryError):
            self.summary.mistake = self.summary.mistake or error
        self.summary.failed.append(item.job)
        if self.manifest:
            with suppress(OSError):  # what is not noted is tried again all the same
                self.manifest.add_failed(item.job, explained)
        self.listener.failed(item.number, item.job, explained)


def _read(job: Job, output: Output) -> tuple[Facts, Picture, float]:
    began = time.monotonic()
    try:
        source = facts(job.source)
    except OSError:
        source = (0, 0.0)  # reading says what is wrong
    return source, read_source(job, output), time.monotonic() - began


def explain(error: Exception, job: Job) -> Exception:
    """Return an error that names the job's picture in place of one that does not; a mistake of ours as it is."""
    out_of_memory = "OutOfMemoryError" in type(error).__name__ or "allocate memory" in str(error)
    if out_of_memory or isinstance(error, MemoryError):
        return MemoryError(f"{job.source} needs more memory than there is")
    if isinstance(error, ImportError):
        return PictureError(f"{job.source} {needs(error)}")
    if isinstance(error, ValueError | OSError) and job.source.name not in str(error):
        return PictureError(f"{job.source}: {error}")
    return error
