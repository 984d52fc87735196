"""What a run will do, decided before it runs: sizes, stages, tiles, calls and memory.

Pure arithmetic on sizes; no tensor and no network is touched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..tiling import (
    NetworkFacts,
    PublishedTiling,
    Size,
    TilePlan,
    batch_for,
    check_tiles,
    published_tiles,
    tile_bytes,
    tiles_for,
)

MAX_FACTOR = 64.0
MIN_SECOND = 1.25  # nineteen stages to MAX_FACTOR
MAX_PIXELS = 2**30
MAX_GROWN = 2**26  # pixels of a result that is made larger than asked: narrow strips would become huge


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
    tiling: PublishedTiling | None = None
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
    tilings: tuple[PublishedTiling | None, PublishedTiling | None] = (None, None),
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
        tiles = published_tiles(padded, tiling, facts) if tiling else tiles_for(padded, tile_px, overlap_px, facts)
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
