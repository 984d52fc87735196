"""The two networks of a `tudsr-model` file in plain torch: an autoencoder, and a UNet without attention.

They are the part of diffusers' AutoencoderDC (Chen et al. 2024) and UNet2DConditionModel that the
embedded model needs: read from the same configs and state dicts, called the same way, with the
same results. What a config asks for beyond that part is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import CheckpointError
from .embedded_config import UNetConfig, VAEConfig, read_config
from .fill_weights import fill
from .unet_blocks import Downsample, ResnetBlock, TimeEmbedding, Upsample

EPS = 1e-5


class Latent(NamedTuple):
    """What `encode` returns."""

    latent: Tensor


class Sample(NamedTuple):
    """What `decode` and the UNet return."""

    sample: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean of x^2 over channels) * weight + bias for `B C H W` (Zhang and Sennrich 2019)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + EPS)
        return x.to(self.weight.dtype) * self.weight[:, None, None] + self.bias[:, None, None]


class ResBlock(nn.Module):
    """x + norm(conv2(silu(conv1(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(F.silu(self.conv1(x)))) + x


class Fold(nn.Module):
    """Half the size: a convolution, then 2 x 2 pixels become channels; the same of x, averaged, beside it."""

    def __init__(self, channels: int, out_channels: int, shortcut: bool = True) -> None:
        super().__init__()
        if out_channels % 4 or (shortcut and 4 * channels % out_channels):
            raise ValueError(f"{channels} channels do not fold into {out_channels}")
        self.group = 4 * channels // out_channels if shortcut else 0
        self.conv = nn.Conv2d(channels, out_channels // 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        folded = F.pixel_unshuffle(self.conv(x), 2)
        if not self.group:
            return folded
        return folded + F.pixel_unshuffle(x, 2).unflatten(1, (-1, self.group)).mean(2)


class Unfold(nn.Module):
    """Twice the size: a convolution, then channels become 2 x 2 pixels; the same of x, repeated, beside it."""

    def __init__(self, channels: int, out_channels: int, shortcut: bool = True) -> None:
        super().__init__()
        if shortcut and 4 * out_channels % channels:
            raise ValueError(f"{channels} channels do not unfold into {out_channels}")
        self.repeats = 4 * out_channels // channels if shortcut else 0
        self.conv = nn.Conv2d(channels, 4 * out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        unfolded = F.pixel_shuffle(self.conv(x), 2)
        if not self.repeats:
            return unfolded
        return unfolded + F.pixel_shuffle(x.repeat_interleave(self.repeats, 1), 2)


class Encoder(nn.Module):
    """Pixels `B 3 H W` to latents; every level but the last halves the size."""

    def __init__(self, latents: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = Fold(3, widths[1], shortcut=False)
        self.down_blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(w) for _ in range(n))) for w, n in _pairs(widths, layers)
        )
        for level, (width, after) in enumerate(pairwise(widths[1:]), 1):
            self.down_blocks[level].append(Fold(width, after))
        self.conv_out = nn.Conv2d(widths[-1], latents, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(x)


class Decoder(nn.Module):
    """Latents to pixels `B 3 H W`; the levels in reverse."""

    def __init__(self, latents: int, widths: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latents, widths[-1], 3, padding=1)
        self.up_blocks = nn.ModuleList(
            nn.Sequential(*(ResBlock(w) for _ in range(n))) for w, n in _pairs(widths, layers)
        )
        for level, (width, before) in enumerate(pairwise(widths[1:]), 1):
            self.up_blocks[level].insert(0, Unfold(before, width))
        self.norm_out = RMSNorm(widths[1])
        self.conv_out = Unfold(widths[1], 3, shortcut=False)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for block in reversed(self.up_blocks):
            x = block(x)
        return self.conv_out(F.relu(self.norm_out(x)))


def _pairs(widths: tuple[int, ...], layers: tuple[int, ...]) -> list[tuple[int, int]]:
    """Channels and layers of each level; the first has none (a fold takes its place), the middle ones some."""
    if layers[0] or not all(layers[1:-1]):
        raise ValueError(f"layers_per_block {list(layers)} must be 0 first, and above 0 between first and last")
    return list(zip(widths, layers, strict=True))


class AutoencoderDC(nn.Module):
    """A deep-compression autoencoder of residual blocks alone: purely local, plain latents without a posterior."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        latents = config.latent_channels
        self.encoder = Encoder(latents, config.encoder_block_out_channels, config.encoder_layers_per_block)
        self.decoder = Decoder(latents, config.decoder_block_out_channels, config.decoder_layers_per_block)

    @property
    def latent_scale(self) -> int:
        """Pixels per latent."""
        return 2 ** (len(self.config.encoder_block_out_channels) - 1)

    def encode(self, x: Tensor) -> Latent:
        """Return unscaled latents of pixels `B 3 H W` in -1..1."""
        return Latent(self.encoder(x))

    def decode(self, z: Tensor) -> Sample:
        """Return pixels `B 3 H W`, nominally -1..1, of unscaled latents."""
        return Sample(self.decoder(z))


class Level(nn.Module):
    """Residual blocks of the UNet, each with channels in and out, and what changes the size after them."""

    def __init__(
        self,
        config: UNetConfig,
        channels: list[tuple[int, int]],
        down: nn.Module | None = None,
        up: nn.Module | None = None,
    ) -> None:
        super().__init__()
        time, groups, eps = 4 * config.block_out_channels[0], config.norm_num_groups, config.norm_eps
        self.resnets = nn.ModuleList(ResnetBlock(before, after, time, groups, eps) for before, after in channels)
        self.downsamplers, self.upsamplers = (nn.ModuleList([one] if one else []) for one in (down, up))


class UNet(nn.Module):
    """Latents and a timestep to predicted noise: residual blocks on falling and rising sizes, joined by skips."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        widths, layers = config.block_out_channels, config.layers_per_block
        rising = widths[::-1]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0])
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for number, (before, width) in enumerate(zip((widths[0], *widths[:-1]), widths, strict=True), 1):
            sampler = Downsample(width, padding=1) if number < len(widths) else None
            channels = [(before, width), *[(width, width)] * (layers - 1)]
            self.down_blocks.append(Level(config, channels, down=sampler))
        self.mid_block = Level(config, [(widths[-1], widths[-1])])
        for number, (before, width) in enumerate(zip((rising[0], *rising[:-1]), rising, strict=True), 1):
            sampler = Upsample(width) if number < len(widths) else None
            skips = [width] * layers + [rising[min(number, len(widths) - 1)]]
            below = [before] + [width] * layers
            channels = [(x + skip, width) for x, skip in zip(below, skips, strict=True)]
            self.up_blocks.append(Level(config, channels, up=sampler))
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor | int, encoder_hidden_states: Tensor | None = None) -> Sample:
        """Return eps for latents `B C h w` at timestep t, one or one per picture; the text has no effect."""
        time = self.time_embedding(t, z)
        x = self.conv_in(z)
        skips = [x]
        for level in self.down_blocks:
            for resnet in level.resnets:
                x = resnet(x, time)
                skips.append(x)
            for downsampler in level.downsamplers:
                x = downsampler(x)
                skips.append(x)
        x = self.mid_block.resnets[0](x, time)
        for level in self.up_blocks:
            for resnet in level.resnets:
                x = resnet(torch.cat([x, skips.pop()], 1), time)
            for upsampler in level.upsamplers:
                x = upsampler(x, skips[-1].shape[-2:])
        return Sample(self.conv_out(F.silu(self.conv_norm_out(x))))


def make_vae(config: object, source: str | Path) -> AutoencoderDC:
    """Return an untrained autoencoder; raises CheckpointError that names what in `config` it cannot be."""
    return _make(AutoencoderDC, VAEConfig, config, f"{source}: its VAE")


def make_unet(config: object, source: str | Path) -> UNet:
    """Return an untrained UNet; raises CheckpointError that names what in `config` it cannot be."""
    return _make(UNet, UNetConfig, config, f"{source}: its UNet")


def _make(network: type, kind: type, config: object, what: str) -> Any:
    try:
        return network(read_config(kind, config))
    except ValueError as error:
        raise CheckpointError(
            f"{what} cannot be built from its config: {error}; update this pack, or use another model file"
        ) from error


def load_networks(
    vae_config: object,
    vae: Mapping[str, Tensor],
    unet_config: object,
    unet: Mapping[str, Tensor],
    source: str | Path,
) -> tuple[AutoencoderDC, UNet]:
    """Return both networks of a model file in float32; raises CheckpointError for what does not fit."""
    with torch.device("meta"):
        networks = make_vae(vae_config, source), make_unet(unet_config, source)
    latents, ends = (
        networks[0].config.latent_channels,
        (networks[1].config.in_channels, networks[1].config.out_channels),
    )
    if ends != (latents, latents):
        raise CheckpointError(
            f"{source}: its UNet has {ends[0]} channels in and {ends[1]} out, but latents have {latents}"
        )
    for network, weights, title in zip(networks, (vae, unet), ("VAE", "UNet"), strict=True):
        fill(network, weights, source, f"the {title} of its config", "download it again")
    return networks
