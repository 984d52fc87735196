"""The benchmark measures what it says: its reference computes the same picture, its table has every row."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tudsr_core.backends.local import load_embedded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale

BENCH = Path(__file__).parent.parent / "bench"
CAN_MEASURE = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the benchmark resets the peak of memory in Linux's /proc"
)


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("bench_speed", BENCH / "speed.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("factor", [4, 8])
def test_plain_reference_gives_our_picture_where_one_tile_is_enough(speed, factor):
    model, image = load_embedded("cpu"), speed.picture(24)
    ours = upscale(image, model, Target(scale=factor), UpscaleOptions(color_fix="none"))
    assert (speed.plain(model, image, factor) - ours).abs().max() < 1e-5


@CAN_MEASURE
def test_table_has_a_measured_row_for_every_method(speed):
    command = [sys.executable, str(BENCH / "speed.py"), "--sizes", "16x4", "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["16 to 64", method] for method in speed.METHODS]
    assert all(float(cell) >= 0 for row in rows for cell in row[2:])


@CAN_MEASURE
def test_peak_memory_is_what_the_work_took(speed):
    _, figures = speed.measure(lambda: torch.ones(256 * 2**20 // 4).sum())
    assert 200 < figures["mib"] < 300, figures
