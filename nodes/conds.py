"""Cutting ComfyUI's processed conditions to one tile: areas, masks, control hints, concatenated latents.

A condition here is one dict of the lists that ComfyUI's samplers pass around; originals are
never changed, since ComfyUI caches and shares them.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.conds
import comfy.utils
from torch import Tensor

from ..tudsr_core.tiles import Tile


def is_spatial(conds: dict[str, list[dict] | None] | list[list[dict] | None]) -> bool:
    """Return whether any condition depends on where in the picture it is applied."""
    lists = conds.values() if isinstance(conds, dict) else conds
    return any(_is_spatial(entry) for entries in lists for entry in entries or ())


def _is_spatial(entry: dict) -> bool:
    if any(entry.get(key) is not None for key in ("area", "mask", "control", "gligen")):
        return True
    return any(isinstance(cond, comfy.conds.CONDNoiseShape) for cond in entry.get("model_conds", {}).values())


HintCache = dict[tuple, Any]
"""Control objects cut to a tile, kept for one run so that hints are prepared once, not per step."""


def crop_conds(entries: list[dict] | None, tile: Tile, shape: tuple[int, ...], cache: HintCache) -> list[dict] | None:
    """Return the entries that touch `tile`, cut to it; `shape` is the whole latent's `B C H W`.

    An entry whose area misses the tile is left out. `cache` belongs to the caller's run.
    """
    if entries is None:
        return None
    cut = [_crop(entry, tile, shape, cache) for entry in entries]
    return [entry for entry in cut if entry is not None]


def _crop(entry: dict, tile: Tile, shape: tuple[int, ...], cache: HintCache) -> dict | None:
    entry = entry.copy()
    if entry.get("area") is not None:
        area = _crop_area(entry["area"], tile)
        if area is None:
            return None
        entry["area"] = area
    if entry.get("mask") is not None:
        entry["mask"] = tile.cut(entry["mask"])
    if entry.get("control") is not None:
        entry["control"] = crop_control(entry["control"], tile, shape, cache)
    if entry.get("gligen") is not None:
        entry["gligen"] = _crop_gligen(entry["gligen"], tile)
    if "model_conds" in entry:
        entry["model_conds"] = {
            name: cond._copy_with(tile.cut(cond.cond)) if isinstance(cond, comfy.conds.CONDNoiseShape) else cond
            for name, cond in entry["model_conds"].items()
        }
    return entry


def _crop_area(area: tuple[int, ...], tile: Tile) -> tuple[int, ...] | None:
    """Intersect `(height, width, top, left)` with the tile, in the tile's own coordinates."""
    height, width, top, left = area[-4:] if len(area) == 4 else (*area[1:3], *area[4:6])
    y0, x0 = max(top, tile.top), max(left, tile.left)
    y1, x1 = min(top + height, tile.top + tile.height), min(left + width, tile.left + tile.width)
    if y1 <= y0 or x1 <= x0:
        return None
    return y1 - y0, x1 - x0, y0 - tile.top, x0 - tile.left


def _crop_gligen(gligen: tuple, tile: Tile) -> tuple:
    """Move GLIGEN's boxes `(embedding, height, width, top, left)` into the tile; drop those outside."""
    kind, model, boxes = gligen
    moved = []
    for embedding, *area in boxes:
        inside = _crop_area(tuple(area), tile)
        if inside:
            moved.append((embedding, *inside))
    return kind, model, moved


def crop_control(control: Any, tile: Tile, shape: tuple[int, ...], cache: HintCache) -> Any:
    """Return a control object that shares the network and sees only the tile's part of the hint."""
    key = (id(control), tile)
    if key not in cache:
        cut = copy.copy(control)
        cut.cond_hint = None
        cut.cond_hint_original = _crop_hint(control, tile, shape)
        if control.extra_concat_orig:
            cut.extra_concat_orig = [_crop_pixels(x, tile, shape, 8) for x in control.extra_concat_orig]
            cut.extra_concat = None
        if control.previous_controlnet is not None:
            cut.previous_controlnet = crop_control(control.previous_controlnet, tile, shape, cache)
        cache[key] = cut
    return cache[key]


def _crop_hint(control: Any, tile: Tile, shape: tuple[int, ...]) -> Tensor | None:
    hint = control.cond_hint_original
    if hint is None:
        return None
    # A control that encodes its hint says one pixel per latent and counts the VAE's own reduction apart.
    scale = control.compression_ratio * (control.vae.spacial_compression_encode() if control.vae is not None else 1)
    height, width = shape[-2] * scale, shape[-1] * scale
    if tuple(hint.shape[-2:]) != (height, width):
        hint = comfy.utils.common_upscale(hint, width, height, control.upscale_algorithm, "center")
    return tile.cut(hint, scale)


def _crop_pixels(pixels: Tensor, tile: Tile, shape: tuple[int, ...], scale: int) -> Tensor:
    if pixels.shape[-1] == pixels.shape[-2] == 1:
        return pixels
    size = shape[-1] * scale, shape[-2] * scale
    return tile.cut(comfy.utils.common_upscale(pixels, *size, "bilinear", "center"), scale)
