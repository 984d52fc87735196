"""Tile prompts through a CLIP, and per-tile texts inside the tiled sampler.

Which condition belongs to which tile, and rows for a batch of tiles; the plan and the texts are the core's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ...tudsr_core.prompts import TilePrompts
from ...tudsr_core.tiling import Tile, TilePlan

TilePromptsType = io.Custom("TILE_PROMPTS")
Conditioning = list
MARK = "tudsr_tile_text"
TEXT_KEYS = ("cross_attn", "uuid", "pooled_output")


def fits(clip: Any, text: str) -> bool:
    """Return whether the CLIP's tokenizer puts `text` into one window (77 tokens), so that nothing is split off."""
    return all(len(windows) <= 1 for windows in clip.tokenize(text).values() if isinstance(windows, list))


def encode_texts(clip: Any, texts: Sequence[str]) -> list[Conditioning]:
    """Return a CONDITIONING per text; equal texts are encoded once and share it."""
    if clip is None:
        raise ValueError("tile prompts need the text encoder: connect the checkpoint's CLIP")
    distinct = list(dict.fromkeys(texts))
    bar, known = comfy.utils.ProgressBar(len(distinct)), {}
    for text in distinct:
        comfy.model_management.throw_exception_if_processing_interrupted()
        known[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text), show_pbar=False)
        bar.update(1)
    return [known[text] for text in texts]


def positive_texts(clip: Any, prompts: TilePrompts) -> list[str]:
    """Return each tile's whole prompt, cut to one window of this CLIP."""
    return [prompts.positive(index, lambda text: fits(clip, text)) for index in range(len(prompts.plan))]


class TileTexts:
    """Encoded prompts of all tiles; equal texts share one encoding.

    At the start of a run every entry of the sampler's positive becomes one entry per distinct
    text, so that the model itself makes its conditions of each. At every step the entries of the
    tiles at hand are picked and put together row by row.
    """

    def __init__(self, clip: Any, prompts: TilePrompts) -> None:
        self.plan: TilePlan = prompts.plan
        texts = positive_texts(clip, prompts)
        known = list(dict.fromkeys(texts))
        self.of_tile = [known.index(text) for text in texts]
        self.lists = {"positive": encode_texts(clip, known)}
        if prompts.style.negative.strip():
            self.lists["negative"] = encode_texts(clip, [prompts.style.negative])

    def check(self, x: Tensor) -> None:
        """Raise ValueError if the latent `x` is not what the plan was made for."""
        wanted = self.plan.height, self.plan.width
        if tuple(x.shape[-2:]) != wanted:
            raise ValueError(
                f"the tile prompts are for a latent of {wanted[1]} x {wanted[0]}, but the sampled one is "
                f"{tuple(x.shape)}; make Tile Plan of the same size, best by connecting the latent to it"
            )

    def planned(self, tile: Tile, size: Sequence[int]) -> Tile:
        """Return the tile of the plan that shares most with `tile` of a latent of `size` (height, width)."""
        index = self.plan.nearest(tile, replace(self.plan, height=size[0], width=size[1]))
        return self.plan.tile(index)

    def expand(self, conds: dict[str, list[dict]]) -> dict[str, list[dict]]:
        """Return the sampler's conditions with the tiles' texts in place of positive and negative."""
        return {
            name: [
                made
                for entry in entries
                for number, encoded in enumerate(self.lists[name])
                for made in _with_text(entry, encoded, number if name == "positive" else None)
            ]
            if name in self.lists
            else entries
            for name, entries in conds.items()
        }

    def pick(self, entries: list[dict], tile: Tile) -> list[dict]:
        """Return the entries for a tile of the plan; those without a tile's text (the negative) serve all tiles."""
        return [entry for entry in entries if entry.get(MARK) in (None, self.of_tile[tile.index])]


def _with_text(entry: dict, encoded: list, number: int | None) -> list[dict]:
    others = {key: value for key, value in entry.items() if key not in TEXT_KEYS}
    # What else the model is given, such as StableSR's picture, stays with the place, not with the words.
    others["model_conds"] = {key: value for key, value in entry["model_conds"].items() if key != "c_crossattn"}
    made = []
    for tensor, options in encoded:
        # Hooks must be registered before the run starts, so only the sampler's own may act.
        mine = {key: value for key, value in options.items() if key != "hooks"}
        made.append([tensor, others | mine | {MARK: number}])
    return comfy.sampler_helpers.convert_cond(made)
