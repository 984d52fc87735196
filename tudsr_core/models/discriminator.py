"""The critic of adversarial training: small heads on a frozen network's maps (Kumari et al. 2022; TUDSR sec. 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from ..pictures import gaussian_blur
from .features import Features

BINOMIAL = ((1, 3, 3, 1), (3, 9, 9, 3), (3, 9, 9, 3), (1, 3, 3, 1))
LEAST_WIDTH, USUAL_BLOCKS = 96, 3
BLUR, COARSE_GAIN, FINE_GAIN = 1.0, 0.15, 4.0  # sigma in pixels, and what a PatchCritic sees of both parts


class BlurPool(nn.Module):
    """Half the size of `B C H W`, blurred first so that nothing aliases (Zhang 2019): [1 3 3 1], stride 2, pad 1."""

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = (x.new_tensor(BINOMIAL) / 64).expand(channels, 1, 4, 4)
        return F.conv2d(x, kernel, stride=2, padding=1, groups=channels)


def make_head(channels: int, side: int) -> nn.Sequential:
    """Return a head that turns `B channels side side` into one logit a picture.

    Blocks of BlurPool, spectrally normalised 3 x 3 convolution and leaky ReLU, whose widths halve down to
    96; then BlurPool and a 1 x 1 convolution. Three blocks, as far as the side can be halved so often;
    further halvings are strides of the last ones: the layout of OMGSR's heads at 512 pixels. Raises
    ValueError for a map of a single place.
    """
    halvings = side.bit_length() - 2  # but for the last BlurPool's
    if halvings < 0:
        raise ValueError("pictures are too small for the discriminator's features; train at a larger size")
    blocks = max(min(USUAL_BLOCKS, halvings), -(-halvings // 2))
    strided = halvings - blocks
    layers, width = [], channels
    for number in range(blocks):
        after = max(width // 2, min(LEAST_WIDTH, width))
        stride = 2 if number >= blocks - strided else 1
        layers += [BlurPool(), spectral_norm(nn.Conv2d(width, after, 3, stride, 1)), nn.LeakyReLU(0.2)]
        width = after
    return nn.Sequential(*layers, BlurPool(), spectral_norm(nn.Conv2d(width, 1, 1)))


class Discriminator(nn.Module):
    """Logits `B 1 h w` per map of the frozen `features`, for pictures `B 3 side side` in -1..1.

    Spectral norms are estimated in `refresh`, once per optimiser step, and not in every forward pass as
    torch does it: so a step does not depend on how its pictures are spread over passes, chunks and
    processes. It is therefore always in eval mode.
    """

    def __init__(self, features: Features, side: int) -> None:
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.heads = nn.ModuleList(
            make_head(channels, side // stride)
            for channels, stride in zip(features.channels, features.strides, strict=True)
        )
        self.eval()

    def train(self, mode: bool = True) -> Discriminator:
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return the logits of every head."""
        maps = self.features(pictures * 0.5 + 0.5)
        return [head(one) for head, one in zip(self.heads, maps, strict=True)]

    def refresh(self) -> None:
        """Take one power iteration for every spectral norm."""
        _refresh(self.heads)


class PatchCritic(nn.Module):
    """Logits `B 1 h w` of patches of 42 x 42 pixels, for small pictures `B 3 H W` in -1..1 of any size from 16 up.

    A PatchGAN (Isola et al. 2017) whose first layers keep the size: noise and the edges of JPEG's blocks, which are
    what it has to tell apart, lie in single pixels. Pictures are never resized for it. It sees the picture at half
    its contrast, and what a blur takes from it at four times that: noise is small beside content, spectral norms allow
    no gain, and what good and poor folders happen to show must not count. Spectral norms as in `Discriminator`.
    """

    LAYERS = ((3, 1, 1), (3, 1, 1), (4, 2, 2), (3, 1, 2), (4, 2, 4), (3, 1, 4))  # kernel, stride, times the width

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers, before = [], 6
        for kernel, stride, times in self.LAYERS:
            convolution = nn.Conv2d(before, width * times, kernel, stride, 1)
            layers += [spectral_norm(convolution), nn.LeakyReLU(0.2)]
            before = width * times
        self.heads = nn.Sequential(*layers, spectral_norm(nn.Conv2d(before, 1, 3, 1, 1)))
        self.eval()

    def train(self, mode: bool = True) -> PatchCritic:
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return the logits, as a list of one."""
        fine = pictures - gaussian_blur(pictures, BLUR)
        return [self.heads(torch.cat([pictures * COARSE_GAIN, fine * FINE_GAIN], 1))]

    def refresh(self) -> None:
        """Take one power iteration for every spectral norm."""
        _refresh(self.heads)


@torch.no_grad()
def _refresh(heads: nn.Module) -> None:
    for module in heads.modules():
        if isinstance(module, nn.Conv2d):
            module.parametrizations.train()
            module.weight  # noqa: B018 - computing it is what takes the step
            module.parametrizations.eval()
