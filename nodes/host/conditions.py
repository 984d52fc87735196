"""Cutting ComfyUI's processed conditions to one tile: areas, masks, control hints, concatenated latents.

A condition here is one dict of the lists that ComfyUI's samplers pass around; originals are
never changed, since ComfyUI caches and shares them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ...tudsr_core.tiling import Tile

FADE = 8  # latents: over them ComfyUI fades an area's borders
Area = tuple[tuple[int, ...], tuple[int, ...]]
"""Sides and offsets of an area along the latent's axes after `B C`."""


PLACED = ("area", "mask", "control", "gligen")
"""What an entry may have that must be cut to each tile for itself."""


def is_placed(conds: list[list[dict] | None]) -> bool:
    """Return whether any condition has what a tile can only be given alone."""
    return any(entry.get(key) is not None for entries in conds for entry in entries or () for key in PLACED)


def is_spatial(conds: dict[str, list[dict] | None] | list[list[dict] | None], shape: Sequence[int]) -> bool:
    """Return whether any condition of a latent of `shape` depends on where in the picture it is applied."""
    lists = conds.values() if isinstance(conds, dict) else conds
    return any(_is_spatial(entry, shape) for entries in lists for entry in entries or ())


def _is_spatial(entry: dict, shape: Sequence[int]) -> bool:
    return is_placed([[entry]]) or any(_is_plane(cond, shape) for cond in entry.get("model_conds", {}).values())


def _is_plane(cond: Any, shape: Sequence[int]) -> bool:
    """Whether a model's condition lies over the latent: a mask or pose of a video model has its very sides."""
    if isinstance(cond, comfy.conds.CONDNoiseShape):
        return True
    value = getattr(cond, "cond", None)
    return isinstance(value, Tensor) and value.ndim >= len(shape) and tuple(value.shape[-2:]) == tuple(shape[-2:])


def merge_conds(lists: Sequence[list[dict] | None], batch: int) -> list[dict] | None:
    """Return one list of entries for several tiles, `batch` rows of each in order, from the lists of each tile.

    None if they cannot run as one. Entries that are the same for all tiles stay as they are.
    """
    if lists[0] is None or any(len(entries) != len(lists[0]) for entries in lists):
        return None
    merged = [_merge(column, batch) for column in zip(*lists, strict=True)]
    return None if any(entry is None for entry in merged) else merged


def _merge(column: Sequence[dict], batch: int) -> dict | None:
    """Return one entry whose model conditions hold `batch` rows per tile, or None if they do not fit together."""
    first = column[0]
    if all(entry is first for entry in column):
        return first
    model_conds = {}
    for name in first["model_conds"]:
        rows = [entry["model_conds"][name].process_cond(batch_size=batch, area=None) for entry in column]
        if not all(rows[0].can_concat(row) for row in rows[1:]):
            return None
        model_conds[name] = rows[0]._copy_with(rows[0].concat(rows[1:]))
    return first | {"model_conds": model_conds}


HintCache = dict[tuple, Any]
"""Control objects cut to a tile, kept for one run so that hints are prepared once, not per step."""


def crop_conds(entries: list[dict] | None, tile: Tile, x: Tensor, cache: HintCache) -> list[dict] | None:
    """Return the entries that touch `tile`, cut to it; `x` is the whole latent, `B C H W` or `B C T H W`.

    An entry whose area misses the tile is left out. `cache` belongs to the caller's run.
    """
    if entries is None:
        return None
    cut = [_crop(entry, tile, x, cache) for entry in entries]
    return [entry for entry in cut if entry is not None]


def _crop(entry: dict, tile: Tile, x: Tensor, cache: HintCache) -> dict | None:
    entry = entry.copy()
    if entry.get("area") is not None:
        area = _read_area(entry["area"], x.shape[2:])
        inside = _crop_area(area, tile)
        if inside is None:
            return None
        entry["area"] = inside[0] + inside[1]
        if entry.get("mask") is None:
            entry |= {"mask": _fade(area, tile, x), "mask_strength": 1.0}
        else:
            entry["mask"] = tile.cut(entry["mask"])
    elif entry.get("mask") is not None:
        entry["mask"] = tile.cut(entry["mask"])
    if entry.get("control") is not None:
        entry["control"] = crop_control(entry["control"], tile, x.shape, cache)
    if entry.get("gligen") is not None:
        entry["gligen"] = _crop_gligen(entry["gligen"], tile)
    if "model_conds" in entry:
        entry["model_conds"] = {
            name: cond._copy_with(tile.cut(cond.cond)) if _is_plane(cond, x.shape) else cond
            for name, cond in entry["model_conds"].items()
        }
    return entry


def _read_area(area: Sequence[int], sides: Sequence[int]) -> Area:
    """Return ComfyUI's `(height, width, top, left)`, or the longer form with time, for a latent of `sides`."""
    count = len(sides)
    area = comfy.samplers.add_area_dims(list(area), count)
    half = len(area) // 2
    offsets = area[half : half + count]
    return tuple(min(a, side - at) for a, at, side in zip(area, offsets, sides, strict=False)), tuple(offsets)


def _crop_area(area: Area, tile: Tile) -> Area | None:
    """Intersect the last two axes of an area with the tile, in the tile's own coordinates."""
    (*more, height, width), (*before, top, left) = area
    y0, x0 = max(top, tile.top), max(left, tile.left)
    y1, x1 = min(top + height, tile.top + tile.height), min(left + width, tile.left + tile.width)
    if y1 <= y0 or x1 <= x0:
        return None
    return (*more, y1 - y0, x1 - x0), (*before, y0 - tile.top, x0 - tile.left)


def _fade(area: Area, tile: Tile, x: Tensor) -> Tensor:
    """Return ComfyUI's fade of an area without a mask as the mask `1 [T] h w` of one tile.

    ComfyUI would compute it on what the tile sees of the area, with borders that are none.
    """
    mask = x.new_ones(())
    for axis, (side, start, length) in enumerate(zip(*area, x.shape[2:], strict=True)):
        weights = x.new_ones(length)
        reach = min(FADE, side // 4)
        ramp = torch.arange(1, reach + 1).to(weights) / max(1, reach)
        if start != 0:
            weights[start : start + reach] *= ramp
        if start + side < length:
            weights[start + side - reach : start + side] *= ramp.flip(0)
        if axis == x.ndim - 4:
            weights = weights[tile.top : tile.top + tile.height]
        elif axis == x.ndim - 3:
            weights = weights[tile.left : tile.left + tile.width]
        mask = mask[..., None] * weights
    return mask[None]


def _crop_gligen(gligen: tuple, tile: Tile) -> tuple:
    """Move GLIGEN's boxes `(embedding, height, width, top, left)` into the tile; drop those outside."""
    kind, model, boxes = gligen
    moved = []
    for embedding, height, width, top, left in boxes:
        inside = _crop_area(((height, width), (top, left)), tile)
        if inside:
            moved.append((embedding, *inside[0], *inside[1]))
    return kind, model, moved


def crop_control(control: Any, tile: Tile, shape: Sequence[int], cache: HintCache) -> Any:
    """Return a control object that shares the network and sees only the tile's part of the hint."""
    key = (id(control), tile)
    if key not in cache:
        cut = copy.copy(control)
        cut.cond_hint = None
        # A control that encodes its hint says one pixel per latent and counts the VAE's own reduction apart.
        scale = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae is not None else 1)
        cut.cond_hint_original = _crop_pixels(control.cond_hint_original, tile, shape, scale, control.upscale_algorithm)
        if control.extra_concat_orig:
            # These join the hint once it is encoded.
            grid = control.compression_ratio, control.upscale_algorithm
            cut.extra_concat_orig = [_crop_pixels(x, tile, shape, *grid) for x in control.extra_concat_orig]
            cut.extra_concat = None
        if control.previous_controlnet is not None:
            cut.previous_controlnet = crop_control(control.previous_controlnet, tile, shape, cache)
        cache[key] = cut
    return cache[key]


def _crop_pixels(pixels: Tensor | None, tile: Tile, shape: Sequence[int], scale: int, method: str) -> Tensor | None:
    if pixels is None or pixels.shape[-1] == pixels.shape[-2] == 1:
        return pixels
    height, width = shape[-2] * scale, shape[-1] * scale
    if tuple(pixels.shape[-2:]) != (height, width):
        pixels = comfy.utils.common_upscale(pixels, width, height, method, "center")
    return tile.cut(pixels, scale)
