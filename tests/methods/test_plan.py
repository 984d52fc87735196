import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tudsr_core.methods.plan import StageLimits, Target, plan_upscale, split_factor
from tudsr_core.methods.two_stage import UpscaleOptions
from tudsr_core.methods.zoom import ZoomOptions
from tudsr_core.tiling.fitting import NetworkFacts, fit_tile

SD = NetworkFacts(latent_scale=8, multiple=64, weight_bytes=2**30, tile_bytes_per_pixel=1000)


@pytest.mark.parametrize(
    ("factor", "stages"),
    [(1, [1]), (2, [2]), (3, [3]), (4, [2, 2]), (6, [3, 2]), (8, [4, 2]), (12, [3, 2, 2]), (16, [4, 2, 2])],
)
def test_published_factors(factor, stages):
    assert split_factor(factor, StageLimits()) == stages


def test_a_model_trained_for_x4_alone_uses_one_stage_up_to_4():
    limits = StageLimits(single_up_to=4)
    assert [split_factor(f, limits) for f in (4, 4.5, 8)] == [[4], [2.25, 2], [4, 2]]


@given(st.floats(1, 64))
def test_any_factor_is_split_within_the_native_limits(factor):
    limits = StageLimits()
    parts = split_factor(factor, limits)
    assert math.prod(parts) == pytest.approx(factor)
    assert parts[0] <= limits.first_max + 1e-6
    assert all(part == limits.second for part in parts[1:])


@pytest.mark.parametrize(
    ("target", "size"),
    [
        (Target(scale=4), (372, 564)),
        (Target(scale=2.5), (232, 352)),
        (Target(width=1000), (660, 1000)),
        (Target(height=1000), (1000, 1516)),
        (Target(long_edge=999), (659, 999)),
        (Target(width=1000, height=660), (660, 1000)),
        (Target(scale=1), (93, 141)),
    ],
)
def test_targets_give_exact_sizes(target, size):
    assert target.size_for((93, 141)) == size
    assert plan_upscale((93, 141), target, SD, StageLimits()).stages[-1].size == size


@pytest.mark.parametrize(
    ("target", "says"),
    [
        (Target(scale=0), "scale 0"),
        (Target(scale=-1), "scale -1"),
        (Target(scale=1e9), "too large"),
        (Target(scale=float("nan")), "scale nan"),
        (Target(scale=0.5), "smaller than the picture"),
        (Target(width=50), "smaller than the picture"),
        (Target(width=-5), "width -5"),
        (Target(width=1000, height=1000), "stretch"),
        (Target(), "exactly one"),
        (Target(scale=2, long_edge=500), "exactly one"),
    ],
)
def test_impossible_targets_name_the_problem(target, says):
    with pytest.raises(ValueError, match=says):
        target.size_for((93, 141))


def test_too_many_pixels_are_refused():
    with pytest.raises(ValueError, match="pixels"):
        Target(scale=64).size_for((4000, 4000))


@pytest.mark.parametrize("tile", [dict(tile_px=100), dict(tile_px=64), dict(overlap_px=512), dict(overlap_px=30)])
def test_tiles_that_do_not_fit_the_model_are_refused(tile):
    with pytest.raises(ValueError, match=r"tile|overlap"):
        plan_upscale((64, 64), Target(scale=2), SD, StageLimits(), **tile)


@pytest.mark.parametrize(
    ("tile", "overlap", "used"), [(128, 128, 64), (0, 512, 256), (72, 80, 32), (128, 120, 120), (0, 128, 128)]
)
def test_an_overlap_that_does_not_fit_follows_the_tile_and_says_so(tile, overlap, used, caplog):
    assert UpscaleOptions(tile, overlap).overlap_px == ZoomOptions(tile, overlap).overlap_px == used
    said = f"overlap {overlap} is not smaller than the tile ({tile or 512}); {used} is used"
    assert (said in caplog.text) == (used != overlap)


def test_plan_of_an_extreme_strip():
    plan = plan_upscale((2, 30000), Target(scale=8), SD, StageLimits())
    assert plan.size == (16, 240000)
    assert [stage.padded for stage in plan.stages] == [(64, 120000), (64, 240000)]
    assert all(stage.tiles.tile_height == 8 for stage in plan.stages)


def test_plan_counts_calls_and_speaks_plainly():
    plan = plan_upscale((256, 256), Target(scale=8), SD, StageLimits())
    assert [len(stage.tiles) for stage in plan.stages] == [4, 25]
    assert plan.calls == 29
    text = "\n".join(plan.describe())
    assert "256 x 256 to 2048 x 2048, 29 network calls" in text
    assert "stage 1: x4 to 1024 x 1024, 4 tiles of 576 x 576" in text
    assert "stage 2: x2 to 2048 x 2048, 25 tiles of 512 x 512" in text


@pytest.mark.parametrize(
    ("size", "tile", "count"),
    [
        ((300, 512), (512, 512), 1),
        ((576, 640), (576, 640), 1),
        ((704, 1024), (512, 576), 4),
        ((1024, 1024), (576, 576), 4),
        ((2048, 2048), (512, 512), 25),
        ((4096, 4096), (576, 576), 81),
    ],
)
def test_the_tile_fits_the_picture(size, tile, count):
    """Sides and counts worked out by hand: 2 x 576 - 1024 = 128, 5 x 512 - 2048 = 4 x 128."""
    assert fit_tile(size, 128, SD) == tile
    stage = plan_upscale(size, Target(scale=1), SD, StageLimits()).stages[-1]
    assert len(stage.tiles) == count
    starts = stage.tiles.tops, stage.tiles.lefts
    for offsets, side in zip(starts, (stage.tiles.tile_height, stage.tiles.tile_width), strict=True):
        assert all(a + side - b >= 16 for a, b in zip(offsets, offsets[1:], strict=False))


@given(st.integers(1, 80), st.integers(1, 80))
def test_a_fitted_tile_never_computes_more_than_one_of_512(height, width):
    size = height * 64, width * 64

    def latents(tile_px):
        tiles = plan_upscale(size, Target(scale=1), SD, StageLimits(), tile_px=tile_px).stages[-1].tiles
        return len(tiles) * tiles.tile_height * tiles.tile_width

    assert latents(0) <= latents(512)


def test_an_autoencoder_that_cannot_be_tiled_needs_memory_for_the_whole_picture():
    whole = NetworkFacts(8, 64, 0, 1000, picture_bytes_per_pixel=4000)
    plans = [plan_upscale((side, side), Target(scale=8), whole, StageLimits()) for side in (128, 256)]
    assert [plan.device_bytes for plan in plans] == [1024**2 * 4000, 2048**2 * 4000]


def test_device_memory_grows_with_the_tiles_at_once():
    """As many as are computed: no more than there are, and with tile batch 0 those that fit."""
    one = 512 * 512 * 1000
    for batch, free, side, tiles in (
        (1, 0, 256, 1),
        (3, 0, 256, 3),
        (50, 0, 256, 9),
        (4, 0, 96, 1),
        (0, 5 * one, 256, 4),
    ):
        facts = NetworkFacts(8, 64, 7, 1000, free_bytes=free)
        plan = plan_upscale(
            (side, side), Target(scale=4), facts, StageLimits(single_up_to=4), tile_px=512, tile_batch=batch
        )
        tile = plan.stages[0].tiles
        assert plan.device_bytes == 7 + tiles * tile.tile_height * tile.tile_width * 64 * 1000


def test_device_memory_does_not_grow_with_the_picture():
    small, large = (plan_upscale((side, side), Target(scale=8), SD, StageLimits()) for side in (128, 1024))
    assert small.device_bytes == large.device_bytes
    assert large.host_bytes == 64 * small.host_bytes
