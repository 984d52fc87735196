"""Whether tiles show in a picture, at the borders of their plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..pictures import resize
from ..tiling import plan_tiles
from .metrics import seam_score

if TYPE_CHECKING:
    from ..tiling import Size, TilePlan

UNIT = 8  # pixels: where the upscalers' tiles may begin


@dataclass(frozen=True)
class Seam:
    """How much stronger edges of the picture `name` are at `borders` borders of tiles than elsewhere (`seam_score`)."""

    name: str
    borders: int
    score: float

    def describe(self) -> str:
        """Return one line such as `after: edges at 3 tile borders are 1.02 times those elsewhere`."""
        where = f"{self.borders} tile border{'s' if self.borders > 1 else ''}"
        return f"{self.name}: edges at {where} are {self.score:.2f} times those elsewhere"


def seams_of(pictures: dict[str, Tensor], reference: Tensor | None, tiles: TilePlan) -> list[Seam]:
    """Return how much the borders of `tiles` show in two pictures `1 C H W` (C = 3 or 4, 0..1), by name.

    The second one's size counts; the others, and `reference`, are enlarged to it plainly. An enlarged picture is
    steepest between the pixels it was made of, where tiles begin too: what the first one has there is no seam of the
    second. Nothing for a single tile. Raises ValueError for tiles of another picture.
    """
    size = tuple(list(pictures.values())[-1].shape[-2:])
    rows, columns = tiles.borders(size, unit_of(tiles, size))
    if not (rows or columns):
        return []
    found = []
    for name, picture in (pictures | ({} if reference is None else {"reference": reference})).items():
        plain = tuple(picture.shape[-2:]) != size
        score = seam_score(resize(picture[:, :3], size), rows, columns)
        found.append(Seam(f"{name}, enlarged" if plain else name, len(rows) + len(columns), score))
    return found


def unit_of(tiles: TilePlan, size: Size) -> int:
    """Return how many pixels of a picture of `size` one unit of `tiles` is; raises ValueError where that cannot be.

    A picture may be up to a unit larger or smaller than its plan: plans leave out what is no whole latent, and stages
    are padded.
    """
    unit = max(1, round(size[0] / tiles.height))
    if any(
        abs(side - unit * units) >= max(unit, UNIT)
        for side, units in zip(size, (tiles.height, tiles.width), strict=True)
    ):
        raise ValueError(
            f"these tiles are of a picture in the shape {tiles.width} : {tiles.height}, but it is {size[1]} x "
            f"{size[0]}; give the plan of this very picture"
        )
    return unit


def tiles_over(size: Size, tile_px: int, overlap_px: int) -> TilePlan:
    """Return the tiles, in pixels, with which the upscalers make a picture of `size`; ValueError as `plan_tiles`."""
    height, width = (-(-side // UNIT) * UNIT for side in size)
    return plan_tiles(height, width, tile_px, overlap_px, multiple=UNIT)
