"""What becomes of a run's pictures: which are to be done, how each ended, who is told. Nothing is computed here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..atomic_write import remove_leftovers
from ..methods import Tick
from ..missing_packages import needs
from ..pictures import NoRoomError, Picture, PictureError
from .jobs import Job, OpenJob, Output
from .manifest import Manifest, State


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
    """One picture of a run that was written: the source as read, the result, and the seconds it took in all.

    Where it was computed elsewhere, `result` is None, and of the source's pixels there is one.
    """

    opened: OpenJob
    result: Picture | None
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
class Task:
    """A job that is to be done, its number from 1, and how its result is written."""

    number: int
    job: Job
    output: Output


class Ledger:
    """The books of one run, kept by one thread: the sums, what failed, and what the listener hears."""

    def __init__(self, jobs: Sequence[Job], output: Output, listener: Listener, manifest: Manifest | None) -> None:
        self.jobs, self.output, self.listener, self.manifest = jobs, output, listener, manifest
        self.summary = Summary(len(jobs))
        self._began = time.monotonic()

    def clean(self) -> None:
        """Remove what killed processes left of these jobs: whoever wrote it is dead, the manifest is held by us."""
        if self.manifest:
            remove_leftovers(path for job in self.jobs for path in (job.output, *job.also))

    def tasks(self, first: str | None = None) -> Iterator[Task]:
        """Yield what there is to do, the job whose output is named `first` before all others.

        What needs nothing is counted and told when its turn comes.
        """
        numbered = list(enumerate(self.jobs, 1))
        if first is not None and self.manifest:
            numbered.sort(key=lambda pair: self.manifest.name(pair[1]) != first)
        for number, job in numbered:
            if (output := self._output_of(number, job)) is not None:
                yield Task(number, job, output)

    def _output_of(self, number: int, job: Job) -> Output | None:
        """Return how a job is written, None for one that needs nothing."""
        if self.manifest is None or self.output.overwrite:
            return self.output
        state = self.manifest.state(job)
        if state in (State.done, State.foreign):
            self.summary.done["done before" if state is State.done else "kept"] += 1
            self.listener.left(number, job, state)
            return None
        return replace(self.output, overwrite=state is State.outdated or self.manifest.has_begun(job))

    def wrote(self, task: Task, outcome: Outcome) -> None:
        """A result is in its place."""
        self.summary.done["written"] += 1
        self.listener.wrote(task.number, outcome)

    def fail(self, task: Task, error: Exception) -> None:
        """A picture has no result; a full disk is no failure of it, but ends the run."""
        if isinstance(error, NoRoomError):
            self.summary.stopped = error
            return
        explained = explain(error, task.job)
        if explained is error and not isinstance(error, ValueError | OSError | MemoryError):
            self.summary.mistake = self.summary.mistake or error
        self.summary.failed.append(task.job)
        if self.manifest:
            with suppress(OSError):  # what is not noted is tried again all the same
                self.manifest.add_failed(task.job, explained)
        self.listener.failed(task.number, task.job, explained)

    def end(self) -> Summary:
        """The run is over; returns its sums."""
        self.summary.seconds = time.monotonic() - self._began
        self.listener.ended(self.summary)
        return self.summary


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
