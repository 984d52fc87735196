"""Scene-linear pictures, as OpenEXR and float TIFF hold them, and the sRGB pictures that networks and screens take.

Light is linear, of any range, its colours times alpha (OpenEXR's convention), with the primaries of sRGB. The rule:
networks see what lies in 0..1, through sRGB's curve; what lies outside (highlights, negative colours, light without
coverage) is carried beside it, enlarged plainly, and added back in linear light. So a picture within 0..1 is treated as
its sRGB version is, and the rest of a picture does not get darker for its sun.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .srgb import from_linear, to_linear


def displayed(light: Tensor) -> Tensor:
    """Return the sRGB picture, 0..1, float32, colours not times alpha, of light `1 C H W` (C = 3 or 4)."""
    color, alpha = _apart(light.float())
    shown = from_linear(color.clamp(0, 1))
    return shown if light.shape[1] == 3 else torch.cat([shown, alpha.clamp(0, 1)], 1)


def beyond(light: Tensor) -> Tensor | None:
    """Return what `displayed` leaves out of the colours of `light`, `1 3 H W`, times alpha; None for nothing."""
    light = light.float()
    color, alpha = _apart(light)
    inside = (color == color.clamp(0, 1)) & (alpha > 0)
    left = torch.where(inside, 0, light[:, :3] - color.clamp(0, 1) * alpha.clamp(0, 1))
    return left if left.any() else None


def light_of(pixels: Tensor, source: Tensor | None = None) -> Tensor:
    """Return the light `1 C H W`, float32, of an sRGB picture of 0..1 that was made of the light `source`, of any size.

    What lies beyond 0..1 in the source is added. A picture that is still `displayed(source)` gives `source` to the bit.
    """
    if source is not None and pixels.shape == source.shape and torch.equal(pixels.float(), displayed(source)):
        return source.float()
    alpha = pixels[:, 3:]
    color = to_linear(pixels[:, :3].float())
    if alpha.numel():
        color = color * alpha
    left = None if source is None else beyond(source)
    if left is not None:
        # Bilinear, since any other kernel has negative lobes: black rings around a sun.
        color = color + F.interpolate(left, size=tuple(pixels.shape[-2:]), mode="bilinear", antialias=True)
    return torch.cat([color, alpha.float()], 1)


def _apart(light: Tensor) -> tuple[Tensor, Tensor]:
    """Return colours divided by alpha, where there is any, and alpha; without transparency that is 1."""
    if light.shape[1] == 3:
        return light, torch.ones_like(light[:, :1])
    color, alpha = light[:, :3], light[:, 3:]
    return torch.where(alpha > 0, color / alpha.clamp_min(1e-30), color), alpha
