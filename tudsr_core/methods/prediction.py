"""eps of a whole latent, predicted in tiles: the one place where a network meets the tiles of a sampler.

A predictor is called as k-diffusion's samplers call their model: the loop or the single step around it
knows no tiles, no prompts and no guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tiling import TileBlender, TiledRun, TilePlan
from .networks import Networks, Predict, Preview

Restore = Callable[[Tensor], Tensor]
"""`restore(eps)`: the clean latent `B C h w` that a prediction stands for, for previews."""

PredictEps = Callable[[Tensor, int, Restore], Tensor]
"""`predict(z, t, restore)`: eps of the latent z at timestep t, same shape, float32."""


class TiledPredictor:
    """eps of every tile under its condition, blended over the whole latent; tiles shrink when memory runs out.

    MultiDiffusion (Bar-Tal et al. 2023, eq. 5) with the weights of `tiled_run`. `condition` serves all tiles;
    with `plan` it is a list with one per tile of that plan, and other tiles take the one of the planned tile
    that shares most with them. With `negative`, of the same kind, a tile's eps is eps_u + guidance (eps_c - eps_u)
    (classifier-free guidance, Ho and Salimans 2022, eq. 6), which is the same before and after blending.
    `on_tile(preview)` is called for every finished tile, once per condition, and may raise to cancel.
    """

    def __init__(
        self,
        networks: Networks,
        tiled_run: TiledRun,
        condition: Any,
        on_tile: Callable[[Preview], None],
        plan: TilePlan | None = None,
        negative: Any = None,
        guidance: float = 1.0,
    ) -> None:
        self.networks, self.tiled_run, self.on_tile = networks, tiled_run, on_tile
        self.conditions = [condition] if negative is None else [negative, condition]
        self.plan, self.guidance = plan, guidance

    def __call__(self, z: Tensor, t: int, restore: Restore) -> Tensor:
        """Return eps for `B C h w`; raises MemoryError when the smallest tile does not fit."""

        def attempt(blender: TileBlender) -> None:
            tiles = self.tiled_run.tiles
            count = len(z) * min(self.tiled_run.batch, len(tiles))
            part = count, z.shape[1], tiles.tile_height, tiles.tile_width

            def ready(waiting: Sequence[Any], *predicts: Predict) -> Tensor:
                if not waiting:
                    return self._blend(z, blender, predicts, restore)
                first, *rest = waiting
                return self.networks.denoise(z, t, first, part, lambda predict: ready(rest, *predicts, predict))

            ready([self._fitting(condition) for condition in self.conditions])

        return self.tiled_run.blend(attempt, self.networks.is_out_of_memory)

    def _blend(self, z: Tensor, blender: TileBlender, predicts: Sequence[Predict], restore: Restore) -> Tensor:
        for batch in self.tiled_run.batches(blender):
            parts = torch.cat([tile.cut(z) for tile in batch])
            eps = predicts[0](parts, batch)
            for predict in predicts[1:]:
                eps = eps + self.guidance * (predict(parts, batch) - eps)
            for tile, value in zip(batch, eps.split(len(z)), strict=True):
                blender.add(tile, value)
                for _ in predicts:
                    self.on_tile(lambda: restore(blender.result()))
        return blender.result()

    def _fitting(self, condition: Any) -> Any:
        tiles = self.tiled_run.tiles
        if self.plan is None or tiles is self.plan:
            return condition
        return [condition[self.plan.nearest(tile, tiles)] for tile in tiles]


def weighted(parts: Sequence[tuple[float, PredictEps]]) -> PredictEps:
    """Return eps = sum of w_j B_j over `(w_j, B_j)` (PiSA-SR's dials)."""

    def predict(z: Tensor, t: int, restore: Restore) -> Tensor:
        total = None
        for weight, part in parts:
            eps = part(z, t, restore) * weight
            total = eps if total is None else total + eps
        return total

    return predict
