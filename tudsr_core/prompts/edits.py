"""Edits of tile prompts as plain text: what a person changed, and where it still fits.

One line per edited tile, numbered from 1 in reading order:

    5: a red brick wall        says this instead
    6+ ivy                     says this too
    7-                         says nothing (the shared words remain)

A line `# grid ...` (the first of them) remembers the grid and the picture, so that edits find their
places again after the tiles have changed, and stay away from another picture. Without it numbers
mean the current grid; other lines with # are remarks. A later line of the same tile acts on what the
earlier one made: `2: a` and `2+ b` say "a, b".

The editor in the browser reads the same text, so the rule is exact: lines end at LF, CR LF or CR and
nothing else, a byte order mark before the first is ignored, blanks are space, tab, U+00A0 and U+3000,
digits are 0 to 9. `tests/edits_cases.json` holds both to it.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..tiling import Tile, TilePlan
from ..untrusted import MAX_TEXT, check_text, shown
from .tile_prompts import TilePrompts, split_words, unique

log = logging.getLogger(__name__)

Kind = Literal["replace", "add", "clear"]
SIGNS: dict[str, Kind] = {":": "replace", "+": "add", "-": "clear"}
MAX_LINES = 5_000
SAME_REGION = 0.5  # intersection over union from which an edit fits another grid's tile
SAME_PICTURE = 8  # of 64 brightness bits that may differ
BLANKS = " \t\u00a0\u3000"
LINE_ENDS = re.compile(r"\r\n|\n|\r")
HEADER = re.compile(
    r"# grid (\d{1,9})x(\d{1,9}), tile (\d{1,9})x(\d{1,9}), rows (\d{1,9}(?: \d{1,9})*), "
    r"columns (\d{1,9}(?: \d{1,9})*)(?:, picture ([0-9a-f]{16}))?",
    re.ASCII,
)
LINE = re.compile(rf"(\d{{1,9}})[{BLANKS}]*([:+-])(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Edit:
    """What a person wants of one tile."""

    kind: Kind
    text: str = ""

    def __post_init__(self) -> None:
        check_text(self.text, "the edit of a tile")

    def apply(self, text: str) -> str:
        """Return the description after the edit."""
        if self.kind == "clear":
            return ""
        if self.kind == "replace":
            return self.text
        return ", ".join(unique([*split_words(text), *split_words(self.text)]))

    def then(self, later: Edit) -> Edit:
        """Return the one edit that does this and then `later`."""
        if later.kind != "add":
            return later
        return Edit("add" if self.kind == "add" else "replace", later.apply(self.text))


@dataclass(frozen=True)
class Edits:
    """Edits by tile index, and the grid and picture they were made on, if known."""

    by_tile: dict[int, Edit]
    plan: TilePlan | None = None
    picture: str | None = None

    def fit(self, plan: TilePlan, picture: str | None = None) -> Edits:
        """Return the edits that still fit, numbered for `plan`.

        An edit fits the tile that covers the same part of the picture (intersection over union of
        at least a half); none fits another picture.
        Raises ValueError for a tile number that does not exist. The time this takes grows with the
        number of edits, whatever grid their first line declares.
        """
        grid = self.plan or plan
        for index in self.by_tile:
            if not 0 <= index < len(grid):
                raise ValueError(f"the edits speak of tile {index + 1}, but there are {len(grid)} tiles")
        if self.picture and picture and _different_bits(self.picture, picture) > SAME_PICTURE:
            log.info("%d tile edits belong to another picture and are left out", len(self.by_tile))
            return Edits({}, plan, picture)
        fitting: dict[int, tuple[float, Edit]] = {}
        for index, edit in self.by_tile.items():
            tile = grid.tile(index)
            target = plan.nearest(tile, grid)
            share = _shared(tile, grid, plan.tile(target), plan)
            if share >= SAME_REGION and share > fitting.get(target, (0.0, edit))[0]:
                fitting[target] = share, edit
        if lost := len(self.by_tile) - len(fitting):
            log.info("%d tile edits fit no tile of the new grid and are left out", lost)
        return Edits({index: edit for index, (_, edit) in sorted(fitting.items())}, plan, picture)

    def apply(self, prompts: TilePrompts) -> TilePrompts:
        """Return the prompts with these edits, which must have been fitted to their plan."""
        texts = [prompt.text for prompt in prompts.prompts]
        for index, edit in self.by_tile.items():
            texts[index] = edit.apply(texts[index])
        return prompts.with_texts(texts)

    def write(self) -> str:
        """Return the text that `read_edits` reads."""
        lines = [write_header(self.plan, self.picture)] if self.plan else []
        signs = {kind: sign for sign, kind in SIGNS.items()}
        for index, edit in sorted(self.by_tile.items()):
            text = re.sub(rf"[{BLANKS}\r\n]+", " ", edit.text)
            lines.append(f"{index + 1}{signs[edit.kind]} {text.strip(BLANKS)}".rstrip(BLANKS))
        return "\n".join(lines)


def write_header(plan: TilePlan, picture: str | None) -> str:
    """Return the first line that remembers grid and picture."""
    rows, columns = (" ".join(map(str, offsets)) for offsets in (plan.tops, plan.lefts))
    grid = f"{plan.height}x{plan.width}, tile {plan.tile_height}x{plan.tile_width}, rows {rows}, columns {columns}"
    return f"# grid {grid}" + (f", picture {picture}" if picture else "")


def read_edits(text: str) -> Edits:
    """Return the edits written in `text`; raises ValueError naming a line that cannot be read."""
    plan, picture, by_tile = None, None, {}
    lines = LINE_ENDS.split(check_text(text, "the edits", MAX_TEXT).removeprefix("\ufeff"))
    if len(lines) > MAX_LINES:
        raise ValueError(f"the edits have {len(lines):,} lines, the limit is {MAX_LINES:,}; shorten them")
    for number, line in enumerate(lines, 1):
        line = line.strip(BLANKS)
        if header := HEADER.fullmatch(line):
            if plan is None:
                plan, picture = _read_plan(header), header[7]
        elif line and not line.startswith("#"):
            index, edit = _read_line(number, line)
            by_tile[index] = by_tile[index].then(edit) if index in by_tile else edit
    return Edits(by_tile, plan, picture)


def _read_line(number: int, line: str) -> tuple[int, Edit]:
    match = LINE.fullmatch(line)
    text = match[3].strip(BLANKS) if match else ""
    if match is None or (match[2] == "-") == bool(text):
        raise ValueError(f"line {number} of the edits, '{shown(line)}': write `3: text`, `3+ text` or `3-`")
    return int(match[1]) - 1, Edit(SIGNS[match[2]], text)


def _read_plan(header: re.Match) -> TilePlan:
    height, width, tile_height, tile_width = (int(header[i]) for i in range(1, 5))
    rows, columns = (tuple(map(int, header[i].split())) for i in (5, 6))
    if not (_covers(rows, tile_height, height) and _covers(columns, tile_width, width)):
        raise ValueError(f"the first line of the edits describes no grid: {shown(header[0])}; delete it")
    return TilePlan(height, width, tile_height, tile_width, 0, rows, columns)


def _covers(offsets: tuple[int, ...], side: int, length: int) -> bool:
    """Whether tiles of `side` at these offsets cover a length from end to end, in order."""
    steps = [after - before for before, after in pairwise(offsets)]
    return offsets[0] == 0 and 0 < side == length - offsets[-1] and all(0 < step <= side for step in steps)


def _shared(one: Tile, one_plan: TilePlan, other: Tile, other_plan: TilePlan) -> float:
    """Return intersection over union of two tiles of the same picture on different grids."""

    def box(tile: Tile, plan: TilePlan) -> tuple[float, float, float, float]:
        y, x = 1 / plan.height, 1 / plan.width
        return tile.top * y, (tile.top + tile.height) * y, tile.left * x, (tile.left + tile.width) * x

    (t0, b0, l0, r0), (t1, b1, l1, r1) = box(one, one_plan), box(other, other_plan)
    inner = max(0.0, min(b0, b1) - max(t0, t1)) * max(0.0, min(r0, r1) - max(l0, l1))
    return inner / ((b0 - t0) * (r0 - l0) + (b1 - t1) * (r1 - l1) - inner)


def _different_bits(one: str, other: str) -> int:
    return (int(one, 16) ^ int(other, 16)).bit_count()
