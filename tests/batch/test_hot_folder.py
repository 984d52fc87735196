"""Pictures that arrive: when they count as complete, and `tudsr watch` from start to Ctrl-C."""

import os
import signal
import time

import pytest
from command import start
from PIL import Image

from tudsr_core.batch import HotFolder


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def hot(tmp_path):
    clock = Clock()
    folder = HotFolder(tmp_path, settle=2.0, clock=clock)

    def look(after):
        clock.now += after
        return sorted(path.name for path in folder.complete())

    return look


def test_a_picture_is_complete_when_it_has_stopped_growing_and_is_given_once(tmp_path, hot):
    (tmp_path / "old.png").write_bytes(b"1")
    assert hot(0) == []
    (tmp_path / "new.png").write_bytes(b"1")
    assert hot(1.0) == []
    (tmp_path / "new.png").write_bytes(b"12")  # still being copied
    assert hot(1.0) == ["old.png"]
    assert hot(1.9) == []
    assert hot(0.1) == ["new.png"]
    assert hot(10) == []


def test_one_that_changes_afterwards_is_given_again(tmp_path, hot):
    path = tmp_path / "a.png"
    path.write_bytes(b"half")
    hot(0)
    assert hot(2) == ["a.png"]
    path.write_bytes(b"the whole")
    assert hot(1) == []
    assert hot(2) == ["a.png"]
    path.unlink()
    assert hot(2) == []
    path.write_bytes(b"the whole")
    os.utime(path, (5, 5))
    hot(0)
    assert hot(2) == ["a.png"]


def test_empty_hidden_and_other_files_are_not_given(tmp_path, hot):
    for name, content in (("empty.png", b""), (".a.png", b"1"), ("notes.txt", b"1"), ("a.png.part", b"1")):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "none")
    hot(0)
    assert hot(5) == []


def test_watch_does_what_arrives_until_it_is_interrupted(tmp_path):
    source, out, files = tmp_path / "in", tmp_path / "out", [tmp_path / "said", tmp_path / "errors"]
    source.mkdir()
    Image.new("RGB", (16, 16), (9, 9, 9)).save(source / "a.png")
    words = ["watch", source, "-o", out, "--scale", 2, "--device", "cpu", "--settle", 0.2, "--recursive"]
    child = start(words, files)

    def until(exists):
        end = time.monotonic() + 60
        while not exists() and child.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        assert exists(), [path.read_text("utf-8") for path in files]

    try:
        until((out / "a.png").exists)
        (source / "b.png").write_bytes(b"no picture")
        (source / "sub").mkdir()
        Image.new("RGB", (16, 16)).save(source / "sub" / "c.png")
        until((out / "sub" / "c.png").exists)
        until(lambda: "b.png: this is not a picture" in files[1].read_text("utf-8"))
        Image.new("RGB", (8, 8)).save(source / "b.png")  # it was half copied
        until((out / "b.png").exists)
    finally:
        os.kill(child.pid, signal.SIGINT)
        child.join()
    assert child.exitcode == 0
    said = files[0].read_text("utf-8")
    assert said.splitlines()[-1] == "stopped; what was computed is written" and said.count("a.png -> ") == 1
