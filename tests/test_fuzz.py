"""The default share of the fuzz cases; `python tests/fuzz/run.py --all` runs every one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("resource", reason="the fuzz cases are limited by POSIX resource limits")

from fuzz.run import COUNTS, ROOT, run_case
from fuzz.weight_files import write

RUN = Path(__file__).parent / "fuzz" / "run.py"


class Clear(Exception):
    pass


@pytest.mark.parametrize("name", COUNTS)
def test_untrusted_input_gets_a_result_or_one_clear_line(name):
    command = [sys.executable, str(RUN), name]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert f"{name}: {COUNTS[name][0]} cases, 0 failed" in done.stdout


def test_the_same_content_is_written_as_the_same_bytes(tmp_path):
    # Mutants are cut from these bytes: were they in another order every time, a seed would not repeat a failure.
    tree = {"tensors": {"a": torch.zeros(2)}, "metadata": {f"key {i}": "\x1b é" for i in range(20)}}
    first, second = (write(tmp_path / f"{name}.safetensors", tree).read_bytes() for name in "ab")
    assert first == second
    assert load_file(tmp_path / "a.safetensors")["a"].tolist() == [0, 0]


def _clear(text):
    def run():
        raise Clear(text)

    return run


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda: 1 / 0, "ZeroDivisionError"),
        (_clear("two\nlines"), "not one printable line"),
        (_clear("a\x1b[31mred key"), "not one printable line"),
        (lambda: os._exit(3), "died"),
        (lambda: len(bytearray(b"x") * 2**31) and None, "GiB"),
    ],
)
def test_the_driver_notices(run, reason):
    assert reason in run_case(run, (Clear,)).failure


def test_the_driver_lets_results_and_clear_lines_pass():
    assert run_case(lambda: 5, (Clear,)).failure is None
    assert run_case(_clear("a.png is damaged"), (Clear,)).message == "a.png is damaged"
