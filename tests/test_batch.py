"""Which file becomes which, and what a run over many files says."""

import io

import pytest
import torch
import typer
from PIL import Image
from plain_upscaler import Bicubic
from rich.console import Console

from tudsr_core.batch import Job, Output, Work, open_job, plan_jobs
from tudsr_core.cli import console
from tudsr_core.cli.batches import run_command
from tudsr_core.methods import Target
from tudsr_core.pictures.files import PictureError


@pytest.fixture
def folder(tmp_path):
    """A folder of two pictures, and what killed runs, macOS and hidden folders leave beside them."""
    made = tmp_path / "in"
    made.mkdir()
    for name in ("b.png", "a.jpg", ".a.4711.part.png", "._a.jpg", ".hidden.tif"):
        Image.new("RGB", (4, 4)).save(made / name)
    (made / "notes.txt").touch()
    (made / "folder.png").mkdir()
    return made


def test_a_folder_gives_its_pictures_without_leftovers_and_hidden_files(folder, tmp_path):
    jobs = plan_jobs([folder], tmp_path / "out")
    assert [job.source.name for job in jobs] == ["a.jpg", "b.png"]
    assert plan_jobs([folder / ".hidden.tif"], tmp_path / "out")[0].source.name == ".hidden.tif"
    (folder / "c.png").symlink_to(folder / "nowhere.png")
    assert [job.source.name for job in plan_jobs([folder], tmp_path / "out")] == ["a.jpg", "b.png", "c.png"]
    for name in ("a.jpg", "b.png", "c.png"):
        (folder / name).unlink()
    with pytest.raises(PictureError, match="holds no pictures .* hidden files are not read"):
        plan_jobs([folder], tmp_path / "out")


@pytest.mark.parametrize(
    ("output", "suffix", "inputs", "says"),
    [
        ("typo.gif", None, ["b.png"], r"pictures of type \.gif are not written; use \.png"),
        ("typo.pgn", None, ["b.png"], r"type \.pgn are not written"),
        ("typo.jp2", None, ["b.png", "a.jpg"], r"type \.jp2 are not written"),
        ("x.png", ".jpg", ["b.png"], "is no JPEG file, which --format asks for"),
        ("x.png", None, [""], "is a folder; give a folder: -o .*/x$"),
        ("x.png", None, ["a.jpg", "b.png"], "there are several inputs; give a folder"),
        ("there.png", None, [""], "is a folder; give a folder: -o .*/there$"),
        ("there", None, [""], "is a file, not a folder; choose another name with -o"),
        ("there", None, ["b.png"], "is a file, not a folder"),
    ],
)
def test_outputs_that_cannot_be_are_refused_with_the_remedy(folder, tmp_path, output, suffix, inputs, says):
    for name in ("there", "there.png"):
        (tmp_path / name).touch()
    with pytest.raises(PictureError, match=says):
        plan_jobs([folder / name for name in inputs], tmp_path / output, suffix)


@pytest.mark.parametrize(
    ("output", "suffix", "made"),
    [
        ("x.png", ".png", "x.png"),
        ("x.jpeg", ".jpg", "x.jpeg"),
        ("v1.2", None, "v1.2/b.png"),
        ("made.gif", None, "made.gif/b.png"),
        ("new", ".webp", "new/b.webp"),
    ],
)
def test_outputs_that_can_be(folder, tmp_path, output, suffix, made):
    (tmp_path / "made.gif").mkdir()
    assert plan_jobs([folder / "b.png"], tmp_path / output, suffix) == [Job(folder / "b.png", tmp_path / made)]


@pytest.fixture
def printed(monkeypatch):
    """Consoles that keep what is printed, as files would get it."""
    kept = {name: Console(file=io.StringIO(), soft_wrap=True, highlight=False) for name in ("out", "err")}
    for name, made in kept.items():
        monkeypatch.setattr(console, name, made)
    return lambda name: kept[name].file.getvalue()


def run(tmp_path, names, before=lambda number: None, settings=None, **options):
    """Run jobs over small pictures into `out`; returns the exit code. Names with "bad" are no pictures."""
    for index, name in enumerate(names):
        path = tmp_path / name
        if not path.exists():
            path.write_bytes(b"x") if "bad" in name else Image.new("RGB", (2, 2), (index, 0, 0)).save(path)
    jobs = [Job(tmp_path / name, tmp_path / "out" / name) for name in names]
    (tmp_path / "out").mkdir(exist_ok=True)
    upscaler = Bicubic(before)
    work = Work(lambda job: upscaler, Target(scale=2), Output(overwrite=options.pop("overwrite", False)))
    try:
        run_command(jobs, tmp_path / "out", work, lambda: settings or {"scale": 2}, **options)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def test_a_run_counts_its_pictures_and_sums_up(tmp_path, printed):
    names = [f"{index}.png" for index in range(10)]
    assert run(tmp_path, [*names[:3], "bad.png", "bad2.png", *names[3:]]) == 1
    said = printed("out")
    assert f"12 of 12: {tmp_path / '9.png'} -> " in said
    assert said.splitlines()[-1] == "12 pictures: 10 written, 2 failed (bad.png, bad2.png), in 0 s"
    first, second = printed("err").splitlines()
    assert first.startswith(f"error: {tmp_path / 'bad.png'}: this is not a picture")
    assert second.startswith(f"error: {tmp_path / 'bad2.png'}: this is not a picture")


def test_files_that_no_run_wrote_are_kept_without_an_error(tmp_path, printed):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    assert run(tmp_path, ["a.png", "b.png", "c.png"]) == 0
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"
    assert f"1 of 3: {tmp_path / 'out' / 'a.png'} is there already and kept" in printed("out")
    last = printed("out").splitlines()[-1]
    assert last == "3 pictures: 1 kept, 2 written, in 0 s; --force replaces what is there"
    assert printed("err") == ""
    assert run(tmp_path, ["a.png", "b.png", "c.png"], overwrite=True) == 0
    assert Image.open(tmp_path / "out" / "a.png").size == (4, 4)


def test_one_picture_is_not_counted_and_a_dry_run_writes_nothing(tmp_path, printed):
    run(tmp_path, ["a.png"])
    assert "1 of 1" not in printed("out") and "pictures:" not in printed("out")
    assert run(tmp_path, ["b.png", "bad.png", "c.png"], dry_run=True) == 1
    assert printed("out").splitlines()[-1] == "3 pictures: 2 planned, 1 failed"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "tudsr-run.jsonl"]


def raising(error, at=1):
    def before(number):
        if number == at:
            raise error

    return before


def test_an_interrupt_sums_up_too_and_loses_nothing_that_was_computed(tmp_path, printed):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ["a.png", "b.png", "c.png"], raising(KeyboardInterrupt(), 2))
    last = printed("out").splitlines()[-1]
    assert last.startswith("3 pictures: 1 written, 2 not begun or not finished, in 0 s; the same command goes on")
    assert run(tmp_path, ["a.png", "b.png", "c.png"]) == 0
    assert printed("out").splitlines()[-1] == "3 pictures: 1 done before, 2 written, in 0 s"


@pytest.mark.parametrize("error", [MemoryError, torch.OutOfMemoryError, RuntimeError])
def test_a_picture_too_large_for_the_memory_does_not_end_the_run(tmp_path, printed, error):
    assert run(tmp_path, ["a.png", "b.png"], raising(error("DefaultCPUAllocator: can't allocate memory"))) == 1
    assert printed("err") == f"error: {tmp_path / 'a.png'} needs more memory than there is\n"
    assert "2 pictures: 1 failed" not in printed("out")
    assert "2 pictures: 1 written, 1 failed (a.png)" in printed("out")


def test_our_own_mistakes_are_not_hidden_and_do_not_end_the_run(tmp_path, printed):
    with pytest.raises(RuntimeError, match="a slip"):
        run(tmp_path, ["a.png", "b.png"], raising(RuntimeError("a slip")))
    assert "2 pictures: 1 written, 1 failed (a.png)" in printed("out")


def test_names_and_messages_cannot_command_the_terminal(tmp_path, printed):
    run(tmp_path, ["a\x1b[31m\r\u202e[red].png", "b.png"], raising(ValueError("\x1b]0;b.png\n\x07"), 2))
    said = printed("out") + printed("err")
    assert "\\x1b[31m" in said and "[red].png" in said
    assert all(line.isprintable() for line in said.splitlines())


def test_what_is_written_beside_a_picture_is_not_replaced_either(folder, tmp_path):
    beside = tmp_path / "a.prompts.json"
    beside.touch()
    with pytest.raises(PictureError, match=r"a\.prompts\.json already exists"):
        open_job(Job(folder / "a.jpg", tmp_path / "a.png", (beside,)), None, None, Output())
