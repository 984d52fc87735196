"""The smallest upscaler there is: bicubic, with a hook before every picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from tudsr_core.methods import Target
from tudsr_core.pictures import resize


@dataclass(frozen=True)
class Sizes:
    """A plan of nothing but sizes."""

    source: tuple[int, int]
    size: tuple[int, int]
    calls: int = 1

    def describe(self) -> list[str]:
        return [f"{self.source[1]} x {self.source[0]} to {self.size[1]} x {self.size[0]}"]


@dataclass
class Bicubic:
    """An `Upscaler`; `before` is called with the number of the picture, from 1, and may raise."""

    before: Callable[[int], None] = lambda number: None
    computed: int = 0

    def plan(self, source: tuple[int, int], target: Target) -> Sizes:
        return Sizes(source, target.size_for(source))

    def run(self, image: Tensor, plan: Sizes, tick=None) -> Tensor:
        self.computed += 1
        self.before(self.computed)
        if tick:
            tick(1, 1, None)
        return resize(image, plan.size).clamp(0, 1)
