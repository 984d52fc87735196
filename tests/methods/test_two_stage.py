import math

import pytest
import torch
from conftest import identity_model

from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, count_ticks, plan_for, upscale
from tudsr_core.pictures.tensors import resize

PLAIN = UpscaleOptions(color_fix="none")


def resized(image, size, *between):
    """What an identity model must give: the chain of clamped bicubic resizes."""
    for step in (*between, size):
        image = resize(image, step).clamp(0, 1)
    return image


@pytest.mark.parametrize("window", ["gaussian", "uniform", "published"])
@pytest.mark.parametrize(("tile", "overlap", "batch"), [(64, 16, 1), (128, 64, 3), (512, 128, 5), (72, 0, 2)])
def test_identity_network_returns_the_resized_picture(window, tile, overlap, batch, noise):
    image = noise(1, 3, 23, 31)
    options = UpscaleOptions(tile, overlap, batch, window, "none")
    out = upscale(image, identity_model(), Target(scale=8), options)
    assert (out - resized(image, (184, 248), (92, 124))).abs().max() < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (3, 1), (7, 5), (1, 90), (13, 17), (65, 33)])
@pytest.mark.parametrize("scale", [1, 2, 3.3])
def test_odd_sizes_from_one_pixel(size, scale, noise):
    image = noise(1, 3, *size)
    out = upscale(image, identity_model(), Target(scale=scale), UpscaleOptions(64, 16, color_fix="none"))
    wanted = tuple(max(1, round(side * scale)) for side in size)
    factor = max(wanted[0] / size[0], wanted[1] / size[1])
    assert tuple(out.shape[-2:]) == wanted
    if factor <= 3:
        assert (out - resized(image, wanted)).abs().max() < 1e-5


def test_a_batch_equals_its_pictures_one_by_one(noise):
    images = noise(3, 3, 19, 27)
    together = upscale(images, identity_model(), Target(scale=4), UpscaleOptions(64, 16))
    alone = [upscale(image[None], identity_model(), Target(scale=4), UpscaleOptions(64, 16)) for image in images]
    assert torch.equal(together, torch.cat(alone))


def test_all_pictures_pass_stage_one_before_stage_two(noise):
    model, order = identity_model(), []
    for name, stage in (("one", model.first), ("two", model.second)):
        stage.networks.condition = lambda text, name=name: order.append(name)
    upscale(noise(3, 3, 8, 8), model, Target(scale=8), PLAIN)
    assert order == ["one"] * 3 + ["two"] * 3


def test_alpha_survives(noise):
    image = noise(1, 4, 12, 10)
    out = upscale(image, identity_model(), Target(scale=2), PLAIN)
    assert tuple(out.shape) == (1, 4, 24, 20)
    assert (out[:, 3:] - resize(image[:, 3:], (24, 20)).clamp(0, 1)).abs().max() < 1e-6


def test_constant_pictures_stay_constant():
    for value in (0.0, 0.5, 1.0):
        image = torch.full((1, 3, 17, 9), value)
        out = upscale(image, identity_model(), Target(scale=8), UpscaleOptions(64, 16))
        assert (out - value).abs().max() < 1e-5


def test_pointwise_network_tiled_equals_untiled(noise):
    image = noise(1, 3, 40, 56)
    outs = [
        upscale(image, identity_model(eps=torch.sin), Target(scale=3), UpscaleOptions(tile, overlap, color_fix="none"))
        for tile, overlap in ((64, 16), (512, 128))
    ]
    assert (outs[0] - outs[1]).abs().max() < 1e-6


def test_tiled_step_equals_the_published_blend(noise):
    """z_H of a position-dependent network against a slow average written out (tiles 64 / 32)."""
    from tudsr_core.methods.two_stage import StartLatent, restore_latent
    from tudsr_core.tiling.out_of_memory import TiledRun
    from tudsr_core.tiling.plan import plan_tiles

    z = noise(1, 4, 96, 160) - 0.5
    ramp = torch.linspace(0, 1, 64).view(1, 1, 64, 1)
    model = identity_model(eps=lambda tile: tile * ramp)
    sweep = TiledRun(plan_tiles(96, 160, 64, 32, spacing="stride"), "published")
    ours = restore_latent(StartLatent(z), model.first, sweep, lambda preview: None)
    above, below = torch.zeros(1, 4, 96, 160, dtype=torch.float64), torch.zeros(96, 160, dtype=torch.float64)

    def density(i, middle):
        return math.exp(-((i - middle) ** 2) / 64**2 / 0.02)

    mask = torch.tensor([[density(y, 32) * density(x, 31.5) for x in range(64)] for y in range(64)]).double()
    for top in (0, 32):
        for left in (0, 32, 64, 96):
            box = (..., slice(top, top + 64), slice(left, left + 64))
            above[box] += (z[box] * ramp).double() * mask
            below[box] += mask
    abar = 0.753692
    wanted = (z.double() - (1 - abar) ** 0.5 * above / below) / abar**0.5
    assert (ours - wanted).abs().max() < 1e-5


def test_out_of_memory_goes_on_where_it_stopped(noise, caplog):
    """First the batch shrinks, then the tile; every tile is ticked once and the picture stays the same."""
    image = noise(1, 3, 64, 64)
    options = UpscaleOptions(128, 32, 4, color_fix="none")
    calm = upscale(image, identity_model(), Target(scale=8), options)
    model, ticks = identity_model(), []
    networks = model.first.networks

    def predict(z, tiles, done=[0]):  # noqa: B006
        if len(z) > 1 and done[0] or z.shape[-1] > 8 and done[0] > 6:
            raise torch.OutOfMemoryError("simulated")
        done[0] += len(z)
        networks.shapes.append(tuple(z.shape))
        return networks.eps(z)

    networks.predict = predict
    out = upscale(image, model, Target(scale=8), options, lambda done, total, _: ticks.append((done, total)))
    assert (out - calm).abs().max() < 1e-5
    assert [line for line in caplog.messages] == [
        "out of memory: tile batch lowered to 2",
        "out of memory: tile batch lowered to 1",
        "out of memory: tiles lowered to 64 px",
    ]
    sides = [shape[-1] for shape in networks.shapes for _ in range(shape[0])]
    assert sides[:7] == [16] * 7 and set(sides[7:]) == {8}
    assert len(sides[7:]) < 25, "what was done must not be done again"
    assert ticks[-1][0] == ticks[-1][1] and [done for done, _ in ticks] == list(range(1, len(ticks) + 1))


def test_the_next_picture_and_stage_start_with_the_tiles_that_fitted(noise):
    images, options = noise(2, 3, 64, 64), UpscaleOptions(128, 32, 1, color_fix="none")
    model, failures, ticks = identity_model(), [], []
    for stage in (model.first, model.second):

        def predict(z, tiles, networks=stage.networks):
            if z.shape[-1] > 8:
                failures.append(1)
                raise torch.OutOfMemoryError("simulated")
            return networks.eps(z)

        stage.networks.predict = predict
    calm = upscale(images, identity_model(), Target(scale=8), options)
    out = upscale(images, model, Target(scale=8), options, lambda done, total, _: ticks.append((done, total)))
    assert (out - calm).abs().max() < 1e-5
    assert len(failures) == 1
    assert ticks[-1][0] == ticks[-1][1] == len(ticks)


def test_out_of_memory_everywhere_ends_with_a_clear_error(noise):
    model = identity_model()

    def fail(*_):
        raise torch.OutOfMemoryError("simulated")

    model.first.networks.predict = fail
    with pytest.raises(MemoryError, match="out of memory even with tiles"):
        upscale(noise(1, 3, 64, 64), model, Target(scale=2), PLAIN)


def test_other_errors_of_a_network_are_not_swallowed(noise):
    model = identity_model()

    def fail(*_):
        raise RuntimeError("mat1 and mat2 shapes")

    model.first.networks.predict = fail
    with pytest.raises(RuntimeError, match="mat1"):
        upscale(noise(1, 3, 8, 8), model, Target(scale=2))


def test_ticks_count_every_tile_and_can_cancel(noise):
    image, options = noise(2, 3, 40, 40), UpscaleOptions(64, 16)
    model, seen = identity_model(), []
    upscale(image, model, Target(scale=8), options, lambda done, total, _: seen.append((done, total)))
    total = count_ticks(model, plan_for(model, (40, 40), Target(scale=8), options), 2)
    assert seen == [(i + 1, total) for i in range(total)]

    def stop(done, total, preview):
        if done == 5:
            raise KeyboardInterrupt

    model = identity_model()
    with pytest.raises(KeyboardInterrupt):
        upscale(image, model, Target(scale=8), options, stop)
    assert model.first.networks.calls <= 5


def test_nan_in_and_nan_out_are_named(noise):
    image = noise(1, 3, 8, 8)
    image[0, 0, 3, 3] = float("nan")
    with pytest.raises(ValueError, match="picture contains NaN"):
        upscale(image, identity_model(), Target(scale=2))
    with pytest.raises(ValueError, match="stage one produced NaN"):
        upscale(noise(1, 3, 8, 8), identity_model(eps=lambda z: z / 0), Target(scale=2))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="picture"):
        upscale(torch.zeros(shape), identity_model(), Target(scale=2))


def test_a_missing_stage_two_is_named(noise):
    from dataclasses import replace

    with pytest.raises(ValueError, match="needs stage two"):
        upscale(noise(1, 3, 8, 8), replace(identity_model(), second=None), Target(scale=8))
