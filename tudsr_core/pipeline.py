"""The two-stage upscaler, readable as the paper's figure: enlarge, encode, one step, decode, again.

Networks are seen only through the `Networks` protocol, so ComfyUI's models, diffusers' models and
a ten-line fake in a test all take this one road.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .color import ColorFix, match_color
from .image import join_alpha, pad_to, resize, split_alpha
from .methods import Method, Tiling
from .networks import Networks, NoisePredictor, Predict, Preview, Tick
from .plan import StageLimits, StagePlan, Target, UpscalePlan, plan_upscale
from .schedule import OneStep
from .stage_tiles import NetworkFacts, batch_for, fit_overlap
from .sweep import Sweep
from .tiles import Canvas, Window, plan_tiles

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage of a model: its networks, its steps and the text it was trained with.

    `networks` encode and decode. eps = sum of w_j B_j over `branches` (PiSA-SR's dials); without
    any, `networks` alone predict it. `predictor` gives the noise of methods whose first step mixes
    some in. `about` is the row of the method table, None for a model of no published method.
    """

    networks: Networks
    steps: tuple[OneStep, ...]
    name: str = "stage"
    prompt: str = ""
    branches: tuple[tuple[float, Networks], ...] = ()
    predictor: NoisePredictor | None = None
    about: Method | None = None

    @property
    def how(self) -> str:
        """Method and timesteps in words, "" for a model of no published method."""
        return f"{self.about.title} at t = {', '.join(str(step.t) for step in self.steps)}" if self.about else ""

    @property
    def evaluations(self) -> int:
        """Network evaluations per tile."""
        return len(self.steps) * max(1, len(self.branches)) + bool(self.predictor)


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

    def draws(self, options: UpscaleOptions) -> bool:
        """Return whether anything is drawn at random, so that the picture depends on the seed."""
        return options.sample_posterior or any(stage and stage.predictor for stage in (self.first, self.second))


@dataclass(frozen=True)
class UpscaleOptions:
    """How to run; none of these changes what the networks are.

    `tile_px` 0: the side that takes least computing, from 512 to 640. `tile_batch` 0: as many as fit
    in free memory. `published`: as the method's own script does it; tile, overlap and window are then
    the method's (`Method.tiling`), and those given here are not used. `native_size`: no smaller
    results are made than those trained on (`Method.native_px`; a stage before the last may work below);
    smaller ones are enlarged before and shrunk after, or padded, as the method's own script does. An
    overlap that is not smaller than the tile follows it, see `fit_overlap`.
    """

    tile_px: int = 0
    overlap_px: int = 128
    tile_batch: int = 0
    window: Window = "gaussian"
    color_fix: ColorFix = "wavelet"
    sample_posterior: bool = False
    seed: int = 0
    published: bool = False
    native_size: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap_px", fit_overlap(self.tile_px, self.overlap_px))


def plan_for(model: Model, source: tuple[int, int], target: Target, options: UpscaleOptions) -> UpscalePlan:
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


def _published(stage: Stage) -> Tiling:
    if stage.about is None or stage.about.tiling is None:
        name = stage.about.title if stage.about else "this model"
        raise ValueError(f"{name} has no published tiles of the latent; turn 'published' off")
    return stage.about.tiling


def count_ticks(model: Model, plan: UpscalePlan, batch: int = 1) -> int:
    """Return how many ticks `upscale` will give for `batch` pictures of this plan."""
    stages = zip(model.stages(len(plan.stages)), plan.stages, strict=True)
    return sum(batch * (stage.networks.vae_calls(part.padded) + part.calls) for stage, part in stages)


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
    options = _without_unused(options or UpscaleOptions())
    check_image(image)
    color, alpha = split_alpha(image.float())
    plan = plan_for(model, tuple(color.shape[-2:]), target, options)
    progress = Progress(tick, count_ticks(model, plan, len(color)))
    started = [_clamped(one, plan.start) for one in color.split(1)]
    pictures = started
    for stage, part in zip(model.stages(len(plan.stages)), plan.stages, strict=True):
        options, pictures = _run_stage(pictures, stage, part, options, progress)
    made = plan.stages[-1].size
    matched = [
        _clamped(match_color(picture, resize(source, made), options.color_fix), plan.size)
        for picture, source in zip(pictures, started, strict=True)
    ]
    return join_alpha(matched[0] if len(matched) == 1 else torch.cat(matched), alpha)


def _clamped(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Return `image` in another size without what bicubic adds beyond 0..1; itself in the same size."""
    return image if tuple(image.shape[-2:]) == tuple(size) else resize(image, size).clamp_(0, 1)


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

    def expect(self, extra: int) -> None:
        """There will be `extra` more tiles than was thought."""
        self.total += extra

    def advance(self, preview: Preview | None = None) -> None:
        """Count one tile."""
        self.done += 1
        if self.tick:
            self.tick(self.done, self.total, preview)


def _run_stage(
    pictures: Sequence[Tensor], stage: Stage, part: StagePlan, options: UpscaleOptions, progress: Progress
) -> tuple[UpscaleOptions, list[Tensor]]:
    """Run one stage over all pictures; the options come back with the tiles that fitted."""
    results, sweep = [], _plan_sweep(part, stage.networks.facts, options, progress)
    fitting = sweep.tiles, sweep.batch
    for number, picture in enumerate(pictures):
        enlarged = resize(picture, part.size).clamp(0, 1)
        padded = pad_to(enlarged, part.padded)
        seed = options.seed + number
        z = stage.networks.encode(padded, seed if options.sample_posterior else None, progress.advance)
        start = Start(z, _noise_source(picture, part) if stage.predictor else None, seed)
        restored = restore_latent(start, stage, sweep, progress.advance)
        del enlarged, padded, z, start  # the decoder's picture is as large again
        decoded = stage.networks.decode(restored, progress.advance).float()
        if not torch.isfinite(decoded).all():
            raise ValueError(
                f"{stage.name} produced NaN or infinite pixels; run it in float32 "
                "(tudsr: --dtype fp32, ComfyUI: --force-fp32), or check the adapter"
            )
        results.append(decoded[..., : part.size[0], : part.size[1]].clamp_(0, 1))
    if (sweep.tiles, sweep.batch) != fitting:
        tile_px = max(sweep.tiles.tile_height, sweep.tiles.tile_width) * sweep.scale
        overlap_px = sweep.tiles.overlap * sweep.scale
        options = replace(options, tile_px=tile_px, overlap_px=overlap_px, tile_batch=sweep.batch)
    return options, results


def _plan_sweep(part: StagePlan, facts: NetworkFacts, options: UpscaleOptions, progress: Progress) -> Sweep:
    """Return the stage's tiles, or smaller ones if memory has run out since the plan was made."""
    scale, unit = facts.latent_scale, facts.multiple // facts.latent_scale
    window = part.tiling.window if part.tiling else options.window
    sweep = Sweep(part.tiles, window, options.tile_batch, unit, scale, progress.expect)
    side = options.tile_px // scale
    if 0 < side < max(part.tiles.tile_height, part.tiles.tile_width):
        sweep.tiles = plan_tiles(part.tiles.height, part.tiles.width, side, options.overlap_px // scale, multiple=unit)
    sweep.batch = batch_for(sweep.tiles, facts, options.tile_batch)
    return sweep


@dataclass(frozen=True)
class Start:
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


def restore_latent(start: Start, stage: Stage, sweep: Sweep, on_tile: Callable[[Preview], None]) -> Tensor:
    """Take a stage's steps on a whole latent: predict eps tile by tile, blend, then z_H = p z + q eps.

    Blending eps equals blending z_H, because the step is linear (MultiDiffusion eq. 5; OMGSR).
    """
    noise = _predict_noise(start, stage, sweep, on_tile) if stage.predictor else None
    z = stage.steps[0].start(start.z, noise)
    for step in stage.steps:
        total = None
        for weight, networks in stage.branches or ((1.0, stage.networks),):
            eps = _predict_eps(z, step, networks, stage.prompt, sweep, on_tile)
            total = eps * weight if total is None else total + eps * weight
        z = step.finish(z, total)
    return z


def _predict_eps(
    z: Tensor, step: OneStep, networks: Networks, prompt: str, sweep: Sweep, on_tile: Callable[[Preview], None]
) -> Tensor:
    condition = networks.condition(prompt)

    def attempt(canvas: Canvas) -> None:
        def blend(predict: Predict) -> Tensor:
            for batch in sweep.batches(canvas):
                eps = predict(torch.cat([tile.cut(z) for tile in batch]), batch)
                for tile, value in zip(batch, eps.split(len(z)), strict=True):
                    canvas.add(tile, value)
                    on_tile(lambda: step.finish(z, canvas.result()))
            return canvas.result()

        count = len(z) * min(sweep.batch, len(sweep.tiles))
        part = count, z.shape[1], sweep.tiles.tile_height, sweep.tiles.tile_width
        networks.denoise(z, step.t, condition, part, blend)

    return sweep.run(attempt, networks.is_out_of_memory)


def _predict_noise(start: Start, stage: Stage, sweep: Sweep, on_tile: Callable[[Preview], None]) -> Tensor:
    """Return mean + deviation * n, both blended over the tiles, n drawn once for the whole latent."""

    def attempt(canvas: Canvas) -> None:
        for tile in canvas.pending():
            top, left = 2 * tile.top, 2 * tile.left
            pixels = start.pixels[..., top : top + 2 * tile.height, left : left + 2 * tile.width]
            canvas.add(tile, torch.cat(stage.predictor(pixels, stage.steps[0].t), 1))
            on_tile(lambda: start.z)

    mean, deviation = sweep.run(attempt, stage.networks.is_out_of_memory).chunk(2, 1)
    return mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(start.seed))
