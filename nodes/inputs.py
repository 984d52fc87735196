"""Inputs that several nodes have, each said once."""

from __future__ import annotations

from comfy_api.latest import io

from ..tudsr_core.methods import UpscaleOptions
from ..tudsr_core.tiling import AUTO_TILES_PX

CATEGORY = "image/upscaling/TUDSR"


DEFAULTS = UpscaleOptions()


TILE_BATCH_SAYS = "A CPU computes one at a time. The picture does not depend on it, on a GPU but for rounding."


def sampling_tile_inputs() -> list:
    """Return tile and overlap for samplers, which work at the side that the model was trained at."""
    tile, overlap, _, _ = tile_inputs()
    tile.default, tile.min = AUTO_TILES_PX[0], 64
    tile.tooltip = "Side of a tile in output pixels. Models trained at 512 px are best at 512, those at 768 at 768."
    return [tile, overlap]


def tile_inputs(defaults: UpscaleOptions = DEFAULTS) -> list:
    """Return the inputs tile, overlap, tile batch and window, with the core's defaults."""
    return [
        io.Int.Input(
            "tile",
            default=defaults.tile_px,
            min=0,
            max=4096,
            step=64,
            tooltip="Side of a tile in output pixels. 0: from 512 to 640, whichever computes least for the picture. "
            "Raise it for fewer, slower tiles and wider context; lower it when memory runs out.",
        ),
        io.Int.Input(
            "overlap",
            default=defaults.overlap_px,
            min=0,
            max=2048,
            step=8,
            tooltip="Overlap of neighbouring tiles in output pixels. Raise it if you see a grid; "
            "lower it for speed. A quarter of the tile is a good start; what does not fit a tile becomes its half.",
        ),
        io.Int.Input(
            "tile_batch",
            default=defaults.tile_batch,
            min=0,
            max=64,
            tooltip="Tiles computed at once. 0: as many as fit in free memory. Raise it on a large GPU for speed; "
            f"lower it when memory runs out. {TILE_BATCH_SAYS}",
        ),
        io.Combo.Input(
            "window",
            options=["gaussian", "uniform", "published"],
            default=defaults.window,
            tooltip="How overlapping tiles are weighted: gaussian is smooth, uniform is the plain average, "
            "published is the off-centre window of OMGSR and OSEDiff, and nothing but the window.",
        ),
    ]
