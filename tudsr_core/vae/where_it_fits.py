"""One picture's layers, from the start again where the device turns out too full or float16 too narrow."""

from __future__ import annotations

import logging
from collections.abc import Callable

from torch import Tensor, nn

from .feature_maps import FeatureMap
from .graph import Side, run_untiled
from .layer_pass import DeviceFull
from .settings import ComputeTarget, VAETiling
from .stream import Overflow, run_layers

log = logging.getLogger(__name__)


def run_where_it_fits(
    given: tuple,
    tilings: list[VAETiling],
    on_tile: Callable[[], None],
    features: dict[str, FeatureMap],
    keep: dict[str, list[FeatureMap]],
    careful: bool,
) -> tuple[Tensor, bool]:
    """Return what `run_layers(*given, ...)` returns, and whether something overflowed float16.

    `tilings`: the one to use, and those for when the device is full; what did not fit is taken off the list.
    Raises MemoryError when the last one does not fit.
    """
    kept, ticks, overflowed = {level: len(made) for level, made in keep.items()}, _Ticks(on_tile), False
    while True:
        try:
            return run_layers(*given, tilings[0], ticks, features, keep, careful), overflowed
        except DeviceFull:
            if len(tilings) == 1:
                raise
            log.warning("out of memory in the autoencoder: its activations wait in host memory from here on")
            del tilings[0]
        except Overflow:
            log.info("the autoencoder overflowed float16: such layers are done in float32 from here on")
            careful = overflowed = True
        for level, count in kept.items():
            del keep[level][count:]
        ticks.again()


def run_whole(vae: nn.Module, side: Side, x: Tensor, target: ComputeTarget) -> Tensor | None:
    """Return the untiled network's own result, float32 on the CPU; None if it did not fit or overflowed float16."""
    try:
        y = run_untiled(vae, side, x.to(target.device, target.dtype)).float().cpu()
    except RuntimeError as error:
        if not target.is_out_of_memory(error):
            raise
        return None
    return y if y.isfinite().all() else None


class _Ticks:
    """Calls `on_tile` for every tile, but only once for those of a repetition."""

    def __init__(self, on_tile: Callable[[], None]) -> None:
        self.on_tile, self.done, self.skip = on_tile, 0, 0

    def __call__(self) -> None:
        if self.skip:
            self.skip -= 1
            return
        self.done += 1
        self.on_tile()

    def again(self) -> None:
        """What follows starts from the beginning."""
        self.skip = self.done
