"""MultiDiffusion for any MODEL and any sampler: each step predicts overlapping tiles and blends them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comfy.patcher_extension
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tudsr_core.prompts import TilePrompts
from ..tudsr_core.tiling import Tile, TileBlender, TilePlan, Window, fit_overlap, plan_tiles
from .host.conditions import HintCache, crop_conds, is_placed, is_spatial, merge_conds
from .host.networks import batches_tiles, estimate_memory_for, pixels_per_latent
from .host.tile_texts import TileTexts
from .inputs import CATEGORY, TILE_BATCH_SAYS, sampling_tile_inputs, switch_input, tile_inputs, tile_prompt_inputs

KEY = "tudsr_multidiffusion"


class TiledPrediction:
    """A CALC_COND_BATCH wrapper: tiles instead of the whole latent, blended with normalised weights.

    MultiDiffusion (Bar-Tal et al. 2023, eq. 5): the weighted least-squares agreement of all tiles.
    Tiles lie over the last two axes, so a video (`B C T H W`) is cut into tiles of all its frames.
    With `jitter`, the grid is shifted by a different offset each step (seeded by the step's noise
    level), which moves what is left of seams around. With `texts`, their plan is used and every
    tile is given its own prompt.
    """

    def __init__(
        self, tile: int, overlap: int, batch: int, window: Window, jitter: bool, texts: TileTexts | None = None
    ) -> None:
        self.tile, self.overlap, self.batch, self.window, self.jitter = tile, overlap, batch, window, jitter
        self.texts = texts
        self.hints: HintCache = {}

    def run(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: what is kept per tile lives as long as one run."""
        self.hints.clear()
        if self.texts:
            guider = executor.class_obj
            guider.conds = self.texts.expand(guider.conds)
        try:
            return executor(*args, **kwargs)
        finally:
            self.hints.clear()

    def __call__(self, executor, model, conds, x_in: Tensor, timestep: Tensor, model_options: dict) -> list[Tensor]:
        refuse_what_has_no_tiles(x_in, model_options)
        if self.texts:
            self.texts.check(x_in)
            plan = self.texts.plan
        else:
            plan = plan_tiles(x_in.shape[-2], x_in.shape[-1], self.tile, self.overlap)
        if not self.texts and len(plan) == 1:
            return executor(model, conds, x_in, timestep, model_options)
        if self.jitter:
            plan = self._shifted(plan, float(timestep[0]))
        spatial = is_spatial(conds, x_in.shape)
        blenders = [TileBlender(plan, self.window) for _ in conds]
        for tiles in plan.batches(1 if is_placed(conds) or not batches_tiles(x_in) else self.batch):
            for group, cut in self._conditions(conds, tiles, x_in, spatial):
                parts = torch.cat([tile.cut(x_in) for tile in group])
                results = executor(model, cut, parts, timestep.repeat(len(group)), model_options)
                for blender, result in zip(blenders, results, strict=True):
                    for tile, value in zip(group, result.chunk(len(group)), strict=True):
                        blender.add(tile, value)
        return [blender.result().to(x_in.dtype) for blender in blenders]

    def _conditions(
        self, conds: list, tiles: list[Tile], x_in: Tensor, spatial: bool
    ) -> Iterator[tuple[list[Tile], list]]:
        """Yield tiles that can run as one call, and the conditions for it."""
        own = [[self._of_tile(entries, tile, x_in, spatial) for tile in tiles] for entries in conds]
        merged = [merge_conds(lists, len(x_in)) for lists in own]
        if len(tiles) > 1 and any(one is None and lists[0] is not None for one, lists in zip(merged, own, strict=True)):
            for tile in tiles:
                yield from self._conditions(conds, [tile], x_in, spatial)
            return
        yield tiles, merged

    def _of_tile(self, entries: list[dict] | None, tile: Tile, x_in: Tensor, spatial: bool) -> list[dict] | None:
        if entries and self.texts:
            entries = self.texts.pick(entries, tile)
        return crop_conds(entries, tile, x_in, self.hints) if spatial else entries

    def _shifted(self, plan: TilePlan, sigma: float) -> TilePlan:
        """Move all inner tiles by one offset that keeps every point covered; the outer ones stay flush."""
        generator = torch.Generator().manual_seed(int(sigma * 1e6) & 0x7FFFFFFF)

        def shift(offsets: tuple[int, ...], side: int) -> tuple[int, ...]:
            if len(offsets) < 3:
                return offsets
            gaps = [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
            room = side - max(gaps)
            move = int(torch.randint(-room, room + 1, (1,), generator=generator)) if room else 0
            return (offsets[0], *(offset + move for offset in offsets[1:-1]), offsets[-1])

        return TilePlan(
            plan.height,
            plan.width,
            plan.tile_height,
            plan.tile_width,
            plan.overlap,
            shift(plan.tops, plan.tile_height),
            shift(plan.lefts, plan.tile_width),
        )


def refuse_what_has_no_tiles(x: Tensor, model_options: dict) -> None:
    """Raise ValueError for latents without rows and columns, and for patches that hold a picture of the whole."""
    if x.ndim not in (4, 5):
        raise ValueError(
            f"MultiDiffusion (Tiled) needs latents of pictures or video, but this one is {tuple(x.shape)}; "
            "connect the MODEL to the sampler without it"
        )
    for patches in model_options.get("transformer_options", {}).get("patches", {}).values():
        for patch in patches:
            if hasattr(patch, "encoded_image_size"):
                raise ValueError(
                    f"this MODEL carries a control picture ({type(patch).__name__}) that MultiDiffusion (Tiled) cannot "
                    "cut: every tile would see all of it; use a ControlNet on the CONDITIONING instead"
                )


def in_tiles(
    model: Any,
    tile: int,
    overlap: int,
    tile_batch: int,
    window: Window,
    jitter: bool = False,
    tile_prompts: TilePrompts | None = None,
    clip: Any = None,
) -> Any:
    """Return a clone of MODEL that predicts in tiles, its own or those of `tile_prompts`; sides in pixels."""
    overlap = fit_overlap(tile, overlap)
    scale = pixels_per_latent(model)
    texts, size = None, (tile // scale, tile // scale)
    if tile_prompts is not None:
        texts = TileTexts(clip, tile_prompts)
        size = tile_prompts.plan.tile_height, tile_prompts.plan.tile_width
    tiled = TiledPrediction(tile // scale, overlap // scale, tile_batch, window, jitter, texts)
    clone = model.clone()
    wrappers = comfy.patcher_extension.WrappersMP
    for kind, wrapper in ((wrappers.CALC_COND_BATCH, tiled), (wrappers.OUTER_SAMPLE, tiled.run)):
        clone.remove_wrappers_with_key(kind, KEY)
        clone.add_wrapper_with_key(kind, KEY, wrapper)
    estimate_memory_for(clone, KEY, tile_batch, size)
    return clone


class MultiDiffusion(io.ComfyNode):
    """MODEL to MODEL: every step of any sampler in overlapping tiles."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        _, _, tile_batch, window = tile_inputs()
        window.default = "uniform"
        # ComfyUI plans this MODEL's memory before the sampler runs, so the batch must be known.
        tile_batch.default = tile_batch.min = 1
        tile_batch.tooltip = (
            "Tiles computed at once. Raise it on a large GPU for speed; lower it when memory runs out. "
            "Areas, masks and ControlNets make it one at a time. " + TILE_BATCH_SAYS
        )
        return io.Schema(
            node_id="TUDSRMultiDiffusion",
            display_name="MultiDiffusion (Tiled)",
            category=CATEGORY,
            description="Makes any sampler work in overlapping tiles, so that pictures (and videos) of any size fit in "
            "memory and are drawn at the model's native size. Areas, masks and ControlNet hints are cut per tile.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="Any model of pictures or video: Stable Diffusion, Flux, Qwen-Image, Wan. A video is cut "
                    "into tiles of all its frames.",
                ),
                *sampling_tile_inputs(),
                tile_batch,
                window,
                switch_input(
                    "jitter",
                    False,
                    "Shift the grid a little at every step. Turn it on if many steps leave a visible grid.",
                ),
                *tile_prompt_inputs(
                    "One prompt per tile. Its plan replaces tile and overlap, its texts replace the "
                    "sampler's positive prompt, and its negative (unless empty) the sampler's negative."
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The MODEL in tiles, for any sampler.")],
        )

    @classmethod
    def execute(cls, model, tile, overlap, tile_batch, window, jitter, tile_prompts=None, clip=None) -> io.NodeOutput:
        return io.NodeOutput(in_tiles(model, tile, overlap, tile_batch, window, jitter, tile_prompts, clip))
