"""Multi-step sampling outside ComfyUI: MultiDiffusion over a TilePlan, with a text condition per tile.

Numbers of the respaced chain, one blended prediction, and the loop. What picture is sampled, and
where its prompts come from, is in `zoom.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .networks import Networks, Predict, Preview
from .schedule import NoiseSchedule, scaled_linear
from .tiles import Canvas, TilePlan, Window

log = logging.getLogger(__name__)

MAX_STEPS = 500

TilePair = tuple[str, str]
"""Positive and negative prompt of one tile."""

OnTile = Callable[[Preview], None]


class TextNetworks(Networks, Protocol):
    """Networks whose `denoise` also takes a list of conditions: one per tile, by `Tile.index`."""

    def conditions(self, texts: Sequence[str]) -> list[Any]:
        """Return one condition per text; equal texts cost one encoding."""


@dataclass(frozen=True)
class SampleOptions:
    """How to sample; the defaults are those of SeeSR and "Zoomed In, Diffused Out".

    `eta` is the share of fresh noise: 1 is ancestral DDPM, 0 is DDIM. `guidance` is the
    classifier-free guidance scale; at 1 the negative prompts are not evaluated. `strength` below 1
    starts that far down the chain, from a picture with less noise (SDEdit, Meng et al. 2022).
    """

    steps: int = 50
    strength: float = 1.0
    eta: float = 1.0
    guidance: float = 5.5
    tile_batch: int = 1
    window: Window = "uniform"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"{self.steps} steps are not possible; use 1 to {MAX_STEPS}, for example 50")
        if not 0 < self.strength <= 1:
            raise ValueError(f"strength {self.strength:g} must be above 0 and at most 1 (all steps)")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta {self.eta:g} must be from 0 (DDIM) to 1 (DDPM)")
        if not 1 <= self.guidance <= 100:
            raise ValueError(f"guidance {self.guidance:g} must be from 1 (off) to 100; 5.5 is usual")
        if self.tile_batch < 1:
            raise ValueError(f"tile batch {self.tile_batch} must be at least 1")

    @property
    def steps_run(self) -> int:
        """Steps that are left of the chain at this strength."""
        return max(1, round(self.steps * self.strength))

    @property
    def passes(self) -> int:
        """UNet evaluations per tile and step."""
        return 1 if self.guidance == 1 else 2


@dataclass(frozen=True)
class Step:
    """One step t -> t' of a respaced chain: z' = from_z z + from_x0 x0 + std n, with x0 from eps."""

    t: int
    abar: float
    from_z: float
    from_x0: float
    std: float

    def x0(self, z: Tensor, eps: Tensor) -> Tensor:
        """Return the predicted clean latent (DDPM eq. 15)."""
        return (z - (1 - self.abar) ** 0.5 * eps) / self.abar**0.5


def respaced_timesteps(steps: int, total: int = 1000) -> list[int]:
    """Return `steps` timesteps, largest first, evenly from 1: 981, 961, ... 21, 1 for 50.

    Where `steps` divides `total` this is the "leading" spacing with an offset of 1 of SD 2.x.
    """
    return [index * total // steps + 1 for index in reversed(range(steps))]


def plan_steps(steps: int, eta: float = 1.0, schedule: NoiseSchedule | None = None) -> list[Step]:
    """Return the coefficients of a respaced DDPM (`eta` 1), DDIM (`eta` 0) or something between.

    DDIM eq. 12 with sigma from eq. 16, written in z and x0; at `eta` 1 this is exactly the DDPM
    posterior (eq. 7) of the respaced chain with its small variance. The last step returns x0.
    """
    schedule = schedule or scaled_linear()
    timesteps = respaced_timesteps(steps, schedule.steps)
    planned = []
    for t, later in zip(timesteps, [*timesteps[1:], None], strict=True):
        abar = schedule.abar_at(t)
        after = 1.0 if later is None else schedule.abar_at(later)
        std = eta * ((1 - after) / (1 - abar) * (1 - abar / after)) ** 0.5
        from_z = (max(0.0, 1 - after - std**2) / (1 - abar)) ** 0.5
        planned.append(Step(t, abar, from_z, after**0.5 - from_z * abar**0.5, std))
    return planned


def noised(
    z: Tensor, noise: torch.Generator, options: SampleOptions | None = None, schedule: NoiseSchedule | None = None
) -> Tensor:
    """Return sqrt(abar) z + sqrt(1 - abar) n, where `sample` starts.

    For the whole chain that is the last timestep, SeeSR's start: training never sees pure noise,
    because abar is not 0 there. For a part of it, it is the first timestep left.
    """
    schedule, options = schedule or scaled_linear(), options or SampleOptions()
    left = respaced_timesteps(options.steps, schedule.steps)[-options.steps_run :]
    abar = schedule.abar_at(schedule.steps - 1 if len(left) == options.steps else left[0])
    return abar**0.5 * z + (1 - abar) ** 0.5 * draw(z, noise)


def draw(like: Tensor, noise: torch.Generator) -> Tensor:
    """Return standard normal noise for the whole of `like`, made on the CPU, so that devices agree."""
    return torch.randn(like.shape, generator=noise).to(like)


def count_calls(tiles: TilePlan, options: SampleOptions) -> int:
    """Return how many tiles the UNet evaluates in one run, negative prompts included."""
    return len(tiles) * options.steps_run * options.passes


@torch.inference_mode()
def sample(
    z: Tensor,
    networks: TextNetworks,
    tiles: TilePlan,
    prompts: Sequence[TilePair],
    noise: torch.Generator,
    options: SampleOptions | None = None,
    on_tile: OnTile = lambda preview: None,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Run the chain from the noisy latent `z` (`B C h w`) down to a clean one, float32.

    Every step predicts eps for all tiles, blends them over the whole latent (MultiDiffusion, Bar-Tal
    et al. 2023, eq. 5), applies guidance eps_u + g (eps_c - eps_u) and steps once on the whole. Each
    tile is predicted under its own pair of `prompts`. Fresh noise is drawn for the whole latent from
    `noise`, which should be the generator that made the start.
    `on_tile(preview)` is called `count_calls` times and may raise to cancel. Raises ValueError if
    there is not one prompt per tile, or if the model returns NaN.
    """
    options = options or SampleOptions()
    if len(prompts) != len(tiles):
        raise ValueError(f"{len(prompts)} prompts for {len(tiles)} tiles; give one per tile, in reading order")
    positive, negative = (list(texts) for texts in zip(*prompts, strict=True))
    conditions = networks.conditions(positive + negative if options.passes == 2 else positive)
    z = z.float()
    for step in plan_steps(options.steps, options.eta, schedule)[-options.steps_run :]:
        eps = predict_eps(z, step, networks, tiles, conditions, options, on_tile)
        if options.passes == 2:
            without = predict_eps(z, step, networks, tiles, conditions[len(tiles) :], options, on_tile)
            eps = without + options.guidance * (eps - without)
        if not torch.isfinite(eps).all():
            raise ValueError("the model produced NaN or infinite latents; run it in float32 (tudsr: --dtype fp32)")
        z = step.from_z * z + step.from_x0 * step.x0(z, eps)
        if step.std:
            z += step.std * draw(z, noise)
    return z


def predict_eps(
    z: Tensor,
    step: Step,
    networks: TextNetworks,
    tiles: TilePlan,
    conditions: Sequence[Any],
    options: SampleOptions,
    on_tile: OnTile = lambda preview: None,
) -> Tensor:
    """Return eps for the whole latent: every tile under its own condition, blended with the window's weights."""

    def blend(predict: Predict) -> Tensor:
        canvas = Canvas(tiles, options.window)
        for batch in tiles.batches(options.tile_batch):
            eps = predict(torch.cat([tile.cut(z) for tile in batch]), batch)
            for tile, value in zip(batch, eps.split(len(z)), strict=True):
                canvas.add(tile, value)
                on_tile(lambda: step.x0(z, canvas.result()))
        return canvas.result()

    part = (len(z) * min(options.tile_batch, len(tiles)), z.shape[1], tiles.tile_height, tiles.tile_width)
    return networks.denoise(z, step.t, list(conditions), part, blend)
