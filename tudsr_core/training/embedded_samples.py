"""What each step of the embedded model's training sees, drawn by processes beside the one that trains.

A step's batch follows from the seed, the phase and the step alone: the number of workers changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..pictures import random_mild, resize
from .data import Crops
from .drawn import START, draw_gradients
from .embedded_config import EmbeddedConfig, Phase
from .pages import draw_pages

# What a random stream is for. Those of the phases have their numbers.
IDENTITY, BACKBONE, POLISH, LOOPED, FINISH = range(5)
AHEAD = 4  # batches that a worker keeps ready


class Batch(NamedTuple):
    """Pictures `B 3 S S` in 0..1: `sharp`, the same made poor and enlarged again, `start`, and smooth colour.

    `start` of stage two has half the side: it is what stage one sees.
    """

    sharp: Tensor
    start: Tensor
    smooth: Tensor | None

    def to(self, device: torch.device) -> Batch:
        """Return the same on `device`, without waiting for the copies of pinned memory."""
        return Batch(*(part if part is None else part.to(device, non_blocking=True) for part in self))


def rehearses(step: int) -> bool:
    """Say whether this step of the backbone is one of stage two: the fifth of every five."""
    return step % 5 == 4


class Steps(Dataset):
    """The batch of each `(phase, step)`; chunks have `side` pixels.

    Stage one sees x4 in seven pictures of ten, and any factor from 1.5 to 4 in the others, so that
    it does not overshoot when a plan asks for less than x4.
    """

    def __init__(self, crops: Crops, fonts: list[bytes], config: EmbeddedConfig, side: int) -> None:
        self.crops, self.fonts, self.seed, self.side = crops, fonts, config.seed, side
        self.phases = {
            BACKBONE: config.backbone,
            POLISH: config.polish,
            FINISH: config.finish,
            LOOPED: config.stage_two,
        }

    def places(self) -> list[tuple[int, int]]:
        """Return every `(phase, step)` of the run, in order."""
        return [(number, step) for number, phase in self.phases.items() for step in range(phase.steps)]

    def __getitem__(self, place: tuple[int, int]) -> Batch:
        """Draw what the step at `place` needs."""
        phase, step = place
        rng = np.random.default_rng([self.seed, phase, step])
        count, side = self.phases[phase].batch, self.side
        sharp = self._sharp(self.phases[phase], 2 * side if phase == LOOPED else side, rng)
        halved = phase == LOOPED or rehearses(step)
        start = torch.cat([_start(one[None], halved, rng) for one in sharp])
        if phase == BACKBONE:
            return Batch(sharp, start, None)
        smooth = count if phase == LOOPED else max(1, count // 2)
        return Batch(sharp, start, draw_gradients(smooth, side // 2, rng))

    def _sharp(self, phase: Phase, side: int, rng: np.random.Generator) -> Tensor:
        pages = int(rng.binomial(phase.batch, phase.pages)) if phase.pages else 0
        parts = [draw_pages(pages, side, self.fonts, rng)] if pages else []
        if pages < phase.batch:
            parts.append(self.crops.batch(phase.batch - pages, side, rng))
        return torch.cat(parts)


def _start(sharp: Tensor, halved: bool, rng: np.random.Generator) -> Tensor:
    """Make `1 3 S S` poor and enlarge it with bicubic to the side that stage one works on."""
    scale = 8.0 if halved else 4.0 if rng.random() < 0.7 else float(rng.uniform(1.5, 4))
    side = sharp.shape[-1] // 2 if halved else sharp.shape[-1]
    return resize(random_mild(sharp, scale, rng), (side, side))


def batches(steps: Steps, places: Iterable[tuple[int, int]], workers: int, pinned: bool = False) -> Iterator[Batch]:
    """Return the batches of `places` in order, drawn ahead by `workers` processes that start at once.

    `pinned` puts them where a CUDA device copies from without waiting.
    """
    beside = {"prefetch_factor": AHEAD, "multiprocessing_context": START} if workers else {}
    loader = DataLoader(steps, batch_size=None, sampler=places, num_workers=workers, pin_memory=pinned, **beside)
    return iter(loader)
