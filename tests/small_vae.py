"""Random Stable Diffusion autoencoders with few channels, and pictures that are hard to tile."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from functools import cache

import torch
from torch import Tensor, nn

from tudsr_core.vae import ComputeTarget, Fuse, Local, TiledVAE, VAECallables, read_resnet

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
    return nn.Module.to(deepcopy(_drawn(seed, **config)), dtype)


@cache
def _drawn(seed: int, **config) -> nn.Module:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(**(CONFIG | config)).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    return vae


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


class Dense(nn.Module):
    """Convolutions without norms, one after the other, each seeing what those before it gave (an RRDB in small)."""

    def __init__(self, channels: int, growth: int = 4, count: int = 3) -> None:
        super().__init__()
        widths = [channels + growth * number for number in range(count)]
        outs = [growth] * (count - 1) + [channels]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, outs, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in self.convs:
            y = conv(seen)
            seen = torch.cat([seen, nn.functional.leaky_relu(y, 0.2)], 1)
        return y * 0.2 + x


class SmallFusion:
    """CFW in small: residual block with shortcut, dense convolutions, residual block; as modules and as layers."""

    def __init__(self, channels: int, dtype: torch.dtype, weight: float) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        common = dict(temb_channels=None, groups=4, eps=1e-6)
        self.channels, self.weight = channels, weight
        self.blocks = [
            ResnetBlock2D(in_channels=2 * channels, out_channels=channels, **common),
            Dense(channels),
            ResnetBlock2D(in_channels=channels, **common),
        ]
        for block in self.blocks:
            for parameter in block.eval().requires_grad_(False).parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
            block.to(dtype)
        self.read()

    def read(self) -> None:
        """Describe the modules, as they are now, as layers."""
        first, dense, last = self.blocks
        local = Local(dense, radius=len(dense.convs), width=(self.channels, self.channels))
        self.fuse = Fuse([*read_resnet(first), local, *read_resnet(last)], self.weight)

    def __call__(self, features: Tensor, x: Tensor) -> Tensor:
        y = torch.cat([features, x], 1)
        for block in self.blocks:
            y = block(y, None) if hasattr(block, "norm1") else block(y)
        return x + self.weight * y


def make_fusions(
    levels: Iterable[str], dtype: torch.dtype = torch.float32, seed: int = 3, channels: tuple[int, ...] = ()
) -> dict[str, SmallFusion]:
    """Return random fusions for these levels of `make_vae`'s autoencoder, or of one with these `channels`."""
    torch.manual_seed(seed)
    # The decoder's last level has 8 channels, as the encoder's first.
    widths = channels or [8 if level == "level 0" else 16 for level in levels]
    return {level: SmallFusion(width, dtype, 0.7) for level, width in zip(levels, widths, strict=True)}


def run_fused(vae: nn.Module, fusions: dict[str, SmallFusion], pixels: Tensor, z: Tensor) -> Tensor:
    """Return pixels in 0..1 of `z`, untiled: the modules themselves, with hooks where features are taken and used."""
    hooks, features, depth = [], {}, len(vae.decoder.up_blocks)
    for level, fusion in fusions.items():
        number = int(level.split()[1])
        down, up = vae.encoder.down_blocks[number].resnets[-1], vae.decoder.up_blocks[depth - 1 - number].resnets[-1]
        hooks.append(down.register_forward_hook(lambda *call, level=level: features.update({level: call[2]})))
        fuse = lambda *call, level=level, fusion=fusion: fusion(features[level], call[2])  # noqa: E731
        hooks.append(up.register_forward_hook(fuse))
    try:
        vae.encode(pixels * 2 - 1)
        return vae.decode(z).sample / 2 + 0.5
    finally:
        for hook in hooks:
            hook.remove()


def target(dtype, fails=lambda error: False):
    """Return the CPU; `fails` tells which errors are out-of-memory."""
    return ComputeTarget(torch.device("cpu"), dtype, fails)


class Shy(torch.nn.Module):
    """A convolution that runs out of memory on tiles of more than `most` pixels."""

    def __init__(self, inner, most):
        super().__init__()
        self.base_layer, self.most, self.calls = inner, most, []

    def forward(self, x):
        self.calls.append(tuple(x.shape[-2:]))
        if x.shape[-2] * x.shape[-1] > self.most:
            raise torch.OutOfMemoryError("simulated")
        return self.base_layer(x)


def tiled_vae(vae, free=0):
    """Return `vae` as its owner calls it, tiled."""

    def encode(vae, x):
        return vae.encode(x * 2 - 1).latent_dist.mode()

    def decode(vae, z):
        return vae.decode(z).sample / 2 + 0.5

    dtype = next(vae.parameters()).dtype
    callables = VAECallables(lambda x: encode(vae, x.to(dtype)), lambda z: decode(vae, z.to(dtype)), encode, decode)
    return TiledVAE(vae, callables, 8, 4, target(dtype), lambda: free)
