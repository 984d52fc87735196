"""Checks of extracting, editing and planning tile prompts, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_tile_prompts.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import json
from pathlib import Path

from inside import NODES, main, picture  # first: it makes ComfyUI importable
from inside_words import STYLE, extract, prompts_module, tiles_module

import folder_paths
import torch


class CountingPrompter:
    """Says how wide a tile is; counts how often it is asked."""

    asked = 0

    def describe(self, tiles, tick):
        CountingPrompter.asked += 1
        tick(len(tiles), len(tiles))
        return [prompts_module.TilePrompt(f"{tile.shape[-1]} wide") for tile in tiles]

    def fingerprint(self):
        return "counting"

    def release(self):
        pass


def check_extraction_is_edited_without_asking_again():
    plan = tiles_module.plan_tiles(64, 96, 32, 8)
    image = picture(1, 128, 192)
    CountingPrompter.asked = 0
    prompter = CountingPrompter()
    plain = extract(image, plan, prompter=prompter)
    assert [prompt.text for prompt in plain.args[0].prompts] == ["64 wide"] * len(plan)
    edited = extract(image, plan, "2: a wall\n3+ ivy\n4-", prompter=prompter)
    assert edited.args[1][:4] == ["64 wide", "a wall", "64 wide, ivy", ""]
    assert edited.args[0].positive(2) == "photo, 64 wide, ivy, 8k"
    assert CountingPrompter.asked == 1
    extract(image, plan, context=0.5, prompter=prompter)
    assert CountingPrompter.asked == 2


def check_the_editor_is_told_all_it_draws():
    plan = tiles_module.plan_tiles(64, 96, 32, 8)
    image = picture(1, 128, 192)
    facts = extract(image, plan, "2: a wall", prompter=CountingPrompter()).ui["tudsr_tiles"][0]
    json.dumps(facts)
    saved = Path(folder_paths.get_temp_directory()) / facts["picture"]["subfolder"] / facts["picture"]["filename"]
    assert saved.is_file()
    assert len(facts["boxes"]) == len(facts["found"]) == len(facts["prompts"]) == len(plan)
    assert facts["boxes"][0] == [0, 0, round(32 / 96, 5), 0.5] and facts["boxes"][-1][2:] == [1, 1]
    assert facts["found"][1] == "64 wide" and facts["prompts"][1] == "photo, a wall, 8k"
    assert facts["edits"] == "2: a wall" and facts["header"].startswith("# grid 64x96, tile 32x32")
    later = tiles_module.plan_tiles(128, 192, 64, 16)  # the same places of a larger picture
    kept = extract(image, later, f"{facts['header']}\n2: a wall").ui["tudsr_tiles"][0]
    assert kept["edits"] == "2: a wall" and kept["prompts"][1] == "photo, a wall, 8k"
    other = extract(image.flip(2), plan, f"{facts['header']}\n2: a wall").ui["tudsr_tiles"][0]
    assert other["edits"] == ""


def check_several_pictures_are_refused():
    try:
        extract(picture(2, 64, 64), tiles_module.plan_tiles(32, 32, 16, 4))
    except ValueError as error:
        assert "one picture, got 2" in str(error)
    else:
        raise AssertionError("accepted")


def check_strings_of_captioners_become_tile_prompts():
    plan = tiles_module.plan_tiles(32, 48, 16, 0)
    node = NODES["TUDSRTilePromptsFromStrings"]
    style = {key: [value] for key, value in STYLE.items()}
    for strings in (["a", "b", "c", "d", "e", "f"], [["a", "b", "c", "d", "e", "f"]], ["a\nb\nc\nd\ne\nf"]):
        out = node.execute(strings, [plan], edits=["6+ g"], **style)
        assert out.args[1] == ["a", "b", "c", "d", "e", "f, g"]
        assert out.ui["tudsr_tiles"][0]["picture"] is None


def check_tile_plan_counts_before_the_run():
    node = NODES["TUDSRTilePlan"]
    for side, tiles, calls in ((2048, 49, 2450), (4096, 225, 11250), (8192, 961, 48050)):
        out = node.execute(4.0, 0, 0, 512, 256, "stride", 50, image=torch.rand(1, side // 4, side // 4, 3))
        assert len(out.args[0]) == tiles and out.args[3] == calls
        assert f"= {tiles} tiles of 512 x 512 px" in out.args[2] and f"{calls:,} tile calls" in out.args[2]
        assert f"{2 * calls:,} network calls" in out.args[2]  # what `tudsr zoom` counts
        assert max(out.args[1].shape[1:3]) == 1024
    latent = {"samples": torch.zeros(1, 4, 37, 50)}
    plan = node.execute(4.0, 0, 0, 128, 48, "even", 1, image=torch.rand(1, 9, 9, 3), latent=latent).args[0]
    assert (plan.height, plan.width) == (37, 50)
    assert node.execute(1.0, 400, 296, 128, 48, "even", 1).args[0] == plan
    for wrong in (dict(tile=512, overlap=-8, width=64, height=64), dict(tile=512, overlap=0, width=64, height=0)):
        try:
            node.execute(1.0, spacing="even", steps=1, **wrong)
        except ValueError:
            continue
        raise AssertionError("accepted")


def check_tile_images_are_the_plans_tiles():
    plan = tiles_module.plan_tiles(37, 50, 16, 6)
    image = picture(1, 61, 93)
    batch, singles = NODES["TUDSRTileImages"].execute(image, plan, 0.0, 0).args
    cuts = prompts_module.cut_tiles(image[0].movedim(-1, 0), plan)
    assert len(batch) == len(singles) == len(plan)
    assert tuple(batch.shape[1:3]) == tuple(max(cut.shape[axis] for cut in cuts) for axis in (1, 2))
    for one, cut in zip(singles, cuts, strict=True):
        if one.shape[1:3] == cut.shape[1:]:
            assert torch.equal(one[0].movedim(-1, 0), cut)
    assert max(NODES["TUDSRTileImages"].execute(image, plan, 0.0, 384).args[0].shape[1:3]) == 384


if __name__ == "__main__":
    main(globals())
