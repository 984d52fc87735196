"""The downsampler over the upsampler's own UNet, with networks of SD2.1's shape in miniature."""

import copy
from contextlib import nullcontext

import pytest
import torch
from command import tudsr
from PIL import Image

from tudsr_core.backends.local import load_shared_networks
from tudsr_core.diffusion import from_noise_level
from tudsr_core.models.downsampler_files import load_downsampler, write_downsampler
from tudsr_core.models.learned_damage import shrink
from tudsr_core.models.shared_downsampler import SharedConfig, SharedDownsampler, SharedNetworks
from tudsr_core.pictures import read_picture
from tudsr_core.training.config import LoraConfig, ModelConfig
from tudsr_core.training.networks import Restorer, add_lora, frozen, load_base
from tudsr_core.weights.tensor_files import CheckpointError


@pytest.fixture(scope="module")
def networks(small_sd):
    return load_shared_networks(small_sd / "base", "cpu")


def shaken(networks, seed=0):
    """A downsampler whose every part has an effect."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = SharedDownsampler(SharedConfig(rank=2, code=4), networks).eval()
        torch.nn.init.normal_(made.conv_out.weight, std=0.05)
        for half in made.up.values():
            torch.nn.init.normal_(half.weight, std=0.1)
    return made


def student(small_sd, checkpointing):
    """An upsampler whose adapter has an effect, over a backbone of its own."""
    vae, unet, text = load_base(ModelConfig(str(small_sd / "base")))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        unet = add_lora(unet, LoraConfig(4, 4.0))
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    network = Restorer(vae.requires_grad_(False), unet, text, from_noise_level(200))
    if checkpointing:
        network.save_memory()
        network.train()
    return network


def test_an_untrained_one_and_strength_0_are_the_downscale(networks, noise):
    sharp = noise(1, 3, 90, 70)
    assert torch.equal(SharedDownsampler(SharedConfig(rank=2), networks).degrade(sharp), shrink(sharp, 4))
    made = shaken(networks)
    assert torch.equal(made.degrade(sharp, 3.0, strength=0), shrink(sharp, 3.0))


def test_seeds_styles_and_odd_sizes(networks, noise):
    made, sharp = shaken(networks), noise(1, 3, 90, 70)
    poor = made.degrade(sharp, seed=3)
    assert poor.shape == (1, 3, 22, 18) and torch.equal(poor, made.degrade(sharp, seed=3))
    assert torch.equal(poor, made.degrade(sharp, seed=3, tile=16)), "the picture is never cut"
    assert (poor - made.degrade(sharp, seed=4)).abs().max() > 1e-3
    assert (poor - made.degrade(sharp, seed=3, style=noise(1, 3, 20, 20))).abs().max() > 1e-4


def test_the_backbone_is_one_and_stays_as_it_was(small_sd, noise):
    upsampler = student(small_sd, False)
    picture = noise(1, 3, 64, 64)
    with torch.no_grad():
        before = upsampler(picture)
        down = shaken(SharedNetworks(upsampler.unet, upsampler.vae, upsampler.text))
        down.degrade(picture)
        assert torch.equal(upsampler(picture), before)
    ours = {id(parameter) for parameter in down.parameters()}
    assert not ours & {id(parameter) for parameter in upsampler.parameters()}
    assert sum(one.numel() for one in down.parameters()) < sum(one.numel() for one in upsampler.unet.parameters())
    assert all(one.requires_grad == ("lora" in name) for name, one in upsampler.unet.named_parameters())
    # The upsampler's adapter has no part in the downsampler.
    with upsampler.unet.disable_adapter():
        bare = down.degrade(picture)
    assert torch.equal(down.degrade(picture), bare)


def test_copies_share_the_backbone_and_nothing_else(networks, noise):
    first = shaken(networks)
    second = copy.deepcopy(first)
    assert second.networks is first.networks
    sharp = noise(1, 3, 64, 64)
    made = first.degrade(sharp)
    assert torch.equal(second.degrade(sharp), made)
    with torch.no_grad():
        for half in second.up.values():
            half.weight.zero_()
    assert torch.equal(first.degrade(sharp), made) and not torch.equal(second.degrade(sharp), made)


@pytest.mark.parametrize("learns", [True, False])
def test_a_cycle_has_the_same_gradients_when_activations_are_computed_again(small_sd, noise, learns):
    """In the backward pass every block is computed again with the adapter that it had, though both share it."""

    def gradients(checkpointing):
        upsampler = student(small_sd, checkpointing)
        down = shaken(SharedNetworks(upsampler.unet, upsampler.vae, upsampler.text))
        low, code = noise(1, 3, 16, 16), torch.ones(1, 4)
        good = upsampler(noise(1, 3, 64, 64))
        with nullcontext() if learns else frozen(down):
            back = shrink(good, 4) + down(down.condition(good), shrink(good, 4), noise(1, 3, 16, 16, seed=3), code)
        (back - low).square().mean().backward()
        both = {f"up {name}": one for name, one in upsampler.named_parameters()}
        both |= {f"down {name}": one for name, one in down.named_parameters() if not name.startswith("style")}
        return {name: one.grad for name, one in both.items() if one.requires_grad and (learns or "up " in name)}

    plain, again = gradients(False), gradients(True)
    assert all(one is not None and one.abs().max() > 0 for name, one in plain.items() if "text" not in name)
    assert all(torch.allclose(plain[name], again[name], rtol=1e-3, atol=1e-7) for name in plain)


def test_files_and_the_command(networks, small_sd, noise, tmp_path):
    made, path = shaken(networks), tmp_path / "down.safetensors"
    write_downsampler(path, made)
    loaded = load_downsampler(path, networks)
    sharp = noise(1, 3, 64, 64)
    assert loaded.config == made.config and not any(one.requires_grad for one in loaded.parameters())
    assert (loaded.degrade(sharp) - made.degrade(sharp)).abs().max() < 5e-3  # float16 in the file
    with pytest.raises(CheckpointError, match="down.safetensors is an adapter of SD2.1-base"):
        load_downsampler(path)
    Image.new("RGB", (64, 80), (90, 120, 30)).save(tmp_path / "good.png")
    command = "degrade", tmp_path / "good.png", "-o", tmp_path / "poor.png", "--downsampler", path
    done = tudsr(*command)
    assert done.returncode == 1 and "an adapter of SD2.1-base" in done.stderr and len(done.stderr.splitlines()) == 1
    done = tudsr("inspect", path)
    assert done.returncode == 0 and "adapter of SD2.1-base" in done.stdout, done.stderr
    done = tudsr(*command, "--base", small_sd / "base", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    wanted = loaded.degrade(read_picture(tmp_path / "good.png").pixels)
    assert (read_picture(tmp_path / "poor.png").pixels - wanted).abs().max() < 0.6 / 255
