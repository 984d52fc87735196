"""Which file becomes which in folders of folders, and where names meet."""

import os
import shutil

import pytest
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import Output, Work, open_manifest, pictures_under, plan_jobs, run_jobs
from tudsr_core.cli.batches import Voice
from tudsr_core.methods import Target


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (3, 2), (shade, 0, 0)).save(path)
    return path


def made(inputs, output, **options):
    return {job.source: job.output.relative_to(output).as_posix() for job in plan_jobs(inputs, output, **options)}


def run(inputs, output, **options):
    """Plan and run a folder with a manifest; returns the summary."""
    output.mkdir(exist_ok=True)
    upscaler = Bicubic()
    jobs = plan_jobs(inputs, output, **options)
    with open_manifest(output, {}) as manifest:
        return run_jobs(jobs, Work(lambda job: upscaler, Target(scale=2), Output()), Voice(len(jobs)), manifest)


def test_nested_folders_are_kept_and_the_output_inside_the_input_is_not_read(tmp_path):
    root, out = tmp_path / "in", tmp_path / "in" / "out"
    paths = [picture(root / name) for name in ("a.png", "x/a.png", "x/y/b.jpg")]
    picture(root / ".thumbnails" / "a.png")
    picture(out / "a.png")
    assert made([root], out, recursive=True) == {path: path.relative_to(root).as_posix() for path in paths}
    assert made([root], out) == {paths[0]: "a.png"}


def test_a_folder_with_pictures_only_inside_says_how_to_read_them(tmp_path):
    picture(tmp_path / "in" / "x" / "a.png")
    with pytest.raises(ValueError, match="holds no pictures .*; --recursive reads more"):
        plan_jobs([tmp_path / "in"], tmp_path / "out")


def test_loops_of_links_end_and_every_folder_is_read_once_under_its_own_name(tmp_path):
    root = tmp_path / "in"
    paths = [picture(root / "b" / "1.png"), picture(root / "c" / "2.png")]
    outside = picture(tmp_path / "elsewhere" / "3.png")
    (root / "a").symlink_to(root / "b")  # sorts before the folder itself
    (root / "b" / "up").symlink_to(root)
    (root / "c" / "nowhere").symlink_to(root / "none")
    (root / "far").symlink_to(outside.parent)
    assert list(pictures_under(root)) == [*paths, root / "far" / "3.png"]


def test_names_that_meet_are_parted_by_rule_and_said_once(tmp_path, caplog):
    root, out = tmp_path / "in", tmp_path / "out"
    for name in ("a.jpg", "a.png", "a.tif", "B.png", "b.webp"):
        picture(root / name)
    other = picture(tmp_path / "more" / "a.png")
    wanted = {
        root / "a.png": "a.png",
        other: "a-2.png",
        root / "a.jpg": "a-jpg.png",
        root / "a.tif": "a-tif.png",
        root / "B.png": "B.png",
        root / "b.webp": "b-webp.png",  # one file with B.png where names have no case
    }
    assert made([root, other.parent], out, suffix=".png") == wanted
    assert len(caplog.records) == 1 and "another picture has the name already" in caplog.text
    assert "and 1 more" in caplog.text


def test_a_name_once_given_stays_and_a_new_picture_gets_another(tmp_path, caplog):
    root, out = tmp_path / "in", tmp_path / "out"
    first = picture(root / "a.jpg")
    assert run([root], out, suffix=".png").done == {"written": 1}
    late = picture(root / "a.png", 9)
    assert made([root], out, suffix=".png") == {first: "a.png", late: "a-2.png"}
    assert run([root], out, suffix=".png").done == {"done before": 1, "written": 1}
    caplog.clear()
    assert run([root], out, suffix=".png").done == {"done before": 2}
    assert not caplog.records, "said once"


def test_another_folder_with_the_same_names_replaces_nothing(tmp_path):
    one, two, out = picture(tmp_path / "one" / "a.png"), picture(tmp_path / "two" / "a.png", 9), tmp_path / "out"
    run([one.parent], out)
    before = (out / "a.png").read_bytes()
    assert run([two.parent], out).done == {"written": 1}
    assert (out / "a.png").read_bytes() == before and (out / "a-2.png").exists()


def test_pictures_that_moved_with_their_folder_are_still_done(tmp_path):
    old, new, out = tmp_path / "old", tmp_path / "new", tmp_path / "out"
    for name in ("a.png", "b.png"):
        picture(old / name)
    run([old], out)
    shutil.move(old, new)
    assert run([new], out).done == {"done before": 2}
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.png", "tudsr-run.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_folder_is_left_out_with_a_warning(tmp_path, caplog):
    path = picture(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "locked").mkdir(mode=0)
    assert list(pictures_under(tmp_path / "in")) == [path]
    assert "locked is left out" in caplog.text
