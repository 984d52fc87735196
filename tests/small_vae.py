"""Random Stable Diffusion autoencoders with few channels, and pictures that are hard to tile."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CONFIG = dict(
    block_out_channels=(8, 16, 16, 16),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    norm_num_groups=4,
    latent_channels=4,
)
SHALLOW = dict(block_out_channels=(8, 16), norm_num_groups=4) | {
    f"{way}_block_types": (f"{way.capitalize()}{kind}coderBlock2D",) * 2 for way, kind in (("down", "En"), ("up", "De"))
}


def make_vae(dtype: torch.dtype = torch.float64, seed: int = 0, **config) -> nn.Module:
    """Return diffusers' AutoencoderKL with SD's topology; no weight, norms' included, is at its default."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**(CONFIG | config)).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return nn.Module.to(vae, dtype)


def contents(channels: int, height: int, width: int, batch: int = 2) -> dict[str, Tensor]:
    """Return pictures `B C H W` whose statistics differ from tile to tile, or not at all; float64."""
    noise = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1)).double()
    halves = torch.full_like(noise, -1.0)
    halves[..., width // 2 :] = 1
    ramp = torch.linspace(-1, 1, width).double() + torch.linspace(0, 0.5, height).double()[:, None]
    return {
        "random": noise,
        "constant": torch.full_like(noise, 0.3),
        "halves": halves,
        "gradient": ramp.expand_as(noise).contiguous(),
    }
