"""What a restored picture is judged by: edge-aware DISTS, mean absolute error, and the discriminator's opinion.

Pictures are `B 3 H W` in 0..1 unless it is said otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import Features
from ..weights import CheckpointError, read_file

C1 = C2 = 1e-6
EDGE_EPS = 1e-6
GREY = (0.2989, 0.587, 0.114)
SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))

EdgeColors = Literal["grey", "rgb"]


class Dists(nn.Module):
    """DISTS (Ding et al. 2020, eq. 4 to 8) on the picture itself and the maps of any extractor.

    D = 1 - sum of (alpha S1 + beta S2) over channels / (sum alpha + sum beta), with S1 of the means and S2
    of the covariance of each channel. The published `alpha` and `beta` belong to VGG16; without them all
    channels weigh the same, as in OMGSR's variant.
    """

    def __init__(self, features: Features, balance: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.features = features
        count = 3 + sum(features.channels)
        alpha, beta = balance or (torch.ones(count), torch.ones(count))
        if alpha.numel() != count or beta.numel() != count:
            raise ValueError(f"alpha and beta of DISTS have {alpha.numel()} values, these features {count} channels")
        total = alpha.sum() + beta.sum()
        self.register_buffer("alpha", alpha.flatten() / total)
        self.register_buffer("beta", beta.flatten() / total)

    def forward(self, picture: Tensor, truth: Tensor) -> Tensor:
        """Return the distance of each pair, `B`; 0 for equal pictures."""
        maps = ([x, *self.features(x)] for x in (picture, truth))
        moments = [_similarities(x, y) for x, y in zip(*maps, strict=True)]
        first, second = (torch.cat(parts, 1) for parts in zip(*moments, strict=True))
        return 1 - (first * self.alpha).sum(1) - (second * self.beta).sum(1)


def _similarities(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x.float(), y.float()
    mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
    var_x, var_y = (z.var((2, 3), unbiased=False) for z in (x, y))
    covariance = (x * y).mean((2, 3)) - mean_x * mean_y
    first = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    return first, (2 * covariance + C2) / (var_x + var_y + C2)


def read_balance(path: Path) -> tuple[Tensor, Tensor]:
    """Return DISTS' `alpha` and `beta` of a published weights file (`weights.pt`). Raises CheckpointError."""
    tensors = read_file(path).tensors
    if tensors.keys() != {"alpha", "beta"}:
        raise CheckpointError(f"{path} does not hold alpha and beta alone; it is not DISTS' weights.pt")
    return tensors["alpha"].float().flatten(), tensors["beta"].float().flatten()


def edges(picture: Tensor, colors: EdgeColors = "grey") -> Tensor:
    """Return the Sobel magnitude `B 1 H W` of the grey picture, or `B 3 H W` of each channel.

    Not normalised (0 to about 5.7). Borders are repeated: zeros would draw a frame that both pictures
    share, and around every chunk.
    """
    if colors == "grey":
        picture = (picture * picture.new_tensor(GREY).view(1, 3, 1, 1)).sum(1, keepdim=True)
    channels = picture.shape[1]
    across = picture.new_tensor(SOBEL)
    kernels = torch.stack([across, across.T]).view(2, 1, 3, 3).repeat(channels, 1, 1, 1)
    padded = F.pad(picture, (1, 1, 1, 1), mode="replicate")
    gradients = F.conv2d(padded, kernels, groups=channels).unflatten(1, (channels, 2))
    return (gradients.square().sum(2) + EDGE_EPS).sqrt()


def edge_aware_dists(dists: Dists, picture: Tensor, truth: Tensor, colors: EdgeColors = "grey") -> Tensor:
    """Return DISTS of the pictures plus DISTS of their edges, mean of the batch (TUDSR sec. 3.2)."""
    drawn = (edges(x, colors).expand(-1, 3, -1, -1) for x in (picture, truth))
    return (dists(picture, truth) + dists(*drawn)).mean()


def mean_absolute_error(picture: Tensor, truth: Tensor) -> Tensor:
    """Return the mean of |difference| on the scale -1..1: twice that of 0..1."""
    return 2 * F.l1_loss(picture, truth)


def soft_label_loss(logits: Sequence[Tensor], label: float) -> Tensor:
    """Return the binary cross-entropy against a constant `label`: summed over heads, mean of places and batch."""
    return sum(F.binary_cross_entropy_with_logits(x.float(), torch.full_like(x, label).float()) for x in logits)
