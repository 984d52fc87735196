"""Purely local networks in tiles: with enough real neighbours around it, a tile gives exactly the untiled values.

That holds for autoencoders without global operations (no GroupNorm, no attention), such as the
embedded model's. Those with global operations are recognised; `stream` is for them.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Network = Callable[[Tensor], Tensor]
Box = tuple[int, int, int, int]
"""Rows and columns of an input: first and last, first and last."""
SMALLEST_SIDE = 8  # latents; below, running out of memory is not the tile's fault


@dataclass(frozen=True)
class ReceptiveField:
    """How a purely local network maps sizes and how far it looks.

    `scale`: output pixels per input pixel (1/4 for an f = 4 encoder, 4 for its decoder).
    `halo`: input pixels beyond a block that can influence that block's output, per side.
    """

    scale: Fraction
    halo: int


@torch.inference_mode()
def measure_receptive_field(
    network: Network, channels: int, unit: int, like: Tensor, limit: int = 32
) -> ReceptiveField | None:
    """Find the `ReceptiveField` of `network` by following one NaN, or None when it spreads everywhere.

    NaN survives every operation, so the NaNs in the output of a picture with one bad block are
    exactly what can depend on that block. Where it does not survive (half types on a GPU), two pictures
    of noise that differ in that block show what does. `unit` is the smallest block in input pixels (4 for an
    f = 4 encoder, 1 for its decoder); `limit` is the largest halo looked for, in units.
    """
    side = (2 * limit + 1) * unit
    probe = torch.zeros(1, channels, side, side, device=like.device, dtype=like.dtype)
    middle = slice(limit * unit, (limit + 1) * unit)
    probe[..., middle, middle] = math.nan
    output = network(probe)
    touched = torch.isnan(output).any(dim=1)[0]
    if not touched.any():
        probe = torch.rand(probe.shape, generator=torch.Generator().manual_seed(0)).to(like)
        output = network(probe)
        probe[..., middle, middle] = 1 - probe[..., middle, middle]
        touched = (network(probe) != output).any(dim=1)[0]
    rows = torch.nonzero(touched.any(1)).flatten()
    out_unit = output.shape[-1] // (2 * limit + 1)
    first, last = int(rows.min()), int(rows.max())
    if first == 0 or last == output.shape[-1] - 1:
        return None
    halo = max(limit * out_unit - first, last + 1 - (limit + 1) * out_unit)
    return ReceptiveField(Fraction(output.shape[-1], side), math.ceil(halo / out_unit) * unit)


def find_receptive_fields(
    vae: nn.Module, encode: Network, decode: Network, scale: int, latents: int, like: Tensor
) -> tuple[ReceptiveField | None, ReceptiveField | None]:
    """Return the receptive field of `encode` and of `decode`; None, None without trying if `vae` has GroupNorm.

    `scale` is pixels per latent, `latents` the latent's channels; `like` gives device and dtype.
    """
    if any(isinstance(module, nn.GroupNorm) for module in vae.modules()):
        return None, None
    return measure_receptive_field(encode, 3, scale, like, limit=12), measure_receptive_field(
        decode, latents, 1, like, limit=12
    )


def count_blocks(size: tuple[int, int], tile: int) -> int:
    """Return how many tiles `run_tiled` makes of an input of `size` with cores of `tile`."""
    return math.ceil(size[0] / tile) * math.ceil(size[1] / tile)


def run_tiled(
    network: Network,
    image: Tensor,
    receptive_field: ReceptiveField | None,
    tile: int,
    on_tile: Callable[[], None],
    is_out_of_memory: Callable[[BaseException], bool] = lambda error: False,
) -> Tensor:
    """Return `network(image)` computed in cores of `tile` input pixels plus the halo, one picture at a time.

    Cores partition the input; each is read with `receptive_field.halo` real neighbours, clipped at the true
    borders, where the network's own zero padding applies as in the untiled run. When memory runs
    out, cores are halved from there on, down to a few latents. Without a receptive field, pictures are whole.
    `on_tile` is called once per core of `tile`, or per picture.
    """
    if receptive_field is None:
        results = []
        for one in image.split(1):
            results.append(network(one))
            on_tile()
        return results[0] if len(results) == 1 else torch.cat(results)
    batch, _, height, width = image.shape
    cores, output = _Cores(network, receptive_field, tile, is_out_of_memory), None
    for index in range(batch):
        for whole in _cut((0, height, 0, width), tile):
            for box, core in cores.run(image[index : index + 1], whole):
                if output is None:
                    size = int(height * receptive_field.scale), int(width * receptive_field.scale)
                    output = core.new_empty(batch, core.shape[1], *size)
                y, x = int(box[0] * receptive_field.scale), int(box[2] * receptive_field.scale)
                output[index, :, y : y + core.shape[-2], x : x + core.shape[-1]] = core[0]
                del core  # not beside the next one
            on_tile()
    return output


class _Cores:
    """Runs a local network over boxes; `side` is the largest core that has not run out of memory."""

    def __init__(
        self,
        network: Network,
        receptive_field: ReceptiveField,
        side: int,
        is_out_of_memory: Callable[[BaseException], bool],
    ) -> None:
        self.network, self.receptive_field, self.side = network, receptive_field, side
        self.is_out_of_memory = is_out_of_memory

    def run(self, image: Tensor, whole: Box) -> Iterator[tuple[Box, Tensor]]:
        """Yield parts of `whole`, in reading order, with their results `1 C h w`."""
        smallest = SMALLEST_SIDE * self.receptive_field.scale.denominator
        boxes = [whole]
        while boxes:
            box = boxes.pop()
            if max(box[1] - box[0], box[3] - box[2]) > self.side:
                boxes += reversed(list(_cut(box, self.side)))
                continue
            core = None
            # The except block must end before anything is tried again: the traceback keeps tensors alive.
            try:
                core = _run_core(self.network, image, box, self.receptive_field)
            except RuntimeError as error:
                if self.side <= smallest or not self.is_out_of_memory(error):
                    raise
            if core is None:
                self.side = max(smallest, self.side // 2 // smallest * smallest)
                log.warning("out of memory in the autoencoder: going on with tiles of %d", self.side)
                boxes.append(box)
                continue
            yield box, core


def _cut(box: Box, side: int) -> Iterator[Box]:
    """Yield parts of at most `side`, in reading order."""
    y0, y1, x0, x1 = box
    for top in range(y0, y1, side):
        for left in range(x0, x1, side):
            yield top, min(top + side, y1), left, min(left + side, x1)


def _run_core(network: Network, image: Tensor, box: Box, receptive_field: ReceptiveField) -> Tensor:
    (height, width), (top, bottom, left, right) = image.shape[-2:], box
    y0, x0 = max(0, top - receptive_field.halo), max(0, left - receptive_field.halo)
    y1, x1 = min(height, bottom + receptive_field.halo), min(width, right + receptive_field.halo)
    result = network(image[..., y0:y1, x0:x1])
    start_y, start_x = int((top - y0) * receptive_field.scale), int((left - x0) * receptive_field.scale)
    core_h, core_w = int((bottom - top) * receptive_field.scale), int((right - left) * receptive_field.scale)
    return result[..., start_y : start_y + core_h, start_x : start_x + core_w]
