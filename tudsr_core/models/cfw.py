"""StableSR's controllable feature wrapping (CFW) under its published key names, and the files that hold it.

Written from the mathematics of Wang et al. 2024 (StableSR, section 3.2) and the names and shapes of the published
tensors. Only the network; where in a decoder it belongs, and what its weight does, is the autoencoder's business.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..untrusted import some
from ..weights import CheckpointError, read_file, where_to_get
from .fill_weights import fill

EPS = 1e-6
LEVELS = (1, 2)
PUBLISHED_FILE = "vqgan_cfw_00011.ckpt"
PREFIXES = ("decoder.", "first_stage_model.decoder.", "")
# What a file without CFW is, by what its keys contain or begin with; the first that fits.
OTHER_FILES = (
    (("spade.", "structcond"), "it is StableSR's own module or model, which guides the UNet"),
    (("model.diffusion_model.",), "it is a Stable Diffusion checkpoint"),
    (("decoder.",), "it is an autoencoder without CFW"),
)


class FeatureWrapping(nn.Module):
    """What a decoder adds to its activations, out of them and the encoder's, at half and a quarter of the size.

    `widths`: the channels C of these two levels, multiples of `groups`; `growth`: what each dense
    convolution adds. Published: 156 tensors, 44.39 million values.
    """

    def __init__(self, widths: tuple[int, int] = (256, 512), growth: int = 32, groups: int = 32) -> None:
        super().__init__()
        self.fusion_layer_1, self.fusion_layer_2 = (FusionLayer(width, growth, groups) for width in widths)


class FusionLayer(nn.Module):
    """The features of one level and the decoder's activations, `B 2C h w` together, to what is added, `B C h w`."""

    def __init__(self, channels: int, growth: int, groups: int) -> None:
        super().__init__()
        self.encode_enc_1 = ResidualBlock(2 * channels, channels, groups)
        self.encode_enc_2 = nn.Sequential(*(DenseBlocks(channels, growth) for _ in range(2)))
        self.encode_enc_3 = ResidualBlock(channels, channels, groups)

    def forward(self, features: Tensor, x: Tensor) -> Tensor:
        return self.encode_enc_3(self.encode_enc_2(self.encode_enc_1(torch.cat([features, x], 1))))


class ResidualBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), x through a 1 x 1 convolution where channels change."""

    def __init__(self, channels: int, out_channels: int, groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, EPS)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, EPS)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (x if self.conv_out is None else self.conv_out(x)) + hidden


class DenseBlocks(nn.Module):
    """x + 0.2 of three dense blocks one after the other (RRDB of ESRGAN, Wang et al. 2018); sees 15 pixels far."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.rdb1, self.rdb2, self.rdb3 = (DenseBlock(channels, growth) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.rdb3(self.rdb2(self.rdb1(x))).mul_(0.2).add_(x)


class DenseBlock(nn.Module):
    """x + 0.2 of five convolutions, of which each sees x and all that the ones before it gave."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        for number in range(1, 6):
            out = growth if number < 5 else channels
            setattr(self, f"conv{number}", nn.Conv2d(channels + (number - 1) * growth, out, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, F.leaky_relu(conv(seen), 0.2, inplace=True)], 1)
        return self.conv5(seen).mul_(0.2).add_(x)


def load_wrapping(path: Path) -> FeatureWrapping:
    """Return CFW, float32 on the CPU, from any published file that holds it, alone or within an autoencoder.

    Widths are read from the tensors. Raises CheckpointError for files without CFW, with only a part of
    it, or with more.
    """
    tensors = read_file(path).tensors
    own = {}
    for key, value in tensors.items():
        before, found, rest = key.partition("fusion_layer_")
        if found and before in PREFIXES:
            own[found + rest] = value
    if not own:
        remedy = f"{where_to_get(PUBLISHED_FILE)}the file {PUBLISHED_FILE}"
        raise CheckpointError(f"{path} holds no CFW: {_what_it_is(tensors)}; {remedy}")
    try:
        widths = tuple(own[f"fusion_layer_{level}.encode_enc_3.conv1.weight"].shape[0] for level in LEVELS)
        growth = own["fusion_layer_1.encode_enc_2.0.rdb1.conv1.weight"].shape[0]
        with torch.device("meta"):
            network = FeatureWrapping(widths, growth)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not hold all of CFW ({error}); download it again") from error
    return fill(network, own, path, "CFW", "download it again")


def _what_it_is(keys: dict[str, Tensor]) -> str:
    for marks, says in OTHER_FILES:
        if any(mark in key for key in keys for mark in marks):
            return says
    return f"its keys are {some(sorted(keys))}" if keys else "it holds no tensors"
