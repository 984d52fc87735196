"""Seams at the borders of a plan."""

import pytest
import torch

from tudsr_core.evaluation.metrics import seam_score
from tudsr_core.evaluation.seams import seams_of, tiles_over
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, plan_for
from tudsr_core.pictures.tensors import resize
from tudsr_core.tiling.plan import plan_tiles


def test_the_score_is_that_of_the_plans_borders(noise):
    after, before, small = noise(1, 4, 100, 150), noise(1, 3, 100, 150, seed=1), noise(1, 3, 25, 40)
    after[..., 64:] += 0.5
    plan = plan_tiles(12, 18, 8, 0)  # in latents of 8 pixels, which leave out the last rows and columns
    rows, columns = [32, 64], [40, 64, 80, 104]
    assert plan.borders((100, 150), 8) == (rows, columns) == plan.borders((90, 140), 8)
    found = seams_of({"before": before, "after": after}, None, plan)
    assert [seam.name for seam in found] == ["before", "after"]
    assert found[1].score == seam_score(after[:, :3], rows, columns) > 1.2 > 1.05 > found[0].score
    assert found[1].describe() == f"after: edges at 6 tile borders are {found[1].score:.2f} times those elsewhere"
    one, _, last = seams_of({"small": small, "after": after}, before, plan)
    assert (one.name, last.name, last.score) == ("small, enlarged", "reference", found[0].score)
    assert one.score == seam_score(resize(small, (100, 150)), rows, columns)
    assert seams_of({"small": small, "after": after}, None, plan_tiles(12, 18, 30, 0)) == []  # one tile
    with pytest.raises(ValueError, match="these tiles are of a picture in the shape 18 : 12, but it is 100 x 150"):
        seams_of({"a": before, "b": after.transpose(2, 3)}, None, plan)


@pytest.mark.parametrize(("source", "scale", "tile", "overlap"), [((70, 91), 8, 256, 64), ((101, 60), 4, 128, 32)])
def test_tiles_by_side_and_overlap_are_those_of_the_upscaler(embedded, source, scale, tile, overlap):
    stage = plan_for(embedded, source, Target(scale=scale), UpscaleOptions(tile, overlap)).stages[-1]
    unit = embedded.first.networks.facts.latent_scale
    assert tiles_over(stage.size, tile, overlap).borders(stage.size, 1) == stage.tiles.borders(stage.size, unit)
    picture = torch.zeros(1, 3, *stage.size)
    assert seams_of({"a": picture, "b": picture}, None, stage.tiles)[0].score == 1
