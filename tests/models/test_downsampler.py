"""Both downsamplers: strength, seeds, tiles, factors, styles, and files that are not what they should be."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_run import VAE

from tudsr_core.models.downsampler import Downsampler, DownsamplerConfig, block_waves
from tudsr_core.models.downsampler_files import load_downsampler, write_downsampler
from tudsr_core.models.learned_damage import shrink
from tudsr_core.pictures import gaussian_blur
from tudsr_core.pictures.tensors import resize
from tudsr_core.weights.tensor_files import CheckpointError

CONFIGS = {
    "pixel": DownsamplerConfig("pixel", 12, 2, 4, 3),
    "latent": DownsamplerConfig("latent", 12, 2, 4, vae=VAE),
}


@pytest.fixture(params=CONFIGS)
def network(request):
    """A network of random weights, whose damage is large enough to be seen."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = Downsampler(CONFIGS[request.param]).eval().requires_grad_(False)
        torch.nn.init.normal_(made.conv_out.weight, std=0.02)
        for block in made.blocks:
            torch.nn.init.normal_(block.film.weight, std=0.5)
    return made


def test_strength_0_is_the_downscale_and_strength_multiplies_the_damage(network, noise):
    sharp = noise(2, 3, 41, 58)
    base = resize(sharp, (10, 14)).clamp(0, 1)
    assert torch.equal(network.degrade(sharp, strength=0), base) and torch.equal(shrink(sharp, 4), base)
    # Small enough that nothing is clamped away from the middle greys.
    grey = 0.5 + 0.01 * (sharp - 0.5)
    low = shrink(grey, 4)
    half, whole = (network.degrade(grey, strength=s) - low for s in (0.25, 0.5))
    inside = ((low + 2 * half) > 0) & ((low + 2 * half) < 1)
    assert whole[inside].std() > 1e-3 and inside.float().mean() > 0.5
    assert torch.allclose(2 * half[inside], whole[inside], atol=1e-5)


def test_the_same_seed_makes_the_same_bytes_and_a_batch_counts_up(network, noise):
    sharp = noise(1, 3, 40, 40)
    made = network.degrade(sharp, seed=7)
    assert torch.equal(made, network.degrade(sharp, seed=7)) and made.shape == (1, 3, 10, 10)
    assert (made - network.degrade(sharp, seed=8)).abs().max() > 1e-3
    both = network.degrade(torch.cat([sharp, sharp]), seed=7)
    assert torch.allclose(both, torch.cat([made, network.degrade(sharp, seed=8)]), atol=1e-6)
    assert 0 <= float(made.min()) and float(made.max()) <= 1


@pytest.mark.parametrize(("size", "factor"), [((203, 161), 4.0), ((97, 130), 2.7), ((30, 41), 1.0), ((401, 331), 8.0)])
def test_tiles_make_the_same_picture(network, noise, size, factor):
    sharp, ticks = noise(1, 3, *size), []
    whole = network.degrade(sharp, factor, tile=1000)
    tiled = network.degrade(sharp, factor, tile=13, tick=lambda done, total, _: ticks.append((done, total)))
    assert whole.shape[-2:] == tuple(round(side / factor) for side in size)
    assert (whole - tiled).abs().max() < 1e-5 and (whole - shrink(sharp, factor)).abs().max() > 1e-2
    assert ticks == [(number, len(ticks)) for number in range(1, len(ticks) + 1)] and len(ticks) > 1


def test_nothing_beyond_the_reach_has_an_effect(network, noise):
    """Tiles are exact because of this; within the reach something has, so the reach is no idle bound."""
    with torch.no_grad():
        low, code = noise(1, 3, 41, 41), torch.ones(1, 4)
        sharp, maps = noise(1, 3, 164, 164), noise(1, network.noise_channels, 41, 41)
        made = network(network.condition(sharp), low, maps, code)
        sharp[..., :4, :4] += 1
        moved = network(network.condition(sharp), low, maps, code)
    far = (made != moved).any(1)[0].nonzero().max()
    assert 4 <= far <= network.reach


def test_what_is_added_keeps_content_and_colour(network, noise):
    """What a blur leaves of the damage is small beside the damage, unless the network may move colours."""
    sharp = torch.full((1, 3, 256, 256), 0.5)
    added = network.degrade(sharp, strength=0.2) - 0.5
    free = Downsampler(replace(network.config, keeps=False))
    free.load_state_dict(network.state_dict())
    moved = free.degrade(sharp, strength=0.2) - 0.5
    kept, shifted = (float(gaussian_blur(one, 2.0)[..., 16:-16, 16:-16].std() / one.std()) for one in (added, moved))
    assert float(added.mean().abs()) < 0.02 * float(added.std()) and kept < 0.5 * shifted


def test_a_style_gives_the_kind_of_damage_and_the_seed_its_noise(network, noise):
    sharp, styles = noise(1, 3, 40, 40), [noise(1, 3, 24, 31, seed=2), 0.1 + 0.05 * noise(1, 3, 24, 31, seed=3)]
    first, second = (network.degrade(sharp, style=style) for style in styles)
    assert (first - second).abs().max() > 1e-4
    codes = [network.style(style) for style in styles]
    assert all(float(code.norm()) == pytest.approx(2, abs=1e-5) for code in codes)
    assert float(network.draw((4, 4), 0)[1].norm()) == pytest.approx(2, abs=1e-5)
    assert torch.equal(first, network.degrade(sharp, style=styles[0]))
    assert not torch.equal(first, network.degrade(sharp, seed=1, style=styles[0]))


def test_the_latent_network_begins_at_resshifts_noise():
    """Its input at the end of the published chain: (v + 1.98 eps) / sqrt(1.98^2 + 1), with v in -1..1."""
    network, seen = Downsampler(CONFIGS["latent"]), []
    network.conv_in.register_forward_hook(lambda _, given, __: seen.append(given[0]))
    base, eps = torch.full((1, 3, 4, 4), 0.75), torch.randn(1, 3, 4, 4)
    network(network.condition(torch.rand(1, 3, 16, 16)), base, eps, torch.ones(1, 4))
    assert torch.allclose(seen[0][:, 4:7], (0.5 + 1.98 * eps) / 2.2181975, atol=1e-6)


def test_waves_tell_where_in_a_block_a_pixel_is():
    waves = block_waves((32, 48), (0, 0))
    assert torch.equal(waves[..., 16:, :], waves[..., :16, :]) and torch.equal(waves[..., 16:32], waves[..., :16])
    assert len({tuple(place) for place in waves[0, :, :16, :16].flatten(1).T.tolist()}) == 256
    assert torch.equal(waves[..., 5:, 3:], block_waves((27, 45), (5, 3)))


def test_an_untrained_network_is_the_downscale(noise):
    sharp = noise(1, 3, 40, 40)
    for config in CONFIGS.values():
        assert torch.equal(Downsampler(config).degrade(sharp), shrink(sharp, 4))


def test_numbers_out_of_range_are_refused(network, noise):
    sharp = noise(1, 3, 16, 16)
    with pytest.raises(ValueError, match="factor 9 must be from 1 to 8"):
        network.degrade(sharp, 9)
    with pytest.raises(ValueError, match=r"strength 2 must be from 0 to 1\.5"):
        network.degrade(sharp, strength=2)
    with pytest.raises(ValueError, match="tile 0 must be 1 or more"):
        network.degrade(sharp, tile=0)
    with pytest.raises(ValueError, match="kind latent needs the config of an autoencoder"):
        DownsamplerConfig("latent")


def test_a_file_makes_the_same_picture(network, noise, tmp_path):
    path, sharp = tmp_path / "down.safetensors", noise(1, 3, 40, 40)
    write_downsampler(path, network, {"training": "some"})
    loaded = load_downsampler(path)
    assert loaded.config == network.config and not any(one.requires_grad for one in loaded.parameters())
    assert (loaded.degrade(sharp) - network.degrade(sharp)).abs().max() < 5e-3  # float16 in the file
    assert path.stat().st_size < 2.2 * sum(one.numel() for one in network.state_dict().values()) + 20000


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "tudsr-model/1"}, "is no downsampler .its metadata says tudsr-model/1"),
        ({"downsampler": "[1]"}, "must be a table"),
        ({"downsampler": "{"}, "cannot be read"),
        ({"downsampler": {"width": 10**9}}, "width 1000000000 must be from 1 to 512"),
        ({"downsampler": {"width": 16}}, "wrong shape"),
        ({"downsampler": {"kind": "other"}}, "kind is 'other'; it must be one of: pixel, latent"),
        ({"downsampler": {"vae": "x"}}, "no table of settings|none"),
        ({"downsampler": {"more": 1}}, "says more, which this version does not know"),
        ({"downsampler": {"keeps": 1}}, "keeps is '1', it must be true or false"),
        ({"downsampler": {"kappa": "x"}}, "'kappa' is x, it must be a number"),
    ],
)
def test_files_that_are_something_else_are_named(network, tmp_path, change, says):
    path = tmp_path / "down.safetensors"
    write_downsampler(path, network)
    about = json.loads(json.dumps({"format": "tudsr-downsampler/1", "downsampler": vars(network.config)}))
    for name, value in change.items():
        about[name] = about[name] | value if isinstance(value, dict) else value
    said = {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}
    save_file(load_file(path), path, said)
    with pytest.raises(CheckpointError, match=says) as refused:
        load_downsampler(path)
    assert "down.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_weights_that_are_no_numbers_are_named(network, tmp_path):
    path = tmp_path / "down.safetensors"
    network.conv_in.bias[0] = float("nan")
    write_downsampler(path, network)
    with pytest.raises(CheckpointError, match=r"conv_in\.bias contains NaN"):
        load_downsampler(path)
