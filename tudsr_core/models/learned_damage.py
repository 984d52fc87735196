"""What every learned damage does around its network: factor, seed, strength, style, tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pictures import resize

GRID = 4  # good pixels for a poor one, a side
LEAST_FACTOR, MOST_FACTOR, MOST_STRENGTH = 1.0, 8.0, 1.5
TILE = 256  # poor pixels a side, without the surroundings that are computed with them
FRAME = 16  # poor pixels around a picture; whole blocks of JPEG, which are counted from its corner
STYLE_SIDE = 512  # of the middle of a style picture, which is all that is looked at

Tick = Callable[[int, int, object], None]


class LearnedDamage(nn.Module):
    """A network that says what is to be added to the downscale, behind one `degrade`.

    A subclass has `config.code` (the length of codes), `noise_channels`, `reach`, `style` (a poor picture to its code),
    `condition` and `forward`. `reach` is how many poor pixels away anything can have an effect, None for all of them:
    then nothing is cut into tiles.
    """

    reach: int | None = None

    @torch.no_grad()
    def degrade(
        self,
        sharp: Tensor,
        factor: float = 4.0,
        seed: int = 0,
        strength: float = 1.0,
        style: Tensor | None = None,
        tile: int = TILE,
        tick: Tick | None = None,
    ) -> Tensor:
        """Return pictures `B 3 h w`, 0..1, with sides `round(H / factor)`, of good ones `B 3 H W`, 0..1.

        Picture n of a batch has the seed after the one before it, as everywhere here. `style` is a bad picture
        `1 3 h w` whose kind of damage is taken; without it a kind is drawn. `strength` multiplies the damage;
        at 0 this is `shrink`. Noise is drawn for the whole picture on the CPU and cut, and tiles of `tile` poor
        pixels see all that can have an effect: the result does not depend on `tile` but for rounding. `tick` is
        told of every tile. Raises ValueError for a factor or strength that is out of range.
        """
        if not 0 <= strength <= MOST_STRENGTH:
            raise ValueError(f"strength {strength:g} must be from 0 to {MOST_STRENGTH:g}")
        base = shrink(sharp, factor)
        if strength == 0:
            return base
        device = next(self.parameters()).device
        large = resize(sharp, tuple(side * GRID for side in base.shape[-2:])).clamp(0, 1)
        # A frame is computed too and cut off, or what convolutions make of the outside would be seen.
        large, base = (F.pad(x, (width,) * 4, mode="replicate") for x, width in ((large, FRAME * GRID), (base, FRAME)))
        size = tuple(base.shape[-2:])
        parts = boxes(size, max(size), 0) if self.reach is None else boxes(size, tile, self.reach)
        for number in range(len(sharp)):
            noise, code = self.draw(size, seed + number)
            if style is not None:
                code = self.style(middle(style[:1, :3], STYLE_SIDE).to(device))
            one, result = base[number : number + 1].clone(), base[number : number + 1]
            for done, part in enumerate(parts, 1 + number * len(parts)):
                moved = (x[part.seen].to(device) for x in (one, noise))
                seen = self.condition(large[number : number + 1][part.large].to(device))
                added = self(seen, *moved, code.to(device), part.place)[part.kept]
                result[part.made] += strength * added.to(base)
                if tick:
                    tick(done, len(parts) * len(sharp), None)
        return base[..., FRAME:-FRAME, FRAME:-FRAME].clamp(0, 1)

    def draw(self, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        """Return noise `1 K h w` for a whole poor picture and a code `1 D`, drawn from `seed` on the CPU."""
        rng = torch.Generator().manual_seed(seed)
        code = on_sphere(torch.randn(1, self.config.code, generator=rng))
        return torch.randn(1, self.noise_channels, *size, generator=rng), code


def shrink(sharp: Tensor, factor: float) -> Tensor:
    """Return the antialiased bicubic downscale of `B 3 H W`, clamped to 0..1; sides are `round(side / factor)`."""
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise ValueError(f"factor {factor:g} must be from {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
    return resize(sharp, tuple(max(1, round(side / factor)) for side in sharp.shape[-2:])).clamp(0, 1)


def middle(picture: Tensor, side: int) -> Tensor:
    """Return the middle of `B C H W`, at most `side` a side."""
    top, left = (max(0, have - side) // 2 for have in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side]


@dataclass(frozen=True)
class Box:
    """One tile: what of the poor picture it sees, what of the good one, what it makes, and where that lies in it."""

    seen: tuple
    large: tuple
    made: tuple
    kept: tuple
    place: tuple[int, int]


def boxes(size: tuple[int, int], tile: int, reach: int) -> list[Box]:
    """Return the tiles of a poor picture of `size`; raises ValueError for a tile below 1."""
    if tile < 1:
        raise ValueError(f"tile {tile} must be 1 or more")
    rows, columns = ([(start, min(start + tile, side)) for start in range(0, side, tile)] for side in size)
    found = []
    for made in ((row, column) for row in rows for column in columns):
        seen = [(max(0, a - reach), min(side, b + reach)) for (a, b), side in zip(made, size, strict=True)]
        kept = [(a - begin, b - begin) for (a, b), (begin, _) in zip(made, seen, strict=True)]
        large = [(a * GRID, b * GRID) for a, b in seen]
        spans = ((..., *(slice(a, b) for a, b in span)) for span in (seen, large, made, kept))
        found.append(Box(*spans, tuple(begin for begin, _ in seen)))
    return found


def on_sphere(code: Tensor) -> Tensor:
    """Return codes `B D` of length sqrt(D), that of a drawn one: so drawn and encoded codes lie in one place."""
    return F.normalize(code, dim=1) * code.shape[1] ** 0.5
