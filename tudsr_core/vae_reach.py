"""Purely local networks in tiles: with enough real neighbours around it, a tile gives exactly the untiled values.

That holds for autoencoders without global operations (no GroupNorm, no attention), such as the
embedded model's. Those with global operations are recognised; `vae_stream` is for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Reach:
    """How a purely local network maps sizes and how far it looks.

    `scale`: output pixels per input pixel (1/4 for an f = 4 encoder, 4 for its decoder).
    `halo`: input pixels beyond a block that can influence that block's output, per side.
    """

    scale: Fraction
    halo: int


@torch.inference_mode()
def measure_reach(network: Network, channels: int, unit: int, like: Tensor, limit: int = 32) -> Reach | None:
    """Find the `Reach` of `network` by following one NaN, or None when it spreads everywhere.

    NaN survives every operation, so the NaNs in the output of a picture with one bad block are
    exactly what can depend on that block. `unit` is the smallest block in input pixels (4 for an
    f = 4 encoder, 1 for its decoder); `limit` is the largest halo looked for, in units.
    """
    side = (2 * limit + 1) * unit
    probe = torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype)
    middle = slice(limit * unit, (limit + 1) * unit)
    probe[..., middle, middle] = math.nan
    output = network(probe)
    touched = torch.isnan(output).any(dim=1)[0]
    rows = torch.nonzero(touched.any(1)).flatten()
    out_unit = output.shape[-1] // (2 * limit + 1)
    first, last = int(rows.min()), int(rows.max())
    if first == 0 or last == output.shape[-1] - 1:
        return None
    halo = max(limit * out_unit - first, last + 1 - (limit + 1) * out_unit)
    return Reach(Fraction(output.shape[-1], side), math.ceil(halo / out_unit) * unit)


def find_reaches(
    vae: nn.Module, encode: Network, decode: Network, scale: int, latents: int, like: Tensor
) -> tuple[Reach | None, Reach | None]:
    """Return the reach of `encode` and of `decode`; None, None without trying if `vae` has GroupNorm.

    `scale` is pixels per latent, `latents` the latent's channels; `like` gives device and dtype.
    """
    if any(isinstance(module, nn.GroupNorm) for module in vae.modules()):
        return None, None
    return measure_reach(encode, 3, scale, like, limit=12), measure_reach(decode, latents, 1, like, limit=12)


def count_tiles(size: tuple[int, int], tile: int) -> int:
    """Return how many tiles `run_tiled` makes of an input of `size` with cores of `tile`."""
    return math.ceil(size[0] / tile) * math.ceil(size[1] / tile)


def run_tiled(network: Network, image: Tensor, reach: Reach | None, tile: int, on_tile: Callable[[], None]) -> Tensor:
    """Return `network(image)` computed in cores of `tile` input pixels plus the halo.

    Cores partition the input; each is read with `reach.halo` real neighbours, clipped at the true
    borders, where the network's own zero padding applies as in the untiled run. One picture of
    the batch is computed at a time. Without a reach, the whole batch is computed at once.
    """
    if reach is None:
        result = network(image)
        on_tile()
        return result
    batch, _, height, width = image.shape
    output = None
    for index in range(batch):
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                core = _run_core(network, image[index : index + 1], top, left, reach, tile)
                if output is None:
                    size = int(height * reach.scale), int(width * reach.scale)
                    output = core.new_empty(batch, core.shape[1], *size)
                y, x = int(top * reach.scale), int(left * reach.scale)
                output[index, :, y : y + core.shape[-2], x : x + core.shape[-1]] = core[0]
                on_tile()
    return output


def _run_core(network: Network, image: Tensor, top: int, left: int, reach: Reach, tile: int) -> Tensor:
    height, width = image.shape[-2:]
    bottom, right = min(top + tile, height), min(left + tile, width)
    y0, x0 = max(0, top - reach.halo), max(0, left - reach.halo)
    y1, x1 = min(height, bottom + reach.halo), min(width, right + reach.halo)
    result = network(image[..., y0:y1, x0:x1])
    start_y, start_x = int((top - y0) * reach.scale), int((left - x0) * reach.scale)
    core_h, core_w = int((bottom - top) * reach.scale), int((right - left) * reach.scale)
    return result[..., start_y : start_y + core_h, start_x : start_x + core_w]
