"""Pictures made small and poor from file to file, by a learned downsampler or by Real-ESRGAN's classical damage.

What was done goes into a JSON file beside each picture, so that it can be shown, counted and done again. Knows no
network's inside and no command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from . import __version__
from .atomic_write import temporary_beside
from .batch import Job
from .models import LearnedDamage, SharedNetworks, load_downsampler
from .pictures import RECIPES, degrade, read_picture, sample_degradation

BESIDE = ".degraded.json"
Tick = Callable[[int, int, object], None]


class Damage(Protocol):
    """A way to make pictures poor."""

    factor: float

    def make(self, sharp: Tensor, seed: int, tick: Tick | None) -> tuple[Tensor, dict[str, Any]]:
        """Return the poor picture of `1 3 H W` and what was done to it, as plain values."""
        ...


@dataclass(frozen=True)
class Classical:
    """Real-ESRGAN's two orders, drawn from a published recipe."""

    recipe: str
    factor: float = 4.0

    def make(self, sharp: Tensor, seed: int, tick: Tick | None) -> tuple[Tensor, dict[str, Any]]:
        """Draw all numbers from `seed` and apply them."""
        drawn = sample_degradation(np.random.default_rng(seed), RECIPES[self.recipe], self.factor)
        return degrade(sharp, drawn), {"how": "classical", "recipe": self.recipe, "drawn": asdict(drawn)}


class Learned:
    """A downsampler's file; `style` is a bad picture whose kind of damage is taken. Raises CheckpointError.

    `networks` are those of SD2.1, for a file that is an adapter of them.
    """

    def __init__(
        self,
        path: Path,
        factor: float = 4.0,
        strength: float = 1.0,
        style: Path | None = None,
        networks: SharedNetworks | None = None,
    ) -> None:
        self.factor, self.strength = factor, strength
        self.network: LearnedDamage = load_downsampler(path, networks)
        self.style = None if style is None else read_picture(style).pixels[:, :3]
        self.said = {
            "how": "learned",
            "downsampler": path.name,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "strength": strength,
            "style": None if style is None else style.name,
        }

    def make(self, sharp: Tensor, seed: int, tick: Tick | None) -> tuple[Tensor, dict[str, Any]]:
        """Run the network with the noise of `seed`, in tiles."""
        return self.network.degrade(sharp, self.factor, seed, self.strength, self.style, tick=tick), self.said


@dataclass(frozen=True)
class DegradePlan:
    """How large the poor picture will be."""

    source: tuple[int, int]
    size: tuple[int, int]
    calls: int = 1

    def describe(self) -> list[str]:
        """Return both sizes in words."""
        return [f"{self.source[1]} x {self.source[0]} to {self.size[1]} x {self.size[0]}"]


@dataclass(frozen=True)
class Degrader:
    """Damage to the picture of one job, as what a batch runs; what was done is written to the first of `job.also`."""

    damage: Damage
    seed: int
    job: Job

    def plan(self, source: tuple[int, int], target: object) -> DegradePlan:
        """Return the plan for a picture of `source = (height, width)`; `target` is not asked, damage has a factor."""
        height, width = (max(1, round(side / self.damage.factor)) for side in source)
        return DegradePlan(source, (height, width))

    def run(self, image: Tensor, plan: DegradePlan, tick: Tick | None = None) -> Tensor:
        """Return the poor picture of `1 3 H W`, once what was done to it is written down."""
        pixels, said = self.damage.make(image, self.seed, tick)
        height, width = plan.size
        facts = {"source": self.job.source.name, "picture": self.job.output.name, "width": width, "height": height}
        facts |= {"factor": self.damage.factor, "seed": self.seed, **said, "tudsr": __version__}
        with temporary_beside(self.job.also[0]) as temporary:
            temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        return pixels


def beside(path: Path) -> Path:
    """Return the JSON file that belongs to a degraded picture."""
    return path.with_suffix(BESIDE)
