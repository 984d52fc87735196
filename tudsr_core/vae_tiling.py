"""The one way through an autoencoder: encode and decode of any size in tiles, equal to the untiled network.

Chooses how, per autoencoder: Stable Diffusion's are streamed step by step (`vae_graph`,
`vae_stream`), purely local ones such as the embedded model's run as tiles with a halo
(`vae_reach`), and what is neither runs on the whole picture and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from weakref import WeakSet

import torch
from torch import Tensor, nn

from .vae_graph import Side, Step, UnknownTree, grids, read_steps, run_untiled
from .vae_reach import Network, Reach, find_reaches, run_tiled
from .vae_reach import count_tiles as count_local_tiles
from .vae_stream import Place, Tiling, count_tiles, run_steps

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}  # of the largest value; half types: 0.1
_proven: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True)
class Doors:
    """An autoencoder as its owner calls it.

    `encode` and `decode` take and give whole tensors, float32 on the CPU: pixels `B 3 H W` in 0..1,
    moments (mean, log variance) or plain latents, unscaled. `prepare` and `finish` are what they do
    around the network itself (0..1 to -1..1 and back).
    """

    encode: Network
    decode: Network
    prepare: Network
    finish: Network


class TiledVAE:
    """An autoencoder of any kind, encoded and decoded in tiles.

    `scale`: pixels per latent. `latents`: channels of a latent. `free_bytes` says how much of the
    device's memory is free, for `Tiling.planes` "auto".
    """

    def __init__(
        self, vae: nn.Module, doors: Doors, scale: int, latents: int, place: Place, free_bytes: Callable[[], int]
    ) -> None:
        self.vae, self.doors, self.scale, self.latents = vae, doors, scale, latents
        self.place, self.free_bytes = place, free_bytes

    @cached_property
    def steps(self) -> dict[Side, list[Step]]:
        """Encoder and decoder as steps; a side is missing if its module tree is not Stable Diffusion's."""
        try:
            return {side: read_steps(self.vae, side) for side in ("encoder", "decoder")}
        except UnknownTree as unknown:
            if not all(self.reaches):
                log.warning("this autoencoder cannot be tiled exactly (%s); it runs on whole pictures", unknown)
            return {}

    @property
    def tiling(self) -> Tiling:
        """What is used when nothing else is asked for: on a CPU small tiles, which its caches like better."""
        return Tiling(128) if self.steps and self.place.device.type == "cpu" else Tiling()

    @cached_property
    def reaches(self) -> tuple[Reach | None, Reach | None]:
        """`Reach` of encoder and decoder, None where the network is not local."""
        like = torch.zeros(1)
        return find_reaches(self.vae, self.doors.encode, self.doors.decode, self.scale, self.latents, like)

    @property
    def is_tiled(self) -> bool:
        """Whether device memory is bounded by the tile, not by the picture."""
        return len(self.steps) == 2 or all(self.reaches)

    @torch.no_grad()
    def encode(self, pixels: Tensor, on_tile: Callable[[], None], tiling: Tiling | None = None) -> Tensor:
        """Return moments or latents, float32 on the CPU, of `B 3 H W` in 0..1."""
        tiling = tiling or self.tiling
        if self._streams("encoder"):
            return self._stream("encoder", self.doors.prepare(pixels), on_tile, tiling)
        return run_tiled(self.doors.encode, pixels, self.reaches[0], tiling.tile_px, on_tile)

    @torch.no_grad()
    def decode(self, z: Tensor, on_tile: Callable[[], None], tiling: Tiling | None = None) -> Tensor:
        """Return pixels `B 3 H W`, nominally 0..1, float32 on the CPU, of unscaled latents."""
        tiling = tiling or self.tiling
        if self._streams("decoder"):
            return self.doors.finish(self._stream("decoder", z, on_tile, tiling))
        return run_tiled(self.doors.decode, z, self.reaches[1], tiling.tile_px // self.scale, on_tile)

    def count(self, side: Side, size: tuple[int, int], tiling: Tiling | None = None) -> int:
        """Return how often `on_tile` will be called for one picture of `size` pixels."""
        tiling = tiling or self.tiling
        if side in self.steps:
            small = tuple(length // self.scale for length in size)
            return count_tiles(self.steps[side], self._start(side), small if side == "decoder" else size, tiling)
        return count_local_tiles(size, tiling.tile_px) if self.reaches[side == "decoder"] else 1

    def tile_bytes(self, tiling: Tiling | None = None) -> int:
        """Return the peak memory of one tile on the device."""
        tiling = tiling or self.tiling
        return max(
            (_tile_bytes(self.steps[s], self._start(s), tiling, self.place.dtype) for s in self.steps), default=0
        )

    def plane_bytes(self, pixels: int, side: Side | None = None) -> int:
        """Return the memory of the activations of a picture of so many pixels between passes."""
        half = self.place.dtype == torch.float16
        sides = [side] if side else list(self.steps)
        channels = max((_live_channels(self.steps[s], self._start(s), half) for s in sides), default=0)
        return int(channels * pixels * self.place.dtype.itemsize)

    def _start(self, side: Side) -> Fraction:
        return Fraction(1) if side == "encoder" else Fraction(1, self.scale)

    def _stream(self, side: Side, x: Tensor, on_tile: Callable[[], None], tiling: Tiling) -> Tensor:
        if tiling.planes == "auto":
            area = x.shape[-2] * x.shape[-1] * (1 if side == "encoder" else self.scale**2)
            needed = self.plane_bytes(area, side) + 2 * self.tile_bytes(tiling)
            fits = self.place.device.type == "cpu" or needed < self.free_bytes()
            tiling = replace(tiling, planes="device" if fits else "host")
        parts = [run_steps(self.steps[side], self._start(side), one, self.place, tiling, on_tile) for one in x.split(1)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _streams(self, side: Side) -> bool:
        """Whether to stream: the tree is known, and on a small probe the steps give what the modules give."""
        if side not in self.steps:
            return False
        tree = getattr(self.vae, side)
        if tree not in _proven:
            if not self._agrees(side):
                log.warning("the %s's steps do not give the modules' result; it runs on whole pictures", side)
                del self.steps[side]
                return False
            _proven.add(tree)
        return True

    def _agrees(self, side: Side) -> bool:
        unit, channels = (self.scale, 3) if side == "encoder" else (1, self.latents)
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(1, channels, 3 * unit, 2 * unit, generator=generator)
        truth = run_untiled(self.vae, side, probe.to(self.place.device, self.place.dtype)).cpu()
        if not truth.isfinite().all():
            return True
        tiling = Tiling(self.scale, "device")
        ours = run_steps(self.steps[side], self._start(side), probe, self.place, tiling, lambda: None)
        bound = TOLERANCE.get(self.place.dtype, 0.1) * float(truth.abs().max())
        return ours.shape == truth.shape and float((ours - truth).abs().max()) <= bound


def draw(moments: Tensor, latents: int, seed: int | None) -> Tensor:
    """Return the posterior's mode for moments `B 2C h w` (or plain latents `B C h w`), or with `seed` a sample."""
    mean, log_variance = moments[:, :latents], moments[:, latents:]
    if seed is None or not log_variance.shape[1]:
        return mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise


def _tile_bytes(steps: list[Step], start: Fraction, tiling: Tiling, dtype: torch.dtype) -> int:
    """A tile's input in the planes' and the norm's dtype, the convolution's two ends, and the statistics' copy."""
    wide = max(4, dtype.itemsize)
    largest = 0
    for step, scale in grids(steps, start):
        inside, outside = step.channels
        if getattr(step, "resample", "") == "up":
            inside *= 1.25
        area = (tiling.tile_px * scale + 2) ** 2
        largest = max(largest, area * (inside * (wide + dtype.itemsize) + outside * (wide + 2 * dtype.itemsize)))
    return int(largest)


def _live_channels(steps: list[Step], start: Fraction, whole_input: bool) -> Fraction:
    """Channels per pixel of the picture that wait at once, at most; inputs are freed as they are used."""
    x, skip, most = Fraction(0), Fraction(0), Fraction(0)
    for step, scale in grids(steps, start):
        y, role, before = step.channels[1] * scale**2, getattr(step, "skip", ""), x + skip
        if role == "open":
            skip = x if step.shortcut is None else step.shortcut.out_channels * scale**2
        elif role == "close":
            skip = Fraction(0)
        aside = skip if role == "open" and step.shortcut is not None else 0
        most = max(most, before + y + aside if whole_input else max(before, y + skip))
        x = y
    return most
