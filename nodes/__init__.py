"""The list of node classes: the pack's table of contents for ComfyUI."""

from __future__ import annotations

import logging

log = logging.getLogger(__name__)


def load_extension():
    """Return the ComfyExtension; a failure is logged with its traceback, which ComfyUI omits."""
    try:
        from comfy_api.latest import ComfyExtension

        from .host.messages import shows_warnings
        from .images import ColorFix
        from .loaders import LoadAdapter, LoadEmbedded
        from .multidiffusion import MultiDiffusion
        from .one_step import OneStepLatent, OneStepSigmas
        from .plan import Plan
        from .prompters import ClipTags
        from .regions import RegionConditioning
        from .taggers import LoadCaptioner, LoadDape
        from .tile_plan import PlanTiles, TileImages
        from .tile_prompts import ExtractTilePrompts, TilePromptsFromStrings
        from .upscale import StageOne, StageTwo, Upscale
        from .vae import VAEDecode, VAEEncode
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
