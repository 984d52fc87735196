"""Tiled against untiled: the modules themselves, run on the whole picture, are the truth."""

import copy
from fractions import Fraction
from functools import cache

import pytest
import torch
from conftest import LONG
from live_bytes import device_peak
from small_vae import SHALLOW, Shy, contents, make_vae, target

from tudsr_core.vae.graph import read_layers, run_untiled
from tudsr_core.vae.settings import VAETiling
from tudsr_core.vae.stream import count_tiles, run_layers

START = {"encoder": Fraction(1), "decoder": Fraction(1, 8)}
SIZES = {"encoder": (3, 152, 213), "decoder": (4, 19, 27)}


@pytest.fixture(autouse=True)
def one_thread():
    """Tiles of these sizes are not worth a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiled(vae, side, x, tiling, on_tile=lambda: None, fails=lambda error: False):
    layers, where = read_layers(vae, side), target(next(vae.parameters()).dtype, fails)
    return torch.cat([run_layers(layers, START[side], one, where, tiling, on_tile) for one in x.split(1)])


@cache
def truths(side, dtype):
    """Return `{content: result}` of the untiled network."""
    # One picture at a time: in float32, untiled, a batch of two is itself off by 1e-4 on constant pictures.
    vae = make_vae(dtype)
    return {
        name: torch.cat([run_untiled(vae, side, one) for one in x.to(dtype).split(1)])
        for name, x in contents(*SIZES[side]).items()
    }


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("tile", [8, 16, 17, 40])
def test_float64_equals_untiled(side, tile):
    vae = make_vae()
    for name, x in contents(*SIZES[side]).items():
        truth = truths(side, torch.float64)[name]
        for planes in ("device", "host") if name == "random" else ("device",):
            error = (tiled(vae, side, x, VAETiling(tile * 8, planes)) - truth).abs().max()
            assert error <= 1e-12, (name, planes, float(error))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("tile", [8, 16, 17, 40])
def test_float32_equals_untiled(side, tile):
    vae = make_vae(torch.float32)
    for name, x in contents(*SIZES[side]).items():
        ours = tiled(vae, side, x.float(), VAETiling(tile * 8, "device"))
        error = (ours - truths(side, torch.float32)[name]).abs().max()
        assert error <= 5e-5, (name, float(error))


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_bfloat16_is_as_close_to_the_truth_as_untiled(side):
    exact, rough = make_vae(), make_vae(torch.bfloat16)
    x = contents(*SIZES[side])["random"]
    truth = run_untiled(exact, side, x)
    plain, ours = (run_untiled(rough, side, x.bfloat16()), tiled(rough, side, x.float(), VAETiling(128, "device")))
    assert (ours - truth).square().mean() < 1.5 * (plain - truth).square().mean()


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (8, 100), (31, 8)])
def test_any_size_of_the_encoder(size):
    vae = make_vae()
    x = contents(3, *size, batch=1)["random"]
    assert (tiled(vae, "encoder", x, VAETiling(16, "device")) - run_untiled(vae, "encoder", x)).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (dict(use_quant_conv=False, use_post_quant_conv=False), 8),
        (dict(mid_block_add_attention=False), 8),
        (SHALLOW | dict(layers_per_block=1), 2),
    ],
)
def test_other_shapes_of_the_same_family(config, scale):
    vae = make_vae(**config)
    x, z = contents(3, 40, 56, 1)["gradient"], contents(4, 40 // scale, 56 // scale, 1)["halves"]
    for side, given, start in (("encoder", x, Fraction(1)), ("decoder", z, Fraction(1, scale))):
        ours = run_layers(read_layers(vae, side), start, given, target(z.dtype), VAETiling(24, "device"), lambda: None)
        assert (ours - run_untiled(vae, side, given)).abs().max() < 1e-12


def test_every_tile_ticks_once_and_can_cancel():
    vae, x, ticks = make_vae(torch.float32), torch.randn(1, 4, 19, 27), []
    for attention in ("exact", "windowed"):
        tiling = VAETiling(64, "device", attention)
        ticks.clear()
        tiled(vae, "decoder", x, tiling, lambda: ticks.append(1))
        assert len(ticks) == count_tiles(read_layers(vae, "decoder"), START["decoder"], (19, 27), tiling)

    def stop():
        ticks.append(1)
        if len(ticks) == 5:
            raise KeyboardInterrupt

    ticks.clear()
    with pytest.raises(KeyboardInterrupt):
        tiled(vae, "decoder", x, VAETiling(64, "device"), stop)
    assert len(ticks) == 5


def test_windowed_attention_is_close_but_not_exact():
    vae = make_vae()
    z = contents(4, 16, 16, batch=1)["random"]
    truth = run_untiled(vae, "decoder", z)
    near = tiled(vae, "decoder", z, VAETiling(32, "device", "windowed"))
    assert 1e-9 < (near - truth).abs().mean() < 0.2 * truth.abs().mean()
    whole = tiled(vae, "decoder", z, VAETiling(128, "device", "windowed"))
    assert (whole - truth).abs().max() < 1e-12


def test_threads_change_nothing_that_can_be_seen():
    vae, z, results = make_vae(torch.float32), torch.randn(1, 4, 19, 27), []
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        results.append(tiled(vae, "decoder", z, VAETiling(64, "device")))
    assert torch.equal(results[0], results[2])
    assert (results[0] - results[1]).abs().max() <= 1e-6 * results[0].abs().max()


def test_out_of_memory_halves_the_tile_where_it_is_and_keeps_the_result(caplog):
    vae = make_vae()
    z = contents(4, 19, 27, batch=1)["random"]
    truth = run_untiled(vae, "decoder", z)
    shy = vae.decoder.conv_out = Shy(vae.decoder.conv_out, 40 * 70)
    out = tiled(
        vae, "decoder", z, VAETiling(64, "device"), fails=lambda error: isinstance(error, torch.OutOfMemoryError)
    )
    assert (out - truth).abs().max() < 1e-12
    failed = [size for size in shy.calls if size[0] * size[1] > 40 * 70]
    assert len(failed) == 1, "the following tiles must begin small"
    shy.most = 4
    with pytest.raises(MemoryError, match="smallest tiles"):
        tiled(vae, "decoder", z, VAETiling(64, "device"), fails=lambda error: isinstance(error, torch.OutOfMemoryError))
    with pytest.raises(torch.OutOfMemoryError):
        tiled(vae, "decoder", z, VAETiling(64, "device"))


class Saturating(torch.nn.Module):
    """A convolution whose float16 result overflows; what float16 does with large activations."""

    def __init__(self, inner):
        super().__init__()
        self.base_layer = inner

    def forward(self, x):
        y = self.base_layer(x)
        return y * torch.inf if y.dtype == torch.float16 else y


@pytest.mark.parametrize("at", ["mid_block.resnets.0.conv2", "up_blocks.1.upsamplers.0.conv", "conv_out"])
def test_a_layer_that_overflows_float16_is_done_in_float32(at, caplog):
    vae = make_vae(torch.float16)
    z = contents(4, 9, 12, batch=1)["random"].float()
    truth = run_untiled(make_vae(torch.float32), "decoder", z)
    parent, name = vae.decoder.get_submodule(at.rpartition(".")[0]), at.rpartition(".")[2]
    setattr(parent, name, Saturating(getattr(parent, name)))
    with caplog.at_level("INFO"):
        out = tiled(vae, "decoder", z, VAETiling(32, "host"))
    assert (out - truth).abs().max() < 0.05 * truth.abs().max()
    assert caplog.text.count("overflowed float16") == 1


def test_large_residuals_travel_in_float32():
    """Sums beyond float16's 65504 stay right from the layer that overflowed to the end."""
    half = make_vae(torch.float16)
    for block in half.decoder.mid_block.resnets:
        block.conv2.bias[::2] = 6e4
    z = contents(4, 9, 12, batch=1)["random"].float()
    truth = run_untiled(torch.nn.Module.to(copy.deepcopy(half), torch.float32), "decoder", z)
    assert not run_untiled(half, "decoder", z.half()).isfinite().all()
    out = tiled(half, "decoder", z, VAETiling(32, "host"))
    assert (out - truth).abs().max() < 0.05 * truth.abs().max()


def decoder_peak(vae, start, z, tiling, monkeypatch):
    """Return the most bytes alive at once on the device while `z` is decoded."""
    layers, where = read_layers(vae, "decoder"), target(next(vae.parameters()).dtype)
    return device_peak(lambda: run_layers(layers, start, z, where, tiling, lambda: None), [z], monkeypatch)


@pytest.mark.parametrize("tile", [256, pytest.param(512, marks=LONG)])
def test_device_memory_does_not_grow_from_4_to_8_tiles_a_side(monkeypatch, tile):
    narrow = dict(block_out_channels=(2,) * 4, norm_num_groups=1, layers_per_block=0, mid_block_add_attention=False)
    vae = make_vae(torch.float32, **narrow)
    small, large = (
        decoder_peak(vae, START["decoder"], torch.randn(1, 4, side, side), VAETiling(tile, "host"), monkeypatch)
        for side in (tile // 2, tile)
    )
    assert large <= 1.1 * small
    assert small < (4 * tile) ** 2 * 2 * 4, "not even one whole feature map"


def test_device_memory_of_the_attention_does_not_grow(monkeypatch):
    vae = make_vae(torch.float32, **SHALLOW, layers_per_block=0)
    small, large = (
        decoder_peak(vae, Fraction(1, 2), torch.randn(1, 4, side, side), VAETiling(32, "host"), monkeypatch)
        for side in (48, 96)
    )
    assert large <= 1.1 * small
