"""Differentiable augmentation of what the discriminator sees (Zhao et al. 2020): colour, translation, cutout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHIFT, CUTOUT = 0.125, 0.5  # of the side


@dataclass(frozen=True)
class Augment:
    """Numbers for `B` pictures, `B` of each; `draw_augment` draws them, calling applies them.

    `brightness` is added, `saturation` and `contrast` multiply, shifts are in whole pixels (down, right),
    `holes` are the middles of the squares cut out.
    """

    brightness: Tensor
    saturation: Tensor
    contrast: Tensor
    shifts: Tensor
    holes: Tensor

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return pictures `B 3 H W`, nominally -1..1, changed, unclamped; what comes in from outside is 0."""
        return self._cut(self._shift(self._recolor(pictures)))

    def _recolor(self, x: Tensor) -> Tensor:
        brightness, saturation, contrast = (
            value.to(x).view(-1, 1, 1, 1) for value in (self.brightness, self.saturation, self.contrast)
        )
        x = x + brightness
        grey = x.mean(1, keepdim=True)
        x = (x - grey) * saturation + grey
        mean = x.mean((1, 2, 3), keepdim=True)
        return (x - mean) * contrast + mean

    def _shift(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        moved = []
        for picture, (down, right) in zip(x, self.shifts.tolist(), strict=True):
            rows, columns = _overlap(down, height), _overlap(right, width)
            part = picture[:, rows[0], columns[0]]
            pad = (columns[1], width - columns[1] - part.shape[2], rows[1], height - rows[1] - part.shape[1])
            moved.append(torch.nn.functional.pad(part, pad))
        return torch.stack(moved)

    def _cut(self, x: Tensor) -> Tensor:
        keep = torch.ones_like(x[:, :1])
        sides = [int(side * CUTOUT + 0.5) for side in x.shape[-2:]]
        for mask, middle in zip(keep, self.holes.tolist(), strict=True):
            (top, left), (tall, wide) = (max(0, m - s // 2) for m, s in zip(middle, sides, strict=True)), sides
            bottom, right = (max(0, m - s // 2 + s) for m, s in zip(middle, (tall, wide), strict=True))
            mask[:, top:bottom, left:right] = 0
        return x * keep


def _overlap(shift: int, length: int) -> tuple[slice, int]:
    """Return which part of an axis stays in view when it moves by `shift`, and where it begins then."""
    return slice(max(0, -shift), length - max(0, shift)), max(0, shift)


def draw_augment(count: int, size: tuple[int, int], generator: torch.Generator) -> Augment:
    """Draw for `count` pictures of `size`, with the ranges of the published policy "color,translation,cutout"."""

    def uniform(least: float, most: float) -> Tensor:
        return torch.rand(count, generator=generator) * (most - least) + least

    def whole(least: int, most: int) -> Tensor:
        return torch.randint(least, most + 1, (count,), generator=generator)

    brightness, saturation, contrast = uniform(-0.5, 0.5), uniform(0, 2), uniform(0.5, 1.5)
    reach = [int(side * SHIFT + 0.5) for side in size]
    shifts = torch.stack([whole(-most, most) for most in reach], 1)
    holes = torch.stack([whole(0, side - 1 + (1 - int(side * CUTOUT + 0.5) % 2)) for side in size], 1)
    return Augment(brightness, saturation, contrast, shifts, holes)
