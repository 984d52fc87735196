import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tudsr_core.tiling.blending import TileBlender, tile_weights
from tudsr_core.tiling.plan import plan_tiles
from tudsr_core.tiling.windows import gaussian, window

SIZES = st.integers(1, 300)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, st.integers(2, 96), st.data())
def test_tiles_cover_everything_and_weights_sum_to_one(height, width, tile, data):
    overlap = data.draw(st.integers(0, tile - 1))
    multiple = data.draw(st.sampled_from([1, 2]))
    spacing = data.draw(st.sampled_from(["even", "stride"]))
    kind = data.draw(st.sampled_from(["gaussian", "uniform", "published"]))
    if math.prod(-(-side // max(1, tile - overlap)) for side in (height, width)) > 400:
        return
    plan = plan_tiles(
        height * multiple, width * multiple, tile * multiple, overlap * multiple, multiple=multiple, spacing=spacing
    )
    total = torch.zeros(plan.height, plan.width, dtype=torch.float64)
    for box in plan:
        assert box.top % multiple == box.left % multiple == 0
        box.cut(total).add_(tile_weights(plan, box, kind))
    assert (total - 1).abs().max() < 1e-9
    assert len({(box.height, box.width) for box in plan}) == 1


def test_even_tiles_have_at_least_the_overlap_and_no_thin_gaps():
    for length in range(65, 400):
        offsets = plan_tiles(length, 1, 64, 16).tops
        gaps = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
        assert max(gaps) <= 48
        assert max(gaps) - min(gaps) <= 1
        assert offsets[0] == 0 and offsets[-1] == length - 64


def test_2048_pixels_take_25_tiles_of_64_latents():
    assert len(plan_tiles(256, 256, 64, 16)) == 25


def published_loop(length, tile, overlap):
    """The published grid, written as its counting loop."""
    stride, count = tile - overlap, 0
    position = 0
    while position < length:
        position = max(count * stride, 0) + tile
        count += 1
    return [min(i * stride, length - tile) for i in range(count)]


@pytest.mark.parametrize(("tile", "overlap"), [(64, 32), (96, 32), (64, 16), (48, 8)])
def test_stride_spacing_is_the_published_grid(tile, overlap):
    for length in range(tile, 401):
        assert list(plan_tiles(length, 1, tile, overlap, spacing="stride").tops) == published_loop(
            length, tile, overlap
        )
    counts = {length: len(plan_tiles(length, 1, 64, 32, spacing="stride").tops) for length in (64, 96, 128, 192, 256)}
    assert counts == {64: 1, 96: 2, 128: 3, 192: 5, 256: 7}


def test_small_pictures_get_one_tile_even_when_the_overlap_is_larger():
    plan = plan_tiles(20, 500, 64, 32)
    assert (plan.tile_height, plan.tile_width, plan.tops) == (20, 64, (0,))


@pytest.mark.parametrize("bad", [dict(tile=0, overlap=0), dict(tile=8, overlap=8), dict(tile=8, overlap=-1)])
def test_impossible_tiles_are_refused(bad):
    with pytest.raises(ValueError, match=r"tile|overlap"):
        plan_tiles(100, 100, **bad)


def published_weight(i, size, middle):
    return math.exp(-((i - middle) ** 2) / size**2 / (2 * 0.01)) / math.sqrt(2 * math.pi * 0.01)


def test_published_window_is_symmetric_in_x_and_half_a_pixel_off_in_y():
    for size in (64, 96):
        x, y = window(size, 32, "published", "x"), window(size, 32, "published", "y")
        for i in range(size):
            assert abs(float(x[i]) - published_weight(i, size, (size - 1) / 2)) < 1e-12
            assert abs(float(y[i]) - published_weight(i, size, size / 2)) < 1e-12
    x, y = window(64, 32, "published", "x"), window(64, 32, "published", "y")
    assert float(x[0]) == pytest.approx(2.19e-5, rel=5e-3) == float(x[-1])
    assert (float(y[0]), float(y[-1])) == (pytest.approx(1.49e-5, rel=5e-3), pytest.approx(3.21e-5, rel=5e-3))
    assert float(x.max()) == pytest.approx(3.977, rel=1e-3)


def test_pisa_window_is_the_symmetric_gaussian_on_both_axes():
    mask = gaussian(96, 9.6, 47.5)
    for i in range(96):
        assert abs(float(mask[i]) - published_weight(i, 96, 47.5)) < 1e-12


def test_gaussian_window_leaves_about_two_percent_at_a_tile_border():
    plan = plan_tiles(64 + 48, 8, 64, 16)
    first, second = (tile_weights(plan, box)[:, 0] for box in plan)
    assert float(first[-1]) == pytest.approx(0.02, abs=0.005)
    assert float(second[0]) == pytest.approx(0.02, abs=0.005)


@pytest.mark.parametrize("kind", ["gaussian", "uniform", "published"])
def test_canvas_gives_back_what_was_cut(kind, noise):
    plane = noise(2, 4, 96, 160)
    plan = plan_tiles(96, 160, 64, 32)
    canvas = TileBlender(plan, kind)
    for box in plan:
        canvas.add(box, box.cut(plane))
    assert (canvas.result() - plane).abs().max() < 1e-6


def test_canvas_is_the_weighted_mean_of_a_slow_loop(noise):
    plan = plan_tiles(9, 13, 6, 3, spacing="stride")
    tiles = [noise(1, 1, 6, 6, seed=i) for i in range(len(plan))]
    canvas = TileBlender(plan, "published")
    for box, value in zip(plan, tiles, strict=True):
        canvas.add(box, value)
    for y in range(9):
        for x in range(13):
            above = below = 0.0
            for box, value in zip(plan, tiles, strict=True):
                i, j = y - box.top, x - box.left
                if 0 <= i < 6 and 0 <= j < 6:
                    weight = published_weight(i, 6, 3) * published_weight(j, 6, 2.5)
                    above, below = above + weight * float(value[0, 0, i, j]), below + weight
            assert abs(above / below - float(canvas.result()[0, 0, y, x])) < 1e-6


def test_canvas_refuses_a_tile_of_another_shape(noise):
    plan = plan_tiles(8, 8, 4, 0)
    with pytest.raises(ValueError, match="tile 0"):
        TileBlender(plan).add(next(iter(plan)), noise(1, 1, 4, 3))


def test_batches_keep_reading_order():
    plan = plan_tiles(40, 40, 16, 4)
    assert [box.index for batch in plan.batches(4) for box in batch] == list(range(len(plan)))


def test_plans_of_millions_of_tiles_are_refused():
    assert len(plan_tiles(4096, 4096, 64, 32)) == 127**2
    with pytest.raises(ValueError, match="16,719,921 tiles, the limit is 262,144; raise the tile"):
        plan_tiles(4096, 4096, 8, 7)
