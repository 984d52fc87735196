"""The page of `tudsr compare`, written, and used in a real browser."""

import json
import re

import browser
import pytest
import torch
from command import tudsr

from tudsr_core.evaluation.compare_page import figures_of, write_page
from tudsr_core.evaluation.metrics import psnr_y, ssim_y
from tudsr_core.pictures.files import Picture, PictureError
from tudsr_core.pictures.writing import write_picture


@pytest.fixture
def pictures(noise):
    """A grey picture and one half of which is brighter, as large again."""
    after = torch.full((1, 3, 80, 120), 0.5)
    after[..., 60:] = 0.75
    return {"small.png": Picture(torch.full((1, 3, 40, 60), 0.5)), "large.png": Picture(after)}


def test_figures_are_those_of_equal_sizes(noise):
    truth, near, far = noise(1, 4, 24, 30), noise(1, 3, 24, 30, seed=1), noise(1, 3, 12, 15)
    assert figures_of({"a": far, "b": near}) == []
    (one,) = figures_of({"a": near, "b": truth})
    assert (one.psnr, one.ssim) == (psnr_y(near, truth[:, :3]), ssim_y(near, truth[:, :3]))
    assert one.describe().startswith("a against b: PSNR-Y ")
    assert [f.name for f in figures_of({"a": near, "b": far}, truth)] == ["a"]
    assert figures_of({"a": near[..., :9, :9], "b": truth[..., :9, :9]}) == []


def test_nothing_in_a_name_can_end_the_script(pictures, tmp_path):
    first, second = pictures.values()
    write_page(tmp_path / "page.html", {"</script><b>": first, "\x1b[31m&": second})
    page = (tmp_path / "page.html").read_text("utf-8")
    assert page.count("</script>") == 1 and "<b>" not in page and "\x1b" not in page
    (given,) = re.findall(r"\)\(\.\.\.(\[.*\])\);", page)
    assert json.loads(given)[0]["name"] == "</script><b>"
    with pytest.raises(PictureError, match="was not written"):
        write_page(tmp_path / "none" / "x" / "page.html", pictures)


def test_the_command_writes_a_page_and_says_what_is_wrong(pictures, noise, tmp_path):
    for name, picture in pictures.items():
        write_picture(tmp_path / name, picture)
    small, large, page = tmp_path / "small.png", tmp_path / "large.png", tmp_path / "page.html"
    done = tudsr("compare", small, large, "-o", page, "--reference", large)
    assert done.returncode == 0 and "large.png against reference: PSNR-Y 120.00 dB, SSIM 1.0000" in done.stdout
    assert "SSIM 1.0000" in page.read_text("utf-8")
    done = tudsr("compare", small, large, "-o", page, "--force", "--tile", 64, "--overlap", 0)
    # 80 x 120: rows from 0 and 16, columns from 0 and 56; the only step of the large picture is at column 60
    assert "small.png, enlarged: edges at 4 tile borders are 1.00 times" in done.stdout, done.stderr
    assert "large.png: edges at 4 tile borders are 0.00 times" in done.stdout
    assert "seams 0.00" in page.read_text("utf-8")
    for arguments, says in (
        ((small, large, "-o", page), "exists"),
        ((small, large, "-o", tmp_path / "page.png"), "ends in .html"),
        ((small, small, "-o", tmp_path / "b.html"), "given twice"),
        ((large, large.parent / "none.png", "-o", tmp_path / "b.html"), "none.png"),
        ((large, page, "-o", tmp_path / "b.html"), "page.html"),
    ):
        done = tudsr("compare", *arguments)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_page_in_a_browser(pictures, tmp_path):
    """The divider moves, both pictures zoom alike, and the difference is that of the two."""
    write_page(tmp_path / "page.html", pictures)
    with browser.plain_page((tmp_path / "page.html").as_uri(), 900, 600) as page:
        state = """() => {
            const [one, two] = ["first", "second"].map((c) => document.querySelector(`.${c} img`));
            const same = ["width", "height", "transform"].every((name) => one.style[name] === two.style[name]);
            return [document.querySelector(".divider").style.left, same, two.style.width];
        }"""
        page.wait_for_function("() => document.querySelector('.second img').naturalWidth")
        assert page.evaluate(state) == ["450px", True, "900px"]
        page.mouse.move(450, 300)
        page.mouse.down()
        page.mouse.move(225, 300)
        page.mouse.up()
        page.mouse.move(600, 300)
        page.mouse.wheel(0, -100)
        assert page.evaluate(state) == ["225px", True, "1080px"]
        page.keyboard.press("Tab")
        page.locator(".compare-view").press("ArrowLeft")
        assert page.evaluate(state)[0] == "207px"
        page.get_by_text("difference").click()
        assert browser.color_at(page, 300, 300) == (0, 0, 0)
        assert browser.color_at(page, 700, 300) == (63, 63, 63)
        page.get_by_text("difference").click()
        assert browser.color_at(page, 700, 300) == (252, 252, 252)
