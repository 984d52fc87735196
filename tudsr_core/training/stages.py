"""The two stages as streams of chunks: what the trained network gets, and what it should make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..pictures import resize
from .samples import Batch, torch_rng_of

# Uses of a chunk's own random numbers.
POSTERIOR, FAKE_SEEN_BY_GENERATOR, FAKE, REAL = range(4)

Restore = Callable[[Tensor], Tensor]
Cut = Callable[[Batch], list[tuple[Tensor, Tensor]]]
"""Turns a batch into pairs `(low, sharp)`, `B 3 R R` each, 0..1."""


@dataclass(frozen=True)
class Chunk:
    """One forward and backward pass: pictures `low` and their truth `sharp`, `B 3 R R`, 0..1.

    `numbers` are those of the samples, `place` that of the chunk inside its picture.
    """

    low: Tensor
    sharp: Tensor
    numbers: tuple[int, ...]
    place: int = 0

    def draws(self, seed: int, use: int) -> list[torch.Generator]:
        """Return a random stream for every picture, the same wherever the chunk is computed."""
        return [torch_rng_of(seed, number, self.place, use) for number in self.numbers]


def whole(batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Stage one (TUDSR sec. 3.2): the crop is as large as the network sees."""
    return [(batch.low, batch.sharp)]


def looped(first: Restore, count: int) -> Cut:
    """Stage two (TUDSR sec. 3.3): restore with stage one, enlarge `count` times, cut into `count`^2 chunks.

    Chunks come in reading order and do not overlap, so each is of the native size R. Nothing here has a
    gradient.
    """

    @torch.no_grad()
    def cut(batch: Batch) -> list[tuple[Tensor, Tensor]]:
        start = enlarge(first(batch.low), count)
        return list(zip(split(start, count), split(batch.sharp, count), strict=True))

    return cut


def enlarge(pictures: Tensor, count: int) -> Tensor:
    """Return pictures, `count` times as large, as stage two sees them in use: bicubic, clamped."""
    return resize(pictures, tuple(side * count for side in pictures.shape[-2:])).clamp(0, 1)


def split(pictures: Tensor, count: int) -> list[Tensor]:
    """Cut `B C H W` into `count`^2 equal chunks, in reading order."""
    return [chunk for row in pictures.chunk(count, -2) for chunk in row.chunk(count, -1)]


def join(chunks: list[Tensor], count: int) -> Tensor:
    """Undo `split`."""
    return torch.cat([torch.cat(chunks[row * count : (row + 1) * count], -1) for row in range(count)], -2)


def chunks_of(batches: Iterable[Batch], cut: Cut, device: torch.device, skip: int = 0) -> Iterator[Chunk]:
    """Yield the chunks of all batches, without the first `skip` of the first one."""
    for batch in batches:
        moved = Batch(batch.numbers, batch.sharp.to(device), batch.low.to(device))
        for place, (low, sharp) in enumerate(cut(moved)):
            if place >= skip:
                yield Chunk(low, sharp, batch.numbers, place)
        skip = 0
