import math

import pytest
import torch

from tudsr_core.evaluation.metrics import seam_score
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, plan_for, upscale


def test_seam_score_is_border_energy_over_the_rest():
    picture = torch.zeros(1, 3, 6, 8)
    picture[..., 4:] = 0.5  # one step at column 4
    picture[..., 3:, :] += 0.25  # and a weaker one at row 3
    across, down, others = 6 * 0.5**2, 8 * 0.25**2, 6 * 6 + 4 * 8
    assert seam_score(picture, [], [4]) == pytest.approx((across / 6) / (down / (others + 8)))
    assert seam_score(picture, [3], [4]) == math.inf
    assert seam_score(torch.ones(1, 3, 6, 8), [3], [4]) == 1
    with pytest.raises(ValueError, match="border 8"):
        seam_score(picture, [], [8])


def test_seam_score_of_noise_is_one_and_rises_with_a_seam(noise):
    picture = noise(1, 3, 128, 128)
    assert seam_score(picture, [64], [32, 96]) == pytest.approx(1, abs=0.1)
    picture[..., 32:96] += 0.5
    assert seam_score(picture, [], [32, 96]) > 1.5


def borders(starts, side, length, scale):
    """Where, in pixels inside the picture, tiles of `side` latents begin or end."""
    return sorted({edge * scale for start in starts for edge in (start, start + side) if 0 < edge < length})


def test_borders_are_both_sides_of_a_tile():
    assert borders((0, 3, 6), 4, 10, 8) == [24, 32, 48, 56]


def test_the_embedded_model_leaves_no_grid(embedded):
    """Tiled against untiled within 2 % in the mean of five cuts, and nothing to be seen on flat and ramp pictures."""
    from tudsr_core.evaluation.measurement import example_path
    from tudsr_core.pictures.reading import read_picture

    options = UpscaleOptions(128, 32, color_fix="none")
    plan = plan_for(embedded, (48, 64), Target(scale=8), options).stages[-1]
    tiles, scale = plan.tiles, embedded.first.networks.facts.latent_scale
    rows = borders(tiles.tops, tiles.tile_height, tiles.height, scale)
    columns = borders(tiles.lefts, tiles.tile_width, tiles.width, scale)

    def both(picture):
        tiled = upscale(picture, embedded, Target(scale=8), options)
        return tiled, upscale(picture, embedded, Target(scale=8), UpscaleOptions(1024, 128, color_fix="none"))

    photo = read_picture(example_path()).pixels
    ratios = []
    for top, left in ((20, 40), (0, 0), (60, 100), (40, 70), (80, 10)):
        tiled, whole = both(photo[..., top : top + 48, left : left + 64])
        ratios.append(seam_score(tiled, rows, columns) / seam_score(whole, rows, columns))
        assert (tiled - whole).square().mean() < 1e-5  # 50 dB
    assert sum(ratios) / len(ratios) == pytest.approx(1, rel=0.02)
    ramp = torch.linspace(0.1, 0.9, 64).expand(1, 3, 48, 64).contiguous()
    for smooth in (torch.full_like(ramp, 0.4), ramp):
        tiled, whole = both(smooth)
        assert (tiled - whole).abs().max() < 1 / 255
