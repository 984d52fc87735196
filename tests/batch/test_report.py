"""The page about a run."""

import re

import pytest
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import Output, Report, Together, Work, open_manifest, plan_jobs, run_jobs
from tudsr_core.batch import report as module
from tudsr_core.cli.batches import Voice
from tudsr_core.methods import Target
from tudsr_core.pictures import PictureError


@pytest.fixture
def folder(tmp_path):
    """Two pictures, one of a name that is HTML, and a file that is none."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    Image.new("RGBA", (30, 20), (255, 0, 0, 128)).save(tmp_path / "in" / "<img src=x onerror=alert(1)>.png")
    Image.new("RGB", (400, 300), (0, 0, 255)).save(tmp_path / "in" / "b.png")
    (tmp_path / "in" / "c.png").write_bytes(b"no picture")
    return tmp_path


def run(folder, before=lambda number: None):
    """Run the folder; returns the page."""
    jobs, upscaler = plan_jobs([folder / "in"], folder / "out"), Bicubic(before)
    settings = {"scale": 2, "prompt": "</table><script>"}
    with open_manifest(folder / "out", settings) as manifest:
        report = Report(jobs, settings, manifest)
        try:
            work = Work(lambda job: upscaler, Target(scale=2), Output())
            run_jobs(jobs, work, Together(Voice(len(jobs)), report), manifest)
        finally:
            report.write(folder / "report.html")
    return (folder / "report.html").read_text("utf-8")


def test_the_page_has_pictures_seconds_errors_and_settings_and_needs_nothing_else(folder):
    page = run(folder)
    assert re.search(r"3 pictures: 2 written, 1 failed; \d+ s", page)
    assert len(re.findall(r"<img alt='' src='data:image/jpeg;base64,", page)) == page.count("<img ") == 4
    assert "written, 400 x 300 to 800 x 600" in page and "written, 30 x 20 to 60 x 40" in page
    assert page.count("<tr class='failed'>") == 1 and "c.png: this is not a picture" in page
    assert "&lt;img src=x onerror=alert(1)&gt;" in page and "&lt;/table&gt;&lt;script&gt;" in page
    assert "<script" not in page and "http" not in page


def test_a_run_that_goes_on_shows_what_was_done_before(folder):
    run(folder)
    page = run(folder)
    assert "3 pictures: 2 done before, 1 failed" in page and page.count("<img ") == 4
    assert len(re.findall(r"<td class='number'>\d+\.\d</td>", page)) == 2


def test_an_interrupted_run_has_its_page_too(folder):
    def before(number):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, before)
    page = (folder / "report.html").read_text("utf-8")
    assert "3 pictures: 1 written, 2 not finished" in page


def test_small_pictures_are_limited_and_rows_are_not(folder, monkeypatch):
    monkeypatch.setattr(module, "MAX_SHOWN", 1)
    page = run(folder)
    assert page.count("<img ") == 2 and page.count("<td class='name'>") == 2 + 3  # two settings


def test_a_page_that_cannot_be_written_is_one_error(folder):
    report = Report([], {})
    with pytest.raises(PictureError, match="report .* was not written"):
        report.write(folder / "none" / "report.html")
