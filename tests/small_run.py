"""A training in miniature: pictures, a base of random weights, and settings of which a step takes a moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tudsr_core.diffusion.one_step import from_noise_level
from tudsr_core.methods.plan import StageLimits
from tudsr_core.models.embedded import make_unet, make_vae
from tudsr_core.training.config import (
    DataConfig,
    DiscriminatorConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
)
from tudsr_core.training.embedded_networks import UNET_CONFIG, VAE_CONFIG
from tudsr_core.weights.adapters import Adapter, LoRAWeights, WeightDelta
from tudsr_core.weights.checkpoints import ModelFile, write_model

SIZE = 32
VAE = VAE_CONFIG | {"latent_channels": 4} | {f"{side}_block_out_channels": [16] * 3 for side in ("encoder", "decoder")}
UNET = UNET_CONFIG | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [16, 16],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "norm_eps": 1e-5,
}


def write_small_model(path: Path) -> Path:
    """Write a model file of random weights, a fiftieth of the shipped one, and return its path."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, unet = make_vae(VAE, path), make_unet(UNET, path)
        update = LoRAWeights(torch.randn(2, 4, 3, 3), torch.randn(16, 2, 1, 1) * 0.1, 2.0)
    second = Adapter("stage two", WeightDelta({"conv_in": update}), stage=2, steps=(from_noise_level(50),))
    parts = vae.state_dict(), unet.state_dict(), from_noise_level(200), second, StageLimits(4, 2, 4)
    write_model(path, ModelFile("small", VAE, UNET, *parts))
    return path


def write_pictures(folder: Path, count: int = 3) -> Path:
    """Write `count` pictures of waves, each another, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:80, 0:96]
    for number in range(count):
        planes = [np.sin(x / (3 + number)) * np.cos(y / (4 + plane)) * 110 + 128 for plane in range(3)]
        Image.fromarray(np.dstack(planes).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def small_config(root: Path, base: Path, stage: int = 1, **changes: dict) -> TrainingConfig:
    """Return settings for `stage` behind the base model; `changes` replace fields of sections."""
    config = TrainingConfig(
        output=root / f"stage-{stage}",
        model=ModelConfig(str(base), timestep=200 if stage == 1 else 50),
        data=DataConfig((root / "pictures",), SIZE, chunks=stage, factor=4 * stage, workers=0),
        lora=LoraConfig(rank=4, alpha=4),
        loss=LossConfig(dists_features="scratch"),
        discriminator=DiscriminatorConfig(features="scratch"),
        optimizer=OptimizerConfig(steps=4, rate=1e-3, critic_rate=1e-3, accumulation=2),
        run=RunConfig("fp32", gradient_checkpointing=False, save_every=100, tensorboard=False),
    )
    return replace(config, **{name: replace(getattr(config, name), **change) for name, change in changes.items()})
