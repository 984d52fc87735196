import copy

import pytest
import torch
from small_vae import contents, make_vae, tiled_vae

from tudsr_core.vae import tiled as tiled_module
from tudsr_core.vae import where_it_fits
from tudsr_core.vae.layer_pass import DeviceFull
from tudsr_core.vae.settings import VAETiling
from tudsr_core.vae.tiled import TiledVAE, posterior_latent


def test_encode_and_decode_are_the_untiled_ones_with_their_scaling():
    vae = make_vae()
    ours, tiling, ticks = tiled_vae(vae), VAETiling(64), []
    pixels, z = contents(3, 120, 136)["random"].sigmoid(), contents(4, 15, 17)["gradient"]
    posterior = vae.encode(pixels * 2 - 1).latent_dist
    assert (ours.encode(pixels, lambda: ticks.append(1), tiling) - posterior.mode()).abs().max() < 1e-12
    assert len(ticks) == 2 * ours.count("encoder", (120, 136), tiling)
    drawn = ours.encode(pixels, lambda: None, tiling, seed=7)
    assert (drawn - posterior_latent(posterior.parameters, 4, 7)).abs().max() < 1e-12
    decoded = ours.decode(z, lambda: ticks.append(1), tiling)
    assert (decoded - (vae.decode(z).sample / 2 + 0.5)).abs().max() < 1e-12
    assert not decoded.requires_grad
    both = sum(ours.count(side, (120, 136), tiling) for side in ("encoder", "decoder"))
    assert len(ticks) == 2 * both


def test_weights_are_read_at_each_call():
    vae = make_vae()
    ours, z = tiled_vae(vae), contents(4, 8, 8, 1)["random"]
    before = ours.decode(z, lambda: None)
    vae.decoder.mid_block.resnets[0].norm1.weight.mul_(1.5)
    vae.decoder.conv_in.weight.mul_(0.5)
    after = ours.decode(z, lambda: None)
    assert (after - (vae.decode(z).sample / 2 + 0.5)).abs().max() < 1e-12
    assert (after - before).abs().max() > 1e-3


def test_an_unknown_tree_runs_whole_and_says_so(caplog):
    vae, ticks = make_vae(), []
    vae.decoder.extra = torch.nn.Identity()
    ours, z = tiled_vae(vae), contents(4, 8, 8)["random"]
    assert (ours.decode(z, lambda: ticks.append(1)) - (vae.decode(z).sample / 2 + 0.5)).abs().max() < 1e-12
    assert len(ticks) == 2 * ours.count("decoder", (64, 64)) == 2
    assert "whole pictures" in caplog.text and "extra" in caplog.text
    assert not ours.is_tiled


def test_layers_that_do_not_give_the_modules_result_are_not_used(caplog):
    vae = make_vae()
    forward = vae.decoder.forward
    vae.decoder.forward = lambda z: forward(z.flip(-1))  # the tree looks right, the order does not show in it
    ours, z = tiled_vae(vae), contents(4, 8, 8, 1)["random"]
    assert torch.equal(ours.decode(z, lambda: None), vae.decode(z).sample / 2 + 0.5)
    assert "whole pictures" in caplog.text
    pixels = contents(3, 64, 64, 1)["random"]
    assert (
        ours.encode(pixels, lambda: None, VAETiling(32)) - vae.encode(pixels * 2 - 1).latent_dist.mode()
    ).abs().max() < 1e-12


def test_feature_maps_go_where_they_fit(monkeypatch):
    vae, seen = make_vae(torch.float32), []
    monkeypatch.setattr(
        where_it_fits, "run_layers", lambda *args: seen.append(args[4].planes) or torch.zeros(1, 3, 64, 64)
    )
    monkeypatch.setattr(TiledVAE, "_difference", lambda self, side: "")
    z = torch.zeros(1, 4, 8, 16)
    ours = tiled_vae(vae)
    ours.target = tiled_module.ComputeTarget(torch.device("cuda"), torch.float32, lambda error: False)
    needed = ours.feature_map_bytes(64 * 128, "decoder") + 2 * ours.tile_bytes(VAETiling(64))
    for device, free in (("cpu", 0), ("cuda", needed + 1), ("cuda", needed)):
        ours = tiled_vae(vae, free)
        ours.target = tiled_module.ComputeTarget(torch.device(device), torch.float32, lambda error: False)
        ours.decode(z, lambda: None, VAETiling(64))
    assert seen == ["device", "device", "host"]


def test_feature_maps_of_sd_take_a_kilobyte_per_pixel():
    wide = make_vae(torch.float32, block_out_channels=(128, 256, 512, 512), norm_num_groups=32, layers_per_block=1)
    assert tiled_vae(wide).feature_map_bytes(1) == 4 * 256
    assert tiled_vae(wide).feature_map_bytes(10, "encoder") == 10 * 4 * 256


@pytest.mark.parametrize("channels", [4, 8])
def test_draw_is_mean_plus_deviation_times_noise(channels):
    moments = contents(channels, 3, 5)["random"].float() * 40
    assert torch.equal(posterior_latent(moments, 4, None), moments[:, :4])
    drawn = posterior_latent(moments, 4, 7)
    if channels == 4:
        assert torch.equal(drawn, moments)
        return
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    wanted = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(7))
    assert (drawn - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_an_overflow_of_float16_is_found_once_and_ticks_no_tile_twice(caplog):
    vae, ticks = make_vae(torch.float16), []
    vae.decoder.mid_block.resnets[0].conv2.bias[::2] = 6e4
    vae.decoder.mid_block.resnets[1].conv2.bias[::2] = 6e4
    truth = torch.nn.Module.to(copy.deepcopy(vae), torch.float32)
    ours, z = tiled_vae(vae), contents(4, 9, 12, 1)["random"].float()
    ours._streams("decoder")  # the probe may overflow, too
    ours._overflowing.clear()
    with caplog.at_level("INFO"):
        made = [ours.decode(z, lambda: ticks.append(1), VAETiling(32)) for _ in range(2)]
    assert caplog.text.count("overflowed float16: such layers") == 1
    assert len(ticks) == 2 * ours.count("decoder", (72, 96), VAETiling(32))
    assert torch.equal(*made)
    wanted = truth.decode(z).sample / 2 + 0.5
    assert (made[0] - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_full_device_sends_the_activations_to_host_memory(monkeypatch, caplog):
    seen, ticks, keep = [], [], {"level 0": ["of another picture"]}

    def run(tiling, on_tile, features, keep, careful):
        seen.append(tiling.planes)
        for _ in range(3 if tiling.planes == "device" else 5):
            on_tile()
        keep["level 0"].append(tiling.planes)
        if tiling.planes == "device":
            raise DeviceFull("full")
        return torch.ones(1)

    monkeypatch.setattr(where_it_fits, "run_layers", run)
    tilings = [VAETiling(64, "device"), VAETiling(64, "host")]
    made, overflowed = where_it_fits.run_where_it_fits((), tilings, lambda: ticks.append(1), {}, keep, False)
    assert made == 1 and not overflowed and seen == ["device", "host"] and len(ticks) == 5
    assert keep == {"level 0": ["of another picture", "host"]} and "host memory" in caplog.text
    with pytest.raises(MemoryError):
        where_it_fits.run_where_it_fits((), [VAETiling(64, "device")], lambda: None, {}, keep, False)
