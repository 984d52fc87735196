"""Multi-step sampling outside ComfyUI: the loop over a respaced chain, for whatever predicts eps.

What picture is sampled, and where its prompts come from, is in `zoom.py`; how a whole latent is predicted
in tiles, in `prediction.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..diffusion import NoiseSchedule, Respacing, plan_steps, respaced_timesteps, scaled_linear
from ..tiling import TiledRun, TilePlan, Window
from .networks import Preview, TextNetworks
from .prediction import PredictEps, TiledPredictor

MAX_STEPS = 1000

TilePair = tuple[str, str]
"""Positive and negative prompt of one tile."""

OnPreview = Callable[[Preview], None]


@dataclass(frozen=True)
class SampleOptions:
    """How to sample; the defaults are those of SeeSR and "Zoomed In, Diffused Out".

    `eta` is the share of fresh noise: 1 is ancestral DDPM, 0 is DDIM. `guidance` is the
    classifier-free guidance scale; at 1 the negative prompts are not evaluated. `strength` below 1
    starts that far down the chain, from a picture with less noise (SDEdit, Meng et al. 2022).
    `respacing`: which timesteps the steps are at, see `respaced_timesteps`.
    """

    steps: int = 50
    strength: float = 1.0
    eta: float = 1.0
    guidance: float = 5.5
    tile_batch: int = 1
    window: Window = "uniform"
    respacing: Respacing = "leading"

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


def noised(
    z: Tensor, noise: torch.Generator, options: SampleOptions | None = None, schedule: NoiseSchedule | None = None
) -> Tensor:
    """Return sqrt(abar) z + sqrt(1 - abar) n, where `sample` starts.

    For the whole chain that is the last timestep, SeeSR's start: training never sees pure noise,
    because abar is not 0 there. For a part of it, it is the first timestep left.
    """
    schedule, options = schedule or scaled_linear(), options or SampleOptions()
    left = respaced_timesteps(options.steps, schedule.steps, options.respacing)[-options.steps_run :]
    abar = schedule.abar_at(schedule.steps - 1 if len(left) == options.steps else left[0])
    return abar**0.5 * z + (1 - abar) ** 0.5 * draw_noise(z, noise)


def draw_noise(like: Tensor, noise: torch.Generator) -> Tensor:
    """Return standard normal noise for the whole of `like`, made on the CPU, so that devices agree."""
    return torch.randn(like.shape, generator=noise).to(like)


def count_calls(tiles: TilePlan, options: SampleOptions) -> int:
    """Return how many tiles the UNet evaluates in one run, negative prompts included."""
    return len(tiles) * options.steps_run * options.passes


@torch.inference_mode()
def sample(
    z: Tensor,
    predict: PredictEps,
    noise: torch.Generator,
    options: SampleOptions | None = None,
    schedule: NoiseSchedule | None = None,
) -> Tensor:
    """Run the chain from the noisy latent `z` (`B C h w`) down to a clean one, float32.

    Every step is one on the whole latent, whose eps `predict` gives; tiles, texts and guidance are its
    business (`tiled_predictor`). Fresh noise is drawn for the whole latent from `noise`, which should be the
    generator that made the start. Raises ValueError if the model returns NaN.
    """
    options, z = options or SampleOptions(), z.float()
    for step in plan_steps(options.steps, options.eta, schedule, options.respacing)[-options.steps_run :]:
        eps = predict(z, step.t, partial(step.x0, z))
        if not torch.isfinite(eps).all():
            raise ValueError("the model produced NaN or infinite latents; run it in float32 (tudsr: --dtype fp32)")
        z = step.from_z * z + step.from_x0 * step.x0(z, eps)
        if step.std:
            z += step.std * draw_noise(z, noise)
    return z


def tiled_predictor(
    networks: TextNetworks,
    tiled_run: TiledRun,
    prompts: Sequence[TilePair],
    guidance: float,
    on_tile: OnPreview = lambda preview: None,
) -> PredictEps:
    """Return eps with every tile under its own pair of `prompts`, and with guidance unless it is 1.

    `on_tile(preview)` is called for every finished tile, once per prompt, and may raise to cancel. Raises
    ValueError if there is not one prompt per tile.
    """
    tiles = tiled_run.tiles
    if len(prompts) != len(tiles):
        raise ValueError(f"{len(prompts)} prompts for {len(tiles)} tiles; give one per tile, in reading order")
    positive, negative = (list(texts) for texts in zip(*prompts, strict=True))
    # At once, so that the text encoder is loaded once.
    conditions = networks.conditions(positive if guidance == 1 else positive + negative)
    with_text, without = conditions[: len(tiles)], conditions[len(tiles) :]
    return TiledPredictor(networks, tiled_run, with_text, on_tile, tiles, without or None, guidance)
