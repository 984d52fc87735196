"""The recipe of "Zoomed In, Diffused Out": enlarge once, then sample with MultiDiffusion and a prompt per tile.

No training and no adapter: any Stable Diffusion 2.x serves. One TilePlan addresses the pixels that
are described and the latents that are sampled. The loop itself is in `sampling.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from ..pictures import ColorFix, join_alpha, match_color, pad_to_multiple, resize, split_alpha
from ..tiling import NetworkFacts, Size, Spacing, TiledRun, TilePlan, check_tiles, fit_overlap, tiles_for
from .networks import TextNetworks, Tick
from .plan import Target
from .prompt_sources import PromptSource
from .sampling import SampleOptions, TilePair, count_calls, draw_noise, noised, sample, tiled_predictor
from .upscaler import ProgressCounter, check_image

ZoomStart = Literal["picture", "noise"]


@dataclass(frozen=True)
class ZoomOptions:
    """How to run; `start` is the noised low-resolution latent ("picture") or pure noise.

    `spacing` of the tiles is as in `plan_tiles`.
    """

    tile_px: int = 512
    overlap_px: int = 256
    start: ZoomStart = "picture"
    color_fix: ColorFix = "adain"
    seed: int = 0
    sample: SampleOptions = field(default_factory=SampleOptions)
    spacing: Spacing = "even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap_px", fit_overlap(self.tile_px, self.overlap_px))
        if self.start not in ("picture", "noise"):
            raise ValueError(f"start is {self.start!r}; use 'picture' or 'noise'")
        if self.start == "noise" and self.sample.strength < 1:
            raise ValueError("a start from noise needs the whole chain; set strength to 1 or start from the picture")


@dataclass(frozen=True)
class ZoomPlan:
    """What a run will do with one picture: sizes, tiles, and UNet evaluations; `note` says what a dial did."""

    source: Size
    size: Size
    padded: Size
    tiles: TilePlan
    calls: int
    options: ZoomOptions
    note: str = ""

    def describe(self) -> list[str]:
        """Return the plan as lines of plain text."""
        scale, tiles, sampling = self.padded[0] // self.tiles.height, self.tiles, self.options.sample
        side = f"{tiles.tile_width * scale} x {tiles.tile_height * scale}"
        grid = f"{len(tiles)} tiles ({len(tiles.lefts)} x {len(tiles.tops)}) of {side}"
        run, whole = sampling.steps_run, sampling.steps
        steps = f"{run} of {whole}" if run < whole else run
        both = ", each with its positive and its negative prompt" if sampling.passes == 2 else ""
        return [
            f"{self.source[1]} x {self.source[0]} to {self.size[1]} x {self.size[0]}, {self.calls} network calls",
            f"{grid}, {steps} steps{both}",
            *filter(None, [self.note]),
        ]


def plan_zoom(source: Size, target: Target, facts: NetworkFacts, options: ZoomOptions) -> ZoomPlan:
    """Plan the enlargement of one picture of `source = (height, width)`; raises ValueError as `plan_upscale` does."""
    size = target.size_for(source)
    check_tiles(options.tile_px, options.overlap_px, options.sample.tile_batch, facts)
    padded = tuple(-(-side // facts.multiple) * facts.multiple for side in size)
    tiles = tiles_for(padded, options.tile_px, options.overlap_px, facts, options.spacing)
    return ZoomPlan(source, size, padded, tiles, count_calls(tiles, options.sample), options)


@dataclass(frozen=True)
class Zoom:
    """MultiDiffusion with a prompt per tile: an `Upscaler`. `prompts` is asked once for all pictures of a run.

    `note` is said with every plan: what a dial did to the networks.
    """

    networks: TextNetworks
    options: ZoomOptions
    prompts: PromptSource
    note: str = ""

    def plan(self, source: Size, target: Target) -> ZoomPlan:
        """Return `plan_zoom` of these networks and options."""
        return replace(plan_zoom(source, target, self.networks.facts, self.options), note=self.note)

    def run(self, image: Tensor, plan: ZoomPlan, tick: Tick | None = None) -> Tensor:
        """Describe the tiles of the first of `B C H W` (C = 3 or 4, float, 0..1), then `zoom`.

        `tick` counts the tiles described, then starts again for the sampling.
        """
        check_image(image, plan)
        return zoom(image, self.networks, plan, self.prompts(split_alpha(image[:1])[0], plan, tick), tick)


@torch.inference_mode()
def zoom(
    image: Tensor, networks: TextNetworks, plan: ZoomPlan, prompts: Sequence[TilePair], tick: Tick | None = None
) -> Tensor:
    """Enlarge `B C H W` (C = 3 or 4, float, 0..1) as planned and return `B C H' W'`, float32, 0..1.

    `prompts` are one pair per tile in reading order. Raises ValueError for wrong shapes, sizes,
    non-finite values or a wrong number of prompts, MemoryError if the smallest tile does not fit.
    """
    check_image(image, plan)
    color, alpha = split_alpha(image.float())
    facts, sampling = networks.facts, plan.options.sample
    progress = ProgressCounter(tick, len(color) * (networks.vae_calls(plan.padded) + plan.calls))
    unit = facts.multiple // facts.latent_scale
    tiled_run = TiledRun(plan.tiles, sampling.window, sampling.tile_batch, unit, facts.latent_scale)
    tiled_run.expect = lambda extra: progress.expect(extra * sampling.passes)
    results = []
    for number, picture in enumerate(color.split(1)):
        enlarged = resize(picture, plan.size).clamp(0, 1)
        padded, padding = pad_to_multiple(enlarged, facts.multiple)
        encoded = networks.encode(padded, None, progress.advance)
        noise = torch.Generator().manual_seed(plan.options.seed + number)
        seeing = networks.seeing(encoded.z)
        predict = tiled_predictor(seeing, tiled_run, prompts, sampling.guidance, progress.advance)
        start = _start(encoded.z.float(), plan.options, noise)
        encoded = replace(encoded, z=sample(start, predict, noise, sampling))
        decoded = networks.decode(encoded, progress.advance).float()
        if not torch.isfinite(decoded).all():
            raise ValueError("the decoder produced NaN or infinite pixels; run it in float32 (tudsr: --dtype fp32)")
        results.append(
            match_color(padding.crop(decoded).clamp(0, 1), enlarged, plan.options.color_fix, networks.device)
        )
    return join_alpha(torch.cat(results), alpha)


def _start(z: Tensor, options: ZoomOptions, noise: torch.Generator) -> Tensor:
    return noised(z, noise, options.sample) if options.start == "picture" else draw_noise(z, noise)
