"""Feature maps: activations that wait between layers, in row bands, with their statistics, and the way to and fro.

Knows tensors and devices, not networks. A feature map is one picture's activation `C H W`; tiles of it
travel as `1 C h w`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from typing import TypeVar

import torch
from torch import Tensor

Interval = tuple[int, int]
Box = tuple[Interval, Interval]
Sums = tuple[int, Tensor]
Job = TypeVar("Job")
BAND_ROWS = 32


def intervals(length: int, side: int, unit: int = 1) -> list[Interval]:
    """Cut 0..length into the fewest near-equal intervals of at most `side`; inner borders are multiples of `unit`."""
    count = max(1, -(-length // max(side, unit)))
    edges = [i * length // count // unit * unit for i in range(count)] + [length]
    return list(zip(edges, edges[1:], strict=False))


def halves(box: Box) -> tuple[Box, Box]:
    """Cut rows and columns across their longer side, at an even number."""
    rows, columns = box
    tall = rows[1] - rows[0] >= columns[1] - columns[0]
    first, last = rows if tall else columns
    middle = (first + last) // 4 * 2
    if tall:
        return ((first, middle), columns), ((middle, last), columns)
    return (rows, (first, middle)), (rows, (middle, last))


def reserve(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory in which activations wait between passes."""
    return torch.empty(size, dtype=dtype, device=device)


class FeatureMap:
    """One activation `C H W`, kept as row bands (`rows`) so that what has been used can be freed before the rest."""

    def __init__(
        self,
        channels: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        rows: list[Interval] | None = None,
    ) -> None:
        self.channels, self.height, self.width, self.dtype, self.device = channels, height, width, dtype, device
        self.rows = rows or intervals(height, BAND_ROWS)
        self.bands: list[Tensor | None] = [None] * len(self.rows)
        self.kept = False
        self._sums: list[Sums] = []

    @classmethod
    def of(cls, tensor: Tensor) -> FeatureMap:
        """Return a feature map that reads from and writes to `tensor`, `C H W`."""
        feature_map = cls(*tensor.shape, tensor.dtype, tensor.device)
        feature_map.rows, feature_map.bands = [(0, feature_map.height)], [tensor]
        return feature_map

    def read(self, rows: Interval, columns: Interval, into: Tensor) -> Tensor:
        """Copy that part into `into` (`1 C h w`) and return it."""
        for _, band, inner, outer in self._bands_of(rows):
            into[0, :, outer].copy_(band[:, inner, slice(*columns)])
        return into

    def write(self, rows: Interval, columns: Interval, tile: Tensor) -> None:
        """Put `1 C h w` in its place."""
        for number, band, inner, outer in self._bands_of(rows):
            if band is None:
                top, bottom = self.rows[number]
                size = bottom - top, self.width, self.channels
                band = self.bands[number] = reserve(size, self.dtype, self.device).permute(2, 0, 1)
            band[:, inner, slice(*columns)].copy_(tile[0, :, outer])

    def _bands_of(self, rows: Interval) -> Iterator[tuple[int, Tensor | None, slice, slice]]:
        """Yield number and band of those that meet `rows`, and the common rows counted in the band and in `rows`."""
        for number, ((top, bottom), band) in enumerate(zip(self.rows, self.bands, strict=True)):
            first, last = max(top, rows[0]), min(bottom, rows[1])
            if first < last:
                yield number, band, slice(first - top, last - top), slice(first - rows[0], last - rows[0])

    def free(self, before: int) -> None:
        """Drop the bands that lie wholly above row `before`, unless the map is kept."""
        if self.kept:
            return
        for number, (_, bottom) in enumerate(self.rows):
            if bottom <= before:
                self.bands[number] = None

    @staticmethod
    def measure(tile: Tensor) -> Sums:
        """Return what a tile `1 C h w` adds to the statistics."""
        if tile.is_cuda and tile.dtype != torch.float64:
            # One pass with float32 sums, whatever the type: what synchronised batch norm is made of.
            count = tile.shape[-2] * tile.shape[-1]
            # With an epsilon of 0 it calls the inverse of no deviation 0.
            mean, inverse_deviation = torch.batch_norm_stats(tile, 1e-30)
            return count, torch.stack([mean, count * inverse_deviation.pow(-2)])
        # By pixel, then channel: as tiles lie in memory.
        values = tile[0].permute(1, 2, 0).flatten(0, 1).to(torch.promote_types(tile.dtype, torch.float32))
        mean = values.mean(0)
        return len(values), torch.stack([mean, (values - mean).square_().sum(0)])

    def add(self, sums: Sums) -> None:
        """Add a measured tile to the statistics; tiles must partition the feature map, without halo."""
        self._sums.append(sums)

    def moments(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each of `groups` channel groups, float64, where tiles were computed."""
        return _merge(self._sums, groups)

    def finite(self) -> Tensor:
        """Whether every measured value is finite: one value, where tiles were computed."""
        return torch.stack([pair for _, pair in self._sums]).isfinite().all()


class Joined(FeatureMap):
    """Activations of one size as one, their channels in order; nothing is copied, nothing is freed."""

    def __init__(self, *parts: FeatureMap) -> None:
        first, self.parts = parts[0], parts
        self.channels, self.height, self.width = sum(part.channels for part in parts), first.height, first.width
        self.dtype = reduce(torch.promote_types, (part.dtype for part in parts))
        on_host = (part.device for part in parts if part.device.type == "cpu")
        self.device = next(on_host, first.device)
        self.kept = True

    def read(self, rows: Interval, columns: Interval, into: Tensor) -> Tensor:
        """Copy that part of all into `into` (`1 C h w`) and return it."""
        for part, own in zip(self.parts, into.split([part.channels for part in self.parts], 1), strict=True):
            part.read(rows, columns, own)
        return into

    def moments(self, groups: int) -> tuple[Tensor, Tensor]:
        """Return mean and biased variance of each of `groups` channel groups, float64, where tiles were computed."""
        pixels = self.height * self.width
        means, variances = zip(*(part.moments(part.channels) for part in self.parts), strict=True)
        return _merge([(pixels, torch.stack([torch.cat(means), torch.cat(variances) * pixels]))], groups)


def _merge(sums: list[Sums], groups: int) -> tuple[Tensor, Tensor]:
    """Merge tiles exactly, with the variance between them (Chan, Golub and LeVeque 1983)."""
    pairs = torch.stack([pair for _, pair in sums])
    # A device is not waited for; only those without double precision (MPS) give their sums away.
    pairs = (pairs if pairs.device.type in ("cpu", "cuda") else pairs.cpu()).double()
    counts = torch.tensor([count for count, _ in sums], dtype=torch.float64).to(pairs.device, non_blocking=True)
    means, squares = pairs.unflatten(2, (groups, -1)).unbind(1)  # tiles, groups, channels of a group
    total = counts.sum() * means.shape[2]
    weights = counts[:, None, None]
    mean = (weights * means).sum((0, 2)) / total
    between = (weights * (means - mean[:, None]).square()).sum((0, 2))
    return mean, (squares.sum((0, 2)) + between) / total


class TransferQueue:
    """Carries tiles between feature maps and the compute device.

    Where feature maps wait in host memory and the device is CUDA, the next tile is brought while the
    current one is computed, through pinned buffers on streams of their own, one transfer per tile.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.ahead = device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if self.ahead else []
        self._pending: list[tuple[torch.cuda.Event, FeatureMap, Interval, Interval, Tensor]] = []

    def feed(self, jobs: Iterable[Job], fetch: Callable[[Job], tuple]) -> Iterator[tuple[Job, tuple]]:
        """Yield each job with `fetch(job)`, fetched one job ahead where that overlaps with computing."""
        if not self.ahead:
            for job in jobs:
                yield job, fetch(job)
            return
        compute, waiting = torch.cuda.current_stream(self.device), None
        for job in jobs:
            parts, brought = fetch(job), torch.cuda.Event()
            brought.record(self._streams[0])
            ready, waiting = waiting, (job, parts, brought)
            del parts
            if ready is not None:
                compute.wait_event(ready[2])
                yield ready[:2]
        if waiting is not None:
            compute.wait_event(waiting[2])
            yield waiting[:2]

    def arrive(self) -> None:
        """Let the computation wait for all that has been fetched outside `feed`."""
        if self.ahead:
            torch.cuda.current_stream(self.device).wait_stream(self._streams[0])

    def fetch(self, feature_map: FeatureMap, rows: Interval, columns: Interval) -> Tensor:
        """Return that part as a new tensor `1 C h w` on the compute device, after `feed` or `arrive`."""
        size = 1, feature_map.channels, rows[1] - rows[0], columns[1] - columns[0]
        crossing = self.ahead and feature_map.device.type == "cpu"
        where = dict(dtype=feature_map.dtype, device=feature_map.device, pin_memory=crossing)
        part = feature_map.read(rows, columns, torch.empty(size, memory_format=torch.channels_last, **where))
        if not crossing:
            return part.to(self.device)
        with torch.cuda.stream(self._streams[0]):
            moved = part.to(self.device, non_blocking=True)
        moved.record_stream(torch.cuda.current_stream(self.device))
        return moved

    def store(self, feature_map: FeatureMap, rows: Interval, columns: Interval, tile: Tensor) -> None:
        """Put a computed tile into its feature map, now or by the next `flush`."""
        if not (self.ahead and feature_map.device.type == "cpu"):
            feature_map.write(rows, columns, tile)
            return
        self.flush(keep=1)
        out = self._streams[1]
        out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(out):
            dense = tile.contiguous(memory_format=torch.channels_last)
            host = torch.empty(tile.shape, dtype=tile.dtype, pin_memory=True, memory_format=torch.channels_last)
            host.copy_(dense, non_blocking=True)
            tile.record_stream(out)
            done = torch.cuda.Event()
            done.record(out)
        self._pending.append((done, feature_map, rows, columns, host))

    def flush(self, keep: int = 0) -> None:
        """Wait until at most `keep` stored tiles are still on their way."""
        while len(self._pending) > keep:
            done, feature_map, rows, columns, host = self._pending[0]
            done.synchronize()
            feature_map.write(rows, columns, host)
            del self._pending[0]  # only now: the feature map's memory may have run out
