"""The two-stage upscaler, readable as the paper's figure: enlarge, encode, one step, decode, again.

Networks are seen only through the `Networks` protocol, so ComfyUI's models, diffusers' models and
a ten-line fake in a test all take this one road.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .color import ColorFix, match_color
from .image import join_alpha, pad_to_multiple, resize, split_alpha
from .plan import NetworkFacts, StageLimits, StagePlan, Target, UpscalePlan, plan_upscale
from .schedule import OneStep
from .tiles import Canvas, Tile, TilePlan, Window, plan_tiles

log = logging.getLogger(__name__)

Preview = Callable[[], Tensor]
"""Returns the scaled latents `B C h w` as far as they are restored."""

Tick = Callable[[int, int, "Preview | None"], None]
"""`tick(done, total, preview)`: called once per tile; may raise to cancel. `preview` costs only when called."""

Predict = Callable[[Tensor, Sequence[Tile]], Tensor]
"""`predict(parts, tiles)`: eps for the latents of `tiles`, stacked along the batch, same shape."""


class Networks(Protocol):
    """What the pipeline needs of a model; one object per stage, sharing weights as it likes."""

    facts: NetworkFacts

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Return how often `on_tile` will be called by one encode plus one decode of `size` pixels."""

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Tensor:
        """Return scaled latents for `B 3 H W` in 0..1; `seed` draws from the posterior, None takes its mode."""

    def denoise(
        self, z: Tensor, t: int, condition: Any, part: tuple[int, ...], body: Callable[[Predict], Tensor]
    ) -> Tensor:
        """Make the UNet ready for timestep t, return `body(predict)`.

        `z` is the whole latent `B C h w`; `part` is the largest shape that `predict` will be given,
        for memory estimates.
        """

    def decode(self, z: Tensor, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W`, nominally 0..1, unclamped."""

    def condition(self, text: str) -> Any:
        """Return whatever `predict` takes as its text condition."""

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Return whether `error` means that a smaller tile could succeed."""


@dataclass(frozen=True)
class Stage:
    """One stage of a model: its networks, its one-step formula and the text it was trained with."""

    networks: Networks
    step: OneStep
    name: str = "stage"
    prompt: str = ""


@dataclass(frozen=True)
class Model:
    """A two-stage model: stage one, stage two (None: stage one alone) and its trained factors."""

    first: Stage
    second: Stage | None
    limits: StageLimits

    def stages(self, count: int) -> list[Stage]:
        """Return the stages for a plan of `count`; raises ValueError if stage two is missing."""
        if count > 1 and self.second is None:
            raise ValueError(
                f"this factor needs stage two, and no stage-two adapter is loaded; "
                f"load one, or stay within x{self.limits.single_up_to:g}"
            )
        return [self.first] + [self.second] * (count - 1)


@dataclass(frozen=True)
class UpscaleOptions:
    """How to run; none of these changes what the networks are."""

    tile_px: int = 512
    overlap_px: int = 128
    tile_batch: int = 1
    window: Window = "gaussian"
    color_fix: ColorFix = "wavelet"
    sample_posterior: bool = False
    seed: int = 0


def plan_for(model: Model, source: tuple[int, int], target: Target, options: UpscaleOptions) -> UpscalePlan:
    """Return what `upscale` will do for a picture of `source = (height, width)`."""
    plan = plan_upscale(
        source,
        target,
        model.first.networks.facts,
        model.limits,
        tile_px=options.tile_px,
        overlap_px=options.overlap_px,
        tile_batch=options.tile_batch,
    )
    model.stages(len(plan.stages))
    return plan


def count_ticks(model: Model, plan: UpscalePlan, batch: int = 1) -> int:
    """Return how many ticks `upscale` will give for `batch` pictures of this plan."""
    stages = zip(model.stages(len(plan.stages)), plan.stages, strict=True)
    return sum(batch * (stage.networks.vae_calls(part.padded) + len(part.tiles)) for stage, part in stages)


@torch.inference_mode()
def upscale(
    image: Tensor,
    model: Model,
    target: Target,
    options: UpscaleOptions | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Enlarge `B C H W` (C = 3 or 4, float, 0..1) and return `B C H' W'`, float32, 0..1.

    All pictures pass stage one before any passes stage two, so that adapters are switched once.
    Raises ValueError for wrong shapes, non-finite pixels, or a target that cannot be planned.
    """
    options = options or UpscaleOptions()
    check_image(image)
    color, alpha = split_alpha(image.float())
    plan = plan_for(model, tuple(color.shape[-2:]), target, options)
    progress = Progress(tick, count_ticks(model, plan, len(color)))
    pictures = list(color.split(1))
    for stage, part in zip(model.stages(len(plan.stages)), plan.stages, strict=True):
        options, pictures = _run_stage(pictures, stage, part, options, progress)
    matched = [
        match_color(picture, resize(source, plan.size), options.color_fix)
        for picture, source in zip(pictures, color.split(1), strict=True)
    ]
    return join_alpha(matched[0] if len(matched) == 1 else torch.cat(matched), alpha)


def check_image(image: Tensor) -> None:
    """Raise ValueError unless `image` is a finite, non-empty `B 3 H W` or `B 4 H W`."""
    if image.ndim != 4 or image.shape[1] not in (3, 4):
        raise ValueError(f"expected a picture of B 3 H W or B 4 H W, got shape {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"the picture is empty: shape {tuple(image.shape)}")
    if not torch.isfinite(image).all():
        raise ValueError("the picture contains NaN or infinite values; repair or re-export it")


class Progress:
    """Counts tiles towards a known total and tells `tick`."""

    def __init__(self, tick: Tick | None, total: int) -> None:
        self.tick, self.done, self.total = tick, 0, total

    def redo(self, done: int, extra: int) -> None:
        """Go back to `done` after a failed attempt; the next one has `extra` more tiles."""
        self.done, self.total = done, self.total + extra

    def advance(self, preview: Preview | None = None) -> None:
        """Count one tile."""
        self.done += 1
        if self.tick:
            self.tick(self.done, self.total, preview)


def _run_stage(
    pictures: Sequence[Tensor], stage: Stage, part: StagePlan, options: UpscaleOptions, progress: Progress
) -> tuple[UpscaleOptions, list[Tensor]]:
    """Run one stage over all pictures; the options come back with the tile that fitted."""
    results = []
    for number, picture in enumerate(pictures):
        enlarged = resize(picture, part.size).clamp(0, 1)
        padded, padding = pad_to_multiple(enlarged, stage.networks.facts.multiple)
        seed = options.seed + number if options.sample_posterior else None
        z = stage.networks.encode(padded, seed, progress.advance)
        tiles, mark = part.tiles, progress.done
        while (restored := _restore_or_none(z, stage, tiles, options, progress)) is None:
            before = len(tiles)
            options, tiles = _smaller_tiles(options, tiles, stage.networks.facts)
            progress.redo(mark, len(tiles) - before)
        del enlarged, padded, z  # the decoder's picture is as large again
        decoded = stage.networks.decode(restored, progress.advance).float()
        if not torch.isfinite(decoded).all():
            raise ValueError(
                f"{stage.name} produced NaN or infinite pixels; run it in float32 "
                "(tudsr: --dtype fp32, ComfyUI: --force-fp32), or check the adapter"
            )
        results.append(padding.crop(decoded).clamp_(0, 1))
    return options, results


def _restore_or_none(
    z: Tensor, stage: Stage, tiles: TilePlan, options: UpscaleOptions, progress: Progress
) -> Tensor | None:
    # None means out of memory. The except block must end before anything is tried again: the
    # traceback keeps the tensors of the failed call alive.
    try:
        return restore_latent(z, stage, tiles, options, progress.advance)
    except RuntimeError as error:
        if not stage.networks.is_out_of_memory(error):
            raise
    return None


def restore_latent(
    z: Tensor, stage: Stage, tiles: TilePlan, options: UpscaleOptions, on_tile: Callable[[Preview], None]
) -> Tensor:
    """One denoising step on a whole latent: predict eps tile by tile, blend, then z_H = p z + q eps.

    Blending eps equals blending z_H, because the step is linear (MultiDiffusion eq. 5; OMGSR).
    """
    networks, step = stage.networks, stage.step
    z_in = step.start(z)

    def blend(predict: Predict) -> Tensor:
        canvas = Canvas(tiles, options.window)
        for batch in tiles.batches(options.tile_batch):
            eps = predict(torch.cat([tile.cut(z_in) for tile in batch]), batch)
            for tile, value in zip(batch, eps.split(len(z)), strict=True):
                canvas.add(tile, value)
                on_tile(lambda: step.finish(z_in, canvas.result()))
        return canvas.result()

    part = (len(z) * min(options.tile_batch, len(tiles)), z.shape[1], tiles.tile_height, tiles.tile_width)
    condition = networks.condition(stage.prompt)
    return step.finish(z_in, networks.denoise(z_in, step.t, condition, part, blend))


def _smaller_tiles(options: UpscaleOptions, tiles: TilePlan, facts: NetworkFacts) -> tuple[UpscaleOptions, TilePlan]:
    """Return a smaller tile batch, or tiles of half the side when the batch is already 1."""
    scale, unit = facts.latent_scale, facts.multiple // facts.latent_scale
    if options.tile_batch > 1:
        smaller = replace(options, tile_batch=options.tile_batch // 2)
        log.warning("out of memory: tile batch lowered to %d", smaller.tile_batch)
        return smaller, tiles
    side = max(tiles.tile_height, tiles.tile_width) // 2 // unit * unit
    overlap = min(tiles.overlap, side // 2 // unit * unit)
    if side < 8 * unit:
        raise MemoryError(
            f"out of memory even with tiles of {2 * side * scale} px; close other programs or use a smaller model"
        )
    log.warning("out of memory: tiles lowered to %d px", side * scale)
    smaller = replace(options, tile_px=side * scale, overlap_px=overlap * scale)
    return smaller, plan_tiles(tiles.height, tiles.width, side, overlap, multiple=unit)
