"""Pictures made small and poor from file to file, by a learned downsampler or by Real-ESRGAN's classical damage.

What was done goes into a JSON file beside each picture, so that it can be shown, counted and done again. Knows no
network's inside and no command line.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from . import __version__
from .atomic_write import temporary_beside
from .batch import Job, Output
from .models import Downsampler, load_downsampler
from .pictures import (
    RECIPES,
    Picture,
    check_free,
    check_output,
    degrade,
    read_picture,
    sample_degradation,
    writable,
    write_picture,
)

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
    """A downsampler's file; `style` is a bad picture whose kind of damage is taken. Raises CheckpointError."""

    def __init__(self, path: Path, factor: float = 4.0, strength: float = 1.0, style: Path | None = None) -> None:
        self.factor, self.strength = factor, strength
        self.network: Downsampler = load_downsampler(path)
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
class OpenDegradation:
    """A job whose picture was read and whose result can be made and written."""

    job: Job
    picture: Picture
    seed: int
    damage: Damage

    def describe(self) -> list[str]:
        """Return what had to be assumed about the picture, as lines of plain text."""
        return [*self.picture.notes]


def beside(path: Path) -> Path:
    """Return the JSON file that belongs to a degraded picture."""
    return path.with_suffix(BESIDE)


def open_degradation(job: Job, damage: Damage, seed: int, output: Output) -> OpenDegradation:
    """Read the source, without its transparency, and check that picture and JSON can be written. Raises PictureError.

    The result has eight bits a channel; damage may be coloured, so that it is never stored as grey.
    """
    check_free(beside(job.output), output.overwrite)
    picture = read_picture(job.source, output.max_megapixels)
    notes = (*picture.notes, "its transparency is left out") if picture.has_alpha else picture.notes
    picture = replace(picture, pixels=picture.pixels[:, :3], bits=8, is_grey=False, notes=notes)
    size = tuple(max(1, round(side / damage.factor)) for side in picture.size)
    check_output(job.output, size, False, 8, output.overwrite)
    return OpenDegradation(job, writable(picture, job.output, size), seed, damage)


def finish_degradation(opened: OpenDegradation, output: Output, tick: Tick | None = None) -> Picture:
    """Make the poor picture, write it and what was done; returns what was written."""
    pixels, said = opened.damage.make(opened.picture.pixels, opened.seed, tick)
    result, job = replace(opened.picture, pixels=pixels), opened.job
    height, width = result.size
    facts = {"source": job.source.name, "picture": job.output.name, "width": width, "height": height}
    facts |= {"factor": opened.damage.factor, "seed": opened.seed, **said, "tudsr": __version__}
    with temporary_beside(beside(job.output)) as temporary:
        temporary.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        write_picture(job.output, result, overwrite=output.overwrite, quality=output.quality)
    return result
