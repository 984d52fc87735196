"""Tile prompts: what each tile shows, and the text a model is given for it.

`TilePrompts` pairs one TilePlan with one description per tile and a shared style (prefix, suffix,
negative). Who describes is in `prompters.py`, what a person changed is in `edits.py`; nothing here
knows a network.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ..pictures import luma
from ..tiling import TilePlan
from ..untrusted import check_text

TOKENS = 75  # CLIP's 77 less start and end
FLAT_STD = 0.02  # luminance, 0..1: below it a tile is sky, wall or blur

Fits = Callable[[str], bool]
CountProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class TilePrompt:
    """What one tile shows: comma-separated words, and the scores behind them if there are any.

    Raises ValueError for a text that is far longer than any prompt, as `Style` does.
    """

    text: str = ""
    tags: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        check_text(self.text, "a tile's prompt")


class TilePrompter(Protocol):
    """Describes tiles; a pure function of the pixels, which never fails on an empty-looking tile."""

    def describe(self, tiles: Sequence[Tensor], tick: CountProgress) -> list[TilePrompt]:
        """Return one prompt per tile `3 h w` in 0..1, in the same order; calls `tick(done, total)`."""
        ...

    def fingerprint(self) -> str:
        """Return a text that changes whenever the descriptions could."""
        ...

    def release(self) -> None:
        """Give device memory back."""
        ...


@dataclass(frozen=True)
class Style:
    """What all tiles share: words before and after the description, and the negative prompt.

    The defaults are those of SeeSR and "Zoomed In, Diffused Out".
    """

    prefix: str = ""
    suffix: str = "clean, high-resolution, 8k"
    negative: str = "dotted, noise, blur, lowres, smooth"

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            check_text(text, f"the {name} of the tile prompts")

    def compose(self, text: str, fits: Fits | None = None) -> str:
        """Return `prefix, text, suffix` without repeated words, cut so that `fits` agrees.

        Prefix and suffix come first in the budget: only the description is shortened, from its
        end. (Upstream appends the quality words and lets CLIP cut exactly those.) Without `fits`
        the length is estimated.
        """
        fits = fits or estimate_fits
        prefix, words, suffix = split_words(self.prefix), split_words(text), split_words(self.suffix)
        shared = {word.lower() for word in (*prefix, *suffix)}
        words = [word for word in words if word.lower() not in shared]

        def whole(words: Sequence[str]) -> str:
            return ", ".join(unique([*prefix, *words, *suffix]))

        # A lone sentence is shortened word by word, a list of tags tag by tag.
        kept = _most(words, lambda words: fits(whole(words)))
        if words and not kept:
            parts = _most(words[0].split(), lambda parts: fits(whole([" ".join(parts)])))
            kept = [" ".join(parts)] if parts else []
        return whole(kept)


def _most(parts: list[str], good: Callable[[list[str]], bool]) -> list[str]:
    """Return as many of the first `parts` as are good together, found in few trials."""
    counts = range(1, len(parts) + 1)
    return parts[: bisect_left(counts, True, key=lambda count: not good(parts[:count]))]


@dataclass(frozen=True)
class TilePrompts:
    """One description per tile of `plan`, in reading order, and the style they share.

    Raises ValueError if the number of descriptions is not the number of tiles.
    """

    plan: TilePlan
    prompts: tuple[TilePrompt, ...]
    style: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.plan):
            raise ValueError(
                f"{len(self.prompts)} prompts for {len(self.plan)} tiles; give one prompt per tile, in reading order"
            )

    def positive(self, index: int, fits: Fits | None = None) -> str:
        """Return the whole prompt of tile `index`."""
        return self.style.compose(self.prompts[index].text, fits)

    def with_texts(self, texts: Sequence[str]) -> TilePrompts:
        """Return the same tiles with other descriptions; unchanged ones keep their scores."""
        pairs = zip(self.prompts, texts, strict=True)
        return replace(self, prompts=tuple(old if old.text == new else TilePrompt(new) for old, new in pairs))


def cut_tiles(image: Tensor, plan: TilePlan, context: float = 0.0) -> list[Tensor]:
    """Return what each tile shows in `3 H W`, a picture of any size; `context` widens by that part of a side."""
    height, width = image.shape[-2:]
    cuts = []
    for tile in plan:
        top, bottom, left, right = plan.region(tile, (height, width))
        rows, columns = _widen(top, bottom, height, context), _widen(left, right, width, context)
        cuts.append(image[..., rows, columns])
    return cuts


def _widen(start: int, end: int, length: int, context: float) -> slice:
    """Return the range with `context` of itself on both sides, moved rather than cut at the picture's border."""
    more = round((end - start) * context)
    wanted = min(length, end - start + 2 * more)
    first = min(max(0, start - more), length - wanted)
    return slice(first, first + wanted)


def describe(
    prompter: TilePrompter,
    tiles: Sequence[Tensor],
    tick: CountProgress = lambda done, total: None,
    flat_std: float = FLAT_STD,
) -> list[TilePrompt]:
    """Return the prompter's descriptions of `tiles`; flat ones (sky, bokeh) get an empty one without a look.

    An empty description leaves the style's words alone: naming nothing is what keeps guidance from
    painting the main object into the background.
    """
    seen = [index for index, tile in enumerate(tiles) if not is_flat(tile, flat_std)]
    found = prompter.describe([tiles[index] for index in seen], tick) if seen else []
    if len(found) != len(seen):
        raise ValueError(f"the prompter described {len(found)} of {len(seen)} tiles")
    prompts = [TilePrompt()] * len(tiles)
    for index, prompt in zip(seen, found, strict=True):
        prompts[index] = replace(prompt, text=", ".join(unique(split_words(prompt.text))))
    return prompts


def is_flat(tile: Tensor, limit: float = FLAT_STD) -> bool:
    """Return whether the luminance of `3 h w` in 0..1 varies by less than `limit` (standard deviation)."""
    return float(luma(tile[None].float()).std(correction=0)) < limit


def split_words(text: str) -> list[str]:
    """Return the comma- or newline-separated parts, trimmed, none empty."""
    return [part for part in (" ".join(part.split()) for part in re.split(r"[,\n]", text)) if part]


def unique(words: Sequence[str]) -> list[str]:
    """Return the words in order, repetitions (whatever their case) left out."""
    known: dict[str, str] = {}
    for word in words:
        known.setdefault(word.lower(), word)
    return list(known.values())


def estimate_fits(text: str) -> bool:
    """Estimate whether `text` is within CLIP's 77 tokens; a tokenizer knows it exactly.

    One token per punctuation mark and one per started six letters, which over a whole prompt is
    more than CLIP's vocabulary needs for common words.
    """
    pieces = re.findall(r"[^\W_]+|[^\w\s]|_", text)
    return sum(1 + (len(piece) - 1) // 6 for piece in pieces) <= TOKENS


def picture_mark(image: Tensor) -> str:
    """Return 16 hexadecimal digits that say which of 8 x 8 cells of `3 H W` are brighter than the mean."""
    cells = torch.nn.functional.adaptive_avg_pool2d(image.float().mean(0, keepdim=True)[None], 8).flatten()
    bits = (cells > cells.mean()).tolist()
    return f"{sum(bit << place for place, bit in enumerate(reversed(bits))):016x}"


def content_key(*parts: str | Tensor) -> str:
    """Return a hash of texts and of tensors' exact content, for caches."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part.detach().cpu().contiguous().numpy().tobytes()
        digest.update(f"{len(data)} {getattr(part, 'shape', '')} ".encode() + data)
    return digest.hexdigest()
