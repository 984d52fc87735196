"""The embedded model while it is trained: its shapes, and its two networks as the two one-step formulas.

A small relative of the real thing, the two networks of `models.embedded`: an autoencoder (f = 4,
32 latents) and a UNet, eps prediction on SD's schedule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..diffusion import OneStep, from_noise_level
from ..models import make_unet, make_vae
from ..pictures import resize

STAGE_ONE, STAGE_TWO = from_noise_level(200), from_noise_level(50)
LATENTS = 32
VAE_CONFIG = {
    "latent_channels": LATENTS,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [48, 48, 96],
    "decoder_block_out_channels": [48, 48, 96],
    "encoder_layers_per_block": [0, 1, 0],
    "decoder_layers_per_block": [0, 1, 1],
    "encoder_qkv_multiscales": [[], [], []],
    "decoder_qkv_multiscales": [[], [], []],
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "scaling_factor": 1.0,
}
# One normalisation group with a large epsilon is nearly the identity: statistics of a tile then
# hardly matter, and tiled equals untiled up to a few 1e-3.
UNET_CONFIG = {
    "sample_size": 32,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 96],
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 1,
    "norm_eps": 100.0,
}


def build() -> tuple[nn.Module, nn.Module]:
    """Return an untrained `(vae, unet)` with the shapes of the embedded model."""
    return make_vae(VAE_CONFIG, "training"), make_unet(UNET_CONFIG, "training")


@dataclass
class Restorer:
    """The two networks and the two one-step formulas, on pictures `B 3 H W` in 0..1."""

    vae: nn.Module
    unet: nn.Module

    def encode(self, image: Tensor) -> Tensor:
        return self.vae.encode(image * 2 - 1).latent

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample / 2 + 0.5

    def finish(self, z: Tensor, formula: OneStep) -> Tensor:
        t = torch.full((len(z),), formula.t, device=z.device)  # a number would be copied there, and waited for
        return formula.finish(z, self.unet(z, t).sample)

    def step(self, image: Tensor, formula: OneStep = STAGE_ONE) -> Tensor:
        return self.decode(self.finish(self.encode(image), formula))

    def step_beside(self, image: Tensor, coded: Tensor, formula: OneStep) -> tuple[Tensor, Tensor]:
        """Return `step` of `image`, and `coded` encoded and decoded, with one pass through the autoencoder."""
        own = len(image)
        z = self.encode(torch.cat([image, coded]))
        out = self.decode(torch.cat([self.finish(z[:own], formula), z[own:]]))
        return out[:own], out[own:]

    def stage_two_start(self, small: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what stage two sees for a picture of `size`: stage one at half of it, then bicubic x2."""
        return self.doubled(resize(small, tuple(side // 2 for side in size)))

    def doubled(self, start: Tensor) -> Tensor:
        """Return stage one's picture of `start`, enlarged x2 with bicubic."""
        return resize(self.step(start).clamp(0, 1), tuple(2 * side for side in start.shape[-2:]))
