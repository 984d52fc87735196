"""What an autoencoder's layers take: bytes of a tile on the device, and channels that wait between layers."""

from __future__ import annotations

from collections.abc import Container
from fractions import Fraction

import torch

from .graph import Add, Join, Layer, Local, grids
from .settings import VAETiling
from .stream import tile_sides


def tile_bytes(layers: list[Layer], start: Fraction, tiling: VAETiling, dtype: torch.dtype, fused: bool = False) -> int:
    """Bytes of a tile: its input in the feature maps' and the norm's dtype, the convolution's ends, statistics.

    `fused`: norms and statistics read and write half types, as they do on CUDA.
    """
    wide = dtype.itemsize if fused else max(4, dtype.itemsize)
    largest = 0
    for layer, scale in grids(layers, start):
        if isinstance(layer, Join):
            continue
        inside, outside = layer.channels
        if getattr(layer, "resample", "") == "up":
            inside *= 1.25
        area = (tiling.tile_px * scale + 2) ** 2
        largest = max(largest, area * (inside * (wide + dtype.itemsize) + outside * (wide + 2 * dtype.itemsize)))
    for layer, side in tile_sides(layers, start, tiling):
        if isinstance(layer, Local):
            largest = max(largest, (side + 2 * layer.halo) ** 2 * layer.held * dtype.itemsize)
    return int(largest)


def live_channels(layers: list[Layer], start: Fraction, whole_input: bool, keep: Container[str] = ()) -> Fraction:
    """Channels per pixel of the picture that wait at once, at most; inputs are freed as they are used.

    `whole_input`: they are freed after the layer only. `keep`: levels whose activations stay.
    """
    x, skip, waiting, most = Fraction(0), Fraction(0), Fraction(0), Fraction(0)
    for layer, scale in grids(layers, start):
        if isinstance(layer, Join):
            x, waiting = Fraction(0), waiting + x
            continue
        y, role, before = layer.channels[1] * scale**2, getattr(layer, "skip", ""), x + skip + waiting
        if role == "open":
            skip = x if layer.shortcut is None else layer.shortcut.out_channels * scale**2
        elif role == "close":
            skip = Fraction(0)
        aside = skip if role == "open" and layer.shortcut is not None else 0
        most = max(most, before + y + aside if whole_input else max(before, y + skip + waiting))
        x = y
        if isinstance(layer, Add):
            waiting = Fraction(0)
        elif layer.level in keep:
            x, waiting = Fraction(0), waiting + y
    return most


def kept_channels(layers: list[Layer], keep: Container[str]) -> Fraction:
    """Channels per pixel of the picture that the activations kept of an encoder have."""
    kept = (layer.channels[1] * scale**2 for layer, scale in grids(layers, Fraction(1)) if layer.level in keep)
    return sum(kept, Fraction(0))
