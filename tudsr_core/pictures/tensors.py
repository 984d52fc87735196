"""Pixels as tensors: resizing, padding to a multiple, and the alpha channel.

Everything here is pure tensor work on `B C H W`, float, 0..1. Files live in `files.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA_BT601 = (65.481 / 255, 128.553 / 255, 24.966 / 255)


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `B C H W` to `size = (height, width)` with Pillow's bicubic (a = -0.5, antialiased).

    Returns a tensor of the same dtype and device. Values may overshoot the input range by the
    kernel's negative lobes, as in every bicubic; callers clamp where a range matters.
    """
    if tuple(image.shape[-2:]) == tuple(size):
        return image
    # Antialiased bicubic is missing on MPS and has no half-precision kernel on CPU.
    home = image.device if image.device.type in ("cpu", "cuda") else torch.device("cpu")
    resized = F.interpolate(
        image.to(home, torch.float32), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return resized.to(image.device, image.dtype)


def luma(image: Tensor) -> Tensor:
    """Return the BT.601 luma `B 1 H W` of RGB `B 3 H W` in 0..1 (studio range 16/255..235/255)."""
    weights = image.new_tensor(LUMA_BT601).view(1, 3, 1, 1)
    return (image * weights).sum(1, keepdim=True) + 16 / 255


@dataclass(frozen=True)
class Padding:
    """How many pixels were added on each side, so that `crop` can take them off again."""

    left: int
    top: int
    right: int
    bottom: int

    def crop(self, image: Tensor) -> Tensor:
        """Cut this padding off `B C H W`."""
        height, width = image.shape[-2:]
        return image[..., self.top : height - self.bottom, self.left : width - self.right]


def pad_to_multiple(image: Tensor, multiple: int, minimum: int = 0) -> tuple[Tensor, Padding]:
    """Grow `B C H W` so that both sides are multiples of `multiple` and at least `minimum`.

    The new pixels are those of `pad_to`. Works from 1 px upwards. Padding goes right and bottom, so that latents
    keep the phase of the picture.
    """
    if multiple < 1:
        raise ValueError(f"multiple is {multiple}; it must be at least 1")
    height, width = (-(-max(side, minimum) // multiple) * multiple for side in image.shape[-2:])
    return pad_to(image, (height, width)), Padding(0, 0, width - image.shape[-1], height - image.shape[-2])


def pad_to(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Grow `B C H W` to the right and downwards to `size = (height, width)`, which must not be smaller.

    The new pixels mirror the picture, again and again where it is small; a single pixel is repeated.
    """
    while tuple(image.shape[-2:]) != tuple(size):
        sides = image.shape[-2:]
        down, right = (min(want - have, have - 1) for want, have in zip(size, sides, strict=True))
        if not (down or right):
            return F.pad(image, (0, size[1] - sides[1], 0, size[0] - sides[0]), mode="replicate")
        image = F.pad(image, (0, right, 0, down), mode="reflect")
    return image


def split_alpha(image: Tensor) -> tuple[Tensor, Tensor | None]:
    """Split `B 4 H W` into colour `B 3 H W` and alpha `B 1 H W`; three channels give `(image, None)`.

    Colour under full transparency is undefined in most files (often black), and would bleed into
    the edges of what is visible; it is filled from the nearest visible colour.
    """
    if image.shape[1] == 3:
        return image, None
    if image.shape[1] != 4:
        raise ValueError(f"image has {image.shape[1]} channels; expected 3 (RGB) or 4 (RGBA)")
    color, alpha = image[:, :3], image[:, 3:]
    return fill_transparent(color, alpha), alpha


def join_alpha(color: Tensor, alpha: Tensor | None) -> Tensor:
    """Undo `split_alpha`: `B 3 H W` and alpha `B 1 h w` (resized to fit) give `B 4 H W`."""
    if alpha is None:
        return color
    alpha = resize(alpha, tuple(color.shape[-2:])).clamp(0, 1)
    return torch.cat([color, alpha.to(color)], 1)


def fill_transparent(color: Tensor, alpha: Tensor) -> Tensor:
    """Replace colour where `alpha` is 0 by an average of the visible colour around it.

    Push-pull: premultiplied colour is averaged down a pyramid, and every hole takes the value of
    the finest level that has any coverage. Pixels with alpha > 0 are returned untouched.
    """
    hidden = alpha <= 0
    if not hidden.any() or hidden.all():
        return color
    levels = [(color * (~hidden), (~hidden).to(color.dtype))]
    while max(levels[-1][0].shape[-2:]) > 1:
        levels.append(tuple(F.avg_pool2d(x, 2, ceil_mode=True) for x in levels[-1]))
    filled = levels[-1][0] / levels[-1][1].clamp_min(1e-12)
    for summed, coverage in reversed(levels[:-1]):
        below = F.interpolate(filled, size=summed.shape[-2:], mode="bilinear", align_corners=False)
        filled = torch.where(coverage > 0, summed / coverage.clamp_min(1e-12), below)
    return torch.where(hidden, filled, color)
