"""InvSR's noise predictor under its published key names.

Only the network; when it is called and what becomes of the noise is the pipeline's business.
"""

from __future__ import annotations

from itertools import pairwise, zip_longest
from pathlib import Path

import torch
from torch import Tensor, nn

from ..weights import CheckpointError
from .fill_weights import fill
from .unet_blocks import Attention, Downsample, ResnetBlock, TimeEmbedding

HEAD_CHANNELS, EPS = 64, 1e-6
MAX_LAYERS = 16  # published: 3


class NoisePredictor(nn.Module):
    """Predicts the noise to start from, out of the small picture (InvSR).

    An encoder of two attention blocks with time embedding, one downsampling by 2 between them:
    pixels `B 3 2h 2w` give mean and log-variance `B 8 h w` of the noise for latents `h w`.
    """

    def __init__(
        self, widths: tuple[int, int] = (256, 512), layers: int = 3, temb: int = 512, groups: int = 32
    ) -> None:
        super().__init__()
        self.encoder = _TimeAwareEncoder(widths, layers, temb, groups)

    def forward(self, pixels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, float32, for pixels in 0..1."""
        first = self.encoder.conv_in.weight
        moments = self.encoder((pixels * 2 - 1).to(first.device, first.dtype), t).float()
        mean, log_variance = moments.chunk(2, 1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()


class _TimeAwareEncoder(nn.Module):
    def __init__(self, widths: tuple[int, int], layers: int, temb: int, groups: int) -> None:
        super().__init__()
        self.time_embedding = TimeEmbedding(max(128, widths[0]), temb)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        befores = (widths[0], *widths)
        self.down_blocks = nn.ModuleList(
            _Block([before] + [width] * layers, layers, temb, groups, halves=level + 1 < len(widths))
            for level, (before, width) in enumerate(zip(befores, widths, strict=False))
        )
        self.mid_block = _Block([widths[-1]] * 3, 1, temb, groups, halves=False)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 8, 3, padding=1)

    def forward(self, x: Tensor, t: int) -> Tensor:
        time = self.time_embedding(t, x)
        x = self.conv_in(x)
        for block in (*self.down_blocks, self.mid_block):
            x = block(x, time)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


class _Block(nn.Module):
    """Residual blocks along `channels`, the first ones with attention behind them, then perhaps a halving."""

    def __init__(self, channels: list[int], attentions: int, temb: int, groups: int, halves: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(a, b, temb, groups, EPS) for a, b in pairwise(channels))
        self.attentions = nn.ModuleList(Attention(channels[-1], HEAD_CHANNELS, groups, EPS) for _ in range(attentions))
        self.downsamplers = nn.ModuleList([Downsample(channels[-1], padding=0)] if halves else [])

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for resnet, attention in zip_longest(self.resnets, self.attentions):
            x = resnet(x, time)
            x = x if attention is None else attention(x)
        for downsampler in self.downsamplers:
            x = downsampler(x)
        return x


def build_predictor(tensors: dict[str, Tensor], source: str | Path) -> NoisePredictor:
    """Return the network of a state dict, its widths read from the tensors.

    Raises CheckpointError that names `source` and lists what does not fit.
    """
    try:
        widths = tuple(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in (0, 1))
        layers = sum(
            1 for key in tensors if key.startswith("encoder.down_blocks.0.resnets.") and key.endswith("conv1.bias")
        )
        if layers > MAX_LAYERS:
            raise ValueError(f"{layers} layers in a block")
        temb = tensors["encoder.time_embedding.linear_1.bias"].shape[0]
        with torch.device("meta"):
            network = NoisePredictor(widths, layers, temb)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source} is not a whole InvSR noise predictor ({error}); download it again") from error
    return fill(network, tensors, source, "InvSR's noise predictor", "download it again")
