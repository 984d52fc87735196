"""Blocks of diffusion UNets in plain torch, with the state dict keys of diffusers.

Written after Ho et al. 2020 (residual blocks that are told the timestep) as Stable Diffusion uses
them; the sums are in diffusers' order, so that results are equal to the bit where torch's are.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Timesteps as `B width` vectors: `steps` cosines and sines of falling frequency, then two linear layers."""

    def __init__(self, steps: int, width: int) -> None:
        super().__init__()
        self.steps = steps
        self.linear_1 = nn.Linear(steps, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, t: Tensor | int, like: Tensor) -> Tensor:
        """Return the embedding of one timestep, or of one for each of the pictures `like`."""
        return self.linear_2(F.silu(self.linear_1(timestep_waves(t, self.steps, like))))


def timestep_waves(t: Tensor | int, count: int, like: Tensor) -> Tensor:
    """Return `B count` cosines, then sines, of one timestep or one for each of the `B` pictures `like`.

    Frequencies fall from 1 to 1/10000 (Vaswani et al. 2017, section 3.5, as Ho et al. 2020 use it).
    """
    half = count // 2
    timesteps = torch.as_tensor(t, device=like.device).expand(len(like))
    exponents = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=like.device) / half
    angles = timesteps[:, None].float() * exponents.exp()
    return torch.cat([angles.cos(), angles.sin()], -1).to(like.dtype)


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x))) + time))), x through a 1 x 1 convolution where channels change."""

    def __init__(self, channels: int, out_channels: int, time_width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_width, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = hidden + self.time_emb_proj(F.silu(time))[:, :, None, None]
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class Downsample(nn.Module):
    """A 3 x 3 convolution of stride 2; without `padding` a zero row below and a zero column right are added."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.edge = None if padding else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x if self.edge is None else F.pad(x, self.edge))


class Upsample(nn.Module):
    """Nearest neighbour to a size, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Attention(nn.Module):
    """x + out(softmax(q k^T / sqrt(d)) v) over all positions, q, k, v of norm(x)."""

    def __init__(self, channels: int, head_channels: int, groups: int, eps: float) -> None:
        super().__init__()
        if not channels or channels % head_channels:
            raise ValueError(f"{channels} channels are not whole heads of {head_channels}")
        self.heads = channels // head_channels
        self.group_norm = nn.GroupNorm(groups, channels, eps)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.group_norm(x.flatten(2)).transpose(1, 2)
        q, k, v = (
            layer(tokens).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.to_out[0](mixed).transpose(1, 2).reshape(x.shape) + x
