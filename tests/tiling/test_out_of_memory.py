import pytest
import torch

from tudsr_core.tiling.blending import TileBlender, tile_weights
from tudsr_core.tiling.fitting import NetworkFacts, batch_for
from tudsr_core.tiling.out_of_memory import TiledRun
from tudsr_core.tiling.plan import plan_tiles


def facts(free):
    return NetworkFacts(latent_scale=8, multiple=8, weight_bytes=0, tile_bytes_per_pixel=100, free_bytes=free)


def test_the_tile_batch_is_what_fits_in_free_memory():
    tiles = plan_tiles(256, 256, 64, 16)
    one = 512 * 512 * 100
    assert [batch_for(tiles, facts(int(one * n / 0.8) + 5)) for n in (0, 1, 3, 7.5, 500)] == [1, 1, 3, 7, 16]
    assert batch_for(plan_tiles(64, 112, 64, 16), facts(500 * one)) == 2


@pytest.mark.parametrize("window", ["gaussian", "uniform", "published"])
@pytest.mark.parametrize("stops", [(0,), (1,), (9,), (24,), (3, 20), (7, 0)])
def test_weights_sum_to_one_after_any_stop(window, stops):
    """A canvas continued with smaller tiles, any number of times, is the weighted mean written out."""
    size, side, parts = 96, 32, []
    canvas = TileBlender(plan_tiles(size, size, side, 8), window)
    left = torch.ones(size, size, dtype=torch.float64)
    wanted = torch.zeros(size, size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for stop in (*stops, None):
        given = torch.zeros_like(left)
        for tile in canvas.pending()[:stop]:
            value = torch.randn(1, 1, tile.height, tile.width, generator=generator)
            canvas.add(tile, value)
            parts.append(tile)
            weights = tile_weights(canvas.plan, tile, window) * tile.cut(left)
            tile.cut(given).add_(weights)
            tile.cut(wanted).add_(weights * value[0, 0].double())
        left = left - given
        if stop is not None:
            side //= 2
            canvas = TileBlender(plan_tiles(size, size, side, side // 4), window, after=canvas)
    assert left.abs().max() < 1e-9
    assert (canvas.result()[0, 0].double() - wanted).abs().max() < 1e-5


def test_tiles_that_lie_in_finished_parts_are_not_done_again():
    canvas = TileBlender(plan_tiles(256, 256, 64, 16))
    for tile in canvas.pending()[:20]:  # four of five rows
        canvas.add(tile, torch.zeros(1, 1, 64, 64))
    rest = TileBlender(plan_tiles(256, 256, 32, 8), after=canvas)
    assert {tile.top for tile in rest.pending()} == {top for top in rest.plan.tops if top + 32 > 192}


def test_a_continued_canvas_has_no_seam():
    """Old and new predictions differ by a constant; where they meet, the blend must not jump."""
    canvas = TileBlender(plan_tiles(128, 128, 64, 16))
    for tile in canvas.pending()[:4]:
        canvas.add(tile, torch.zeros(1, 1, 64, 64))
    rest = TileBlender(plan_tiles(128, 128, 32, 8), after=canvas)
    for tile in rest.pending():
        rest.add(tile, torch.ones(1, 1, 32, 32))
    blend = rest.result()[0, 0]
    assert blend.min() == 0 and (blend.max() - 1).abs() < 1e-6
    steps = torch.maximum(blend.diff(dim=0).abs().max(), blend.diff(dim=1).abs().max())
    assert steps < 0.15, "as smooth as an ordinary tile border"


def test_no_smaller_tile_is_a_clear_error():
    def fail(canvas):
        raise torch.OutOfMemoryError("simulated")

    tiled_run = TiledRun(plan_tiles(64, 64, 32, 8), batch=3)
    with pytest.raises(MemoryError, match="tiles of 64 px"):
        tiled_run.blend(fail, lambda error: True)
    with pytest.raises(torch.OutOfMemoryError):
        TiledRun(plan_tiles(64, 64, 32, 8)).blend(fail, lambda error: False)


def test_tiles_shrink_to_eight_units_and_overlap_by_at_most_half_a_side():
    """Eight units is where it ends; an overlap near the side would take many times the tiles."""
    seen = []

    def fail(canvas):
        seen.append((canvas.plan.tile_height, canvas.plan.overlap))
        raise torch.OutOfMemoryError("simulated")

    tiled_run = TiledRun(plan_tiles(128, 128, 64, 48, multiple=2), unit=2)
    with pytest.raises(MemoryError, match="tiles of 128 px"):
        tiled_run.blend(fail, lambda error: True)
    assert seen == [(64, 48), (32, 16), (16, 8)]
