"""The run over many pictures in one process: the next are read and the last is written while one is computed.

At most AHEAD decoded pictures wait, and one result is being written; one failure never stops the rest.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

from ..pictures import Picture
from .computed import Computed
from .jobs import Job, OpenJob, Work, compute, plan_job, read_source, write_result
from .ledger import Ledger, Listener, Outcome, Summary, Task
from .manifest import Facts, Manifest, facts_or_none

AHEAD = 2


@dataclass(frozen=True)
class _Reading:
    """A task, and its picture with what its file was when it was read."""

    task: Task
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
    return _Run(work, Ledger(jobs, work.output, listener, manifest), cancels).run()


class _Run:
    def __init__(self, work: Work, ledger: Ledger, cancels: tuple[type[BaseException], ...]) -> None:
        self.work, self.ledger, self.cancels = work, ledger, cancels
        self.manifest = ledger.manifest
        self.computed = Computed(self.manifest.folder, work.output.overwrite) if self.manifest else None
        self.readers, self.writers = ThreadPoolExecutor(1, "reading"), ThreadPoolExecutor(1, "writing")
        self.writing: deque[tuple[Task, OpenJob, Picture, Future[float]]] = deque()

    def run(self) -> Summary:
        self.ledger.clean()
        try:
            for reading in self._readings():
                self._do(reading)
                if self.ledger.summary.stopped:
                    break
        finally:
            self.readers.shutdown(cancel_futures=True)
            self._settle(0)
            self.writers.shutdown()
            if self.computed:
                self.computed.remove()
            self.ledger.end()
        return self.ledger.summary

    def _readings(self) -> Iterator[_Reading]:
        """Yield what there is to do; the pictures of the next ones are being read meanwhile."""
        waiting: deque[_Reading] = deque()
        for task in self.ledger.tasks(first=self.computed and self.computed.output):
            waiting.append(_Reading(task, self.readers.submit(_read, task)))
            if len(waiting) > AHEAD:
                yield waiting.popleft()
        yield from waiting

    def _do(self, reading: _Reading) -> None:
        began, task = time.monotonic(), reading.task
        try:
            source, picture, seconds = reading.read.result()
            if self.manifest:
                task.job.output.parent.mkdir(parents=True, exist_ok=True)
            upscaler = self.work.upscaler_for(task.job)
            opened = plan_job(task.job, picture, upscaler, self.work.target, task.output)
            result = self.computed and self.computed.take(task.job, opened, source)
            if result:
                opened = replace(opened, picture=replace(opened.picture, notes=result.notes))
            if self.manifest:
                self.manifest.begin_job(task.job)
            tick = self.ledger.listener.begins(task.number, opened)
            result = result or compute(opened, upscaler, tick)
        except self.cancels:
            raise
        except Exception as error:
            self.ledger.fail(task, error)
            return
        seconds += time.monotonic() - began
        written = self.writers.submit(self._write, task, result, source, seconds)
        self.writing.append((task, opened, result, written))
        self._settle(1)
        # Before the next picture is begun: killed from here on, no run computes this one again.
        if self.computed and not written.done() and not self.computed.keep(task.job, result, source):
            self._settle(0)

    def _write(self, task: Task, result: Picture, source: Facts, seconds: float) -> float:
        began = time.monotonic()

        def note(complete) -> None:
            if self.manifest:
                self.manifest.add_written(task.job, source, complete, seconds + time.monotonic() - began)

        write_result(task.job, result, task.output, note)
        return seconds + time.monotonic() - began

    def _settle(self, leave: int) -> None:
        """Wait until all results but the last `leave` are in their places, and tell."""
        while len(self.writing) > leave:
            task, opened, result, written = self.writing[0]
            try:
                seconds = written.result()
            except Exception as error:
                self.ledger.fail(task, error)
            else:
                self.ledger.wrote(task, Outcome(opened, result, seconds))
            self.writing.popleft()  # not before: an interrupt while waiting must find it here


def _read(task: Task) -> tuple[Facts, Picture, float]:
    began = time.monotonic()
    source = facts_or_none(task.job.source)
    return source, read_source(task.job, task.output), time.monotonic() - began
