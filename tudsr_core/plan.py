"""What a run will do, decided before it runs: sizes, stages, tiles, calls and memory.

Pure arithmetic on sizes; no tensor and no network is touched.
"""

from __future__ import annotations

import itertools
import logging
import math
from dataclasses import dataclass

from .methods import Tiling
from .tiles import TilePlan, plan_tiles

log = logging.getLogger(__name__)

MAX_FACTOR = 64.0
MIN_SECOND = 1.25  # nineteen stages to MAX_FACTOR
MAX_PIXELS = 2**30
MAX_GROWN = 2**26  # pixels of a result that is made larger than asked: narrow strips would become huge
AUTO_TILES_PX = (512, 576, 640)  # what Stable Diffusion 2.1-base was trained at, and a little above
OVERLAP_STEP = 8  # pixels

MOST_TILES = 16  # at once: more are not faster

Size = tuple[int, int]


@dataclass(frozen=True)
class StageLimits:
    """Which factors a model's stages were trained for (TUDSR sec. 3.1: x8 = 4 x 2, x4 = 2 x 2).

    `first_max`: largest factor of stage one. `second`: factor of stage two, repeated as needed.
    `single_up_to`: up to this total factor stage one works alone. Raises ValueError for factors with
    which a size is never reached.
    """

    first_max: float = 4.0
    second: float = 2.0
    single_up_to: float = 3.0

    def __post_init__(self) -> None:
        for name, least in (("first_max", 1.0), ("second", MIN_SECOND), ("single_up_to", 1.0)):
            if not least <= getattr(self, name) <= MAX_FACTOR:
                raise ValueError(f"{name} {getattr(self, name):g} is not possible; use {least:g} to {MAX_FACTOR:g}")


@dataclass(frozen=True)
class Target:
    """The wanted size: a factor, a width and / or height, or the length of the longer edge."""

    scale: float | None = None
    width: int | None = None
    height: int | None = None
    long_edge: int | None = None

    def size_for(self, source: Size) -> Size:
        """Return `(height, width)` for a source of `(height, width)`.

        Raises ValueError when nothing or too much is given, when both sides are given with
        another aspect ratio, and when the result is smaller than the source or too large.
        """
        height, width = source
        given = [self.scale is not None, bool(self.width or self.height), self.long_edge is not None]
        if sum(given) != 1:
            raise ValueError("give exactly one of scale, width / height, or long edge")
        factor = self._factor(height, width)
        if not math.isfinite(factor) or factor <= 0:
            raise ValueError(f"scale {factor:g} is not a size; use a factor from 1 to {MAX_FACTOR:g}")
        if factor > MAX_FACTOR:
            raise ValueError(f"scale {factor:g} is too large; the limit is {MAX_FACTOR:g}")
        size = (
            self.height or max(1, round(height * factor)),
            self.width or max(1, round(width * factor)),
        )
        if size[0] < height or size[1] < width:
            raise ValueError(
                f"target {size[1]} x {size[0]} is smaller than the picture ({width} x {height}); "
                "this tool only enlarges"
            )
        if size[0] * size[1] > MAX_PIXELS:
            raise ValueError(f"target {size[1]} x {size[0]} has more than {MAX_PIXELS:,} pixels; use a smaller scale")
        return size

    def _factor(self, height: int, width: int) -> float:
        if self.scale is not None:
            return float(self.scale)
        if self.long_edge is not None:
            return self.long_edge / max(height, width)
        for name, value in (("width", self.width), ("height", self.height)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not a size; it must be at least 1")
        if self.width and self.height:
            across, down = self.width / width, self.height / height
            if max(abs(self.height - height * across), abs(self.width - width * down)) > max(1.0, across, down):
                raise ValueError(
                    f"{self.width} x {self.height} would stretch a picture of {width} x {height}; "
                    "give only the width or only the height"
                )
            return max(across, down)
        return self.width / width if self.width else self.height / height


def split_factor(factor: float, limits: StageLimits) -> list[float]:
    """Split a total factor into stages: [first, second, second, ...], their product is `factor`.

    >>> split_factor(8, StageLimits()), split_factor(6, StageLimits()), split_factor(16, StageLimits())
    ([4.0, 2.0], [3.0, 2.0], [4.0, 2.0, 2.0])
    """
    if factor <= limits.single_up_to:
        return [float(factor)]
    seconds = max(1, math.ceil(round(math.log(factor / limits.first_max, limits.second), 9)))
    first = factor / limits.second**seconds
    return [first] + [limits.second] * seconds


@dataclass(frozen=True)
class NetworkFacts:
    """What planning must know about a model: geometry, and memory measured once per pixel.

    `latent_scale`: pixels per latent. `multiple`: sides must be multiples of it, in pixels.
    `weight_bytes`: all weights in memory. `tile_bytes_per_pixel`: peak activations of one tile, per
    pixel of tile. `picture_bytes_per_pixel`: the same for an autoencoder that cannot be tiled and
    sees the whole picture; 0 if it can. `plane_bytes_per_pixel`: activations of a tiled autoencoder
    that wait in host memory (or on the device, when they fit), per pixel of picture. `free_bytes`:
    free memory of the device, for choosing the tile batch; 0 where batching gains nothing (CPU).
    """

    latent_scale: int
    multiple: int
    weight_bytes: int
    tile_bytes_per_pixel: int
    picture_bytes_per_pixel: int = 0
    plane_bytes_per_pixel: int = 0
    free_bytes: int = 0


@dataclass(frozen=True)
class StagePlan:
    """One stage: the factor, the size it makes, the padded size it computes on, and its tiles.

    `evaluations` is how often a network sees each tile. `tiling` is set where the tiles are those of
    the method's own script. `how` names the method and its timesteps, where known.
    """

    number: int
    factor: float
    size: Size
    padded: Size
    tiles: TilePlan
    evaluations: int = 1
    tiling: Tiling | None = None
    how: str = ""

    @property
    def calls(self) -> int:
        """Network evaluations of this stage."""
        return len(self.tiles) * self.evaluations

    def describe(self) -> str:
        """Return one line such as `stage 2: x2 to 1024 x 768, 12 tiles of 512 x 512`."""
        scale = self.padded[0] // self.tiles.height
        tile = f"{self.tiles.tile_width * scale} x {self.tiles.tile_height * scale}"
        tiles = f"{len(self.tiles)} tiles of {tile}" if len(self.tiles) > 1 else "one tile"
        tiles += " as published" if self.tiling else ""
        times = f", {self.evaluations} evaluations each" if self.evaluations > 1 else ""
        how = f", {self.how}" if self.how else ""
        return f"stage {self.number}: x{self.factor:g} to {self.size[1]} x {self.size[0]}, {tiles}{times}{how}"


@dataclass(frozen=True)
class UpscalePlan:
    """The whole run for one picture.

    `start` is the size that stage one enlarges: the source's, or a larger one for a small picture, whose
    result is then shrunk to `size`. `note` says so, or that it is padded.
    """

    source: Size
    start: Size
    size: Size
    stages: tuple[StagePlan, ...]
    device_bytes: int
    host_bytes: int
    note: str = ""

    @property
    def calls(self) -> int:
        """Number of network evaluations over all stages."""
        return sum(stage.calls for stage in self.stages)

    def describe(self) -> list[str]:
        """Return the plan as lines of plain text."""
        source = f"{self.source[1]} x {self.source[0]} to {self.size[1]} x {self.size[0]}"
        memory = f"memory: about {_gib(self.device_bytes)} for the networks, {_gib(self.host_bytes)} for the picture"
        calls = f"{self.calls} network call{'s' if self.calls != 1 else ''}"
        return [f"{source}, {calls}", *filter(None, [self.note]), *(stage.describe() for stage in self.stages), memory]


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.0f} MiB"


def plan_upscale(
    source: Size,
    target: Target,
    facts: NetworkFacts,
    limits: StageLimits,
    *,
    tile_px: int = 0,
    overlap_px: int = 128,
    tile_batch: int = 0,
    evaluations: tuple[int, int] = (1, 1),
    tilings: tuple[Tiling | None, Tiling | None] = (None, None),
    native_px: int = 0,
    pads_small: bool = False,
) -> UpscalePlan:
    """Plan the enlargement of one picture of `source = (height, width)`.

    `tile_px` and `overlap_px` are in pixels of the stage's output and multiples of the model's
    multiple; `tile_px` 0 leaves the side to `fit_tile`. `evaluations` are per tile, `tilings` take the
    place of tile and overlap, in stage one and in the later ones. `native_px` and `pads_small` are the
    method's (`Method`), 0 for none. Raises ValueError as
    `Target.size_for` and `plan_tiles` do.
    """
    if min(source) < 1:
        raise ValueError(f"picture is {source[1]} x {source[0]}; both sides must be at least 1")
    size = target.size_for(source)
    check_tiles(tile_px, overlap_px, tile_batch, facts)
    factor = max(size[0] / source[0], size[1] / source[1])
    factors = split_factor(factor, limits)
    start = source if pads_small else grown(source, factor, native_px)
    whole = size if start == source else tuple(round(side * factor) for side in start)
    least = native_px if pads_small else 0
    stages, done = [], 1.0
    for number, stage_factor in enumerate(factors, 1):
        done *= stage_factor
        last = number == len(factors)
        made = whole if last else tuple(max(1, round(side * done)) for side in start)
        padded = tuple(-(-max(side, least) // facts.multiple) * facts.multiple for side in made)
        later, tiling = number > 1, tilings[number > 1]
        tiles = _published_tiles(padded, tiling, facts) if tiling else _tiles(padded, tile_px, overlap_px, facts)
        stages.append(StagePlan(number, stage_factor, made, padded, tiles, evaluations[later], tiling))
    computed = max(tile_bytes(s.tiles, facts) * batch_for(s.tiles, facts, tile_batch) for s in stages)
    pixels = max(stage.padded[0] * stage.padded[1] for stage in stages)
    activations = max(computed, pixels * facts.picture_bytes_per_pixel)
    return UpscalePlan(
        source=source,
        start=start,
        size=size,
        stages=tuple(stages),
        device_bytes=facts.weight_bytes + activations,
        host_bytes=pixels * (BYTES_PER_OUTPUT_PIXEL + facts.plane_bytes_per_pixel),
        note=_note(source, start, size, stages[0], native_px, pads_small),
    )


def grown(source: Size, factor: float, native_px: int) -> Size:
    """Return the size to which a picture is enlarged before it is enlarged by `factor`.

    As in the scripts of OMGSR, OSEDiff and PiSA-SR: a short side below `native_px / factor` (rounded
    down) becomes that, the other follows. Narrow strips grow only until their result has MAX_GROWN pixels.
    """
    short, long = min(source), max(source)
    most = math.sqrt(MAX_GROWN * short / long)
    wanted = int(min(native_px, most) / factor)
    return tuple(side * wanted // short for side in source) if short < wanted else source


def _note(source: Size, start: Size, size: Size, stage: StagePlan, native_px: int, pads_small: bool) -> str:
    if start != source:
        return (
            f"a small picture: enlarged to {start[1]} x {start[0]} first, so that the result is about {native_px} px "
            f"as in training, then shrunk to {size[1]} x {size[0]}"
        )
    if pads_small and min(stage.size) < native_px:
        return f"a small picture: its borders are mirrored to {stage.padded[1]} x {stage.padded[0]}, and cut off again"
    return ""


# Peak of the whole-picture tensors: six float32 RGB copies (67 bytes measured at 4096 x 4096, see
# bench/README.md).
BYTES_PER_OUTPUT_PIXEL = 3 * 4 * 6


def tile_bytes(tiles: TilePlan, facts: NetworkFacts) -> int:
    """Return the activations of one tile."""
    return tiles.tile_height * tiles.tile_width * facts.latent_scale**2 * facts.tile_bytes_per_pixel


def batch_for(tiles: TilePlan, facts: NetworkFacts, wanted: int = 0) -> int:
    """Return how many tiles are computed at once: `wanted`, or with 0 as many as fit in free memory (unknown: 1)."""
    fitting = facts.free_bytes * 4 // 5 // max(1, tile_bytes(tiles, facts))
    return max(1, min(wanted or min(fitting, MOST_TILES), len(tiles)))


def check_tiles(tile_px: int, overlap_px: int, tile_batch: int, facts: NetworkFacts) -> None:
    """Raise ValueError when tile, overlap or tile batch cannot work with this model."""
    if tile_px and (tile_px < 2 * facts.multiple or tile_px % facts.multiple):
        raise ValueError(
            f"tile {tile_px} must be a multiple of {facts.multiple} and at least {2 * facts.multiple}; "
            "try 512, or 0 to let the picture's size decide"
        )
    smallest = tile_px or AUTO_TILES_PX[0]
    if overlap_px % facts.multiple or not 0 <= overlap_px < smallest:
        raise ValueError(
            f"overlap {overlap_px} must be a multiple of {facts.multiple}, "
            f"at least 0 and smaller than the tile ({smallest})"
        )
    if tile_batch < 0:
        raise ValueError(f"tile batch {tile_batch} must be at least 1, or 0 to let free memory decide")


def fit_overlap(tile_px: int, overlap_px: int) -> int:
    """Return `overlap_px`, or half the tile, said in a warning, where it is not smaller than the tile.

    So a smaller tile alone can be asked for: its overlap follows. `tile_px` 0 stands for 512. Nothing
    follows a tile that `check_tiles` will refuse.
    """
    tile_px = tile_px or AUTO_TILES_PX[0]
    if overlap_px < tile_px or tile_px < 2 * OVERLAP_STEP or tile_px % OVERLAP_STEP:
        return overlap_px
    fitting = tile_px // 2 // OVERLAP_STEP * OVERLAP_STEP
    log.warning("overlap %d is not smaller than the tile (%d); %d is used", overlap_px, tile_px, fitting)
    return fitting


def fit_tile(padded: Size, overlap_px: int, facts: NetworkFacts) -> Size:
    """Return height and width, in pixels, of the tile that takes least computing for a picture of `padded` pixels.

    Tiles a little larger than those the networks were trained at often come out cheaper: 1024 x 1024
    are nine tiles of 512 px that overlap by at least 128 px, or four of 576 px. At equal cost the
    smaller tile is taken.
    """

    def cost(tile: Size) -> float:
        area = tile[0] * tile[1]
        # Self-attention grows with the square of the area; at 512 x 512 it is a sixth of SD2.1's UNet.
        return len(_cut(padded, tile, overlap_px, facts)) * area * (1 + area / (5 * 512**2))

    sides = [AUTO_TILES_PX if length > AUTO_TILES_PX[0] else AUTO_TILES_PX[:1] for length in padded]
    return min(itertools.product(*sides), key=lambda tile: (cost(tile), tile))


def _cut(padded: Size, tile: Size, overlap_px: int, facts: NetworkFacts) -> TilePlan:
    (height, width), scale = padded, facts.latent_scale
    sides = tile[0] // scale, tile[1] // scale
    return plan_tiles(height // scale, width // scale, sides, overlap_px // scale, multiple=facts.multiple // scale)


def _tiles(padded: Size, tile_px: int, overlap_px: int, facts: NetworkFacts) -> TilePlan:
    tile = (tile_px, tile_px) if tile_px else fit_tile(padded, overlap_px, facts)
    return _cut(padded, tile, overlap_px, facts)


def _published_tiles(padded: Size, tiling: Tiling, facts: NetworkFacts) -> TilePlan:
    """Return the tiles of a method's own script: none by area, else squares no larger than the shorter side."""
    height, width = (side // facts.latent_scale for side in padded)
    tile, overlap = tiling.tile_px // facts.latent_scale, tiling.overlap_px // facts.latent_scale
    if height * width <= tile**2:
        return plan_tiles(height, width, (height, width), 0)
    side = min(tile, height, width)
    # The scripts never end where the shorter side is not above the overlap; half the tile ends.
    return plan_tiles(height, width, side, overlap if overlap < side else side // 2, spacing="stride")
