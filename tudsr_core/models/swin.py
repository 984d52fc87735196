"""Swin Transformer (Liu et al. 2021) for one square input size, with the key names of the official code.

torch only: torchvision's Swin is equal but is no dependency of this package. Reads no files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OTHER_REGION = -100.0  # added to the scores of tokens that the shift brought together, as published


@dataclass(frozen=True)
class SwinConfig:
    """Sizes of a Swin Transformer; the defaults are Swin-L at 384 px with windows of 12."""

    image_px: int = 384
    patch_px: int = 4
    width: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12

    @property
    def features(self) -> int:
        """Channels of the last stage."""
        return self.width * 2 ** (len(self.depths) - 1)


class PatchEmbedding(nn.Module):
    """`B 3 S S` to `B s s C`: one token per patch."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_px, stride=config.patch_px)
        self.norm = nn.LayerNorm(config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learnt bias per head and relative position (eq. 4)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("index", relative_positions(window), persistent=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`B windows tokens C` to the same; `mask` is `windows 1 tokens tokens`, added to the scores."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        bias = self.relative_position_bias_table[self.index].permute(2, 0, 1)
        scores = bias if mask is None else bias + mask.to(bias.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=scores.expand(*q.shape[:-1], q.shape[-2]))
        return self.proj(mixed.transpose(-3, -2).flatten(-2))


def relative_positions(window: int) -> Tensor:
    """Return `tokens tokens`: which row of the bias table belongs to a pair of tokens of one window."""
    line = torch.arange(window, device="cpu")  # real even while the network is built on "meta"
    y, x = torch.meshgrid(line, line, indexing="ij")
    y, x = y.flatten(), x.flatten()
    apart_y = y[:, None] - y[None, :] + window - 1
    apart_x = x[:, None] - x[None, :] + window - 1
    return apart_y * (2 * window - 1) + apart_x


class Mlp(nn.Module):
    """Two linear layers with GELU between them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwinBlock(nn.Module):
    """Window attention, then an MLP, both residual (eq. 3); every second block shifts its windows."""

    def __init__(self, width: int, heads: int, side: int, window: int, shifted: bool) -> None:
        super().__init__()
        self.window = min(window, side)
        self.shift = window // 2 if shifted and side > window else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, self.window)
        self.mlp = Mlp(width)
        mask = region_mask(side, self.window, self.shift) if self.shift else None
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`B s s C` to the same."""
        moved = self.norm1(x)
        if self.shift:
            moved = moved.roll((-self.shift, -self.shift), (1, 2))
        moved = from_windows(self.attn(to_windows(moved, self.window), self.mask), self.window)
        if self.shift:
            moved = moved.roll((self.shift, self.shift), (1, 2))
        x = x + moved
        return x + self.mlp(self.norm2(x))


def to_windows(x: Tensor, window: int) -> Tensor:
    """`B s s C` to `B windows tokens C`, both in reading order."""
    split = x.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return split.transpose(2, 3).flatten(1, 2).flatten(2, 3)


def from_windows(x: Tensor, window: int) -> Tensor:
    """Undo `to_windows`."""
    across = round(x.shape[1] ** 0.5)
    split = x.unflatten(2, (window, window)).unflatten(1, (across, across))
    return split.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def region_mask(side: int, window: int, shift: int) -> Tensor:
    """Return `windows 1 tokens tokens`: 0 inside a region of the shifted picture, OTHER_REGION across two."""
    line = torch.zeros(side, device="cpu")
    line[side - window :] += 1
    line[side - shift :] += 1
    regions = to_windows((3 * line[:, None] + line[None, :])[None, ..., None], window)[0, ..., 0]
    return (regions[:, None, :, None] != regions[:, None, None, :]) * OTHER_REGION


class PatchMerging(nn.Module):
    """`B s s C` to `B s/2 s/2 2C`: four neighbours become one token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)
        self.norm = nn.LayerNorm(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, down::2, right::2] for right in (0, 1) for down in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Stage(nn.Module):
    """Blocks at one resolution, then the merging to the next (none after the last)."""

    def __init__(self, config: SwinConfig, number: int) -> None:
        super().__init__()
        width = config.width * 2**number
        side = config.image_px // config.patch_px // 2**number
        self.blocks = nn.ModuleList(
            SwinBlock(width, config.heads[number], side, config.window, shifted=index % 2 == 1)
            for index in range(config.depths[number])
        )
        last = number == len(config.depths) - 1
        self.downsample = None if last else PatchMerging(width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class SwinTransformer(nn.Module):
    """The backbone without a classifier."""

    def __init__(self, config: SwinConfig) -> None:
        super().__init__()
        self.patch_embed = PatchEmbedding(config)
        self.layers = nn.ModuleList(Stage(config, number) for number in range(len(config.depths)))
        self.norm = nn.LayerNorm(config.features)

    def forward(self, x: Tensor) -> Tensor:
        """`B 3 image_px image_px`, normalised, to `B tokens features` in reading order."""
        x = self.patch_embed(x)
        for stage in self.layers:
            x = stage(x)
        return self.norm(x).flatten(1, 2)
