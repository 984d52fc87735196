"""Runs on a Ray cluster of this machine with two actors: the same bytes and the same record as in one process."""

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from command import tudsr
from PIL import Image
from plain_work import PlainWork

from tudsr_core.batch import open_manifest, plan_jobs, ray_crew, ray_workers, run_jobs, run_on_workers
from tudsr_core.cli.batches import Voice
from tudsr_core.cli.upscaling import Device, prepare
from tudsr_core.pictures import PictureError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster():
    """Yield the address of a cluster of two CPUs."""
    ray = pytest.importorskip("ray", reason="runs on a cluster need Ray: pip install 'comfyui-tudsr[ray]'")
    quiet = dict(configure_logging=False, log_to_driver=False, include_dashboard=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        try:
            ray.init(address="local", num_cpus=2, object_store_memory=2**27, **quiet)
        except Exception as error:  # Ray gives its own processes 30 s to start
            pytest.skip(f"Ray did not start on this machine, which may be too busy: {str(error)[:100]}")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture
def folder(tmp_path):
    """A folder of ten pictures, larger and larger, and one that is none."""
    for name in ("in", "notes"):
        (tmp_path / name).mkdir()
    for shade in range(10):
        Image.radial_gradient("L").resize((16 + shade, 16)).save(tmp_path / "in" / f"{shade}.png")
    (tmp_path / "in" / "bad.png").write_bytes(b"nothing")
    return tmp_path


def on_crew(folder, crew, out):
    jobs = plan_jobs([folder / "in"], folder / out)
    (folder / out).mkdir()
    with open_manifest(folder / out, crew.said.settings) as manifest:
        return run_on_workers(jobs, crew, Voice(len(jobs)), manifest)


def in_one_process(folder, make, out="serial"):
    jobs = plan_jobs([folder / "in"], folder / out)
    (folder / out).mkdir(exist_ok=True)
    work, describe = make()
    with open_manifest(folder / out, describe()) as manifest:
        return run_jobs(jobs, work, Voice(len(jobs)), manifest)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "tudsr-run.jsonl"}


def record(folder):
    """The manifest without seconds and the times of results, its pictures in name order."""
    run, *lines = map(json.loads, (folder / "tudsr-run.jsonl").read_text("utf-8").splitlines())
    for line in lines:
        line["seconds"] = line["output_mtime"] = 0
    return [run, *sorted(lines, key=lambda line: line["source"])]


@pytest.fixture
def one_thread():
    """As many threads as an actor on one CPU has: the last bits of a convolution depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_two_actors_give_the_bytes_and_the_record_of_one_process(cluster, folder, one_thread):
    make = partial(prepare, scale=2, device=Device.cpu)
    one = in_one_process(folder, make)
    with ray_crew("local", make, 2) as crew:
        for out, ship in (("paths", False), ("ship", True)):
            two = on_crew(folder, replace(crew, ship=ship), out)
            assert one.done == two.done == {"written": 10} and [job.source.name for job in two.failed] == ["bad.png"]
            assert files(folder / out) == files(folder / "serial")
            assert record(folder / out) == record(folder / "serial")


def test_the_pictures_of_an_actor_that_is_killed_are_computed_by_others(cluster, folder, caplog):
    make = PlainWork(folder / "notes")
    in_one_process(folder, make)
    for note in (folder / "notes").iterdir():
        note.unlink()
    with ray_crew("local", PlainWork(folder / "notes", deadly=(("5", 1),)), 2) as crew:
        summary = on_crew(folder, crew, "ray")
    assert summary.done == {"written": 10} and "another takes its place" in caplog.text
    assert files(folder / "ray") == files(folder / "serial"), "also: no temporary file is left"
    assert record(folder / "ray") == record(folder / "serial")
    assert len({note.name.split("-")[2] for note in (folder / "notes").iterdir()}) >= 2, "the dead, and who lives"


def test_the_command_goes_on_with_the_run_of_one_process_and_refuses_other_settings(cluster, folder):
    arguments = ["upscale", folder / "in", "-o", folder / "out", "--device", "cpu", "--scale"]
    (folder / "in" / "bad.png").unlink()
    in_one_process(folder, partial(prepare, scale=2.0, device=Device.cpu), "out")
    (folder / "out" / "7.png").unlink()
    again = tudsr(*arguments, 2, "--ray", cluster, "--report", folder / "report.html")
    assert again.returncode == 0, again.stderr
    assert "10 pictures: 9 done before, 1 written" in again.stdout
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("<img ") == 20 and "written, 23 x 16 to 46 x 32" in page
    arguments[1] = folder / "in" / "1.png"
    other = tudsr(*arguments, 3, "--ray", cluster)
    assert other.returncode == 1 and "were made with other settings (scale 2.0, now 3.0)" in other.stderr


def test_an_address_that_does_not_answer_is_one_error():
    pytest.importorskip("ray", reason="runs on a cluster need Ray: pip install 'comfyui-tudsr[ray]'")
    for address in ("127.0.0.1:1", "nowhere", "ray://127.0.0.1:1"):
        with pytest.raises(PictureError, match=rf"--ray {address}: no Ray cluster answers there \(.*; give HOST:PORT"):
            ray_workers._connect(address)
