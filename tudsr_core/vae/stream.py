"""Runs an autoencoder's layers over pictures of any size, tile by tile, with the untiled network's result.

Each layer is one pass over the picture: tiles are read with their real neighbours from a `FeatureMap`,
computed on the device, and written to the next feature map. What makes it exact: GroupNorm statistics
come from all tiles together, zero padding is seen at true borders only, attention is over all
positions. The device holds one tile at a time. Which layers there are is `graph`'s business.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from .feature_maps import FeatureMap, Joined, TransferQueue, intervals, reserve
from .graph import Add, Attention, Join, Layer, grids
from .layer_pass import Grid, LayerPass, OnTile
from .settings import ComputeTarget, VAETiling

log = logging.getLogger(__name__)


class Overflow(ArithmeticError):
    """An activation left the range of float16."""


def tile_sides(layers: list[Layer], start: Fraction, tiling: VAETiling) -> Iterator[tuple[Layer, float]]:
    """Yield each layer with the side of the square that is as large as one of its output's tiles."""
    heaviest = max(max(layer.channels) for layer, scale in grids(layers, start) if scale == 1)
    for layer, scale in grids(layers, start):
        side = tiling.tile_px * scale
        if not isinstance(layer, Attention):
            side = max(side, tiling.tile_px * min(1, heaviest / max(layer.channels)) ** 0.5)
        yield layer, side


def cut(layers: list[Layer], start: Fraction, size: tuple[int, int], tiling: VAETiling) -> Iterator[tuple[Layer, Grid]]:
    """Yield each layer with the rows and columns of its output's tiles; `size` is the input's, on grid `start`.

    Coarse grids get tiles as heavy as the finest one's, that is, of nearly as many positions: small
    ones would be mostly halo. Tiles are up to twice as wide as the square of that weight, because a
    flat row of tiles lets the feature map it reads be freed sooner. Attention keeps to the square, which is
    what its queries and windows are.
    """
    for layer, side in tile_sides(layers, start, tiling):
        factor = {"": Fraction(1), "up": Fraction(2), "down": Fraction(1, 2)}[getattr(layer, "resample", "")]
        height, width = (int(length * factor) for length in size)
        if isinstance(layer, Attention):
            yield layer, (intervals(height, max(1, int(side))), intervals(width, max(1, int(side))))
        else:
            unit = 2 if factor == 2 else 1
            columns = intervals(width, max(1, int(2 * side)), unit)
            yield layer, (intervals(height, max(1, int(side**2 / (columns[0][1] or 1))), unit), columns)
        size = height, width


def count_tiles(layers: list[Layer], start: Fraction, size: tuple[int, int], tiling: VAETiling) -> int:
    """Return how many tiles `run_layers` computes for one input of `size` on grid `start`."""
    total = 0
    for layer, (rows, columns) in cut(layers, start, size, tiling):
        passes = 2 if isinstance(layer, Attention) and tiling.attention == "exact" else int(not isinstance(layer, Join))
        total += passes * len(rows) * len(columns)
    return total


def run_layers(
    layers: list[Layer],
    start: Fraction,
    x: Tensor,
    target: ComputeTarget,
    tiling: VAETiling,
    on_tile: OnTile,
    features: Mapping[str, FeatureMap] | None = None,
    keep: Mapping[str, list[FeatureMap]] | None = None,
    careful: bool = True,
) -> Tensor:
    """Return the output for one picture `1 C H W` on grid `start` (1: pixels, 1/8: latents).

    The result is on the CPU, float32 or float64. `tiling.planes` must not be "auto" here. `features`:
    what `Join` layers join, by level. `keep`: lists to which the activations at the end of these
    levels are appended, where they lie; they stay when the layers after them are done. `careful`: a
    layer that overflows float16 is done again in float32, for which every layer is waited for; if
    not, Overflow is raised at the end.
    """
    half, wide = target.dtype == torch.float16, torch.promote_types(target.dtype, torch.float32)
    home = target.device if tiling.planes == "device" else torch.device("cpu")
    common = dict(home=home, queue=TransferQueue(target.device), target=target, tiling=tiling, careful=careful)
    feature_map, skip, aside, finite = FeatureMap.of(x[0].cpu()), None, None, []
    for number, (layer, grid) in enumerate(cut(layers, start, tuple(x.shape[-2:]), tiling)):
        if isinstance(layer, Join):
            aside, feature_map = feature_map, Joined(features[layer.level], feature_map)
            continue
        following = layers[number + 1] if number + 1 < len(layers) else None
        out, level = None, getattr(layer, "level", "")
        if following is None:
            size = layer.channels[1], grid[0][-1][1], grid[1][-1][1]
            out = FeatureMap.of(reserve(size, wide, torch.device("cpu")))
        kept = keep is not None and level in keep
        measure = half or kept or isinstance(following, Join) or getattr(following, "norm", None) is not None
        inputs = feature_map, aside if isinstance(layer, Add) else skip
        feature_map, skip = _run_layer(layer, inputs, on_tile, measure=measure, grid=grid, out=out, **common)
        if half and not careful:
            finite += [made.finite() for made in (feature_map, skip) if made not in (None, *inputs)]
        if kept:
            feature_map.kept = True
            keep[level].append(feature_map)
    if finite and not torch.stack(finite).all():
        raise Overflow("an activation is beyond the range of float16")
    return feature_map.bands[0][None]


def _run_layer(layer: Layer, inputs: tuple, on_tile: OnTile, **common) -> tuple:  # noqa: ANN003
    """Return output and what is put aside; what overflows float16 is done again in float32, if `careful`."""
    dtype = common["target"].dtype
    made = LayerPass(layer, *inputs, dtype, on_tile=on_tile, **common).run()
    if dtype == torch.float16 and common["careful"] and not all(p in (None, inputs[0]) or p.finite() for p in made):
        log.info("the autoencoder overflowed float16; this layer again in float32")
        made = LayerPass(_in_float32(layer), *inputs, torch.float32, on_tile=lambda: None, **common).run()
    return made


def _in_float32(layer: Layer) -> Layer:
    modules = {
        name: copy.deepcopy(module).float()
        for name in ("module", "shortcut", "q", "k", "v", "out")
        if (module := getattr(layer, name, None)) is not None
    }
    return replace(layer, **modules)
