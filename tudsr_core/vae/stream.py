"""Runs an autoencoder's steps over pictures of any size, tile by tile, with the untiled network's result.

Each step is one pass over the picture: tiles are read with their real neighbours from a `Plane`,
computed on the device, and written to the next plane. What makes it exact: GroupNorm statistics
come from all tiles together, zero padding is seen at true borders only, attention is over all
positions. The device holds one tile at a time. Which steps there are is `vae_graph`'s business.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from .feature_maps import Box, FeatureMap, Interval, TransferQueue, halves, intervals, reserve
from .graph import Attention, Layer, grids
from .layers import attend, double, read_affine, read_doubling, scale_and_shift

log = logging.getLogger(__name__)

Grid = tuple[list[Interval], list[Interval]]
OnTile = Callable[[], None]
SMALLEST_SIDE = 16  # on a step's own grid; below, running out of memory is not the tile's fault


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


def cut(steps: list[Layer], start: Fraction, size: tuple[int, int], tiling: VAETiling) -> Iterator[tuple[Layer, Grid]]:
    """Yield each step with the rows and columns of its output's tiles; `size` is the input's, on grid `start`.

    Coarse grids get tiles as heavy as the finest one's, that is, of nearly as many positions: small
    ones would be mostly halo. Tiles are up to twice as wide as the square of that weight, because a
    flat row of tiles lets the plane it reads be freed sooner. Attention keeps to the square, which is
    what its queries and windows are.
    """
    heaviest = max(max(step.channels) for step, scale in grids(steps, start) if scale == 1)
    for step, scale in grids(steps, start):
        factor = {"": Fraction(1), "up": Fraction(2), "down": Fraction(1, 2)}[getattr(step, "resample", "")]
        height, width = (int(length * factor) for length in size)
        side = tiling.tile_px * scale
        if isinstance(step, Attention):
            yield step, (intervals(height, max(1, int(side))), intervals(width, max(1, int(side))))
        else:
            side = max(side, tiling.tile_px * min(1, heaviest / max(step.channels)) ** 0.5)
            unit = 2 if step.resample == "up" else 1
            columns = intervals(width, max(1, int(2 * side)), unit)
            yield step, (intervals(height, max(1, int(side**2 / (columns[0][1] or 1))), unit), columns)
        size = height, width


def count_tiles(steps: list[Layer], start: Fraction, size: tuple[int, int], tiling: VAETiling) -> int:
    """Return how many tiles `run_steps` computes for one input of `size` on grid `start`."""
    total = 0
    for step, (rows, columns) in cut(steps, start, size, tiling):
        passes = 2 if isinstance(step, Attention) and tiling.attention == "exact" else 1
        total += passes * len(rows) * len(columns)
    return total


def run_layers(
    steps: list[Layer], start: Fraction, x: Tensor, place: ComputeTarget, tiling: VAETiling, on_tile: OnTile
) -> Tensor:
    """Return the output for one picture `1 C H W` on grid `start` (1: pixels, 1/8: latents).

    The result is on the CPU, float32 or float64. `tiling.planes` must not be "auto" here.
    """
    half, wide = place.dtype == torch.float16, torch.promote_types(place.dtype, torch.float32)
    home = place.device if tiling.planes == "device" else torch.device("cpu")
    lane = TransferQueue(place.device)
    plane, skip = FeatureMap.of(x[0].cpu()), None
    for number, (step, grid) in enumerate(cut(steps, start, tuple(x.shape[-2:]), tiling)):
        following = steps[number + 1] if number + 1 < len(steps) else None
        out = None
        if following is None:
            size = step.channels[1], grid[0][-1][1], grid[1][-1][1]
            out = FeatureMap.of(reserve(size, wide, torch.device("cpu")))
        common = dict(grid=grid, out=out, home=home, lane=lane, place=place, tiling=tiling)
        measure = half or getattr(following, "norm", None) is not None
        made = _Pass(step, plane, skip, place.dtype, measure, on_tile=on_tile, **common).run()
        if half and not all(p is None or p is plane or p.is_finite() for p in made):
            log.info("the autoencoder overflowed float16; this step again in float32")
            made = _Pass(_in_float32(step), plane, skip, torch.float32, measure, on_tile=lambda: None, **common).run()
        plane, skip = made
    return plane.bands[0][None]


def _in_float32(step: Layer) -> Layer:
    modules = {
        name: copy.deepcopy(module).float()
        for name in ("module", "shortcut", "q", "k", "v", "out")
        if (module := getattr(step, name, None)) is not None
    }
    return replace(step, **modules)


@dataclass
class _Pass:
    """One step over the whole picture; `run` returns its output and what is put aside for later."""

    step: Layer
    x: FeatureMap
    skip: FeatureMap | None
    dtype: torch.dtype
    measure: bool
    grid: Grid
    out: FeatureMap | None
    home: torch.device
    lane: TransferQueue
    place: ComputeTarget
    tiling: VAETiling
    on_tile: OnTile
    limit: int | None = None

    def run(self) -> tuple[FeatureMap, FeatureMap | None]:
        return self._attend() if isinstance(self.step, Attention) else self._convolve()

    def _plane(self, channels: int, dtype: torch.dtype) -> FeatureMap:
        return FeatureMap(channels, self.grid[0][-1][1], self.grid[1][-1][1], dtype, self.home)

    def _convolve(self) -> tuple[FeatureMap, FeatureMap | None]:
        step, affine, aside, phases = self.step, self._affine(), self.skip, self._phases()
        closing = step.skip == "close"
        y = self.out or self._plane(step.channels[1], self._joined(self.skip) if closing else self.dtype)
        if closing:
            aside = None
        elif step.skip == "open":
            aside = self.x if step.shortcut is None else self._plane(step.shortcut.out_channels, self.dtype)

        def fetch(box: Box) -> tuple[Tensor, Tensor | None]:
            part = self.lane.fetch(self.x, *(self._source(*axis)[:2] for axis in self._axes(box)))
            return part, self.lane.fetch(self.skip, *box) if closing else None

        def compute(box: Box, parts: tuple[Tensor, Tensor | None]) -> None:
            if phases is not None:
                rims = [(first == 0, last == 2 * length) for (first, last), length in self._axes(box)]
                tile, put_aside = double(parts[0].to(self.dtype), *phases, rims), None
            else:
                tile, put_aside = self._convolve_tile(affine, box, *parts)
            made = [(y, tile, self.measure)]
            if put_aside is not None:
                made.append((aside, put_aside, self.place.dtype == torch.float16))
            self._store(box, made)

        used = [plane for plane in (self.x, self.skip if closing else None) if plane not in (None, aside)]
        self._sweep(fetch, compute, used)
        return y, aside

    def _axes(self, box: Box) -> tuple[tuple[Interval, int], tuple[Interval, int]]:
        return (box[0], self.x.height), (box[1], self.x.width)

    def _source(self, span: Interval, length: int) -> tuple[int, int, int]:
        """Return where to read for an output span: first, last, and how much of the result precedes it."""
        first, last = span
        if self.step.resample == "down":
            return 2 * first, min(2 * last + 1, length), 0
        if self.step.resample == "up":
            read = max(0, first // 2 - 1)
            return read, min(length, last // 2 + 1), first - 2 * read
        read = max(0, first - self.step.halo)
        return read, min(length, last + self.step.halo), first - read

    def _convolve_tile(
        self, affine: tuple[Tensor, Tensor] | None, box: Box, part: Tensor, skip: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        step = self.step
        core = _core((self._source(*axis)[2] for axis in self._axes(box)), box)
        put_aside = step.shortcut(part[core].to(self.dtype)) if step.shortcut is not None else None
        if affine is not None:
            part = silu(scale_and_shift(affine, part), inplace=True)
        # The module pads with zeros: right at true borders, and elsewhere only the cropped rim sees it.
        y = step.module(part.to(self.dtype))[core]
        if skip is not None:
            y = y.add_(skip) if y.dtype == self._joined(self.skip) else y + skip
            y = y if step.divide == 1 else y / step.divide
        return y, put_aside

    def _phases(self) -> tuple[Tensor, Tensor | None] | None:
        like = torch.empty(0, device=self.place.device, dtype=self.dtype)
        return read_doubling(self.step.module, self.x.channels, like) if self.step.resample == "up" else None

    def _attend(self) -> tuple[FeatureMap, FeatureMap | None]:
        affine, windowed = self._affine(), self.tiling.attention == "windowed"
        rows, columns = self.grid
        margin = max(b - a for a, b in rows + columns) // 2 if windowed else 0
        y = self.out or self._plane(self.step.channels[1], self._joined(self.x))
        memory = None if windowed else self._keys_and_values(affine)

        def around(box: Box) -> Box:
            return tuple((max(0, a - margin), min(length, b + margin)) for (a, b), length in self._axes(box))

        def compute(box: Box, parts: tuple[Tensor]) -> None:
            core = _core((span[0] - wide[0] for span, wide in zip(box, around(box), strict=True)), box)
            residual = parts[0][core].clone()
            normed = scale_and_shift(affine, parts[0]).to(self.dtype)
            keys, values = memory or (self._tokens(module, normed) for module in (self.step.k, self.step.v))
            mixed = attend(self._tokens(self.step.q, normed[core]), keys, values, self._chunk(keys))
            tile = self._project(mixed, box) + residual
            self._store(box, [(y, tile if self.step.divide == 1 else tile / self.step.divide, self.measure)])

        self._sweep(lambda box: (self.lane.fetch(self.x, *around(box)),), compute, [] if windowed else [self.x])
        return y, self.skip

    def _chunk(self, keys: Tensor) -> int:
        """How many keys are on the device at once: all if they are there, else about a tile's memory."""
        rows, columns = self.grid
        tile = max(b - a for a, b in rows) * max(b - a for a, b in columns)
        return keys.shape[1] if self.tiling.planes == "device" else max(64, 4 * tile)

    def _keys_and_values(self, affine: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions, `heads N d`, where the planes are."""
        filled, memory = 0, []

        def compute(box: Box, parts: tuple[Tensor]) -> None:
            nonlocal filled
            normed = scale_and_shift(affine, parts[0]).to(self.dtype)
            tokens = [self._tokens(module, normed) for module in (self.step.k, self.step.v)]
            if not memory:
                size = tokens[0].shape[0], self.x.height * self.x.width, tokens[0].shape[2]
                memory.extend([reserve(size, self.dtype, self.home) for _ in tokens])
            for all_tokens, part in zip(memory, tokens, strict=True):
                all_tokens[:, filled : filled + part.shape[1]].copy_(part)
            filled += tokens[0].shape[1]

        self._sweep(lambda box: (self.lane.fetch(self.x, *box),), compute, [])
        return memory[0], memory[1]

    def _tokens(self, projection: nn.Module, normed: Tensor) -> Tensor:
        """Return `heads N d` of a projection of `1 C h w`."""
        flat = projection(normed.flatten(2).mT) if self.step.flat else projection(normed).flatten(2).mT
        return flat[0].unflatten(1, (self.step.heads, -1)).transpose(0, 1).contiguous()

    def _project(self, mixed: Tensor, box: Box) -> Tensor:
        tokens, size = mixed.transpose(0, 1).flatten(1)[None], [b - a for a, b in box]
        if self.step.flat:
            return self.step.out(tokens).mT.unflatten(2, size)
        return self.step.out(tokens.mT.unflatten(2, size))

    def _joined(self, other: FeatureMap) -> torch.dtype:
        return torch.promote_types(self.dtype, other.dtype)

    def _affine(self) -> tuple[Tensor, Tensor] | None:
        """GroupNorm of the whole plane as one multiplication and one addition per channel."""
        if self.step.norm is None:
            return None
        like = torch.empty(0, device=self.place.device, dtype=self.dtype)
        weight, bias, groups, eps = read_affine(self.step.norm, like)
        mean, variance = (m.repeat_interleave(self.x.channels // groups) for m in self.x.moments(groups))
        scale = weight.cpu().double() / (variance + eps).sqrt()
        shift = bias.cpu().double() - mean * scale
        wide = torch.promote_types(self.dtype, torch.float32)
        return tuple(value.view(1, -1, 1, 1).to(wide).to(self.place.device) for value in (scale, shift))

    def _store(self, box: Box, made: list[tuple[FeatureMap, Tensor, bool]]) -> None:
        """Put tiles into their planes; a box that runs out of memory here is computed again, but counted once."""
        made = [(plane, tile.to(plane.dtype), measure) for plane, tile, measure in made]
        sums = [(plane, plane.measure(tile)) for plane, tile, measure in made if measure]
        for plane, tile, _ in made:
            self.lane.store(plane, *box, tile)
        for plane, measured in sums:
            plane.add(measured)

    def _sweep(
        self, fetch: Callable[[Box], tuple], compute: Callable[[Box, tuple], None], used: list[FeatureMap]
    ) -> None:
        boxes = [(rows, columns) for rows in self.grid[0] for columns in self.grid[1]]
        for box, parts in self.lane.feed(boxes, lambda box: self._try(fetch, box)):
            self._compute(box, parts, fetch, compute)
            del parts
            # float16 may have to repeat the step, so there its input stays.
            if box[1] == self.grid[1][-1] and self.place.dtype != torch.float16:
                for plane in used:
                    plane.free(self._needed_from(box[0][1]) if plane is self.x else box[0][1])
            self.on_tile()
        self.lane.flush()

    def _needed_from(self, row: int) -> int:
        return row if isinstance(self.step, Attention) else self._source((row, row), self.x.height)[0]

    def _compute(
        self, box: Box, parts: tuple | None, fetch: Callable[[Box], tuple], compute: Callable[[Box, tuple], None]
    ) -> None:
        """Compute a box; when memory runs out, in halves, and so the boxes after it."""
        sides = [b - a for a, b in box]
        if self.limit is None or sides[0] * sides[1] <= self.limit:
            if parts is None:
                parts = self._try(fetch, box)
                self.lane.arrive()
            if parts is not None and self._try(lambda: compute(box, parts) or True):
                return
            parts = None
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
            if not self.place.is_out_of_memory(error):
                raise
        return None


def _core(offsets, box: Box) -> tuple:  # noqa: ANN001
    (top, left), ((y0, y1), (x0, x1)) = offsets, box
    return ..., slice(top, top + y1 - y0), slice(left, left + x1 - x0)
