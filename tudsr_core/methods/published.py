"""The published one-step methods as data: formula, base model, prompt and what their files carry.

One row per method; nothing else in this package asks which method it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ..diffusion import OneStep, euler, from_noise_level, residual
from ..tiling import PublishedTiling

SD21, TURBO = "SD2.1-base", "SD-Turbo"

INVSR_TIMESTEPS = {
    1: (199,),
    2: (199, 99),
    3: (199, 99, 49),
    4: (199, 149, 99, 49),
    5: (249, 199, 149, 99, 49),
}
"""Timesteps InvSR was published with, by number of steps (its "200" is timestep 199)."""

# What InvSR's noise predictor was trained with; the words are the method's constant.
INVSR_PROMPT = (
    "Cinematic, high-contrast, photo-realistic, 8k, ultra HD, "
    "meticulous detailing, hyper sharpness, perfect without deformations"
)


@dataclass(frozen=True)
class Method:
    """One published method.

    `formula(stage, count)` gives its steps. `prompt` is the fixed text it was trained with, None
    where each picture had its own tags. `alpha` is what its files leave out, None where they say
    it or it equals the rank. `first_max` is the largest factor it was trained for in one go. `tiling`
    is that of its authors' script at its defaults, None where it does not cut the latent. `native_px` is
    the short side of the smallest result that its script lets the networks make: smaller pictures are
    enlarged first, or with `pads_small` mirrored beyond their borders. `dial` is what the dial from faithful to
    inventive turns, see `dial.py`.
    """

    title: str
    base: str
    formula: Callable[[int, int], tuple[OneStep, ...]]
    prompt: str | None = ""
    alpha: float | None = None
    first_max: float = 4.0
    counts: tuple[int, ...] = (1,)
    tiling: PublishedTiling | None = None
    native_px: int = 512
    pads_small: bool = False
    dial: Literal["strength", "detail", "steps"] = "strength"

    def steps(self, stage: int = 1, count: int = 1, timestep: int = 0) -> tuple[OneStep, ...]:
        """Return the steps of `stage` (1 or 2) in `count` evaluations; `timestep` above 0 replaces its own.

        Raises ValueError for a number of steps the method does not know, and for a timestep where
        the method has none to choose.
        """
        if count not in self.counts:
            known = ", ".join(map(str, self.counts))
            raise ValueError(f"{self.title} cannot run in {count} steps; possible: {known}")
        steps = self.formula(stage, count)
        if not timestep:
            return steps
        if len(steps) > 1 or steps[0].p == 1 or steps[0].b:
            raise ValueError(f"the timestep of {self.title} is part of the method; leave it at 0")
        return (from_noise_level(timestep),)


def _noise_level(*by_stage: int) -> Callable[[int, int], tuple[OneStep, ...]]:
    return lambda stage, count: (from_noise_level(by_stage[min(stage, len(by_stage)) - 1]),)


# TUDSR's own script was not to be had; it is built on OMGSR, whose tiles it is taken to share. HYPIR has the same.
OMGSR_TILING = PublishedTiling(512, 256, "published")

METHODS: dict[str, Method] = {
    "tudsr": Method("TUDSR", SD21, _noise_level(200, 50), tiling=OMGSR_TILING),
    "omgsr": Method("OMGSR", SD21, _noise_level(273), tiling=OMGSR_TILING),
    "hypir": Method("HYPIR", SD21, _noise_level(200), tiling=OMGSR_TILING),
    "osediff": Method(
        "OSEDiff", SD21, _noise_level(999), prompt=None, alpha=8.0, tiling=PublishedTiling(768, 256, "published")
    ),
    "pisa-sr": Method(
        "PiSA-SR",
        SD21,
        lambda stage, count: (residual(1),),
        alpha=8.0,
        tiling=PublishedTiling(768, 256, "centred"),
        dial="detail",
    ),
    "invsr": Method(
        "InvSR",
        TURBO,
        lambda stage, count: euler(INVSR_TIMESTEPS[count]),
        prompt=INVSR_PROMPT,
        counts=tuple(INVSR_TIMESTEPS),
        pads_small=True,
        dial="steps",
    ),
}
