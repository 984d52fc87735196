"""Edits of tile prompts: the text form, what they do, and where they still fit."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tudsr_core.prompts.edits import Edit, Edits, read_edits, write_header
from tudsr_core.prompts.tile_prompts import TilePrompt, TilePrompts
from tudsr_core.tiling.plan import TilePlan, plan_tiles

GRID = plan_tiles(160, 256, 64, 16)  # 3 x 5
ONE = plan_tiles(64, 64, 64, 0)
# What the editor in the browser must make of the same texts: tests/test_tile_editor.py runs these too. Tiles
# count from 1. `unreadable`: the number of the line that is named here; the editor leaves that line out.
CASES = json.loads((Path(__file__).parents[1] / "edits_cases.json").read_text("utf-8"))


def named(cases):
    return pytest.mark.parametrize("case", CASES[cases], ids=lambda case: case["name"])


def as_edits(lines):
    return {number - 1: Edit(kind, text) for number, kind, text in lines}


@named("reads")
def test_reads(case):
    assert read_edits(case["text"]).by_tile == as_edits(case["edits"])


@named("unreadable")
def test_an_unreadable_line_is_named(case):
    with pytest.raises(ValueError, match=f"^line {case['line']} of the edits, .*write `3: text`"):
        read_edits(case["text"])


@named("headers")
def test_headers(case):
    edits = read_edits(case["text"])
    assert (write_header(edits.plan, edits.picture) if edits.plan else None) == case["header"]


@named("fits")
def test_fits(case):
    here = read_edits(case["grid"])
    fitted = read_edits(case["text"]).fit(here.plan, here.picture)
    assert fitted.by_tile == as_edits(case["edits"])


@pytest.mark.parametrize("case", CASES["says"], ids=lambda case: case["says"] or "nothing")
def test_what_a_tile_says(case):
    edits = {} if case["edit"] is None else {0: Edit(*case["edit"])}
    prompts = TilePrompts(ONE, (TilePrompt(case["found"]),))
    assert Edits(edits, ONE).apply(prompts).prompts[0].text == case["says"]


@pytest.mark.parametrize("case", CASES["writes"], ids=lambda case: f"{len(case['edits'])} edits")
def test_writes(case):
    assert Edits(as_edits(case["edits"])).write() == case["text"]


def test_fitting_never_lists_all_tiles(monkeypatch):
    monkeypatch.delattr(TilePlan, "__iter__")  # 961 edits took 28 s when each listed all tiles
    grid, twice = plan_tiles(16384, 16384, 1024, 512), plan_tiles(32768, 32768, 2048, 1024)
    edits = Edits({index: Edit("add", "x") for index in range(len(grid))}, grid)
    assert edits.fit(twice).by_tile == edits.by_tile and len(grid) == 961
    offsets = " ".join(map(str, range(2001)))  # a header that claims four million tiles took 64 s and 637 MB
    text = f"# grid 2064x2064, tile 64x64, rows {offsets}, columns {offsets}\n1: a\n4004001: b"
    assert read_edits(text).fit(GRID).by_tile == {}


def test_lines_say_replace_add_and_clear():
    edits = read_edits("# a remark\n2: a red brick wall\n\n 3+ ivy, moss \n15-\n")
    assert edits.by_tile == {
        1: Edit("replace", "a red brick wall"),
        2: Edit("add", "ivy, moss"),
        14: Edit("clear"),
    }
    prompts = TilePrompts(GRID, tuple(TilePrompt("dog, moss", (("dog", 3.0),)) for _ in GRID))
    made = edits.fit(GRID).apply(prompts)
    assert [made.prompts[i].text for i in (0, 1, 2, 14)] == ["dog, moss", "a red brick wall", "dog, moss, ivy", ""]
    assert made.prompts[0].tags and not made.prompts[1].tags


def test_writing_and_reading_are_inverse():
    edits = Edits({0: Edit("add", "x, y"), 7: Edit("clear"), 9: Edit("replace", "z: 2+ 3-")}, GRID, "00ff" * 4)
    again = read_edits(edits.write())
    assert again.by_tile == edits.by_tile and again.picture == edits.picture
    assert (again.plan.tops, again.plan.lefts) == (GRID.tops, GRID.lefts)
    assert again.write() == edits.write()


def test_a_tile_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="tile 16, but there are 15"):
        read_edits("16: x").fit(GRID)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1: " + "x" * 6_000, "the edit of a tile has 6,000 characters, the limit is 5,000"),
        ("\n".join(f"1+ {'ab' * 12} {number}" for number in range(400)), "the edit of a tile has"),
        ("1-\n" * 6_000, "the edits have 6,001 lines"),
        ("x" * 2**23, "the edits has 8,388,608 characters"),
        ("# grid 64x64, tile 64x64, rows 0 0, columns 0", "describes no grid"),
        ("# grid 64x64, tile 32x64, rows 32 0, columns 0", "describes no grid"),
        ("# grid 96x64, tile 32x64, rows 0 64, columns 0", "describes no grid"),
        ("# grid 64x64, tile 32x64, rows 0, columns 0", "describes no grid"),
    ],
)
def test_edits_have_limits(text, says):
    start = time.process_time()
    with pytest.raises(ValueError, match=says) as caught:
        read_edits(text)
    assert time.process_time() - start < 5 and len(str(caught.value)) < 300


def test_edits_follow_their_place_when_the_grid_changes():
    edits = Edits({0: Edit("clear"), 7: Edit("replace", "middle"), 14: Edit("add", "corner")}, GRID, None)
    twice = plan_tiles(320, 512, 128, 32)  # the same grid of a picture twice as large
    assert edits.fit(twice).by_tile == edits.by_tile
    near = plan_tiles(160, 256, 72, 24)  # larger tiles at other places
    fitted = edits.fit(near)
    assert fitted.by_tile[0] == Edit("clear") and fitted.by_tile[len(near) - 1] == Edit("add", "corner")
    assert len(fitted.by_tile) == 3
    assert edits.fit(plan_tiles(160, 256, 160, 32)).by_tile == {}
    assert edits.fit(plan_tiles(160, 256, 32, 0)).by_tile == {}


def test_edits_of_another_picture_are_left_out():
    edits = Edits({0: Edit("replace", "x")}, GRID, "ffffffff00000000")
    assert edits.fit(GRID, "ffffffff00000001").by_tile
    assert not edits.fit(GRID, "00000000ffffffff").by_tile
    assert edits.fit(GRID, None).by_tile
