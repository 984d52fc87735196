"""The run over many pictures: what overlaps, what stops it, and that nothing is lost."""

import errno
import shutil
import threading
import time
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import Output, Work, open_manifest, pipeline, plan_jobs, run_jobs
from tudsr_core.cli.batches import Voice
from tudsr_core.methods import Target


@pytest.fixture
def folder(tmp_path):
    """A folder of eight pictures and the output folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for shade in range(8):
        Image.new("RGB", (3, 2), (shade, 0, 0)).save(tmp_path / "in" / f"{shade}.png")
    return tmp_path


def run(folder, before=lambda number: None, output=None):
    jobs, upscaler = plan_jobs([folder / "in"], folder / "out"), Bicubic(before)
    work = Work(lambda job: upscaler, Target(scale=2), output or Output())
    with open_manifest(folder / "out", {}) as manifest:
        return run_jobs(jobs, work, Voice(len(jobs)), manifest)


def test_reading_and_writing_overlap_with_computing(folder, monkeypatch):
    """Reads and writes of 0.1 s each cost nothing beside pictures that take 0.15 s."""
    threads = {}

    def slowly(name, call):
        def slow(*given, **options):
            threads.setdefault(name, set()).add(threading.current_thread().name)
            time.sleep(0.1)
            return call(*given, **options)

        return slow

    monkeypatch.setattr(pipeline, "read_source", slowly("read", pipeline.read_source))
    monkeypatch.setattr(pipeline, "write_result", slowly("write", pipeline.write_result))
    began = time.monotonic()
    assert run(folder, lambda number: time.sleep(0.15)).done == {"written": 8}
    assert time.monotonic() - began < 8 * 0.15 + 0.9, "one after the other it would be 2.8 s"
    assert all(len(names) == 1 and "MainThread" not in names for names in threads.values())


def test_at_most_two_decoded_pictures_wait_and_none_stays(folder, monkeypatch):
    alive, most, lock = weakref.WeakSet(), [], threading.Lock()
    read = pipeline.read_source

    def counted(*given):
        picture = read(*given)
        with lock:
            alive.add(picture.pixels)
        return picture

    def before(number):
        time.sleep(0.03)  # readers get as far ahead as they may
        with lock:
            most.append(len(alive))

    monkeypatch.setattr(pipeline, "read_source", counted)
    run(folder, before)
    # the one that is computed, two that wait, and the one whose result is being written
    assert max(most) <= 4
    assert len(alive) == 0


def test_what_an_interrupted_run_wrote_beside_a_picture_is_not_in_its_way(folder):
    """Nor may a file that somebody else put there be lost."""
    jobs = plan_jobs([folder / "in"], folder / "out")
    jobs = [replace(job, also=(job.output.with_suffix(".json"),)) for job in jobs]

    def go(stop_at=None):
        def upscaler_for(job):
            def before(number):
                job.also[0].write_text(job.source.stem, encoding="utf-8")
                if job.source.stem == stop_at:
                    raise KeyboardInterrupt

            return Bicubic(before)

        with open_manifest(folder / "out", {}) as manifest:
            return run_jobs(jobs, Work(upscaler_for, Target(scale=2)), Voice(len(jobs)), manifest)

    foreign = folder / "out" / "6.json"
    foreign.write_text("mine", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        go("3")
    assert (folder / "out" / "3.json").exists() and not (folder / "out" / "3.png").exists()
    summary = go()
    assert summary.done == {"done before": 3, "written": 4} and [job.source.stem for job in summary.failed] == ["6"]
    assert foreign.read_text("utf-8") == "mine"
    (folder / "out" / "3.json").write_text("changed by hand", encoding="utf-8")
    (folder / "out" / "3.png").unlink()
    assert [job.source.stem for job in go().failed] == ["3", "6"]


def test_a_result_that_is_computed_is_written_though_the_next_picture_is_interrupted(folder, monkeypatch):
    write = pipeline.write_result

    def slowly(*given):
        time.sleep(0.2)
        write(*given)

    def before(number):
        if number == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "write_result", slowly)
    with pytest.raises(KeyboardInterrupt):
        run(folder, before)
    assert sorted(path.name for path in (folder / "out").glob("*.png")) == ["0.png", "1.png"]
    assert run(folder).done == {"done before": 2, "written": 6}


def kill(folder, monkeypatch):
    """Run the folder, and leave what a kill leaves while picture 3 is computed and 2 is being written."""
    write, blocked, killed = pipeline.write_result, threading.Event(), folder / "killed"

    def slowly(job, *given):
        if job.source.name == "1.png":
            blocked.wait(10)
        write(job, *given)

    def before(number):
        if number == 3:
            shutil.copytree(folder / "out", killed)
            blocked.set()

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_result", slowly)
        assert run(folder, before).done == {"written": 8}
    shutil.rmtree(folder / "out")
    killed.rename(folder / "out")


def test_a_killed_run_computes_nothing_again_but_the_picture_in_flight(folder, monkeypatch, capfd):
    again = []
    kill(folder, monkeypatch)
    assert run(folder, again.append).done == {"done before": 1, "written": 7}
    assert len(again) == 6 and "it was computed before; only writing it is left" in capfd.readouterr().out
    assert [Image.open(folder / "out" / f"{shade}.png").getpixel((1, 1))[0] for shade in range(8)] == list(range(8))
    assert not list((folder / "out").glob(".*"))


@pytest.mark.parametrize("damage", ["short", "changed", "no head", "other source", "force"])
def test_what_a_killed_run_computed_is_used_only_if_it_is_whole_and_of_this_picture(folder, monkeypatch, damage):
    kill(folder, monkeypatch)
    path, again = folder / "out" / ".tudsr-computed", []
    data = path.read_bytes()
    if damage == "other source":
        Image.new("RGB", (3, 2), (100, 0, 0)).save(folder / "in" / "1.png")
    kept = {"short": data[:-1], "changed": data[:-1] + b"\xff", "no head": b"[]" + data}
    path.write_bytes(kept.get(damage, data))
    if damage == "force":
        assert run(folder, again.append, Output(overwrite=True)).done == {"written": 8} and len(again) == 8
        return
    assert run(folder, again.append).done == {"done before": 1, "written": 7} and len(again) == 7
    shade = 100 if damage == "other source" else 1
    assert Image.open(folder / "out" / "1.png").getpixel((1, 1))[0] == shade


def test_a_full_disk_stops_the_run_with_what_is_left(folder, monkeypatch, capfd):
    from tudsr_core.pictures import writing

    def full(*given):
        raise OSError(errno.ENOSPC, "No space left on device")

    encode, written = writing._encode, []

    def until_full(file, kind, picture, quality, size):
        if picture.size == (4, 6):  # not the trial of metadata, which is one pixel
            written.append(1)
            if len(written) >= 3:
                full()
        encode(file, kind, picture, quality, size)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_encode", until_full)
        summary = run(folder)
    assert summary.done == {"written": 2} and summary.left == 6 and not summary.failed
    assert "there is no room left on the disk" in str(summary.stopped)
    said = capfd.readouterr()
    assert said.err.count("error: ") == 1
    assert "2 written, 6 not begun or not finished, in 0 s; the same command goes on" in said.out
    assert run(folder).done == {"done before": 2, "written": 6}
    assert not list((folder / "out").glob(".*"))


def test_a_disk_without_room_for_the_record_gives_no_result_either(folder, monkeypatch):
    jobs, upscaler = plan_jobs([folder / "in"], folder / "out"), Bicubic()
    with open_manifest(folder / "out", {}) as manifest:
        before = (folder / "out" / "tudsr-run.jsonl").read_bytes()

        class Full:
            """A file with room for ten bytes more."""

            def __init__(self, file):
                self.file, self.fileno = file, file.fileno

            def write(self, line):
                return self.file.write(line[:10])

        monkeypatch.setattr(manifest, "_file", Full(manifest._file))
        summary = run_jobs(jobs, Work(lambda job: upscaler, Target(scale=2)), Voice(len(jobs)), manifest)
    assert summary.stopped and summary.left == 8
    assert (folder / "out" / "tudsr-run.jsonl").read_bytes() == before
    assert [path.name for path in (folder / "out").iterdir()] == ["tudsr-run.jsonl"]


@pytest.mark.parametrize(
    "error",
    [ValueError("the picture contains NaN"), OSError(errno.EIO, "Input/output error"), torch.OutOfMemoryError("x")],
)
def test_no_failure_stops_the_rest_and_each_names_its_picture(folder, error, capfd):
    def before(number):
        if number in (2, 5):
            raise error

    summary = run(folder, before)
    assert summary.done == {"written": 6} and [job.source.name for job in summary.failed] == ["1.png", "4.png"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and "1.png" in lines[0] and "4.png" in lines[1]
    assert run(folder).done == {"done before": 6, "written": 2}
