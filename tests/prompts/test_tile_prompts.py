"""Tile prompts: composition, the 77-token budget, one plan for prompts, hints, latents and pixels."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest
import torch

from tudsr_core.prompts.tile_prompts import (
    Style,
    TilePrompt,
    TilePrompts,
    cut_tiles,
    describe,
    estimate_fits,
    is_flat,
    picture_mark,
)
from tudsr_core.tiling.plan import plan_tiles


def prompts_for(plan, style=None):
    return TilePrompts(plan, tuple(TilePrompt(f"tile {i}") for i in range(len(plan))), style or Style())


def test_a_prompt_is_prefix_description_suffix_without_repetition():
    style = Style(prefix="photo", suffix="clean, 8k")
    assert style.compose("dog, Grass, dog, Clean") == "photo, dog, Grass, clean, 8k"
    assert style.compose("") == "photo, clean, 8k"
    assert Style("", "", "").compose("a\nb,, c ") == "a, b, c"
    assert Style("", "sharp, Clean", "").compose("clean, dog") == "dog, sharp, Clean", "whatever its case"


def test_the_budget_shortens_the_description_and_never_the_quality_words():
    style = Style(prefix="photo", suffix="clean, 8k")
    fits = lambda text: len(text.split()) <= 6  # noqa: E731
    assert style.compose("one, two, three, four, five", fits) == "photo, one, two, three, clean, 8k"
    assert style.compose("a very long sentence about one dog", fits) == "photo, a very long, clean, 8k"
    assert style.compose("x", lambda text: False) == "photo, clean, 8k"


def test_the_estimate_counts_words_and_marks():
    assert estimate_fits(", ".join(["dog"] * 37))
    assert not estimate_fits(", ".join(["dog"] * 39))
    assert not estimate_fits(", ".join(["incomprehensibility"] * 16))


def test_a_prompt_per_tile_is_demanded():
    plan = plan_tiles(128, 96, 64, 32)
    with pytest.raises(ValueError, match="2 prompts for 6 tiles"):
        TilePrompts(plan, (TilePrompt(), TilePrompt()))


def test_flat_tiles_are_not_shown_to_the_prompter():
    texture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sky = torch.full((3, 16, 16), 0.7) + 0.004 * texture
    seen = []

    class Prompter:
        def describe(self, tiles, tick):
            seen.extend(tiles)
            return [TilePrompt("dog, Dog,  grass")] * len(tiles)

    assert is_flat(sky) and not is_flat(texture)
    assert [one.text for one in describe(Prompter(), [sky, texture, sky])] == ["", "dog, grass", ""]
    assert len(seen) == 1 and torch.equal(seen[0], texture)
    assert [one.text for one in describe(Prompter(), [sky])] == [""]


def test_prompts_hints_latents_and_pixels_address_the_same_region_on_10000_grids():
    """One plan in latents; every other box is that box scaled, outward to whole pixels."""
    chance = random.Random(1)
    for _ in range(10_000):
        height, width = chance.randint(16, 900), chance.randint(16, 900)
        scale = chance.uniform(1.5, 8)
        rows, columns = (max(1, round(side * scale) // 8) for side in (height, width))
        tile = chance.choice([16, 32, 48, 64, 96, 128])
        spacing = chance.choice(["even", "stride"])
        plan = plan_tiles(rows, columns, tile, chance.randint(0, tile // 2), spacing=spacing)
        some = (0, chance.randrange(len(plan)), len(plan) - 1)
        boxes = [one for one in plan if one.index in some] if len(plan) < 400 else []
        for box in boxes:
            top, bottom, left, right = plan.region(box, (height, width))
            for start, end, offset, side, length, count in (
                (top, bottom, box.top, box.height, height, rows),
                (left, right, box.left, box.width, width, columns),
            ):
                exact = offset * length / count, (offset + side) * length / count
                assert 0 <= start <= exact[0] + 1e-9 < start + 1 + 1e-9, "the prompt sees the tile's first pixel"
                assert end - 1 - 1e-9 < exact[1] - 1e-9 <= end <= length, "and its last, and not a pixel more"
            hint = plan.region(box, (rows * 8, columns * 8))
            assert hint == (box.top * 8, (box.top + box.height) * 8, box.left * 8, (box.left + box.width) * 8)
            assert plan.region(box, (rows, columns)) == (
                box.top,
                box.top + box.height,
                box.left,
                box.left + box.width,
            )
            assert plan.nearest(box, plan) == box.index


def test_cut_tiles_are_those_regions():
    plan = plan_tiles(37, 50, 16, 6)
    y, x = torch.meshgrid(torch.arange(61.0), torch.arange(93.0), indexing="ij")
    image = torch.stack([y, x, y])
    for tile, cut in zip(plan, cut_tiles(image, plan), strict=True):
        top, bottom, left, right = plan.region(tile, (61, 93))
        assert cut[0, :, 0].tolist() == list(range(top, bottom))
        assert cut[1, 0].tolist() == list(range(left, right))
    wider = cut_tiles(image, plan, 0.5)
    assert all(b.shape[1] > a.shape[1] for a, b in zip(cut_tiles(image, plan), wider, strict=True))
    assert tuple(wider[0].shape) == (3, 27 + 2 * 14, 30 + 2 * 15)
    assert wider[-1][0, -1, 0] == 60 and wider[-1][1, 0, -1] == 92


@pytest.mark.parametrize(
    ("height", "width", "count"),
    [(1024, 1024, 9), (2048, 2048, 49), (4096, 4096, 225), (8192, 8192, 961), (1356, 2040, 35)],
)
def test_upstreams_grid(height, width, count):
    """ "Zoomed In, Diffused Out" has 1 + ceil((L - 64) / 32) tiles an axis at i x 32, the last one flush."""
    rows, columns = math.ceil(height / 8), math.ceil(width / 8)
    plan = plan_tiles(rows, columns, 64, 32, spacing="stride")
    assert len(plan) == count == (1 + math.ceil((rows - 64) / 32)) * (1 + math.ceil((columns - 64) / 32))
    for length, offsets in ((rows, plan.tops), (columns, plan.lefts)):
        assert list(offsets) == [min(i * 32, length - 64) for i in range(len(offsets))]


def test_another_grids_tiles_find_the_prompt_of_their_place():
    described = plan_tiles(256, 256, 64, 0)
    finer = plan_tiles(512, 512, 64, 0)  # the second stage: twice the size, quarters of each tile
    for tile in finer:
        row, column = tile.top // 128, tile.left // 128
        assert described.nearest(tile, finer) == row * 4 + column


def test_the_pictures_mark_survives_resizing_and_tells_pictures_apart():
    y, x = torch.meshgrid(torch.linspace(0, 3, 80), torch.linspace(0, 4, 120), indexing="ij")
    image = torch.stack([(x * y).sin() * 0.5 + 0.5] * 3)
    small = torch.nn.functional.interpolate(image[None], scale_factor=0.5, mode="area")[0]
    other = image.flip(-1)
    bits = [int(picture_mark(one), 16) for one in (image, small, other)]
    assert (bits[0] ^ bits[1]).bit_count() <= 2 < 16 <= (bits[0] ^ bits[2]).bit_count()


def test_the_help_pages_call_counts_are_right():
    page = Path(__file__).parents[2] / "nodes" / "web" / "docs" / "TUDSRTilePlan.md"
    rows = re.findall(
        r"^\| (\d+) x \d+ \| .* = (\d+) \| ([\d,]+) \| (\d+) tiles, ([\d,]+) \|$", page.read_text("utf-8"), re.M
    )
    assert len(rows) == 3
    for side, *numbers in rows:
        counts = []
        for overlap in (32, 16):
            tiles = len(plan_tiles(int(side) // 8, int(side) // 8, 64, overlap))
            counts += [tiles, tiles * 50]
        assert [int(number.replace(",", "")) for number in numbers] == counts


def test_long_texts_are_cut_in_few_trials():
    asked = []

    def fits(text):
        asked.append(text)
        return len(text) <= 100

    words = [f"w{number}" for number in range(1000)]
    made = Style(suffix="8k").compose(", ".join(words), fits)
    assert made == ", ".join([*words[:21], "8k"]) and len(asked) <= 11
    made = Style(suffix="8k").compose(" ".join(words), fits)
    assert made == " ".join(words[:26]) + ", 8k" and len(made) <= 100 and len(asked) <= 23
    assert Style(prefix="x" * 200).compose("a, b", fits).startswith("xxx")


def test_texts_longer_than_any_prompt_are_refused():
    with pytest.raises(ValueError, match="a tile's prompt has 5,001 characters"):
        TilePrompt("x" * 5001)
    for name in ("prefix", "suffix", "negative"):
        with pytest.raises(ValueError, match=f"the {name} of the tile prompts has 6,000 characters"):
            Style(**{name: "x" * 6000})
