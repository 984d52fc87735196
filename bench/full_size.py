"""Stable Diffusion 2.1-base at full size with random weights: as fast as trained ones, and no download.

The same file of weights serves this package's core and ComfyUI, so that their results can be compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from tudsr_core.backends.local import Backbone, LocalNetworks
from tudsr_core.backends.sd21 import UNET_CONFIG, VAE_CONFIG
from tudsr_core.diffusion.one_step import from_noise_level
from tudsr_core.methods.plan import StageLimits
from tudsr_core.methods.two_stage import Stage, TwoStageModel
from tudsr_core.weights.checkpoints import DTYPES

CONFIGS = {
    "unet": (UNet2DConditionModel, {**UNET_CONFIG, "in_channels": 4, "out_channels": 4}),
    "vae": (AutoencoderKL, VAE_CONFIG),
}


def write_weights(folder: Path) -> None:
    """Write unet, vae and text.safetensors, float16 (1.8 GiB)."""
    torch.manual_seed(0)
    for name, (kind, config) in CONFIGS.items():
        weights = kind.from_config(config).state_dict()
        save_file({key: value.half().contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors")
    save_file({"text": torch.randn(1, 77, 1024)}, folder / "text.safetensors")


def load_network(folder: Path, name: str, device: str = "cpu", dtype: str = "fp32") -> nn.Module:
    """Return "unet" or "vae"."""
    kind, config = CONFIGS[name]
    with torch.device("meta"):
        network = kind.from_config(config)
    weights = load_file(folder / f"{name}.safetensors")
    network.load_state_dict({key: value.to(DTYPES[dtype]) for key, value in weights.items()}, assign=True)
    return nn.Module.to(network, device).eval().requires_grad_(False)


def load_text(folder: Path) -> Tensor:
    """Return a prompt's embedding `1 77 1024`."""
    return load_file(folder / "text.safetensors")["text"]


def load_model(folder: Path, device: str = "cpu", dtype: str = "fp32") -> TwoStageModel:
    """Return a two-stage model; both stages share the bare backbone."""
    networks = (load_network(folder, name, device, dtype) for name in CONFIGS)
    return two_stages(*networks, load_text(folder), device, dtype)


def random_model(device: str = "cpu", dtype: str = "fp32") -> TwoStageModel:
    """Return such a model with weights drawn on the device, which takes no file and no time there."""
    torch.manual_seed(0)
    with torch.device(device):
        unet, vae = (kind.from_config(config) for kind, config in CONFIGS.values())
        text = torch.randn(1, 77, 1024)
    return two_stages(unet, vae, text, device, dtype)


def two_stages(unet: nn.Module, vae: nn.Module, text: Tensor, device: str, dtype: str) -> TwoStageModel:
    """Return both stages on the same bare networks, with one prompt's embedding `1 77 1024`."""
    backbone = Backbone(vae, unet, lambda *words: text.expand(len(words), -1, -1), torch.device(device), DTYPES[dtype])
    stages = [Stage(LocalNetworks(backbone), (from_noise_level(t),), f"t={t}") for t in (200, 50)]
    return TwoStageModel(*stages, StageLimits())
