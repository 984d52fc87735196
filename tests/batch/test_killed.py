"""`tudsr upscale` killed at random moments, started again until it is through; and its memory over many pictures.

TUDSR_TEST_LONG=1 runs 200 pictures with 20 kills, and 1,000 pictures for the memory.
"""

import json
import os
import random
import re
import time
from collections import Counter

import numpy as np
import psutil
import pytest
from command import start, tudsr
from PIL import Image

LONG = bool(os.environ.get("TUDSR_TEST_LONG"))
PICTURES, KILLS = (200, 20) if LONG else (14, 3)


def make(folder, count, side):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        noise = rng.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{number:04}.png", exif=Image.Exif())
    return folder


def begun(text):
    """Names of the pictures that a run began to compute: those it announced, but what an earlier one had computed."""
    announced = re.findall(r"^\d+ of \d+: .*?([^/]+) -> .*\n((?:  .*\n)*)", text, re.M)
    return [name for name, lines in announced if "it was computed before" not in lines]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tudsr-run.jsonl"}


def test_killed_runs_end_with_the_bytes_of_an_uninterrupted_one(tmp_path):
    source, rng = make(tmp_path / "in", PICTURES, 16), random.Random(1)
    arguments = ["upscale", source, "--scale", 2, "--device", "cpu", "-o"]
    assert tudsr(*arguments, tmp_path / "whole").returncode == 0
    out, files = tmp_path / "out", [tmp_path / "said", tmp_path / "errors"]
    computed, killed = Counter(), 0
    for _ in range(KILLS):
        files[0].write_text("", encoding="utf-8")
        child = start([*arguments, out], files)
        while child.is_alive() and " -> " not in files[0].read_text("utf-8"):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.03 * PICTURES / KILLS))
        child.kill()
        child.join()
        killed += child.exitcode == -9  # else it was through before
        computed.update(begun(files[0].read_text("utf-8")))
        for path in out.glob("[!.]*.png"):
            Image.open(path).load()  # never torn
    assert killed
    last = tudsr(*arguments, out)
    assert last.returncode == 0, last.stderr
    computed.update(begun(last.stdout))
    assert contents(out) == contents(tmp_path / "whole"), "also: no temporary file is left"
    # nothing is computed twice but the picture that a kill interrupted
    assert len(computed) == PICTURES and computed.total() - PICTURES <= killed, computed
    lines = (out / "tudsr-run.jsonl").read_text("utf-8").splitlines()
    assert {json.loads(line)["output"] for line in lines[1:]} == set(contents(out))


def test_two_processes_on_one_folder_end_with_the_right_bytes(tmp_path):
    source, out = make(tmp_path / "in", 6, 16), tmp_path / "out"
    arguments = ["upscale", source, "--scale", 2, "--device", "cpu", "-o"]
    assert tudsr(*arguments, tmp_path / "whole").returncode == 0
    said = [[tmp_path / f"out{number}", tmp_path / f"err{number}"] for number in range(2)]
    children = [start([*arguments, out], files) for files in said]
    for child in children:
        child.join()
    codes = sorted(child.exitcode for child in children)
    errors = "".join(files[1].read_text("utf-8") for files in said)
    # the second came while the first was at it, or after it
    assert codes == [0, 0] or (codes == [0, 1] and "another run is writing into" in errors), errors
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not LONG, reason="takes minutes: set TUDSR_TEST_LONG=1")
def test_memory_stays_flat_over_a_thousand_pictures(tmp_path):
    source, files = make(tmp_path / "in", 1000, 64), [tmp_path / "said", tmp_path / "errors"]
    child = start(["upscale", source, "--scale", 2, "--device", "cpu", "-o", tmp_path / "out"], files)
    process, samples = psutil.Process(child.pid), []
    while child.is_alive():
        done = len(begun(files[0].read_text("utf-8")))
        samples += [(done, process.memory_info().rss)] if done else []
        time.sleep(0.2)
    assert child.exitcode == 0
    first = [rss for done, rss in samples if done <= 333]
    last = [rss for done, rss in samples if done > 667]
    ratio = np.mean(last) / np.mean(first)
    print(f"RSS {np.mean(first) / 2**20:.0f} MiB in the first third, {np.mean(last) / 2**20:.0f} in the last")  # noqa: T201
    assert ratio < 1.05
