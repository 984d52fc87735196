"""One picture whose result is larger than memory: upscaled in overlapping blocks, written while they come."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..methods import Target, Tick, Upscaler
from ..pictures import PictureError, RowReader, check_output, refusal, write_big_tiff
from ..tiling import TilePlan, plan_tiles, tile_weights
from .jobs import Output
from .manifest import facts_or_none
from .settings import Settings
from .unfinished import unfinished

log = logging.getLogger(__name__)

BLOCK_PX, OVERLAP_PX = 1024, 128
ROW_BYTES = 28  # a pixel of a row of blocks takes with all its copies on the way into the file (bench/blocks.py)


@dataclass(frozen=True)
class BlockPlan:
    """What will be done: blocks of the source, and the whole factor by which each is enlarged."""

    scale: int
    tiles: TilePlan

    @property
    def size(self) -> tuple[int, int]:
        """`(height, width)` of the result."""
        return self.tiles.height * self.scale, self.tiles.width * self.scale

    @property
    def enlarged(self) -> TilePlan:
        """The same blocks in the result."""
        plan, scale = self.tiles, self.scale
        sides = (side * scale for side in (plan.height, plan.width, plan.tile_height, plan.tile_width, plan.overlap))
        tops, lefts = (tuple(offset * scale for offset in offsets) for offsets in (plan.tops, plan.lefts))
        return TilePlan(*sides, tops, lefts)

    def describe(self) -> list[str]:
        """Return the plan as lines of plain text."""
        height, width = self.size
        memory = width * self.enlarged.tile_height * ROW_BYTES / 2**30
        return [
            f"{self.tiles.width} x {self.tiles.height} to {width} x {height} ({height * width / 1e6:,.0f} megapixels)",
            f"{len(self.tiles)} blocks of {self.tiles.tile_width * self.scale} x {self.tiles.tile_height * self.scale}",
            f"memory: about {memory:.1f} GiB for a row of blocks, and what one block takes",
        ]


def plan_blocks(size: tuple[int, int], target: Target) -> BlockPlan:
    """Plan a source of `size = (height, width)`; raises ValueError for a target that is no whole factor."""
    scale = target.scale
    if scale is None or scale != int(scale) or scale < 1:
        raise ValueError("a result that is written in blocks needs a whole --scale, such as 2, 4 or 8")
    side, overlap = -(-BLOCK_PX // int(scale)), -(-OVERLAP_PX // int(scale))
    return BlockPlan(int(scale), plan_tiles(*size, side, overlap))


def upscale_in_blocks(
    source: Path,
    path: Path,
    upscaler: Upscaler,
    target: Target,
    output: Output,
    *,
    pyramid: bool = False,
    reader: RowReader | None = None,
    settings: Settings | None = None,
    tick: Tick | None = None,
) -> BlockPlan:
    """Enlarge one picture into a tiled BigTIFF; memory is that of a row of blocks, whatever the picture's height.

    Blocks overlap and are blended, as tiles inside each are. With the `settings` that describe the run, a killed or
    interrupted one is gone on with. `tick` counts blocks. Returns what was done; raises PictureError.
    """
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise PictureError(f"{path}: only TIFF is written in blocks; name it {path.with_suffix('.tif').name}")
    reader = reader or RowReader(source, output.max_megapixels)
    plan = plan_blocks(reader.size, target)
    facts = replace(reader.facts, bits=output.bits or reader.facts.bits)
    check_output(path, plan.size, facts.has_alpha, facts.bits, output.overwrite)
    run = None if settings is None else _identity(settings, source, plan)
    rows = partial(_rows, reader, plan, upscaler, tick)
    try:
        with unfinished(path, run) as part:
            if part.bands:
                log.warning("%s: goes on behind the %d bands of tiles that an ended run wrote", path, len(part))
            more = dict(folder=path.parent, pyramid=pyramid, there=part, on_band=part.add)
            write_big_tiff(part.file, facts, plan.size, rows, **more)
    except OSError as error:
        raise refusal(path, error) from error
    return plan


def _identity(settings: Settings, source: Path, plan: BlockPlan) -> Settings:
    """Return all that the bytes of a result depend on."""
    import imagecodecs
    import tifffile

    written_by = {"tifffile": tifffile.__version__, "imagecodecs": imagecodecs.__version__}
    read = {"source": str(source.absolute()), "facts": facts_or_none(source)}
    return json.loads(json.dumps(settings | written_by | read | {"blocks": dataclasses.asdict(plan)}))


def _rows(
    reader: RowReader, plan: BlockPlan, upscaler: Upscaler, tick: Tick | None, first: int = 0
) -> Iterator[Tensor]:
    """Yield the finished rows of the result from `first` on, as many as the next row of blocks will not change.

    Blocks that reach no further than `first` are not computed: no row from there on has a part in them.
    """
    small, large, scale = plan.tiles, plan.enlarged, plan.scale
    band, target, across = None, Target(scale=float(scale)), len(plan.tiles.lefts)
    for row, top in enumerate(small.tops):
        if large.tops[row] + large.tile_height <= first:
            continue
        strip = reader.rows(top, top + small.tile_height)
        if band is None:
            band = torch.zeros(1, strip.shape[1], large.tile_height, large.width)
        for column, left in enumerate(small.lefts):
            tile = large.tile(row * across + column)
            part = strip[..., left : left + small.tile_width].contiguous()
            made = upscaler.run(part, upscaler.plan(tuple(part.shape[-2:]), target))
            weights = tile_weights(large, tile).to(torch.float32)
            band[..., tile.left : tile.left + tile.width].add_(made * weights)
            if tick:
                tick(tile.index + 1, len(small), None)
        following = large.tops[row + 1] if row + 1 < len(large.tops) else large.height
        done = following - large.tops[row]
        yield band[:, :, min(done, max(0, first - large.tops[row])) : done]
        left_over = large.tile_height - done
        band[:, :, :left_over] = band[:, :, done:].clone()
        band[:, :, left_over:] = 0
