"""The one way through an autoencoder: encode and decode of any size in tiles, equal to the untiled network.

Chooses how, per autoencoder: Stable Diffusion's are streamed layer by layer (`graph`,
`stream`), purely local ones such as the embedded model's run as tiles with a halo
(`receptive_field`), and what is neither runs on the whole picture and says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .feature_maps import FeatureMap
from .fusion import Features, Fusions, check_features, check_levels, fused_levels, up_to_levels, with_fusions
from .graph import Layer, Side, UnknownTree, grids, read_layers
from .memory_estimate import kept_channels, live_channels, tile_bytes
from .owner import Core, with_core
from .receptive_field import Network, ReceptiveField, find_receptive_fields, run_tiled
from .receptive_field import count_blocks as count_local_tiles
from .settings import ComputeTarget, VAETiling
from .stream import count_tiles
from .where_it_fits import run_where_it_fits, run_whole

log = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}  # of the largest value; half types: 0.1
Result = TypeVar("Result")
_proven: WeakKeyDictionary[nn.Module, set[Side]] = WeakKeyDictionary()


@dataclass(frozen=True)
class VAECallables:
    """An autoencoder as its owner calls it.

    `encode` and `decode` take and give whole tensors, float32 on the CPU: pixels `B 3 H W` in 0..1,
    and latents, unscaled, of a posterior the mode. `encode_with(vae, pixels)` and `decode_with(vae, z)`
    do the same through any autoencoder of the kind, on whatever device it is, so that what the owner
    does around encoder and decoder (scaling, packing) stays the owner's. `load(bytes)` brings the
    weights to the device, with so much memory free.
    """

    encode: Network
    decode: Network
    encode_with: Callable[[nn.Module, Tensor], Tensor]
    decode_with: Callable[[nn.Module, Tensor], Tensor]
    load: Callable[[int], object] = lambda needed: None


class TiledVAE:
    """An autoencoder of any kind, encoded and decoded in tiles.

    `scale`: pixels per latent. `latents`: channels of a latent. `free_bytes` says how much of the
    device's memory is free, for `VAETiling.planes` "auto". Whatever runs out of memory raises
    MemoryError in the end; smaller tiles are tried first.
    """

    def __init__(
        self,
        vae: nn.Module,
        callables: VAECallables,
        scale: int,
        latents: int,
        target: ComputeTarget,
        free_bytes: Callable[[], int],
    ) -> None:
        self.vae, self.callables, self.scale, self.latents = vae, callables, scale, latents
        self.target, self.free_bytes = target, free_bytes
        self._overflowing: set[Side] = set()

    @cached_property
    def layers(self) -> dict[Side, list[Layer]]:
        """Encoder and decoder as layers; a side is missing if it cannot be streamed."""
        try:
            return {side: read_layers(self.vae, side) for side in ("encoder", "decoder")}
        except UnknownTree as unknown:
            if not all(self.receptive_fields):
                log.warning("this autoencoder cannot be tiled exactly (%s); it runs on whole pictures", unknown)
            return {}

    @cached_property
    def tiling(self) -> VAETiling:
        """What is used when nothing else is asked for: on a CPU small tiles, which its caches like better.

        On CUDA large ones, of which fewer have rims to be cut off, unless they are much for the device.
        """
        device, large = self.target.device, VAETiling(1024)
        if self.layers and device.type == "cpu":
            return VAETiling(128)
        if self.layers and device.type == "cuda":
            return large if 5 * self.tile_bytes(large) <= torch.cuda.mem_get_info(device)[1] else VAETiling()
        return VAETiling()

    @cached_property
    def receptive_fields(self) -> tuple[ReceptiveField | None, ReceptiveField | None]:
        """`ReceptiveField` of encoder and decoder, None where the network is not local."""
        networks = self.vae, self.callables.encode, self.callables.decode
        return self._guarded(lambda: find_receptive_fields(*networks, self.scale, self.latents, torch.zeros(1)))

    @property
    def is_tiled(self) -> bool:
        """Whether device memory is bounded by the tile, not by the picture."""
        return len(self.layers) == 2 or all(self.receptive_fields)

    def encode(
        self, pixels: Tensor, on_tile: Callable[[], None], tiling: VAETiling | None = None, seed: int | None = None
    ) -> Tensor:
        """Return latents, unscaled float32 on the CPU, of `B 3 H W` in 0..1: of a posterior the mode, or a draw."""
        return self.encode_with_features(pixels, (), on_tile, tiling, seed)[0]

    def encode_with_features(
        self,
        pixels: Tensor,
        keep: Iterable[str],
        on_tile: Callable[[], None],
        tiling: VAETiling | None = None,
        seed: int | None = None,
    ) -> tuple[Tensor, Features]:
        """Return what `encode` does, and the encoder's activations at the end of the levels `keep`.

        Those are a `C H W` for each picture, in the dtype and where they were computed to wait: host
        memory or the device, see `VAETiling.planes`. Raises ValueError for levels that there are not.
        """
        extras = _Extras(seed, {level: [] for level in keep})
        z = self._guarded(lambda: self._run("encoder", pixels, on_tile, tiling or self.tiling, extras))
        return z, extras.keep

    def features(
        self, pixels: Tensor, keep: Iterable[str], on_tile: Callable[[], None], tiling: VAETiling | None = None
    ) -> Features:
        """Return the features of `encode_with_features` without the latents, and without computing what is after them.

        That is deep levels and the attention, whose time grows with the square of the area.
        """
        extras = _Extras(keep={level: [] for level in keep}, only_kept=True)
        self._guarded(lambda: self._run("encoder", pixels, on_tile, tiling or self.tiling, extras))
        return extras.keep

    def decode(
        self,
        z: Tensor,
        on_tile: Callable[[], None],
        tiling: VAETiling | None = None,
        fuse: Fusions | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Return pixels `B 3 H W`, nominally 0..1, float32 on the CPU, of unscaled latents.

        `fuse`: what is fused with the decoder's activations, by level, and `features` what
        `encode_with_features` kept there; they can be used again. Raises ValueError if they do not fit.
        """
        extras = _Extras(fuse=fuse or {}, features=features or {})
        return self._guarded(lambda: self._run("decoder", z, on_tile, tiling or self.tiling, extras))

    def count(
        self,
        side: Side,
        size: tuple[int, int],
        tiling: VAETiling | None = None,
        fuse: Fusions | None = None,
        keep: Iterable[str] = (),
    ) -> int:
        """Return how often `on_tile` will be called for one picture of `size` pixels; with `keep`, by `features`."""
        tiling = tiling or self.tiling
        if side in self.layers:
            if self._fits_one_tile(side, size, tiling, fuse, keep):
                return 1
            start, layers = self._start(side), self._layers(side, fuse)
            layers = up_to_levels(layers, keep) if keep else layers
            return count_tiles(layers, start, tuple(int(length * start) for length in size), tiling)
        return count_local_tiles(size, tiling.tile_px) if self.receptive_fields[side == "decoder"] else 1

    def tile_bytes(self, tiling: VAETiling | None = None, fuse: Fusions | None = None) -> int:
        """Return the peak memory of one tile on the device."""
        tiling = tiling or self.tiling
        sides = ((self._layers(side, fuse), self._start(side)) for side in self.layers)
        fused, dtype = self.target.device.type == "cuda", self.target.dtype
        return max((tile_bytes(*layers, tiling, dtype, fused) for layers in sides), default=0)

    def feature_map_bytes(self, pixels: int, side: Side | None = None, fuse: Fusions | None = None) -> int:
        """Return the memory of the activations of a picture of so many pixels between passes, with features."""
        levels = fused_levels(fuse or {})
        live = {one: self._live_bytes(one, fuse, levels) for one in ([side] if side else self.layers)}
        if levels and "decoder" in live and "encoder" in self.layers:
            live["decoder"] += kept_channels(self.layers["encoder"], levels) * self.target.dtype.itemsize
        return int(max(live.values(), default=0) * pixels)

    def _live_bytes(self, side: Side, fuse: Fusions | None, keep: Iterable[str]) -> Fraction:
        """Return bytes per pixel of the picture; a decoder finds its features there, an encoder's stay."""
        half, kept = self.target.dtype == torch.float16, set(keep) if side == "encoder" else ()
        return live_channels(self._layers(side, fuse), self._start(side), half, kept) * self.target.dtype.itemsize

    def _layers(self, side: Side, fuse: Fusions | None) -> list[Layer]:
        return with_fusions(self.layers[side], fuse) if fuse and side == "decoder" else self.layers[side]

    @torch.no_grad()
    def _run(self, side: Side, x: Tensor, on_tile: Callable[[], None], tiling: VAETiling, extras: _Extras) -> Tensor:
        if self._streams(side):
            check_levels(self.layers[side], extras.keep)
            self.callables.load(2 * self.tile_bytes(tiling, extras.fuse))
            return self._stream(side, x, on_tile, tiling, extras)
        if extras.keep or fused_levels(extras.fuse):
            raise ValueError(f"the activations of this autoencoder's {side} are not known; it cannot be fused with")
        receptive_field = self.receptive_fields[side == "decoder"]
        if extras.seed is not None and receptive_field is None:
            log.warning("this autoencoder runs on whole pictures: the posterior's mode is used, not a sample")
        network, tile = self.callables.encode, tiling.tile_px
        if side == "decoder":
            network, tile = self.callables.decode, tiling.tile_px // self.scale
        return run_tiled(network, x, receptive_field, tile, on_tile, self.target.is_out_of_memory)

    def _guarded(self, call: Callable[[], Result]) -> Result:
        """Return the call's result; raises MemoryError, in one line, for what is out of memory at last."""
        # What failed is let go before this raises: its traceback keeps tensors alive.
        try:
            return call()
        except RuntimeError as error:
            if not self.target.is_out_of_memory(error):
                raise
        raise MemoryError("out of memory in the autoencoder; close other programs, or use smaller tiles or pictures")

    def _start(self, side: Side) -> Fraction:
        """Return the grid of the encoder's or decoder's input; owners that pack latents have a coarser one."""
        if side == "encoder":
            return Fraction(1)
        return Fraction(1, prod(2 for layer in self.layers[side] if getattr(layer, "resample", "") == "up"))

    def _stream(self, side: Side, x: Tensor, on_tile: Callable[[], None], tiling: VAETiling, extras: _Extras) -> Tensor:
        """Return the owner's own result, with the layers in the place of its encoder or decoder."""
        # A posterior's moments are twice the channels that the decoder takes.
        seed = extras.seed
        latents = read_layers(self.vae, "decoder")[0].channels[0] if seed is not None else 0

        def run(inner: Tensor) -> Tensor:
            y = self._run_layers(side, inner, on_tile, tiling, extras)
            if extras.only_kept:  # the owner gets the shape that it expects; nobody reads what it makes of it
                *_, (last, scale) = grids(self.layers[side], self._start(side))
                return y.new_zeros(len(y), last.channels[1], *(int(length * scale) for length in inner.shape[-2:]))
            return y if seed is None else torch.cat([posterior_latent(y, latents, seed), y[:, latents:]], 1)

        core = Core(run)
        through = self.callables.encode_with if side == "encoder" else self.callables.decode_with
        result = through(with_core(self.vae, side, core), x)
        if not core.calls:
            raise UnknownTree(f"{type(self.vae).__name__} does not call its {side}")
        return result

    def _run_layers(
        self, side: Side, x: Tensor, on_tile: Callable[[], None], tiling: VAETiling, extras: _Extras
    ) -> Tensor:
        start, layers = self._start(side), self._layers(side, extras.fuse)
        check_features(layers, start, tuple(x.shape[-2:]), len(x), extras.features)
        layers = up_to_levels(layers, extras.keep) if extras.only_kept else layers
        size = tuple(int(length / start) for length in x.shape[-2:])
        whole = self._fits_one_tile(side, size, tiling, extras.fuse, extras.keep)
        attempts = [tiling]
        if tiling.planes == "auto":
            needed = int(self._live_bytes(side, extras.fuse, extras.keep) * prod(size))
            needed += 2 * self.tile_bytes(tiling, extras.fuse)
            fits = self.target.device.type == "cpu" or needed < self.free_bytes()
            attempts = [replace(tiling, planes=planes) for planes in (("device", "host") if fits else ("host",))]
        parts = []
        for number, one in enumerate(x.split(1)):
            if whole and (made := run_whole(self.vae, side, one, self.target)) is not None:
                parts.append(made)
                on_tile()
                continue
            features = {level: extras.features[level][number] for level in fused_levels(extras.fuse)}
            given = layers, start, one, self.target
            made, overflowed = run_where_it_fits(
                given, attempts, on_tile, features, extras.keep, careful=side in self._overflowing
            )
            parts.append(made)
            self._overflowing |= {side} if overflowed else set()
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _fits_one_tile(
        self, side: Side, size: tuple[int, int], tiling: VAETiling, fuse: Fusions | None, keep: Iterable[str]
    ) -> bool:
        """Whether a picture of `size` pixels is left to the network itself: on CUDA, where every tile's layer costs."""
        plain = not fused_levels(fuse or {}) and not list(keep) and tiling.planes != "host"
        return plain and self.target.device.type == "cuda" and prod(size) <= tiling.tile_px**2

    def _streams(self, side: Side) -> bool:
        """Whether to stream: the tree is known, and on a small probe the layers give the owner's own result."""
        if side not in self.layers:
            return False
        proven = _proven.setdefault(self.vae, set())
        if side not in proven:
            if reason := self._difference(side):
                log.warning(
                    "the %s's layers do not give its owner's result (%s); it runs on whole pictures", side, reason
                )
                del self.layers[side]
                return False
            proven.add(side)
        return True

    def _difference(self, side: Side) -> str:
        """Say how layers and owner differ on a small picture of noise, "" if they do not."""
        generator = torch.Generator().manual_seed(0)
        if side == "encoder":
            probe = torch.rand(1, 3, 3 * self.scale, 2 * self.scale, generator=generator)
            truth = self.callables.encode(probe)
        else:
            probe = torch.randn(1, self.latents, 3, 2, generator=generator)
            truth = self.callables.decode(probe)
        try:
            ours = self._stream(side, probe, lambda: None, VAETiling(self.scale, "device"), _Extras())
        except MemoryError:
            raise
        except Exception as error:  # whatever an owner makes of an encoder that is none of its own
            if self.target.is_out_of_memory(error):
                raise
            return f"{type(error).__name__}: {error}"
        if ours.shape != truth.shape:
            return f"{tuple(ours.shape)} instead of {tuple(truth.shape)}"
        # float16 may overflow untiled, where the layers do not.
        known = truth.isfinite()
        error, most = (ours - truth)[known].abs(), truth[known].abs()
        bound = TOLERANCE.get(self.target.dtype, 0.1)
        return f"off by {error.max():.2g}" if known.any() and not error.max() <= bound * most.max() else ""


@dataclass(frozen=True)
class _Extras:
    """What one encode or decode does beyond the plain one; `keep` is filled, and with `only_kept` all that is made."""

    seed: int | None = None
    keep: dict[str, list[FeatureMap]] = field(default_factory=dict)
    only_kept: bool = False
    fuse: Fusions = field(default_factory=dict)
    features: Features = field(default_factory=dict)


def posterior_latent(moments: Tensor, latents: int, seed: int | None) -> Tensor:
    """Return the posterior's mode for moments `B 2C h w` (or plain latents `B C h w`), or with `seed` a sample."""
    mean, log_variance = moments[:, :latents], moments[:, latents:]
    if seed is None or not log_variance.shape[1]:
        return mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise
