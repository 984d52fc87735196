"""One layer over a whole picture, tile by tile; when memory runs out, in smaller tiles from there on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .feature_maps import Box, FeatureMap, Interval, TransferQueue, halves, reserve
from .graph import Add, Attention, Layer
from .layers import attend, double, read_affine, read_doubling, scale_and_shift
from .settings import ComputeTarget, VAETiling

log = logging.getLogger(__name__)


class DeviceFull(MemoryError):
    """Tile and waiting activations do not fit on the device together."""


Grid = tuple[list[Interval], list[Interval]]
OnTile = Callable[[], None]
SMALLEST_SIDE = 16  # on a layer's own grid; below, running out of memory is not the tile's fault


@dataclass
class LayerPass:
    """One layer over the whole picture; `run` returns its output and what is put aside for later."""

    layer: Layer
    x: FeatureMap
    skip: FeatureMap | None
    dtype: torch.dtype
    measure: bool
    grid: Grid
    out: FeatureMap | None
    home: torch.device
    queue: TransferQueue
    target: ComputeTarget
    tiling: VAETiling
    on_tile: OnTile
    careful: bool
    limit: int | None = None

    def run(self) -> tuple[FeatureMap, FeatureMap | None]:
        if isinstance(self.layer, Add):
            return self._add()
        return self._attend() if isinstance(self.layer, Attention) else self._convolve()

    def _feature_map(self, channels: int, dtype: torch.dtype) -> FeatureMap:
        # On a device a tile is written in one piece: there each copy costs a launch.
        rows = None if self.home.type == "cpu" else self.grid[0]
        return FeatureMap(channels, self.grid[0][-1][1], self.grid[1][-1][1], dtype, self.home, rows)

    def _convolve(self) -> tuple[FeatureMap, FeatureMap | None]:
        layer, affine, aside, phases = self.layer, self._affine(), self.skip, self._phases()
        closing = layer.skip == "close"
        y = self.out or self._feature_map(layer.channels[1], self._joined(self.skip) if closing else self.dtype)
        if closing:
            aside = None
        elif layer.skip == "open":
            aside = self.x if layer.shortcut is None else self._feature_map(layer.shortcut.out_channels, self.dtype)

        def fetch(box: Box) -> tuple[Tensor, Tensor | None]:
            part = self.queue.fetch(self.x, *(self._source(*axis)[:2] for axis in self._axes(box)))
            return part, self.queue.fetch(self.skip, *box) if closing else None

        def compute(box: Box, parts: tuple[Tensor, Tensor | None]) -> None:
            if phases is not None:
                rims = [(first == 0, last == 2 * length) for (first, last), length in self._axes(box)]
                tile, put_aside = double(parts[0].to(self.dtype), *phases, rims), None
            else:
                tile, put_aside = self._convolve_tile(affine, box, *parts)
            made = [(y, tile, self.measure)]
            if put_aside is not None:
                made.append((aside, put_aside, self.target.dtype == torch.float16))
            self._store(box, made)

        used = [read for read in (self.x, self.skip if closing else None) if read not in (None, aside)]
        self._sweep(fetch, compute, used)
        return y, aside

    def _axes(self, box: Box) -> tuple[tuple[Interval, int], tuple[Interval, int]]:
        return (box[0], self.x.height), (box[1], self.x.width)

    def _source(self, interval: Interval, length: int) -> tuple[int, int, int]:
        """Return where to read for an output interval: first, last, and how much of the result precedes it."""
        first, last = interval
        if self.layer.resample == "down":
            return 2 * first, min(2 * last + 1, length), 0
        if self.layer.resample == "up":
            read = max(0, first // 2 - 1)
            return read, min(length, last // 2 + 1), first - 2 * read
        read = max(0, first - self.layer.halo)
        return read, min(length, last + self.layer.halo), first - read

    def _convolve_tile(
        self, affine: tuple[Tensor, Tensor] | None, box: Box, part: Tensor, skip: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        layer = self.layer
        core = _core((self._source(*axis)[2] for axis in self._axes(box)), box)
        put_aside = layer.shortcut(part[core].to(self.dtype)) if layer.shortcut is not None else None
        if affine is not None:
            part = silu(scale_and_shift(affine, part, self.dtype), inplace=True)
        # The module pads with zeros: right at true borders, and elsewhere only the cropped rim sees it.
        y = layer.module(part.to(self.dtype))[core]
        if skip is not None:
            y = y.add_(skip) if y.dtype == self._joined(self.skip) else y + skip
            y = y if layer.divide == 1 else y / layer.divide
        return y, put_aside

    def _add(self) -> tuple[FeatureMap, None]:
        y = self.out or self._feature_map(self.layer.channels[1], self._joined(self.skip))

        def compute(box: Box, parts: tuple[Tensor, Tensor]) -> None:
            tile = torch.add(parts[1].to(y.dtype), parts[0].to(y.dtype), alpha=self.layer.weight)
            self._store(box, [(y, tile, self.measure)])

        self._sweep(
            lambda box: (self.queue.fetch(self.x, *box), self.queue.fetch(self.skip, *box)),
            compute,
            [self.x, self.skip],
        )
        return y, None

    def _phases(self) -> tuple[Tensor, Tensor | None] | None:
        like = torch.empty(0, device=self.target.device, dtype=self.dtype)
        return read_doubling(self.layer.module, self.x.channels, like) if self.layer.resample == "up" else None

    def _attend(self) -> tuple[FeatureMap, FeatureMap | None]:
        affine, windowed = self._affine(), self.tiling.attention == "windowed"
        rows, columns = self.grid
        margin = max(b - a for a, b in rows + columns) // 2 if windowed else 0
        y = self.out or self._feature_map(self.layer.channels[1], self._joined(self.x))
        memory = None if windowed else self._keys_and_values(affine)

        def around(box: Box) -> Box:
            return tuple((max(0, a - margin), min(length, b + margin)) for (a, b), length in self._axes(box))

        def compute(box: Box, parts: tuple[Tensor]) -> None:
            core = _core((interval[0] - wide[0] for interval, wide in zip(box, around(box), strict=True)), box)
            residual = parts[0][core]
            normed = scale_and_shift(affine, parts[0], self.dtype).to(self.dtype)
            keys, values = memory or (self._tokens(module, normed) for module in (self.layer.k, self.layer.v))
            mixed = attend(self._tokens(self.layer.q, normed[core]), keys, values, self._chunk(keys))
            tile = self._project(mixed, box) + residual
            self._store(box, [(y, tile if self.layer.divide == 1 else tile / self.layer.divide, self.measure)])

        self._sweep(lambda box: (self.queue.fetch(self.x, *around(box)),), compute, [] if windowed else [self.x])
        return y, self.skip

    def _chunk(self, keys: Tensor) -> int:
        """How many keys are on the device at once: all if they are there, else about a tile's memory."""
        rows, columns = self.grid
        tile = max(b - a for a, b in rows) * max(b - a for a, b in columns)
        return keys.shape[1] if self.tiling.planes == "device" else max(64, 4 * tile)

    def _keys_and_values(self, affine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions, `heads N d`, where the feature maps are."""
        filled, memory = 0, []

        def compute(box: Box, parts: tuple[Tensor]) -> None:
            nonlocal filled
            normed = scale_and_shift(affine, parts[0], self.dtype).to(self.dtype)
            tokens = [self._tokens(module, normed) for module in (self.layer.k, self.layer.v)]
            if not memory:
                size = tokens[0].shape[0], self.x.height * self.x.width, tokens[0].shape[2]
                memory.extend([reserve(size, self.dtype, self.home) for _ in tokens])
            for all_tokens, part in zip(memory, tokens, strict=True):
                all_tokens[:, filled : filled + part.shape[1]].copy_(part)
            filled += tokens[0].shape[1]

        self._sweep(lambda box: (self.queue.fetch(self.x, *box),), compute, [])
        return memory[0], memory[1]

    def _tokens(self, projection: nn.Module, normed: Tensor) -> Tensor:
        """Return `heads N d` of a projection of `1 C h w`."""
        flat = projection(normed.flatten(2).mT) if self.layer.flat else projection(normed).flatten(2).mT
        return flat[0].unflatten(1, (self.layer.heads, -1)).transpose(0, 1).contiguous()

    def _project(self, mixed: Tensor, box: Box) -> Tensor:
        tokens, size = mixed.transpose(0, 1).flatten(1)[None], [b - a for a, b in box]
        if self.layer.flat:
            return self.layer.out(tokens).mT.unflatten(2, size)
        return self.layer.out(tokens.mT.unflatten(2, size))

    def _joined(self, other: FeatureMap) -> torch.dtype:
        return torch.promote_types(self.dtype, other.dtype)

    def _affine(self) -> tuple[Tensor, Tensor] | None:
        """GroupNorm of the whole feature map as one multiplication and one addition per channel."""
        if self.layer.norm is None:
            return None
        like = torch.empty(0, device=self.target.device, dtype=self.dtype)
        weight, bias, groups, eps = read_affine(self.layer.norm, like)
        mean, variance = (m.repeat_interleave(self.x.channels // groups) for m in self.x.moments(groups))
        scale = weight.to(mean) / (variance + eps).sqrt()
        shift = bias.to(mean) - mean * scale
        wide = torch.promote_types(self.dtype, torch.float32)
        return tuple(value.to(wide).to(self.target.device) for value in (scale, shift))

    def _store(self, box: Box, made: list[tuple[FeatureMap, Tensor, bool]]) -> None:
        """Put tiles into their feature maps; a box that runs out of memory here is computed again, but counted once."""
        made = [(feature_map, tile.to(feature_map.dtype), measure) for feature_map, tile, measure in made]
        sums = [(feature_map, feature_map.measure(tile)) for feature_map, tile, measure in made if measure]
        for feature_map, tile, _ in made:
            self.queue.store(feature_map, *box, tile)
        for feature_map, measured in sums:
            feature_map.add(measured)

    def _sweep(
        self, fetch: Callable[[Box], tuple], compute: Callable[[Box, tuple], None], used: list[FeatureMap]
    ) -> None:
        boxes = [(rows, columns) for rows in self.grid[0] for columns in self.grid[1]]
        for box, parts in self.queue.feed(boxes, lambda box: self._try(fetch, box)):
            self._compute(box, parts, fetch, compute)
            del parts
            # A layer that may have to be repeated in float32 keeps its input.
            if box[1] == self.grid[1][-1] and not (self.careful and self.target.dtype == torch.float16):
                for feature_map in used:
                    feature_map.free(self._needed_from(box[0][1]) if feature_map is self.x else box[0][1])
            self.on_tile()
        self.queue.flush()

    def _needed_from(self, row: int) -> int:
        return row if isinstance(self.layer, Attention | Add) else self._source((row, row), self.x.height)[0]

    def _compute(
        self, box: Box, parts: tuple | None, fetch: Callable[[Box], tuple], compute: Callable[[Box, tuple], None]
    ) -> None:
        """Compute a box; when memory runs out, in halves, and so the boxes after it."""
        sides = [b - a for a, b in box]
        if self.limit is None or sides[0] * sides[1] <= self.limit:
            if parts is None:
                parts = self._try(fetch, box)
                self.queue.arrive()
            if parts is not None and self._try(lambda: compute(box, parts) or True):
                return
            parts = None
            if self.home.type != "cpu":
                raise DeviceFull("out of memory in the autoencoder; let its activations wait in host memory")
            if max(sides) < SMALLEST_SIDE:
                raise MemoryError("out of memory in the autoencoder even with the smallest tiles; close other programs")
            self.limit = sides[0] * sides[1] // 2 + max(sides)
            log.warning("out of memory in the autoencoder: going on with tiles of half the size")
        for half in halves(box):
            self._compute(half, None, fetch, compute)

    def _try(self, call: Callable, *args):  # noqa: ANN202
        """Return the call's result, or None when memory ran out."""
        # The except block must end before anything is tried again: the traceback keeps tensors alive.
        try:
            return call(*args)
        except RuntimeError as error:
            if not self.target.is_out_of_memory(error):
                raise
        return None


def _core(offsets, box: Box) -> tuple:  # noqa: ANN001
    (top, left), ((y0, y1), (x0, x1)) = offsets, box
    return ..., slice(top, top + y1 - y0), slice(left, left + x1 - x0)
