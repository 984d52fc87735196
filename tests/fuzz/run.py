"""Runs fuzz cases, each in a forked child with limits: `python tests/fuzz/run.py --help`.

A case passes when it returns or raises an error of the kind its module calls clear, whose message is
one printable line. It fails on any other exception, on a death, on more than 10 s of CPU or 2 GiB of
memory. The same seed and counts give the same cases.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Cases of the default test run, and of `--all`.
COUNTS = {
    "pictures": (180, 10_300),
    "weights": (70, 3_253),
    "prompts": (100, 1_550),
    "manifests": (150, 1_500),
}
CPU_SECONDS, WALL_SECONDS, MEMORY_BYTES = 10, 900, 2 * 2**30
# The system's stop, far above what is judged: a case that wants this much must not hurt the machine.
MEMORY_STOP_BYTES = 8 * 2**30


@dataclass(frozen=True)
class Outcome:
    """How one case ended: `failure` is None or the reason; `message` is what it said while passing."""

    failure: str | None
    message: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0


def attempt(run: Callable[[], object], clear: tuple[type[BaseException], ...]) -> tuple[str | None, str]:
    """Return `(failure, message)` of calling `run` in this process."""
    try:
        run()
    except clear as error:
        text = str(error)
        if not text or not text.isprintable():
            return f"the message of {type(error).__name__} is not one printable line: {text!r}", ""
        return None, text
    except BaseException:
        return traceback.format_exc(), ""
    return None, ""


def _child(run: Callable[[], object], clear: tuple[type[BaseException], ...], pipe: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_STOP_BYTES, MEMORY_STOP_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    failure, message = attempt(run, clear)
    used = resource.getrusage(resource.RUSAGE_SELF)
    os.write(pipe, json.dumps([failure and failure[-3000:], message[:300], used.ru_maxrss * 1024]).encode())


def run_case(run: Callable[[], object], clear: tuple[type[BaseException], ...]) -> Outcome:
    """Run one case in a child of this process and judge it."""
    start = time.monotonic()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _child(run, clear, writer)
        finally:
            os._exit(0)
    os.close(writer)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(WALL_SECONDS)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    seconds = time.monotonic() - start
    if not answer:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        slow = {signal.SIGXCPU: f"over {CPU_SECONDS} s of CPU", signal.SIGKILL: f"over {WALL_SECONDS} s"}
        return Outcome(slow.get(number, f"the process died with status {status}"), seconds=seconds)
    failure, message, peak = json.loads(answer)
    if not failure and peak > MEMORY_BYTES:
        failure = f"took {peak / 2**30:.1f} GiB"
    return Outcome(failure, message, seconds, peak)


def run_module(name: str, count: int, seed: int, only: str | None = None) -> Iterable[tuple[str, Outcome]]:
    """Yield `(case name, outcome)` of `count` cases of `fuzz.<name>`; with `only`, of the one of that name."""
    module = importlib.import_module(f"fuzz.{name}")
    gc.freeze()  # a child whose collector looks through what was imported here copies all of it
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        for case in module.cases(random.Random(f"{name} {seed}"), Path(folder), count):
            if only in (None, case.name):
                yield case.name, run_case(case.run, module.CLEAR)


def main() -> int:
    """Run the cases that the command line names; returns the exit status, 1 when any case failed."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of untrusted files and texts.")
    parser.add_argument("modules", nargs="*", help=f"of {', '.join(COUNTS)}; default: all")
    parser.add_argument("--all", action="store_true", help="every case instead of the default run's share")
    parser.add_argument("--count", type=int, help="this many cases of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="the one case of this name, to look into a failure")
    options = parser.parse_args()
    if unknown := set(options.modules) - set(COUNTS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(COUNTS)}")
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    # A forked child cannot use threads that its parent started. Torch, where a module imports it, looks here.
    os.environ["OMP_NUM_THREADS"] = "1"
    failed = total = 0
    for name in options.modules or COUNTS:
        count = options.count or COUNTS[name][options.all]
        outcomes = []
        for case, outcome in run_module(name, count, options.seed, options.only):
            outcomes.append(outcome)
            if outcome.failure:
                sys.stdout.write(f"FAILED {name} {case}\n{outcome.failure}\n")
            elif options.only:
                sys.stdout.write(f"passed {name} {case}: {outcome.message or 'no error'}\n")
        bad = sum(outcome.failure is not None for outcome in outcomes)
        said = sum(bool(outcome.message) for outcome in outcomes)
        sys.stdout.write(
            f"{name}: {len(outcomes)} cases, {bad} failed, {said} refused in one line, slowest "
            f"{max((o.seconds for o in outcomes), default=0):.1f} s, "
            f"largest {max((o.peak_bytes for o in outcomes), default=0) / 2**20:.0f} MiB\n"
        )
        failed, total = failed + bad, total + len(outcomes)
    return 1 if failed or not total else 0


if __name__ == "__main__":
    sys.exit(main())
