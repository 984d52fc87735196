"""The embedded model's networks in plain torch: equal to diffusers' classes, and refusing what they are not."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC, UNet2DConditionModel
from safetensors.torch import save_file

from tudsr_core.backends.local import Backbone, LocalNetworks, load_embedded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.stages import Stage, TwoStageModel
from tudsr_core.methods.two_stage import upscale
from tudsr_core.models.embedded import load_networks
from tudsr_core.weights.checkpoints import embedded_path, read_model, write_model
from tudsr_core.weights.tensor_files import CheckpointError, read_file

ROOT = Path(__file__).parents[2]
WITHOUT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "without"), str(ROOT)])}


@pytest.fixture(scope="module")
def file():
    return read_model(embedded_path())


@pytest.fixture(scope="module")
def plain(file):
    return load_networks(file.vae_config, file.vae, file.unet_config, file.unet, "test")


@pytest.fixture(scope="module")
def stock(file):
    vae, unet = AutoencoderDC.from_config(file.vae_config), UNet2DConditionModel.from_config(file.unet_config)
    vae.load_state_dict(file.vae)
    unet.load_state_dict(file.unet)
    return vae.eval(), unet.eval()


def furthest(ours, theirs):
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max())


@pytest.mark.parametrize("size", [(64, 64), (40, 56), (4, 8), (132, 20)])
@torch.inference_mode()
def test_the_networks_are_those_of_diffusers(plain, stock, noise, size):
    pixels = noise(2, 3, *size) * 2 - 1
    latents = noise(2, 32, size[0] // 4, size[1] // 4, seed=1) * 4 - 2
    assert furthest(plain[0].encode(pixels).latent, stock[0].encode(pixels).latent) < 1e-6
    assert furthest(plain[0].decode(latents).sample, stock[0].decode(latents).sample) < 1e-6
    text = torch.zeros(2, 1, 32)
    for t in (0, 50, 200, torch.tensor(999), torch.tensor([3, 700]), torch.tensor([0.5, 12.25])):
        ours = plain[1](latents, t, encoder_hidden_states=text).sample
        assert furthest(ours, stock[1](latents, t, encoder_hidden_states=text).sample) < 1e-6


@torch.inference_mode()
def test_the_networks_are_those_of_diffusers_in_half_precision_too(file, stock, noise):
    vae, unet = load_networks(file.vae_config, file.vae, file.unet_config, file.unet, "test")
    halves = [network.to(torch.bfloat16) for network in (vae, unet)]
    theirs = [type(one).from_config(one.config) for one in stock]
    for ours, other in zip(halves, theirs, strict=True):
        other.load_state_dict(ours.state_dict())
        other.to(torch.bfloat16).eval()
    z = noise(1, 32, 9, 7).bfloat16()
    assert torch.equal(halves[0].decode(z).sample, theirs[0].decode(z).sample)
    eps = theirs[1](z, 200, encoder_hidden_states=torch.zeros(1, 1, 32).bfloat16()).sample
    assert torch.equal(halves[1](z, 200).sample, eps)


def test_the_state_dicts_are_those_of_diffusers(plain, stock):
    for ours, theirs in zip(plain, stock, strict=True):
        mine, other = ours.state_dict(), theirs.state_dict()
        assert {key: value.shape for key, value in mine.items()} == {key: value.shape for key, value in other.items()}


def test_the_picture_is_the_one_that_diffusers_makes(embedded, file, stock, noise):
    backbone = Backbone(*stock, lambda *texts: torch.zeros(len(texts), 1, 32), torch.device("cpu"), torch.float32)
    first = Stage(LocalNetworks(backbone), (file.first_step,), "stage one")
    second = Stage(LocalNetworks(backbone, file.second.unet), file.second.steps_for(2), "stage two")
    image = noise(1, 3, 40, 28)
    made = upscale(image, embedded, Target(scale=8))
    assert torch.equal(made, upscale(image, TwoStageModel(first, second, file.limits), Target(scale=8)))


def changed(file, part, **values):
    """Return `file` with other values in a config; None takes a key away."""
    config = getattr(file, part) | values
    return replace(file, **{part: {key: value for key, value in config.items() if value is not None}})


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        ("vae_config", {"timestep_spacing": "x"}, "'timestep_spacing' is not known"),
        ("vae_config", {"decoder_act_fns": "silu"}, "'decoder_act_fns' is not known"),
        ("vae_config", {"encoder_out_shortcut": None}, "encoder_out_shortcut is missing"),
        ("vae_config", {"encoder_out_shortcut": True}, "encoder_out_shortcut cannot be True"),
        (
            "vae_config",
            {"decoder_block_types": "EfficientViTBlock"},
            "decoder_block_types cannot be 'EfficientViTBlock'",
        ),
        ("vae_config", {"encoder_qkv_multiscales": [[], [], [5]]}, "encoder_qkv_multiscales cannot be"),
        ("vae_config", {"encoder_layers_per_block": [0, 0, 1]}, "0 first, and above 0 between"),
        ("vae_config", {"encoder_layers_per_block": [0, 40, 0]}, "encoder_layers_per_block cannot be"),
        ("vae_config", {"decoder_layers_per_block": [0, 1]}, "different lengths"),
        ("vae_config", {"encoder_block_out_channels": [48, 48, 50]}, "48 channels do not fold into 50"),
        ("vae_config", {"scaling_factor": 0.0}, "scaling_factor cannot be 0.0"),
        ("vae_config", {"scaling_factor": 1e-300}, "scaling_factor cannot be 1e-300"),
        ("vae_config", {"latent_channels": 16}, "its UNet has 32 channels in and 32 out, but latents have 16"),
        (
            "unet_config",
            {"class_embed_type": None, "only_cross_attention": False},
            "'only_cross_attention' is not known",
        ),
        ("unet_config", {"mid_block_type": "UNetMidBlock2DCrossAttn"}, "mid_block_type cannot be"),
        ("unet_config", {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}, "down_block_types cannot be"),
        ("unet_config", {"layers_per_block": 40}, "layers_per_block cannot be 40"),
        ("unet_config", {"norm_num_groups": 5}, "divisible by num_groups"),
        ("unet_config", {"norm_eps": None}, "norm_eps is missing"),
        ("unet_config", {"layers_per_block": True}, "layers_per_block cannot be True"),
    ],
)
def test_config_keys_that_are_not_implemented_are_refused_by_name(file, tmp_path, part, values, says):
    path = tmp_path / "other.safetensors"
    write_model(path, changed(file, part, **values))
    with pytest.raises(CheckpointError, match=says) as refused:
        load_embedded("cpu", path=path)
    assert "other.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_weights_that_do_not_fit_are_named(file, tmp_path):
    path = tmp_path / "other.safetensors"
    fewer, more = dict(file.unet), dict(file.vae)
    lost = fewer.pop("up_blocks.1.resnets.2.conv2.weight")
    write_model(path, replace(file, unet=fewer))
    with pytest.raises(CheckpointError, match=r"missing up_blocks\.1\.resnets\.2\.conv2\.weight"):
        load_embedded("cpu", path=path)
    write_model(
        path, replace(file, vae=more | {"encoder.quant": lost.clone(), "encoder.conv_out.bias": torch.zeros(3)})
    )
    with pytest.raises(CheckpointError, match=r"unknown encoder\.quant; wrong shape encoder\.conv_out\.bias \(\(3,\)"):
        load_embedded("cpu", path=path)


def test_weights_in_whole_numbers_are_named(file, tmp_path):
    path = tmp_path / "other.safetensors"
    write_model(path, file)
    whole = read_file(path)
    key = "unet.conv_in.weight"
    save_file(whole.tensors | {key: whole.tensors[key].to(torch.int64)}, path, whole.metadata)
    with pytest.raises(CheckpointError, match=r"conv_in\.weight of the UNet of its config stored in whole numbers"):
        load_embedded("cpu", path=path)


def core_modules_of_the_nodes():
    """Return the names of the core's modules that anything in `nodes` imports, also inside functions."""
    found = set()
    for path in (ROOT / "nodes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tudsr_core"):
                found.add(node.module)
    return sorted(found)


def test_the_nodes_need_nothing_beyond_comfyui(tmp_path):
    """Every module that the nodes use, the embedded model and InvSR's predictor, where only ComfyUI's packages are."""
    script = f"""
import importlib, sys, torch
for name in {core_modules_of_the_nodes()}:
    importlib.import_module(name)
from tudsr_core.backends.local import load_embedded
from tudsr_core.models.invsr import NoisePredictor, build_predictor
from tudsr_core.methods.two_stage import upscale
from tudsr_core.methods.plan import Target
torch.manual_seed(0)
picture = upscale(torch.rand(1, 3, 12, 16), load_embedded("cpu"), Target(scale=8))
predictor = build_predictor(NoisePredictor((64, 128), 1, 96).state_dict(), "test")
mean, deviation = predictor(torch.rand(1, 3, 16, 16), 199)
print(*picture.shape, *mean.shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, encoding="utf-8", env=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "nothing but what ComfyUI requires can be imported" in done.stderr
    assert done.stdout.split() == ["1", "3", "96", "128", "1", "4", "8", "8"]
