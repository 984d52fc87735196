"""Pages of small print: letters of every size asked for, lit and photographed, from fonts inside a wheel."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import ImageFont

from tudsr_core.training.data import FONTS, read_fonts
from tudsr_core.training.pages import draw_pages

FONT = ImageFont.load_default(10).font_bytes


def drawn(count, seed, side=64):
    return draw_pages(count, side, [FONT], np.random.default_rng(seed))


def test_pages_follow_from_the_random_stream_and_are_pictures():
    pages = drawn(3, 0)
    assert pages.shape == (3, 3, 64, 64) and 0 <= pages.min() and pages.max() <= 1
    assert torch.equal(pages, drawn(3, 0)) and not torch.equal(pages, drawn(3, 1))


def test_print_is_mostly_paper_with_strokes_that_a_small_picture_loses():
    pages = drawn(40, 2, 128).mean(1)
    low, middle, high = (torch.quantile(pages.flatten(1), q, dim=1) for q in (0.02, 0.5, 0.98))
    light = (middle - low > high - middle).float().mean()
    assert 0.6 < light < 1  # dark on light in four of five, and light on dark in the others
    small = torch.nn.functional.avg_pool2d(pages[None], 8)[0]
    assert small.flatten(1).std(1).median() < 0.8 * pages.flatten(1).std(1).median()


def pack(folder, paths):
    with zipfile.ZipFile(folder / "matplotlib-3.11.2.whl", "w") as wheel:
        for path in paths:
            wheel.writestr(path, path)


def test_fonts_come_out_of_the_wheel_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no wheel of matplotlib .*pip download"):
        read_fonts(tmp_path)
    pack(tmp_path, FONTS[:1])
    with pytest.raises(FileNotFoundError, match=f"matplotlib-3.11.2.whl lacks {FONTS[1]}; run: pip download"):
        read_fonts(tmp_path)
    pack(tmp_path, FONTS)
    assert read_fonts(tmp_path) == [path.encode() for path in FONTS]
