"""Workers on a Ray cluster, or on this machine by way of Ray: one actor per GPU, or per CPU where there is none.

The cluster is trusted: Ray sends Python objects as pickles, so whoever may talk to it may run code on it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager

from ..pictures import PictureError
from .dispatch import START_SECONDS, Crew
from .workers import AT_ONCE, Made, Make, Order, Ready, WorkerDied, Workplace

ANSWER_SECONDS = 5.0


@contextmanager
def ray_crew(address: str, make: Make, count: int, ship: bool = False, gpus: bool = True) -> Iterator[Crew]:
    """Start a worker for every GPU or CPU of the Ray cluster at `address` ("local": this machine), `count` at most.

    CPUs count where there is no GPU, or `gpus` are not to be used. `make` loads the model there. Yields the crew once
    its first worker is ready, and stops what it started. Raises PictureError where nothing answers at `address`,
    ImportError without Ray, and what loading raises.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        _connect(address)
    try:
        resources = ray.cluster_resources()
        kind = "GPU" if gpus and resources.get("GPU", 0) >= 1 else "CPU"
        total = max(1, min(count, int(resources.get(kind, 1))))

        def hire() -> _RayWorker:
            return _RayWorker({"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}, make)

        starting = {worker: worker.start() for worker in (hire() for _ in range(total))}
        try:
            yield Crew(hire, starting, _first_word(list(starting.values())), ship)
        finally:
            for worker in starting:
                worker.stop()
    finally:
        if ours:
            ray.shutdown()


def _connect(address: str) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told that a run was started
    os.environ.setdefault("RAY_worker_niceness", "0")  # of what is started here; as a run of one process has
    remedy, options = "try again when this machine is less busy", dict(configure_logging=False, log_to_driver=False)
    try:
        if address == "local":
            options["include_dashboard"] = False
        else:
            remedy = "give HOST:PORT as `ray start --head` prints it, or local"
            _knock(address)
        ray.init(address=address, **options)
    except Exception as error:  # Ray raises anything here
        reason = " ".join(str(error).split())[:200]
        raise PictureError(f"--ray {address}: no Ray cluster answers there ({reason}); {remedy}") from error


def _knock(address: str) -> None:
    """Raise OSError or ValueError at once where nobody listens: Ray itself would try for a minute."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if address != "auto":
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()


def _first_word(starting: list[Future[Ready | Exception]]) -> Ready:
    """Wait until a worker is ready, or all have failed; raises what the last of them says."""
    waiting = set(starting)
    while waiting:
        done, waiting = wait(waiting, START_SECONDS, FIRST_COMPLETED)
        if not done:
            raise PictureError(f"no Ray worker has started for {START_SECONDS:.0f} s; is the cluster busy with others?")
        for future in done:
            said = future.exception() or future.result()
            if isinstance(said, Ready):
                return said
    if isinstance(said, WorkerDied):
        raise PictureError(f"no Ray worker could be started: {said}")
    raise said


class _RayWorker:
    """An actor: a `Worker`."""

    def __init__(self, resources: dict[str, int], make: Make) -> None:
        import ray

        self.make = make
        self.actor = ray.remote(Workplace).options(max_concurrency=AT_ONCE, **resources).remote()

    def start(self) -> Future[Ready | Exception]:
        return _answer(self.actor.start.remote(self.make))

    def upscale(self, order: Order) -> Future[Made | Exception]:
        return _answer(self.actor.upscale.remote(order))

    def stop(self) -> None:
        import ray

        if ray.is_initialized():
            ray.kill(self.actor)


def _answer(reference) -> Future:  # noqa: ANN001
    """Return what a call of an actor gives, later; the end of the actor is `WorkerDied`."""
    from ray.exceptions import RayError, RayTaskError

    answer: Future = Future()

    def pass_on(done: Future) -> None:
        error = done.exception()
        if error is None:
            answer.set_result(done.result())
        elif isinstance(error, RayError) and not isinstance(error, RayTaskError):
            answer.set_exception(WorkerDied(" ".join(str(error).split())[:200]))
        else:
            answer.set_exception(error)

    reference.future().add_done_callback(pass_on)
    return answer
