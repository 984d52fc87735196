"""How an autoencoder is tiled, and on what it is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class VAETiling:
    """How an autoencoder is tiled; only `attention` changes the result.

    `tile_px`: side of a tile in pixels of the picture. `planes`: where activations wait between
    passes; "auto" is the compute device when they fit there, else host memory. `attention`:
    "windowed" lets each tile see only itself and half a tile around, which is NOT exact, for
    pictures whose global attention would take too long. Raises ValueError for values that are none of these.
    """

    tile_px: int = 512
    planes: Literal["auto", "host", "device"] = "auto"
    attention: Literal["exact", "windowed"] = "exact"

    def __post_init__(self) -> None:
        if self.tile_px < 1:
            raise ValueError(f"tile {self.tile_px} must be at least 1; try 512")
        for name, known in (("planes", ("auto", "host", "device")), ("attention", ("exact", "windowed"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; use {', '.join(known)}")


@dataclass(frozen=True)
class ComputeTarget:
    """Where and in which dtype to compute, and what running out of memory looks like there."""

    device: torch.device
    dtype: torch.dtype
    is_out_of_memory: Callable[[BaseException], bool]
