"""What every upscaler is: a plan and a run; and what all of them check and count."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..tiling import Size
from .networks import Preview, Tick
from .plan import Target


class RunPlan(Protocol):
    """What a run will do with one picture, before it runs."""

    source: Size
    size: Size

    @property
    def calls(self) -> int:
        """Network evaluations of the run."""

    def describe(self) -> list[str]:
        """Return the plan as lines of plain text."""


class Upscaler(Protocol):
    """One published system, ready to run: its networks and options are its own, pictures and sizes come from outside.

    `batch`, the command line and evaluation know nothing else of a method.
    """

    def plan(self, source: Size, target: Target) -> Any:
        """Return the `RunPlan` for a picture of `source = (height, width)`; raises ValueError where there is none."""

    def run(self, image: Tensor, plan: Any, tick: Tick | None = None) -> Tensor:
        """Enlarge `B C H W` (C = 3 or 4, float, 0..1) by its own plan; returns `B C H' W'`, float32, 0..1.

        Raises ValueError for another size than planned, wrong shapes and non-finite values, MemoryError
        when the smallest tile does not fit.
        """


def check_image(image: Tensor, plan: RunPlan | None = None) -> None:
    """Raise ValueError unless `image` is a finite, non-empty `B 3 H W` or `B 4 H W`, of the size that `plan` is for."""
    if image.ndim != 4 or image.shape[1] not in (3, 4):
        raise ValueError(f"expected a picture of B 3 H W or B 4 H W, got shape {tuple(image.shape)}")
    if 0 in image.shape:
        raise ValueError(f"the picture is empty: shape {tuple(image.shape)}")
    height, width = image.shape[-2:]
    if plan and (height, width) != tuple(plan.source):
        raise ValueError(f"the plan is for {plan.source[1]} x {plan.source[0]}, the picture is {width} x {height}")
    if not torch.isfinite(image).all():
        raise ValueError("the picture contains NaN or infinite values; repair or re-export it")


class ProgressCounter:
    """Counts tiles towards a known total and tells `tick`."""

    def __init__(self, tick: Tick | None, total: int) -> None:
        self.tick, self.done, self.total = tick, 0, total

    def expect(self, extra: int) -> None:
        """There will be `extra` more tiles than was thought."""
        self.total += extra

    def advance(self, preview: Preview | None = None) -> None:
        """Count one tile."""
        self.done += 1
        self.total = max(self.total, self.done)  # what runs out of memory may take more tiles
        if self.tick:
            self.tick(self.done, self.total, preview)
