"""What a two-stage model is: networks, steps and texts of its stages, and how a run may be asked for.

No picture is touched here; the way of one picture is in `two_stage.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion import OneStep
from ..pictures import ColorFix
from ..tiling import Window, fit_overlap
from .networks import Networks, NoisePredictor
from .plan import StageLimits
from .published import Method


@dataclass(frozen=True)
class Stage:
    """One stage of a model: its networks, its steps and the text it was trained with.

    `networks` encode and decode. eps = sum of w_j B_j over `branches` (PiSA-SR's dials); without
    any, `networks` alone predict it. `predictor` gives the noise of methods whose first step mixes
    some in. `about` is the row of the method table, None for a model of no published method. `strength` s:
    what is decoded is z_L + s (z_H - z_L); `dial` says in words what the dial from faithful to inventive did.
    """

    networks: Networks
    steps: tuple[OneStep, ...]
    name: str = "stage"
    prompt: str = ""
    branches: tuple[tuple[float, Networks], ...] = ()
    predictor: NoisePredictor | None = None
    about: Method | None = None
    strength: float = 1.0
    dial: str = ""

    @property
    def how(self) -> str:
        """Method and timesteps, and a dial that was turned, in words; "" where there is nothing to say."""
        method = f"{self.about.title} at t = {', '.join(str(step.t) for step in self.steps)}" if self.about else ""
        return ", ".join(filter(None, [method, self.dial]))

    @property
    def evaluations(self) -> int:
        """Network evaluations per tile."""
        return len(self.steps) * max(1, len(self.branches)) + bool(self.predictor)


@dataclass(frozen=True)
class TwoStageModel:
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
