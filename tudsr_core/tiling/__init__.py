"""Tiles: where they lie, which size fits, how they are weighted and blended, and smaller ones when memory runs out.

Must not know: what is computed for a tile, pictures as files, methods by name.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    blending="TileBlender tile_weights",
    fitting="AUTO_TILES_PX NetworkFacts PublishedTiling Size batch_for "
    "check_tiles fit_overlap published_tiles tile_bytes tiles_for",
    plan="Spacing Tile TilePlan plan_tiles",
    out_of_memory="TiledRun",
    windows="Window",
)
