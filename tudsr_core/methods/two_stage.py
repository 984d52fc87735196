"""The two-stage upscaler, readable as the paper's figure: enlarge, encode, one step, decode, again.

Networks are seen only through the `Networks` protocol, so ComfyUI's models, diffusers' models and
a ten-line fake in a test all take this one road.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..pictures import join_alpha, match_color, pad_to, resize, split_alpha
from ..tiling import NetworkFacts, PublishedTiling, Size, TileBlender, TiledRun, batch_for, plan_tiles
from .networks import Preview, Tick
from .plan import StagePlan, Target, UpscalePlan, plan_upscale
from .prediction import TiledPredictor, weighted
from .stages import Stage, TwoStageModel, UpscaleOptions
from .upscaler import ProgressCounter, check_image


def plan_for(model: TwoStageModel, source: tuple[int, int], target: Target, options: UpscaleOptions) -> UpscalePlan:
    """Return what `upscale` will do for a picture of `source = (height, width)`.

    Raises ValueError for what cannot be planned, and for `published` where nothing was.
    """
    options, stages = _without_unused(options), (model.first, model.second or model.first)
    about = model.first.about if options.native_size else None
    plan = plan_upscale(
        source,
        target,
        model.first.networks.facts,
        model.limits,
        tile_px=options.tile_px,
        overlap_px=options.overlap_px,
        tile_batch=options.tile_batch,
        evaluations=tuple(stage.evaluations for stage in stages),
        tilings=tuple(_published(stage) if options.published else None for stage in stages),
        native_px=about.native_px if about else 0,
        pads_small=bool(about and about.pads_small),
    )
    parts = zip(plan.stages, model.stages(len(plan.stages)), strict=True)
    return replace(plan, stages=tuple(replace(part, how=stage.how) for part, stage in parts))


def _without_unused(options: UpscaleOptions) -> UpscaleOptions:
    return replace(options, tile_px=0, overlap_px=0) if options.published else options


def _published(stage: Stage) -> PublishedTiling:
    if stage.about is None or stage.about.tiling is None:
        name = stage.about.title if stage.about else "this model"
        raise ValueError(f"{name} has no published tiles of the latent; turn 'published' off")
    return stage.about.tiling


def count_ticks(model: TwoStageModel, plan: UpscalePlan, batch: int = 1) -> int:
    """Return how many ticks `upscale` will give for `batch` pictures of this plan."""
    stages = zip(model.stages(len(plan.stages)), plan.stages, strict=True)
    return sum(batch * (stage.networks.vae_calls(part.padded) + part.calls) for stage, part in stages)


@dataclass(frozen=True)
class TwoStage:
    """TUDSR, and every published one-step method as its stage one: an `Upscaler`."""

    model: TwoStageModel
    options: UpscaleOptions = UpscaleOptions()

    def plan(self, source: Size, target: Target) -> UpscalePlan:
        """Return `plan_for` of this model and these options."""
        return plan_for(self.model, source, target, self.options)

    @torch.inference_mode()
    def run(self, image: Tensor, plan: UpscalePlan, tick: Tick | None = None) -> Tensor:
        """Enlarge `B C H W` (C = 3 or 4, float, 0..1) as planned and return `B C H' W'`, float32, 0..1.

        All pictures pass stage one before any passes stage two, so that adapters are switched once.
        Raises ValueError for wrong shapes and sizes and non-finite pixels.
        """
        check_image(image, plan)
        color, alpha = split_alpha(image.float())
        options = _without_unused(self.options)
        progress = ProgressCounter(tick, count_ticks(self.model, plan, len(color)))
        started = [_clamped(one, plan.start) for one in color.split(1)]
        pictures = started
        for stage, part in zip(self.model.stages(len(plan.stages)), plan.stages, strict=True):
            options, pictures = _run_stage(pictures, stage, part, options, progress)
        made = plan.stages[-1].size
        matched = [
            _clamped(
                match_color(picture, resize(source, made), options.color_fix, self.model.first.networks.device),
                plan.size,
            )
            for picture, source in zip(pictures, started, strict=True)
        ]
        return join_alpha(matched[0] if len(matched) == 1 else torch.cat(matched), alpha)


def upscale(
    image: Tensor,
    model: TwoStageModel,
    target: Target,
    options: UpscaleOptions | None = None,
    tick: Tick | None = None,
) -> Tensor:
    """Plan and run at once: enlarge `B C H W` (C = 3 or 4, float, 0..1), return `B C H' W'`, float32, 0..1.

    Raises ValueError for wrong shapes, non-finite pixels, or a target that cannot be planned.
    """
    check_image(image)
    upscaler = TwoStage(model, options or UpscaleOptions())
    return upscaler.run(image, upscaler.plan(tuple(image.shape[-2:]), target), tick)


def _clamped(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `image` in another size without what bicubic adds beyond 0..1; itself in the same size."""
    return image if tuple(image.shape[-2:]) == tuple(size) else resize(image, size).clamp_(0, 1)


def _run_stage(
    pictures: Sequence[Tensor], stage: Stage, part: StagePlan, options: UpscaleOptions, progress: ProgressCounter
) -> tuple[UpscaleOptions, list[Tensor]]:
    """Run one stage over all pictures; the options come back with the tiles that fitted."""
    results, tiled_run = [], _plan_run(part, stage.networks.facts, options, progress)
    fitting = tiled_run.tiles, tiled_run.batch
    for number, picture in enumerate(pictures):
        enlarged = resize(picture, part.size).clamp(0, 1)
        padded = pad_to(enlarged, part.padded)
        seed = options.seed + number
        encoded = stage.networks.encode(padded, seed if options.sample_posterior else None, progress.advance)
        start = StartLatent(encoded.z, _noise_source(picture, part) if stage.predictor else None, seed)
        restored = restore_latent(start, stage, tiled_run, progress.advance)
        encoded = replace(encoded, z=restored)
        del enlarged, padded, restored, start  # the decoder's picture is as large again
        decoded = stage.networks.decode(encoded, progress.advance).float()
        if not torch.isfinite(decoded).all():
            raise ValueError(
                f"{stage.name} produced NaN or infinite pixels; run it in float32 "
                "(tudsr: --dtype fp32, ComfyUI: --force-fp32), or check the adapter"
            )
        results.append(decoded[..., : part.size[0], : part.size[1]].clamp_(0, 1))
    if (tiled_run.tiles, tiled_run.batch) != fitting:
        tile_px = max(tiled_run.tiles.tile_height, tiled_run.tiles.tile_width) * tiled_run.scale
        overlap_px = tiled_run.tiles.overlap * tiled_run.scale
        options = replace(options, tile_px=tile_px, overlap_px=overlap_px, tile_batch=tiled_run.batch)
    return options, results


def _plan_run(part: StagePlan, facts: NetworkFacts, options: UpscaleOptions, progress: ProgressCounter) -> TiledRun:
    """Return the stage's tiles, or smaller ones if memory has run out since the plan was made."""
    scale, unit = facts.latent_scale, facts.multiple // facts.latent_scale
    window = part.tiling.window if part.tiling else options.window
    planned = part.tiles
    tiled_run = TiledRun(planned, window, options.tile_batch, unit, scale, progress.expect)
    side = options.tile_px // scale
    if 0 < side < max(planned.tile_height, planned.tile_width):
        tiled_run.tiles = plan_tiles(planned.height, planned.width, side, options.overlap_px // scale, multiple=unit)
    tiled_run.batch = batch_for(tiled_run.tiles, facts, options.tile_batch)
    return tiled_run


@dataclass(frozen=True)
class StartLatent:
    """Where a stage's steps begin: the encoded latent, and for methods with predicted noise its source and seed."""

    z: Tensor
    pixels: Tensor | None = None
    seed: int = 0


def _noise_source(picture: Tensor, part: StagePlan) -> Tensor:
    """Return the small picture, padded, at two pixels per latent: at x4 the input itself (InvSR)."""
    wanted = 2 * part.tiles.height, 2 * part.tiles.width
    unit = part.padded[0] / wanted[0]
    small = resize(picture, tuple(max(1, round(side / unit)) for side in part.size)).clamp(0, 1)
    return pad_to(small, wanted)


def restore_latent(start: StartLatent, stage: Stage, tiled_run: TiledRun, on_tile: Callable[[Preview], None]) -> Tensor:
    """Take a stage's steps on a whole latent: predict eps tile by tile, blend, then z_H = p z + q eps.

    Blending eps equals blending z_H, because the step is linear (MultiDiffusion eq. 5; OMGSR). Returned is
    z_L + s (z_H - z_L), s being the stage's strength.
    """
    noise = _predict_noise(start, stage, tiled_run, on_tile) if stage.predictor else None
    predict = weighted(
        [
            (weight, TiledPredictor(networks, tiled_run, networks.condition(stage.prompt), on_tile))
            for weight, networks in stage.branches or ((1.0, stage.networks),)
        ]
    )
    z = stage.steps[0].start(start.z, noise)
    for step in stage.steps:
        z = step.finish(z, predict(z, step.t, partial(step.finish, z)))
    return z if stage.strength == 1 else torch.lerp(start.z.to(z), z, stage.strength)


def _predict_noise(start: StartLatent, stage: Stage, tiled_run: TiledRun, on_tile: Callable[[Preview], None]) -> Tensor:
    """Return mean + deviation * n, both blended over the tiles, n drawn once for the whole latent."""

    def attempt(blender: TileBlender) -> None:
        for tile in blender.pending():
            top, left = 2 * tile.top, 2 * tile.left
            pixels = start.pixels[..., top : top + 2 * tile.height, left : left + 2 * tile.width]
            blender.add(tile, torch.cat(stage.predictor(pixels, stage.steps[0].t), 1))
            on_tile(lambda: start.z)

    mean, deviation = tiled_run.blend(attempt, stage.networks.is_out_of_memory).chunk(2, 1)
    return mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(start.seed))
