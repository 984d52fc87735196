"""How everything here is measured: a fresh process each, methods taking turns, medians.

Seconds and CPU seconds are of the work alone. Memory is how far the peak rose above what was there
before: the resident set on a CPU (Linux), the CUDA allocator's count on a GPU.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")
Figures = dict[str, float]


def measure(work: Callable[[], Result], device: str = "cpu") -> tuple[Result, Figures]:
    """Return the work's result and its figures: seconds, cpu, mib."""
    before = _reset_peak(device)
    began, busy = time.perf_counter(), time.process_time()
    result = work()
    wait_for(device)
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    return result, {"seconds": seconds, "cpu": busy, "mib": max(0, _peak(device) - before) / 2**20}


def take_turns(commands: dict[str, list[str]], repeat: int) -> dict[str, Figures]:
    """Run every command `repeat` times in turn; each prints its figures as its last line. Return medians."""
    runs: dict[str, list[Figures]] = {name: [] for name in commands}
    for _ in range(repeat):
        for name, command in commands.items():
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    return {name: medians(all_) for name, all_ in runs.items()}


def medians(runs: list[Figures]) -> Figures:
    """Return the median of every figure."""
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> int:
    wait_for(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _peak(device)


def _peak(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text("utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
