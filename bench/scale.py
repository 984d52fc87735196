"""What a picture costs a run on many workers beside its computing, and how far one driver reaches.

    python bench/scale.py --part driver       # each step of the driver's own work on a picture
    python bench/scale.py --part messages     # what travels through Ray, and how fast with nothing to compute
    python bench/scale.py --part workers      # the real driver and 10 to 1,000 workers that sleep
    python bench/scale.py --part clock        # the same without Ray's messages, where two cores are too few for them
    python bench/scale.py --part model        # the same by events alone, from the driver's measured milliseconds
    python bench/scale.py --part ratio        # pictures per second: one actor against one process, equal threads
    python bench/scale.py --part kept         # writing down results that are not written yet, which kills do not cost

Sleeping workers are tasks of two asynchronous Ray actors, which stand for half of them each: the driver, Ray's messages
and the files are real, only computing is slept through.
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import os
import pickle
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image

from tudsr_core.batch import MANIFEST, Job, Output, open_manifest, plan_jobs, ray_crew, run_jobs, run_on_workers
from tudsr_core.batch.computed import Computed
from tudsr_core.batch.dispatch import Crew
from tudsr_core.batch.jobs import OpenJob
from tudsr_core.batch.manifest import facts, read_history
from tudsr_core.batch.ray_workers import _answer
from tudsr_core.batch.workers import AT_ONCE, Made, Order, Ready
from tudsr_core.methods import Target
from tudsr_core.pictures import Picture, read_size, write_picture

SLEPT = 2.0  # mean seconds of a sleeping worker's picture
# Seconds of a folder's pictures over their mean: the deciles that `--part ratio` measured on a busy machine.
SPREAD = (0.44, 0.56, 0.68, 0.80, 0.87, 1.03, 1.23, 1.42, 1.84)


class Silent:
    """Hears a run, says nothing, and notes when each picture was written and what it took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def left(self, number, job, state): ...

    def begins(self, number, opened): ...

    def wrote(self, number, outcome):
        self.seconds.append(outcome.seconds)

    def failed(self, number, job, error):
        raise error

    def ended(self, summary): ...


def make_pictures(folder: Path, count: int, side: int) -> Path:
    """Write PNG pictures of noise over a slope, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, slope = np.random.default_rng(0), np.linspace(0, 200, side)[:, None, None]
    for number in range(count):
        noise = rng.integers(0, 56, (side, side, 3))
        Image.fromarray((slope + noise).astype(np.uint8)).save(folder / f"{number:06}.png")
    return folder


def seconds(call: Callable[[], object], repeat: int) -> tuple[float, float]:
    """Return the median seconds of a call, and those of this process's CPU."""
    times = []
    for _ in range(repeat):
        began, busy = time.perf_counter(), time.process_time()
        call()
        times.append((time.perf_counter() - began, time.process_time() - busy))
    return tuple(map(statistics.median, zip(*times, strict=True)))


def say(*lines: str) -> None:
    """Print lines at once."""
    print(*lines, sep="\n", flush=True)  # noqa: T201


def rows(heads: str, table: Iterator[tuple]) -> None:
    """Print a table in Markdown."""
    say(heads, "|---" * heads.count(" | ") + "|---|")
    for row in table:
        say("| " + " | ".join(map(str, row)) + " |")


def driver(root: Path, count: int) -> None:
    """Each step of the driver's work, and its memory."""
    source = make_pictures(root / "in", 1, 512) / "000000.png"
    made = root / "made.png"
    write_picture(made, Picture(torch.rand(1, 3, 2048, 2048)))
    out = root / "out"
    out.mkdir()
    numbers = itertools.count()
    jobs = iter([Job(source, out / f"{number}.png") for number in range(10 * count)])
    with open_manifest(out, {}) as manifest:

        def note() -> None:
            manifest.add_written(next(jobs), facts(source), made, 1.0, "0" * 64)

        def rename() -> None:
            os.link(made, out / "a.part.png")
            os.replace(out / "a.part.png", out / f"{next(numbers)}.png")

        def receive() -> None:
            with (root / "received").open("wb") as file:
                file.write(data)
                os.fsync(file.fileno())

        data = made.read_bytes()
        megabytes = len(data) / 1e6
        steps = {
            "look at the header (pixels, for the order)": lambda: read_size(source),
            "ask what there is of a new picture": lambda: manifest.state(Job(source, out / "new.png")),
            "source's size and time": lambda: facts(source),
            "manifest line, on the disk": note,
            "rename (with a link before it)": rename,
            f"--ship: read a source of {source.stat().st_size / 1e6:.1f} MB": source.read_bytes,
            f"--ship: write a result of {megabytes:.1f} MB, on the disk": receive,
        }
        measured = ((name, seconds(call, count)) for name, call in steps.items())
        table = ((name, f"{took * 1e3:.3f}", f"{busy * 1e3:.3f}") for name, (took, busy) in measured)
        rows("| driver's step | ms a picture | of them CPU |", table)
    line, many = (out / MANIFEST).read_bytes().splitlines(keepends=True)[-1], 20_000
    record = out / "long.jsonl"
    record.write_bytes(b"".join(line.replace(b"/in/", b"/in/%d" % number) for number in range(many)))
    _, busy = seconds(lambda: read_history(record), 3)
    say(f"\nmanifest: {len(line)} bytes a picture, read again in {busy / many * 1e6:.0f} us of CPU a picture")


class Sleeper:
    """Many workers in one asynchronous actor: each computes one picture at a time, and has AT_ONCE."""

    def __init__(self, template: str) -> None:
        self.template, self.locks, self.lines = template, {}, None

    async def upscale(self, worker: int, order: Order, takes: float, told: OpenJob) -> Made:
        lock = self.locks.setdefault(worker, asyncio.Lock())
        async with lock:
            await asyncio.sleep(takes)
        os.link(self.template, order.complete)
        return Made(told, "0" * 64, takes)


class Clock:
    """The same without Ray: one thread of this process that answers when the time has come."""

    def __init__(self, template: str) -> None:
        self.template, self.free, self.due, self.changed = template, {}, [], threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def upscale(self, worker: int, order: Order, takes: float, told: OpenJob) -> Future:
        with self.changed:
            self.free[worker] = max(time.monotonic(), self.free.get(worker, 0.0)) + takes
            answer: Future = Future()
            heapq.heappush(self.due, (self.free[worker], id(answer), answer, order, Made(told, "0" * 64, takes)))
            self.changed.notify()
        return answer

    def _run(self) -> None:
        while True:
            with self.changed:
                while not self.due or self.due[0][0] > time.monotonic():
                    self.changed.wait(self.due[0][0] - time.monotonic() if self.due else None)
                _, _, answer, order, made = heapq.heappop(self.due)
            os.link(self.template, order.complete)
            answer.set_result(made)


class SleepingWorker:
    """One of the workers of a Sleeper, or of a Clock: a `Worker`."""

    def __init__(self, actor, number: int, takes: Iterator[float], told: OpenJob) -> None:
        self.actor, self.number, self.takes, self.told = actor, number, takes, told

    def start(self) -> Future:
        ready: Future = Future()
        ready.set_result(Ready({}, Target(scale=4.0), Output()))
        return ready

    def upscale(self, order: Order) -> Future:
        given = self.number, order, next(self.takes), self.told
        return (
            self.actor.upscale(*given) if isinstance(self.actor, Clock) else _answer(self.actor.upscale.remote(*given))
        )

    def stop(self) -> None: ...


@contextmanager
def cluster(cpus: int = 2):
    """Yield Ray, started for all parts that follow; a busy machine needs several tries."""
    import ray

    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parent)])
    quiet = dict(include_dashboard=False, log_to_driver=False, configure_logging=False)
    for left in range(4, -1, -1):
        if ray.is_initialized():
            break
        try:
            ray.init(address="local", num_cpus=cpus, **quiet)
        except Exception:  # Ray gives its own processes 30 s
            if not left:
                raise
            ray.shutdown()
    yield ray


def _told(source: Path) -> OpenJob:
    """What a worker really says of a picture: the embedded model's plan for x4."""
    from tudsr_core import load_embedded
    from tudsr_core.methods import TwoStage

    plan = TwoStage(load_embedded("cpu")).plan((512, 512), Target(scale=4.0))
    return OpenJob(Job(source, source), Picture(torch.zeros(1, 3, 1, 1)), plan)


def workers(root: Path, counts: list[int], each: int, with_ray: bool) -> None:
    """Pictures per second and how busy the workers were, for more and more of them."""
    source = make_pictures(root / "in", 1, 512) / "000000.png"
    told = _told(source)

    def table(ray) -> Iterator[tuple]:
        for count in counts:
            out = root / f"out-{count}"
            out.mkdir()
            jobs = [Job(source, out / f"{number}.png") for number in range(count * each)]
            if ray:
                actors = [ray.remote(Sleeper).options(max_concurrency=4000).remote(str(source)) for _ in range(2)]
            else:
                actors = [Clock(str(source))] * 2
            rng = np.random.default_rng(0)
            takes = iter((rng.choice(SPREAD, 2 * len(jobs)) * SLEPT).tolist())
            team = [SleepingWorker(actors[number % 2], number, takes, told) for number in range(count)]
            crew = Crew(lambda team=team: team[0], {one: one.start() for one in team}, team[0].start().result())
            silent, busy = Silent(), time.process_time()
            with open_manifest(out, {}) as manifest:
                summary = run_on_workers(jobs, crew, silent, manifest)
            busy = time.process_time() - busy
            took, slept = summary.seconds, sum(silent.seconds)
            wanted = count / SLEPT
            yield (
                count, len(jobs), f"{took:.1f}", f"{wanted:.0f}", f"{len(jobs) / took:.0f}",
                f"{slept / count / took:.0%}", f"{busy / len(jobs) * 1e3:.2f}",
            )  # fmt: skip

    with cluster() if with_ray else nullcontext() as ray:
        heads = "| workers | pictures | seconds | wanted pictures / s | got | workers busy | driver CPU ms / picture |"
        rows(heads, table(ray))


def model(counts: list[int], each: int, driver_ms: float) -> None:
    """The same by events alone: one driver that takes `driver_ms` a picture, workers as they are."""

    def simulate(count: int) -> tuple[float, float]:
        rng, busy, driver_free, now = np.random.default_rng(0), 0.0, 0.0, 0.0
        left, have = count * each - count * AT_ONCE, [AT_ONCE] * count
        events: list[tuple[float, int, bool]] = []

        def begin(worker: int, at: float) -> None:
            nonlocal busy
            takes = float(rng.choice(SPREAD)) * SLEPT
            busy += takes
            heapq.heappush(events, (at + takes, worker, True))

        for worker in range(count):
            begin(worker, worker * driver_ms / 1e3)
        while events:
            now, worker, finished = heapq.heappop(events)
            if finished:  # the driver books it, and sends another order when it has
                have[worker] -= 1
                if have[worker]:
                    begin(worker, now)
                driver_free = max(driver_free, now) + driver_ms / 1e3
                heapq.heappush(events, (driver_free, worker, False))
            elif left > 0:
                left -= 1
                have[worker] += 1
                if have[worker] == 1:
                    begin(worker, now)
        return count * each / now, busy / count / now

    def table() -> Iterator[tuple]:
        for count in counts:
            rate, busy = simulate(count)
            yield count, f"{count / SLEPT:.0f}", f"{rate:.0f}", f"{busy:.0%}"

    say(f"the driver takes {driver_ms:g} ms a picture; {each} pictures a worker")
    rows("| workers | wanted pictures / s | got | workers busy |", table())


def messages(root: Path, count: int) -> None:
    """Bytes and calls through Ray, with nothing to compute."""
    source = make_pictures(root / "in", 1, 512) / "000000.png"
    told, data = _told(source), source.read_bytes()
    order, shipped = Order(told.job, Output(), source), Order(told.job, Output(), source, data)
    made = Made(told, "0" * 64, 1.0)
    say(
        f"bytes of an order {len(pickle.dumps(order))}, of an answer {len(pickle.dumps(made))}",
        f"with --ship {len(pickle.dumps(shipped))} for a source of {len(data)}",
    )
    with cluster() as ray:

        class Idle:
            def upscale(self, order, made):
                return made

        actors = [ray.remote(Idle).remote() for _ in range(2)]
        ray.get([actor.upscale.remote(order, made) for actor in actors])
        before = ray.available_resources().get("object_store_memory", 0)
        began, busy = time.perf_counter(), time.process_time()
        waiting = [_answer(actors[number % 2].upscale.remote(order, made)) for number in range(count)]
        for answer in waiting:
            answer.result()
        took, busy = time.perf_counter() - began, time.process_time() - busy
        held = before - ray.available_resources().get("object_store_memory", 0)
        rate, cpu = count / took, busy / count * 1e3
        say(
            f"{count} calls in {took:.2f} s: {rate:.0f} a second, {cpu:.2f} ms of the driver's CPU each",
            f"object store: {held:.0f} bytes more than before",
        )


def ratio(root: Path, count: int, side: int, repeat: int) -> None:
    """Pictures per second in one process and through one actor, in turns; each has one thread."""
    from tudsr_core.cli.upscaling import Device, prepare

    torch.set_num_threads(1)
    folder, make = make_pictures(root / "in", count, side), partial(prepare, scale=4.0, device=Device.cpu)
    work, _ = make()
    got: dict[str, list[float]] = {"process": [], "actor": []}
    cpu: dict[str, list[float]] = {"process": [], "actor": []}
    spread: list[float] = []

    def busy(crew: Crew | None) -> float:
        """CPU seconds of whoever computes."""
        if crew is None:
            return time.process_time()
        import ray

        (worker,) = crew.starting
        return ray.get(worker.actor.__ray_call__.remote(lambda self: time.process_time()))

    def one(kind: str, number: int, crew: Crew | None) -> None:
        out, silent = root / f"{kind}-{number}", Silent()
        out.mkdir()
        jobs = plan_jobs([folder], out)
        with open_manifest(out, {}) as manifest:
            run, before = partial(run_on_workers, jobs, crew) if crew else partial(run_jobs, jobs, work), busy(crew)
            summary = run(silent, manifest)
        if number:  # the first of each only warms up
            got[kind].append(count / summary.seconds)
            cpu[kind].append((busy(crew) - before) / count)
            spread.extend(silent.seconds)

    with cluster(), ray_crew("local", make, 1) as crew:
        for number in range(repeat + 1):
            one("process", number, None)
            one("actor", number, crew)
    for kind, rates in got.items():
        say(f"{kind}: {statistics.median(rates):.2f} pictures / s ({', '.join(f'{rate:.2f}' for rate in rates)})")
    pairs = [a / p for a, p in zip(got["actor"], got["process"], strict=True)]
    median, (least, most) = statistics.median(pairs), (min(pairs), max(pairs))
    say(f"actor / process: {median:.3f} (median of {len(pairs)} pairs, {least:.3f} to {most:.3f})")
    seconds_each = {kind: statistics.median(values) for kind, values in cpu.items()}
    say(f"CPU seconds a picture: process {seconds_each['process']:.3f}, actor {seconds_each['actor']:.3f}")
    mean = statistics.mean(spread)
    deciles = statistics.quantiles([value / mean for value in spread], n=10)
    say("seconds over their mean, deciles: " + ", ".join(f"{value:.2f}" for value in deciles))


def kept(root: Path, repeat: int) -> None:
    """Seconds to write a result down plainly, against those to write its file: what a strict order would wait for."""
    job, source = Job(root / "in.png", root / "out.png"), (1, 1.0)
    computed = Computed(root)

    def table() -> Iterator[tuple]:
        for side in (256, 1024, 2048):
            y, x = torch.meshgrid(torch.linspace(0, 9, side), torch.linspace(0, 7, side), indexing="ij")
            pixels = ((x * y).sin() * 0.4 + 0.5)[None, None].repeat(1, 3, 1, 1)
            result = Picture((pixels + 0.02 * torch.rand(1, 3, side, side)).clamp(0, 1))
            plain = seconds(lambda result=result: computed.keep(job, result, source), repeat)
            png = seconds(lambda result=result: write_picture(job.output, result, overwrite=True), repeat)
            cells = (f"{value * 1e3:.0f}" for value in (*plain, *png))
            yield f"{side} x {side}", *cells, f"{plain[1] / png[1]:.3f}"

    rows("| result | kept plainly, ms | of them CPU | written as PNG, ms | of them CPU | CPU ratio |", table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("driver", "messages", "workers", "clock", "model", "ratio", "kept")
    parser.add_argument("--part", required=True, nargs="+", choices=parts)
    parser.add_argument("--count", type=int, default=300, help="calls that are measured")
    parser.add_argument("--pictures", type=int, default=40, help="of --part ratio")
    parser.add_argument("--workers", type=int, nargs="+", default=[10, 100, 300, 1000])
    parser.add_argument("--each", type=int, default=12, help="pictures a sleeping worker gets")
    parser.add_argument("--driver-ms", type=float, default=4.0, help="of --part model")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    calls = {
        "driver": lambda root: driver(root, args.count),
        "messages": lambda root: messages(root, args.count),
        "workers": lambda root: workers(root, args.workers, args.each, True),
        "clock": lambda root: workers(root, args.workers, args.each, False),
        "model": lambda root: model(args.workers, args.each, args.driver_ms),
        "ratio": lambda root: ratio(root, args.pictures, args.side, args.repeat),
        "kept": lambda root: kept(root, args.repeat),
    }
    for part in args.part:
        with tempfile.TemporaryDirectory() as folder:
            say(f"\n{part}\n")
            calls[part](Path(folder).absolute())


if __name__ == "__main__":
    main()
