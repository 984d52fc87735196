"""Results that are written in blocks: the same picture, with the memory of a row of blocks."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from plain_upscaler import Bicubic

from tudsr_core.batch import Output, blocks, plan_blocks, upscale_in_blocks
from tudsr_core.methods import Target
from tudsr_core.pictures import Picture, PictureError, RowReader, big_tiff, read_picture, write_big_tiff, write_picture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks and file tiles small enough for several in a small picture."""
    monkeypatch.setattr(blocks, "BLOCK_PX", 64)
    monkeypatch.setattr(blocks, "OVERLAP_PX", 16)
    monkeypatch.setattr(big_tiff, "TILE_PX", 32)
    monkeypatch.setattr(big_tiff, "SMALLEST_LEVEL_PX", 20)


def waves(channels, height, width):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(x * y / (i + 1)).sin() * 0.4 + 0.5 for i in range(channels)])[None]


class Nearest(Bicubic):
    """Repeats pixels: what a block makes does not depend on its surroundings."""

    def run(self, image, plan, tick=None):
        factor = plan.size[0] // plan.source[0]
        return image.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


@pytest.mark.parametrize(("channels", "bits"), [(3, 8), (4, 16)])
def test_blocks_give_the_whole_pictures_result(small_blocks, tmp_path, channels, bits):
    source = tmp_path / "in.tif"
    write_picture(source, Picture(waves(channels, 50, 71), bits=bits, dpi=(300, 300), icc=bytes(200)))
    ticks = []
    plan = upscale_in_blocks(
        source, tmp_path / "out.tif", Nearest(), Target(scale=4), Output(), tick=lambda *tick: ticks.append(tick[:2])
    )
    assert plan.size == (200, 284) and len(plan.tiles) == 24 == len(ticks) and ticks[-1] == (24, 24)
    made, before = read_picture(tmp_path / "out.tif"), read_picture(source)
    wanted = before.pixels.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert made.bits == bits and made.icc == before.icc
    assert (made.pixels - wanted).abs().max() <= 1.01 / (2**bits - 1)
    with tifffile.TiffFile(tmp_path / "out.tif") as tiff:
        page = tiff.pages[0]
        assert tiff.is_bigtiff and page.is_tiled and page.tags["XResolution"].value == (300, 1)


def test_seams_are_blended(small_blocks, tmp_path):
    """Bicubic blocks see no neighbours at their borders; the blend hides it."""
    source = tmp_path / "in.png"
    write_picture(source, Picture(waves(3, 60, 60), bits=16))
    upscale_in_blocks(source, tmp_path / "out.tif", Bicubic(), Target(scale=4), Output())
    made = read_picture(tmp_path / "out.tif").pixels
    upscaler = Bicubic()
    whole = upscaler.run(waves(3, 60, 60), upscaler.plan((60, 60), Target(scale=4)))
    assert (made - whole).abs().max() < 0.004


def test_a_pyramid_has_halves_down_to_the_smallest(small_blocks, tmp_path):
    source = tmp_path / "in.tif"
    write_picture(source, Picture(waves(3, 30, 41)))
    upscale_in_blocks(source, tmp_path / "out.tif", Nearest(), Target(scale=4), Output(), pyramid=True)
    with tifffile.TiffFile(tmp_path / "out.tif") as tiff:
        levels = tiff.series[0].levels
        assert [level.shape for level in levels] == [(120, 164, 3), (60, 82, 3), (30, 41, 3), (15, 20, 3)]
        full, half, quarter = (level.asarray().astype(int) for level in levels[:3])
    mean = sum(full[y::2, x::2] for y, x in itertools.product((0, 1), (0, 1))) / 4
    assert np.abs(half - mean).max() <= 0.5
    assert np.abs(quarter - (read_picture(source).pixels[0].movedim(0, -1).numpy() * 255)).max() <= 1.01
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


LAYOUTS = {
    "strips": dict(rowsperstrip=7, compression="zlib", predictor=True),
    "one strip": dict(rowsperstrip=100),
    "tiles": dict(tile=(16, 32), compression="lzw"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (3, np.uint16), (4, np.uint8)])
def test_rows_of_a_tiff_are_those_of_the_whole(tmp_path, layout, channels, dtype):
    array = np.random.default_rng(0).integers(0, 2**8, (50, 41, channels), np.uint16).astype(dtype)
    path = tmp_path / "a.tif"
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(
        path, array[..., 0] if channels == 1 else array, photometric="rgb" if channels > 1 else "minisblack",
        metadata=None, **LAYOUTS[layout], **extra,
    )  # fmt: skip
    reader, whole = RowReader(path), read_picture(path)
    assert reader._tiff is not None and reader.size == (50, 41)
    assert (reader.facts.bits, reader.facts.is_grey, reader.facts.has_alpha) == (
        whole.bits,
        whole.is_grey,
        channels == 4,
    )
    for top, bottom in ((0, 50), (0, 1), (13, 31), (49, 50)):
        assert torch.equal(reader.rows(top, bottom), whole.pixels[:, :, top:bottom])


def test_what_is_no_plain_tiff_is_read_whole(tmp_path):
    Image.new("CMYK", (9, 8), (1, 2, 3, 4)).save(tmp_path / "a.tif")
    write_picture(tmp_path / "b.png", Picture(waves(3, 8, 9)))
    for name in ("a.tif", "b.png"):
        reader = RowReader(tmp_path / name)
        assert reader._tiff is None
        assert torch.equal(reader.rows(2, 5), read_picture(tmp_path / name).pixels[:, :, 2:5])
    (tmp_path / "c.tif").write_bytes(b"II*\0" + bytes(40))
    with pytest.raises(PictureError, match="c.tif is damaged"):
        RowReader(tmp_path / "c.tif")


def test_a_damaged_strip_is_one_error_and_leaves_nothing(small_blocks, tmp_path):
    source = tmp_path / "in.tif"
    tifffile.imwrite(source, np.zeros((99, 40, 3), np.uint8), photometric="rgb", rowsperstrip=9, compression="zlib")
    with tifffile.TiffFile(source) as tiff:
        at = tiff.pages[0].dataoffsets[8]
    data = bytearray(source.read_bytes())
    data[at : at + 8] = b"\xff" * 8
    source.write_bytes(data)
    with pytest.raises(PictureError, match="in.tif is damaged"):
        upscale_in_blocks(source, tmp_path / "out.tif", Nearest(), Target(scale=2), Output())
    assert [path.name for path in tmp_path.iterdir()] == ["in.tif"]


def test_what_cannot_be_written_in_blocks_is_said_before_anything_is_computed(tmp_path):
    source = tmp_path / "in.png"
    write_picture(source, Picture(waves(3, 8, 9)))
    upscaler = Bicubic()
    for path, target, says in (
        ("out.png", Target(scale=2), "only TIFF is written in blocks; name it out.tif"),
        ("out.tif", Target(scale=1.5), "a whole --scale"),
        ("out.tif", Target(width=90), "a whole --scale"),
    ):
        with pytest.raises(ValueError, match=says):
            upscale_in_blocks(source, tmp_path / path, upscaler, target, Output())
    assert upscaler.computed == 0


def test_the_plan_of_twelve_thousand_pixels_by_eight(tmp_path):
    plan = plan_blocks((9000, 12000), Target(scale=8.0))
    assert plan.size == (72000, 96000)
    assert "6,912 megapixels" in plan.describe()[0] and "about 2.6 GiB" in plan.describe()[2]


def test_rows_that_are_missing_are_noticed(tmp_path):
    def rows(first):
        yield waves(3, 5, 7)

    with pytest.raises(PictureError, match="5 rows came of a picture of 9"), (tmp_path / "a.tif").open("wb") as file:
        write_big_tiff(file, Picture(waves(3, 1, 1)), (9, 7), rows, folder=tmp_path)


class Ending(Bicubic):
    """Ends at its `last` block, and counts."""

    def __init__(self, last=10**9, end=None):
        super().__init__()
        self.last, self.end = last, end or (lambda: (_ for _ in ()).throw(KeyboardInterrupt))

    def run(self, image, plan, tick=None):
        if self.computed == self.last:
            self.end()
        return super().run(image, plan, tick)


def enlarge(folder, name, upscaler=None, settings=None, pyramid=True):
    upscaler = upscaler or Ending()
    arguments = folder / "in.tif", folder / name, upscaler, Target(scale=4), Output()
    upscale_in_blocks(*arguments, pyramid=pyramid, settings=settings or {"scale": 4})
    return (folder / name).read_bytes(), upscaler.computed


@pytest.fixture
def tall(small_blocks, tmp_path):
    """A picture of ten rows of two blocks, and a copy of it enlarged in one go."""
    write_picture(tmp_path / "in.tif", Picture(waves(3, 120, 25), bits=16))
    assert enlarge(tmp_path, "whole.tif")[1] == 20
    return tmp_path


KILLED = """
import os, signal, sys
from pathlib import Path
from test_blocks import Ending, blocks, big_tiff, enlarge
blocks.BLOCK_PX, blocks.OVERLAP_PX, big_tiff.TILE_PX, big_tiff.SMALLEST_LEVEL_PX = 64, 16, 32, 20
enlarge(Path(sys.argv[1]), "out.tif", Ending(13, lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


def test_a_killed_run_goes_on_with_the_strips_that_are_written(tall):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "batch")))
    command = [sys.executable, "-c", KILLED, str(tall)]
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode == -signal.SIGKILL
    left = sorted(path.name for path in tall.iterdir() if path.name.startswith("."))
    assert left == [".out.unfinished.jsonl", ".out.unfinished.tif"]
    data, computed = enlarge(tall, "out.tif")
    assert data == (tall / "whole.tif").read_bytes()
    assert computed == 20 - 10, "six rows were whole; the last of them reaches into what is not written"
    assert not [path for path in tall.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["none", "torn strip", "torn line", "no journal", "garbage", "source", "settings"])
def test_what_is_not_whole_or_not_of_this_run_is_made_again(tall, damage):
    with pytest.raises(KeyboardInterrupt):
        enlarge(tall, "out.tif", Ending(13))
    part, journal = tall / ".out.unfinished.tif", tall / ".out.unfinished.jsonl"
    data, lines = bytearray(part.read_bytes()), journal.read_bytes()
    written = len(lines.splitlines()) - 1
    if damage == "torn strip":
        data[-1] ^= 1
        part.write_bytes(data)
    elif damage == "torn line":
        journal.write_bytes(lines[:-5])
    elif damage == "no journal":
        journal.unlink()
    elif damage == "garbage":
        journal.write_bytes(lines + b'{"end": 1e99, "sizes": [1]}\n\xff\n')
        part.write_bytes(data + bytes(10**6))
    elif damage == "source":
        os.utime(tall / "in.tif", (1, 1))
    made, computed = enlarge(tall, "out.tif", settings={"scale": 4, "seed": 1} if damage == "settings" else None)
    assert made == (tall / "whole.tif").read_bytes()
    anew = damage in ("no journal", "source", "settings")
    assert computed == 20 if anew else computed <= 12, f"{written} bands were written"


def test_an_interrupt_of_an_interrupted_run_loses_nothing(tall):
    for last in (9, 4, 3):
        with pytest.raises(KeyboardInterrupt):
            enlarge(tall, "out.tif", Ending(last))
    data, computed = enlarge(tall, "out.tif")
    assert data == (tall / "whole.tif").read_bytes() and computed <= 12


def test_two_runs_at_one_result_are_refused(tall):
    def second():
        with pytest.raises(PictureError, match="another run is writing into"):
            enlarge(tall, "out.tif")

    assert enlarge(tall, "out.tif", Ending(3, second))[0] == (tall / "whole.tif").read_bytes()
