"""Edits of tile prompts: the text form, what they do, and where they still fit."""

from __future__ import annotations

import pytest

from tudsr_core.edits import Edit, Edits, read_edits
from tudsr_core.prompts import TilePrompt, TilePrompts
from tudsr_core.tiles import plan_tiles

GRID = plan_tiles(160, 256, 64, 16)  # 3 x 5


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


@pytest.mark.parametrize("text", ["3 brick", "brick", "3:", "3+", "3- brick"])
def test_an_unreadable_line_is_named(text):
    with pytest.raises(ValueError, match="line 2 of the edits"):
        read_edits(f"1: fine\n{text}")


def test_a_tile_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="tile 16, but there are 15"):
        read_edits("16: x").fit(GRID)


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
