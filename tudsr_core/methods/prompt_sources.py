"""Where the prompts of a zoom's tiles come from: a prompter, the same words for all, or a file; and files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ..atomic_write import temporary_beside
from ..prompts import Style, TilePrompter, TilePrompts, cut_tiles, describe
from ..tiling import TilePlan
from ..untrusted import check_text, parse_json, read_text
from .networks import Tick
from .sampling import TilePair


class TiledPlan(Protocol):
    """A plan whose tiles are given prompts."""

    tiles: TilePlan


PromptSource = Callable[[Tensor, TiledPlan, "Tick | None"], list[TilePair]]
"""`source(image, plan, tick)`: one pair per tile for the source picture `1 3 H W`."""


def described(prompter: TilePrompter, style: Style) -> PromptSource:
    """Return a source that has every tile described by `prompter`, in the words of `style`."""

    def prompts(image: Tensor, plan: TiledPlan, tick: Tick | None) -> list[TilePair]:
        seen = cut_tiles(image[0], plan.tiles)
        found = describe(prompter, seen, lambda done, total: tick(done, total, None) if tick else None)
        prompter.release()
        tiles = TilePrompts(plan.tiles, tuple(found), style)
        return [(tiles.positive(index), style.negative) for index in range(len(plan.tiles))]

    return prompts


def fixed(text: str, style: Style) -> PromptSource:
    """Return a source that gives every tile the same words."""
    return lambda image, plan, tick: [(style.compose(text), style.negative)] * len(plan.tiles)


def from_file(path: Path, negative: str) -> PromptSource:
    """Return a source that takes every tile's prompt from a file as it stands, see `read_prompts`."""
    pairs = read_prompts(path, negative)

    def prompts(image: Tensor, plan: TiledPlan, tick: Tick | None) -> list[TilePair]:
        if len(pairs) != len(plan.tiles):
            raise ValueError(f"{path} has {len(pairs)} prompts, but the plan has {len(plan.tiles)} tiles")
        return pairs

    return prompts


def saved(source: PromptSource, path: Path) -> PromptSource:
    """Return `source`, whose prompts are also written to `path` before the long part begins."""

    def prompts(image: Tensor, plan: TiledPlan, tick: Tick | None) -> list[TilePair]:
        pairs = source(image, plan, tick)
        write_prompts(path, pairs)
        return pairs

    return prompts


def read_prompts(path: Path, negative: str) -> list[TilePair]:
    """Read one prompt per tile: a JSON list of texts or of [positive, negative], or a text file of lines.

    `negative` goes with entries that have none. Raises ValueError naming the file.
    """
    content = read_text(path)
    is_json = path.suffix.lower() == ".json"
    entries = parse_json(content, str(path)) if is_json else content.strip("\n").split("\n")
    pairs = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        pair = [entry, negative] if isinstance(entry, str) else entry
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f"{path}: entry {number} must be a text or a [positive, negative] pair in a list")
        pairs.append(tuple(check_text(text, f"{path}: entry {number}").strip() for text in pair))
    return pairs


def write_prompts(path: Path, prompts: Sequence[TilePair]) -> None:
    """Write prompts as the JSON that `read_prompts` reads, atomically."""
    with temporary_beside(path) as temporary:
        temporary.write_text(
            json.dumps([list(pair) for pair in prompts], indent=1, ensure_ascii=False), encoding="utf-8"
        )
