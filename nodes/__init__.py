"""The pack as ComfyUI sees it: node classes, their inputs, help pages (`web/docs`) and the browser's part (`web/js`).

Owns: what a node is called, which inputs it has and in which order, and how these become a call of the
core. `host/` holds what talks to ComfyUI's internals, `inputs.py` what several nodes ask for.

Must not know: how a picture is made (`tudsr_core`, seen only through its rooms' public names),
diffusers, and the command line. Importing this package imports nothing of ComfyUI.
"""

from __future__ import annotations

import logging
from importlib import import_module

log = logging.getLogger(__name__)

# Every node class by module, in the order in which ComfyUI is told of them.
NODES = (
    ("loaders", "LoadEmbedded LoadAdapter"),
    ("upscale", "Upscale StageOne StageTwo"),
    ("folders", "UpscaleFolder LoadFromFolder SaveWithSourceName"),
    ("picture_files", "LoadPicture SavePicture"),
    ("plan", "Plan"),
    ("one_step", "OneStepSigmas OneStepLatent"),
    ("multidiffusion", "MultiDiffusion"),
    ("stablesr", "LoadStableSR ApplyStableSR StableSRSigmas"),
    ("vae", "VAEEncode VAEDecode"),
    ("tile_plan", "PlanTiles TileImages"),
    ("clip_tags", "ClipTags"),
    ("taggers", "LoadDape LoadCaptioner"),
    ("tile_prompts", "ExtractTilePrompts TilePromptsFromStrings"),
    ("regions", "RegionConditioning"),
    ("images", "ColorFix"),
    ("compare", "Compare"),
    ("cfw", "LoadCFW CFWDecode"),
    ("degrade", "DegradeImage LoadDownsampler DegradeLearned"),
)


def load_extension():
    """Return the ComfyExtension; a failure is logged with its traceback, which ComfyUI omits."""
    try:
        from comfy_api.latest import ComfyExtension

        from .aliases import aliases_of
        from .host.compare_view import serve_view
        from .host.messages import shows_warnings
        from .host.search import found_by

        serve_view()
        nodes = [
            found_by(shows_warnings(getattr(import_module(f".{module}", __name__), name)), aliases_of)
            for module, names in NODES
            for name in names.split()
        ]
    except Exception:
        log.exception("comfyui-tudsr could not be loaded")
        raise

    class TUDSRExtension(ComfyExtension):
        """Gives ComfyUI the node classes."""

        async def get_node_list(self):
            return nodes

    return TUDSRExtension()
