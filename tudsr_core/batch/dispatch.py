"""The run over many pictures on several workers: who gets which, and what happens when one dies.

The books are kept here and nowhere else: the manifest is written, and results get their names, by this process.
The dearest pictures are given out first, each to the worker that has fewest, so that none is alone at the end.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from ..atomic_write import complete_or_absent, temporary_name
from ..methods import Target
from ..pictures import PictureError, check_free, read_size, refusal
from .jobs import Job
from .ledger import Ledger, Listener, Outcome, Summary, Task
from .manifest import Facts, Manifest, facts_or_none
from .settings import differences
from .workers import AT_ONCE, Made, Order, Ready, Worker, WorkerDied

log = logging.getLogger(__name__)

TRIES = 3  # of a picture whose worker dies
LOOK_SECONDS = 0.5  # between looks at whether the run was interrupted
START_SECONDS = 600.0  # to wait for a worker where there is no other


@dataclass
class Crew:
    """The workers of a run: those that were asked to `start`, what the first one `said`, and how to `hire` another."""

    hire: Callable[[], Worker]
    starting: dict[Worker, Future[Ready | Exception]]
    said: Ready
    ship: bool = False


@dataclass(eq=False)
class _Order:
    """A task that is given out: what it costs, how often that was tried, and its source when it was sent."""

    task: Task
    cost: int
    tries: int = 0
    source: Facts = (0, 0.0)
    sent: Order | None = None


def run_on_workers(jobs: Sequence[Job], crew: Crew, listener: Listener, manifest: Manifest | None = None) -> Summary:
    """Have every job that is not done computed by a crew; returns what became of them, as `run_jobs` does.

    A picture whose worker dies is given to others, TRIES times in all, later times alone. The first interrupt lets
    pictures in flight finish and raises KeyboardInterrupt then, a second one does at once.
    """
    return _Dispatch(Ledger(jobs, crew.said.output, listener, manifest), crew).run()


@dataclass
class _Dispatch:
    ledger: Ledger
    crew: Crew
    waiting: deque[_Order] = field(default_factory=deque)
    again: deque[_Order] = field(default_factory=deque)
    ready: dict[Worker, list[_Order]] = field(default_factory=dict)
    unanswered: int = 0
    expected: int = 0
    interrupted: bool = False
    lost: bool = False

    def __post_init__(self) -> None:
        self.events: queue.SimpleQueue[tuple[Callable, tuple, Future]] = queue.SimpleQueue()
        self.numbers = itertools.count(1)

    def run(self) -> Summary:
        self.ledger.clean()
        try:
            with self._drained_when_interrupted():
                orders = [_Order(task, _cost(task.job, self.crew.said.target)) for task in self.ledger.tasks()]
                self.waiting.extend(sorted(orders, key=lambda order: order.cost, reverse=True))
                for worker, future in self.crew.starting.items():
                    self._expect(worker, future)
                self._go()
        finally:
            if self.unanswered:
                for worker in self.crew.starting:
                    worker.stop()
            if self.lost or self.unanswered:
                self.ledger.clean()
            summary = self.ledger.end()
        if self.interrupted:
            raise KeyboardInterrupt
        return summary

    def _go(self) -> None:
        """Give out and take in until nothing is left, or nothing more is to be begun and all is in."""
        told, since = False, time.monotonic()
        while self.unanswered or ((self.waiting or self.again) and not self._ending):
            if self.interrupted and not told:
                told = True
                log.warning("interrupted: %d in flight are finished first; Ctrl-C again ends at once", self.unanswered)
            if not self._ending:
                self._give_out()
            try:
                answer, given, future = self.events.get(timeout=LOOK_SECONDS)
            except queue.Empty:
                if not self.ready and (not self.expected or time.monotonic() - since > START_SECONDS):
                    self.ledger.summary.stopped = PictureError("no worker is left; look at the cluster")
                continue
            since = time.monotonic()
            answer(*given, future)

    @property
    def _ending(self) -> bool:
        return self.interrupted or self.ledger.summary.stopped is not None

    def _when_done(self, future: Future, answer: Callable, *given: object) -> None:
        future.add_done_callback(lambda done: self.events.put((answer, given, done)))

    def _expect(self, worker: Worker, future: Future[Ready | Exception]) -> None:
        self.expected += 1
        self._when_done(future, self._started, worker)

    def _give_out(self) -> None:
        """Give pictures to whoever has room; one that a worker has died of is computed alone."""
        while self.ready:
            worker = min(self.ready, key=lambda worker: _load(self.ready[worker]))
            load = _load(self.ready[worker])
            if self.again and not load:
                self._send(worker, self.again.popleft())
            elif self.waiting and load < AT_ONCE:
                self._send(worker, self.waiting.popleft())
            else:
                return

    def _send(self, worker: Worker, order: _Order) -> None:
        task = order.task
        job = Job(task.job.source.absolute(), task.job.output.absolute(), task.job.also)
        try:
            if self.ledger.manifest:
                job.output.parent.mkdir(parents=True, exist_ok=True)
            order.source = facts_or_none(job.source)
            data = job.source.read_bytes() if self.crew.ship else None
        except OSError as error:
            return self.ledger.fail(task, error)
        order.tries += 1
        order.sent = Order(job, task.output, temporary_name(job.output, next(self.numbers)), data)
        self.ready[worker].append(order)
        self.unanswered += 1
        self._when_done(worker.upscale(order.sent), self._finished, worker, order)

    def _started(self, worker: Worker, future: Future[Ready | Exception]) -> None:
        self.expected -= 1
        said = future.exception() or future.result()
        if isinstance(said, WorkerDied):
            return log.warning("a worker died while it was starting: %s", said)
        if isinstance(said, Ready) and said.settings == self.crew.said.settings:
            self.ready[worker] = []
            return None
        why = said if isinstance(said, BaseException) else differences(self.crew.said.settings, said.settings)
        return log.warning("a worker is left out, since it would make other pictures: %s", why)

    def _finished(self, worker: Worker, order: _Order, future: Future[Made | Exception]) -> None:
        self.unanswered -= 1
        made = future.exception() or future.result()
        if isinstance(made, WorkerDied):
            return self._died(worker, order, made)
        if worker in self.ready:
            self.ready[worker].remove(order)
        if isinstance(made, Exception):
            return self.ledger.fail(order.task, made)
        try:
            self._put_in_place(order, made)
        except (OSError, PictureError) as error:
            order.sent.complete.unlink(missing_ok=True)
            known = error if isinstance(error, PictureError) else refusal(order.task.job.output, error)
            return self.ledger.fail(order.task, known)
        opened = replace(made.opened, job=order.task.job)
        self.ledger.listener.begins(order.task.number, opened)
        return self.ledger.wrote(order.task, Outcome(opened, None, made.seconds))

    def _put_in_place(self, order: _Order, made: Made) -> None:
        job, complete = order.task.job, order.sent.complete
        check_free(job.output, order.task.output.overwrite)
        if made.data is not None:
            with complete_or_absent(complete):
                complete.write_bytes(made.data)
        if self.ledger.manifest:
            self.ledger.manifest.add_written(job, order.source, complete, made.seconds, made.sha256)
        os.replace(complete, job.output)

    def _died(self, worker: Worker, order: _Order, why: WorkerDied) -> None:
        self.lost = True
        if self.ready.pop(worker, None) is not None and not self._ending:
            log.warning("a worker died (%s); another takes its place", why)
            another = self.crew.hire()
            self.crew.starting[another] = future = another.start()
            self._expect(another, future)
        if order.tries < TRIES:
            self.again.append(order)
        else:
            source = order.task.job.source
            self.ledger.fail(order.task, PictureError(f"{source}: {TRIES} workers died computing it ({why})"))

    @contextmanager
    def _drained_when_interrupted(self) -> Iterator[None]:
        def interrupt(number: int, frame: object) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        if threading.current_thread() is not threading.main_thread():  # only the main one gets signals
            yield
            return
        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _load(orders: Sequence[_Order]) -> int:
    return AT_ONCE if any(order.tries > 1 for order in orders) else len(orders)


def _cost(job: Job, target: Target) -> int:
    """Return the pixels of a job's result, 0 for what cannot be read."""
    try:
        return math.prod(target.size_for(read_size(job.source)))
    except (ValueError, ZeroDivisionError):
        return 0
