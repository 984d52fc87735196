"""What a second run does: skip, redo, retry, refuse; and what of a manifest is believed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import MANIFEST, Job, Output, State, Work, describe_run, open_manifest, plan_jobs, run_jobs
from tudsr_core.batch.manifest import facts, read_history
from tudsr_core.batch.settings import differences
from tudsr_core.cli.batches import Voice
from tudsr_core.methods import Target, UpscaleOptions
from tudsr_core.pictures import PictureError

ROOT = Path(__file__).parents[2]


def draw(path, shade=0):
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """A folder of three pictures and the output folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for shade, name in enumerate("abc"):
        draw(tmp_path / "in" / f"{name}.png", shade)
    return tmp_path


def run(folder, settings=None, force=False):
    """Run the folder; returns what became of its pictures, by kind, and the names of those computed."""
    begun, upscaler = [], Bicubic()
    jobs = plan_jobs([folder / "in"], folder / "out")

    class Ears(Voice):
        def begins(self, number, opened):
            begun.append(opened.job.source.name)

    work = Work(lambda job: upscaler, Target(scale=2), Output(overwrite=force))
    with open_manifest(folder / "out", settings or {"scale": 2}, force) as manifest:
        summary = run_jobs(jobs, work, Ears(len(jobs)), manifest)
    return dict(summary.done) | ({"failed": len(summary.failed)} if summary.failed else {}), begun


def test_done_pictures_are_skipped_changed_ones_redone_failed_ones_retried(folder):
    (folder / "in" / "b.png").write_bytes(b"damaged")
    assert run(folder) == ({"written": 2, "failed": 1}, ["a.png", "c.png"])
    assert run(folder) == ({"done before": 2, "failed": 1}, [])
    draw(folder / "in" / "b.png", 5)
    assert run(folder) == ({"done before": 2, "written": 1}, ["b.png"])
    draw(folder / "in" / "c.png", 77)
    assert run(folder) == ({"done before": 2, "written": 1}, ["c.png"])
    assert Image.open(folder / "out" / "c.png").getpixel((0, 0)) == (77, 0, 0)
    (folder / "out" / "a.png").unlink()
    assert run(folder) == ({"done before": 2, "written": 1}, ["a.png"])
    assert run(folder) == ({"done before": 3}, [])


def test_what_someone_did_to_a_result_is_kept_also_when_its_source_changes(folder):
    run(folder)
    draw(folder / "out" / "a.png", 200)
    edited = (folder / "out" / "a.png").read_bytes()
    draw(folder / "in" / "a.png", 9)
    assert run(folder) == ({"kept": 1, "done before": 2}, [])
    assert (folder / "out" / "a.png").read_bytes() == edited


def test_results_that_were_copied_without_their_times_are_known_by_their_digests(folder):
    run(folder)
    for path in (folder / "out").glob("*.png"):
        os.utime(path, (1, 1))
    assert run(folder) == ({"done before": 3}, [])


def test_other_settings_are_refused_with_the_difference_and_forced_ones_begin_anew(folder):
    run(folder, {"scale": 2, "window": "gaussian"})
    with pytest.raises(PictureError, match=r"other settings \(scale 2, now 4; seed not set, now 1; window gaussian, "):
        run(folder, {"scale": 4, "seed": 1})
    assert run(folder, {"scale": 4}, force=True)[0] == {"written": 3}
    assert run(folder, {"scale": 4}) == ({"done before": 3}, [])
    with pytest.raises(PictureError, match="other settings"):
        run(folder, {"scale": 2, "window": "gaussian"})


def test_a_forced_run_that_was_stopped_goes_on_without_force(folder):
    run(folder)
    with open_manifest(folder / "out", {"scale": 2}, force=True):
        pass
    assert run(folder) == ({"written": 3}, ["a.png", "b.png", "c.png"])


def test_a_line_without_its_file_is_not_believed(folder):
    """A run that was killed between the two leaves the older result, or none."""
    run(folder)
    job = Job(folder / "in" / "a.png", folder / "out" / "a.png")
    draw(folder / "in" / "a.png", 9)
    with open_manifest(folder / "out", {"scale": 2}) as manifest:
        complete = draw(folder / "complete.png", 18)
        manifest.add_written(job, facts(job.source), complete, 0.1)
        assert manifest.state(job) is State.outdated
    assert run(folder) == ({"done before": 2, "written": 1}, ["a.png"])


@pytest.mark.parametrize("cut", [1, 7, 60])
def test_a_half_written_last_line_costs_no_more_than_its_picture(folder, cut, caplog):
    run(folder)
    path = folder / "out" / MANIFEST
    path.write_bytes(path.read_bytes()[:-cut])
    (folder / "out" / "c.png").unlink()
    assert run(folder) == ({"done before": 2, "written": 1}, ["c.png"])
    assert ("unreadable lines are passed over (1)" in caplog.text) == (cut > 1)
    assert run(folder) == ({"done before": 3}, [])


LIES = {
    "outside": {"output": "../a.png"},
    "absolute": {"output": "/tmp/a.png"},
    "size": {"bytes": "many"},
    "time": {"mtime": float("nan")},
    "source": {"source": 5},
    "digest": {"sha256": "x" * 5000},
}


@pytest.mark.parametrize("lie", LIES)
def test_lines_that_lie_are_passed_over(folder, lie):
    path = folder / "out" / MANIFEST
    line = {"source": str(folder / "in" / "a.png"), "bytes": 1, "mtime": 1.0, "output": "a.png"} | LIES[lie]
    path.write_text(json.dumps(line) + "\n[[[[\n\xff\n" + "9" * 300_000 + "\n", encoding="latin-1")
    history = read_history(path)
    assert not history.ended and history.unreadable >= 4
    assert run(folder)[0] == {"written": 3}
    assert sorted(p.name for p in folder.iterdir()) == ["in", "out"]


def test_a_manifest_that_is_no_file_is_refused(folder):
    (folder / "out" / MANIFEST).symlink_to(folder / "elsewhere")
    with pytest.raises(PictureError, match=f"{MANIFEST} is no file of a run"):
        run(folder)
    assert not (folder / "elsewhere").exists()


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(folder):
    names = (".a.4711.part.png", ".other.4711.part.png", ".a.part.png", ".a.4711.part.jpg")
    for name in names:
        (folder / "out" / name).touch()
    run(folder)
    assert sorted(path.name for path in (folder / "out").glob(".*")) == sorted(names[1:])


HOLDER = """
import sys, time
from pathlib import Path
from tudsr_core.batch import open_manifest
with open_manifest(Path(sys.argv[1]), {"scale": 2}):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_one_holds_nothing(folder):
    command = [sys.executable, "-c", HOLDER, str(folder / "out")]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", cwd=ROOT)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(PictureError, match="another run is writing into .*out; wait"):
            run(folder)
        assert not list((folder / "out").glob("*.png"))
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    assert run(folder)[0] == {"written": 3}


def test_a_run_is_described_by_what_changes_pixels(tmp_path):
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "unet" / "weights.bin").write_bytes(b"1")
    small, large = (UpscaleOptions(tile_batch=batch) for batch in (1, 9))
    target = Target(scale=4)
    first = describe_run({"model": model, "stage_two": None}, small, target, Output(), prompt=None)
    assert first == describe_run({"model": model}, large, target, Output(overwrite=True, max_megapixels=5))
    assert first["scale"] == 4 and first["model"].startswith("sha256:") and "stage_two" not in first
    (model / "unet" / "weights.bin").write_bytes(b"2")
    second = describe_run({"model": model}, small, target, Output(bits=16))
    said = differences(first, second)
    assert said.startswith("model sha256:") and said.endswith("...; bits not set, now 16")
    with pytest.raises(PictureError, match="none cannot be read"):
        describe_run({"model": tmp_path / "none"})


def test_state_of_many_pictures_is_asked_quickly(folder):
    """A resumed run of 10,000 pictures must not read them."""
    run(folder)
    jobs = [Job(folder / "in" / "a.png", folder / "out" / "a.png")] * 2000
    with open_manifest(folder / "out", {"scale": 2}) as manifest:
        began = time.monotonic()
        assert {manifest.state(job) for job in jobs} == {State.done}
        assert time.monotonic() - began < 2
