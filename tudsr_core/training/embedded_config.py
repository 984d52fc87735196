"""The recipe of the embedded model: the sections of `configs/embedded.toml`, with the numbers of its first training."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class DataSection:
    """`wheels`: folder of the wheel files of `data.WHEELS`; `photographs`: the unpacked package of `data.PACKAGE`."""

    wheels: Path
    photographs: Path
    drawn: int = 500


@dataclass(frozen=True)
class Phase:
    """Optimiser steps, none to leave the phase out, and the peak of the learning rate."""

    steps: int
    rate: float

    def __post_init__(self) -> None:
        if self.steps < 0 or self.rate <= 0:
            raise ValueError("steps must not be below 0, and rate must be above it")


@dataclass(frozen=True)
class EmbeddedConfig:
    """The recipe: `output` is the file to write, `start` a tudsr-model file whose backbone training goes on from."""

    output: Path
    data: DataSection
    seed: int = 0
    start: Path | None = None
    backbone: Phase = field(default_factory=lambda: Phase(8000, 8e-4))
    polish: Phase = field(default_factory=lambda: Phase(700, 2e-4))
    stage_two: Phase = field(default_factory=lambda: Phase(1200, 1e-3))
