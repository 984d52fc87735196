"""The list of node classes: the pack's table of contents for ComfyUI."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def load_extension():
    """Return the ComfyExtension; a failure is logged with its traceback, which ComfyUI omits."""
    try:
        from comfy_api.latest import ComfyExtension

        from .images import ColorFix
        from .loaders import LoadAdapter, LoadEmbedded
        from .one_step import OneStepLatent, OneStepSigmas
        from .plan import Plan
        from .prompters import ClipTags
        from .prompts import ExtractTilePrompts, TilePromptsFromStrings
        from .regions import RegionConditioning
        from .taggers import LoadCaptioner, LoadDape
        from .tile_plan import PlanTiles, TileImages
        from .tiles import MultiDiffusion
        from .upscale import StageOne, StageTwo, Upscale
        from .vae import VAEDecode, VAEEncode
        from .words import shows_warnings
    except Exception:
        log.exception("comfyui-tudsr could not be loaded")
        raise

    nodes = [
        LoadEmbedded,
        LoadAdapter,
        Upscale,
        StageOne,
        StageTwo,
        Plan,
        OneStepSigmas,
        OneStepLatent,
        MultiDiffusion,
        VAEEncode,
        VAEDecode,
        PlanTiles,
        TileImages,
        ClipTags,
        LoadDape,
        LoadCaptioner,
        ExtractTilePrompts,
        TilePromptsFromStrings,
        RegionConditioning,
        ColorFix,
    ]

    class TUDSRExtension(ComfyExtension):
        """Gives ComfyUI the node classes."""

        async def get_node_list(self):
            return [shows_warnings(node) for node in nodes]

    return TUDSRExtension()
