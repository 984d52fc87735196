"""The recipe of the embedded model: the sections of `configs/embedded.toml`, with the numbers of its first training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class DataSection:
    """`wheels`: folder of the wheel files of `data.WHEELS`; `photographs`: the unpacked package of `data.PACKAGE`.

    `workers` are the processes that draw what the steps see; 0 draws it in the process that trains.
    """

    wheels: Path
    photographs: Path
    drawn: int = 500
    workers: int = 0

    def __post_init__(self) -> None:
        if self.drawn < 1 or not 0 <= self.workers <= 256:
            raise ValueError("drawn must be above 0, and workers from 0 to 256")


@dataclass(frozen=True)
class Phase:
    """Optimiser steps, none to leave the phase out, the peak of the learning rate, and pictures a step.

    `pages` is the share of them that is small print (`pages.py`).
    """

    steps: int
    rate: float
    batch: int = 8
    pages: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0 or self.batch < 1:
            raise ValueError("steps must not be below 0, rate must be above it, and batch at least 1")
        if not 0 <= self.pages <= 1:
            raise ValueError("pages must be from 0 to 1")


@dataclass(frozen=True)
class FinishPhase(Phase):
    """A second polish, for pictures that the others lack.

    `mix` is how far it goes from the weights before to those it ends with: in between, what is new is learned
    and little is forgotten (WiSE-FT, Wortsman et al. 2022).
    """

    mix: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mix <= 1:
            raise ValueError("mix must be above 0 and at most 1")


@dataclass(frozen=True)
class LoopedPhase(Phase):
    """A phase on pictures of four chunks; `together` of them go through the network at once, 1, 2 or 4."""

    batch: int = 2
    together: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.together not in (1, 2, 4):
            raise ValueError("together must be 1, 2 or 4")


@dataclass(frozen=True)
class EmbeddedConfig:
    """The recipe: `output` is the file to write, `start` a tudsr-model file whose backbone training goes on from.

    Every `report_every` steps the loss, the speed and the gain on the choice photos are logged.
    """

    output: Path
    data: DataSection
    seed: int = 0
    start: Path | None = None
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    report_every: int = 250
    backbone: Phase = field(default_factory=lambda: Phase(8000, 8e-4))
    polish: Phase = field(default_factory=lambda: Phase(700, 2e-4))
    finish: FinishPhase = field(default_factory=lambda: FinishPhase(0, 2e-4))
    stage_two: LoopedPhase = field(default_factory=lambda: LoopedPhase(1200, 1e-3))

    def __post_init__(self) -> None:
        if self.seed < 0 or self.report_every < 1:
            raise ValueError("seed must not be below 0, and report_every at least 1")
