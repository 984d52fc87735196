"""Who describes tiles: a fixed text, somebody else's strings, CLIP's similarity to a tag list, a tagger.

Networks come in as functions or small protocols, so that ComfyUI's and diffusers' both fit;
captioning models of transformers are in `captions.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..assets import asset_path
from ..untrusted import MAX_TEXT, check_text, flat, read_text
from .tile_prompts import CountProgress, TilePrompt, content_key

MAX_TAGS, MAX_TAG = 20_000, 200
TAGS_PATH = asset_path("tags.txt")


class StaticPrompter:
    """The same words for every tile."""

    def __init__(self, text: str = "") -> None:
        self.text = text

    def describe(self, tiles: Sequence[Tensor], tick: CountProgress) -> list[TilePrompt]:
        """Return the text once per tile."""
        return [TilePrompt(self.text)] * len(tiles)

    def fingerprint(self) -> str:
        """Return the text."""
        return f"static {self.text}"

    def release(self) -> None:
        """Hold nothing."""


def prompts_from_strings(values: Any, count: int) -> list[TilePrompt]:
    """Return `count` prompts from what captioners give: a list, nested lists, or one text of lines.

    A single text is used for all tiles. Raises ValueError if the number of texts is neither 1 nor `count`.
    """
    texts = _flatten(values)
    if len(texts) == 1:
        texts = texts[0].strip("\n").split("\n")
    if len(texts) == 1:
        texts *= count
    if len(texts) != count:
        raise ValueError(
            f"{len(texts)} texts for {count} tiles; give one per tile in reading order (a list, or one line each), "
            "or a single one for all"
        )
    return [TilePrompt(", ".join(text.split("\n")).strip()) for text in texts]


def _flatten(values: Any) -> list[str]:
    texts = flat(values, "the list of the tiles' texts")
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"expected texts, got {type(text).__name__}; connect a captioner's text output")
    if (size := sum(map(len, texts))) > MAX_TEXT:
        raise ValueError(f"the tiles' texts have {size:,} characters, the limit is {MAX_TEXT:,}; shorten them")
    return texts


class Tagger(Protocol):
    """A network that names what it sees, such as DAPE."""

    def tags(self, images: Tensor) -> list[str]:
        """Return "tag, tag" for each of `B 3 H W` in 0..1."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of weights and settings."""
        ...

    def release(self) -> None:
        """Give device memory back."""
        ...


class TaggerPrompter:
    """Tags of a trained tagger, tile by tile.

    A host that manages memory itself gives `load`, called before the first tile; the weights are
    then its to take away.
    """

    def __init__(self, tagger: Tagger, load: Callable[[], None] | None = None) -> None:
        self.tagger, self.load = tagger, load

    def describe(self, tiles: Sequence[Tensor], tick: CountProgress) -> list[TilePrompt]:
        """Return the tagger's tags of each tile."""
        if self.load:
            self.load()
        prompts = []
        for number, tile in enumerate(tiles, 1):
            prompts.append(TilePrompt(self.tagger.tags(tile[None].float())[0]))
            tick(number, len(tiles))
        return prompts

    def fingerprint(self) -> str:
        """Return the tagger's."""
        return f"tagger {self.tagger.fingerprint()}"

    def release(self) -> None:
        """Give the tagger's memory back, if it is ours to give."""
        if not self.load:
            self.tagger.release()


@dataclass(frozen=True)
class TagChoice:
    """How many tags a tile gets from similarities.

    `specific` (0..1) is how much of what the other tiles have in common is taken off a tile's
    similarity; `least` is the standard score over the list that a tag must reach.
    """

    count: int = 8
    least: float = 2.0
    specific: float = 0.5


def choose_tags(images: Tensor, tags: Tensor, names: Sequence[str], choice: TagChoice) -> list[TilePrompt]:
    """Return for each of `N D` image embeddings its best of `T D` tag embeddings, best first.

    Similarity is the cosine. From it, `choice.specific` times the mean similarity of the other
    tiles to that tag is taken off, so that words for the whole picture do not win everywhere; what
    is left becomes a standard score over the tags. A tile where no tag stands out gets none.
    """
    images, tags = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (images, tags))
    similarity = images @ tags.T
    if len(images) > 1:
        others = (similarity.sum(0, keepdim=True) - similarity) / (len(images) - 1)
        similarity = similarity - choice.specific * others
    spread = similarity.std(1, keepdim=True, correction=0).clamp(min=1e-12)
    scores = (similarity - similarity.mean(1, keepdim=True)) / spread
    prompts = []
    for row in scores:
        best = row.topk(min(choice.count, len(names)))
        kept = [(names[i], s) for s, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        kept = [(name, round(score, 3)) for name, score in kept if score >= choice.least]
        prompts.append(TilePrompt(", ".join(name for name, _ in kept), tuple(kept)))
    return prompts


class ClipTagPrompter:
    """Zero-shot tags: the words of a list that CLIP finds closest to each tile.

    `embed_images(tiles, tick)` gives `N D`; `embed_tags()` gives `T D` for `names`, once.
    """

    def __init__(
        self,
        names: Sequence[str],
        embed_images: Callable[[Sequence[Tensor], CountProgress], Tensor],
        embed_tags: Callable[[], Tensor],
        weights: str,
        choice: TagChoice | None = None,
    ) -> None:
        self.names, self.embed_images, self.embed_tags = tuple(names), embed_images, embed_tags
        self.weights, self.choice = weights, choice or TagChoice()

    def describe(self, tiles: Sequence[Tensor], tick: CountProgress) -> list[TilePrompt]:
        """Return the tags of all tiles, which are scored against each other.

        Raises ValueError if pictures and words do not live in the same space.
        """
        words, images = self.embed_tags(), self.embed_images(tiles, tick)
        if words.shape[-1] != images.shape[-1]:
            raise ValueError(
                f"this CLIP embeds words in {words.shape[-1]} numbers and this CLIP_VISION pictures in "
                f"{images.shape[-1]}; they must be two halves of one CLIP: CLIP-ViT-H-14 (laion2B) with SD2.x's text "
                "encoder (1024), or CLIP-ViT-bigG-14 with SDXL's (1280)"
            )
        return choose_tags(images, words, self.names, self.choice)

    def fingerprint(self) -> str:
        """Return a hash of weights, list and choice."""
        return content_key("clip", self.weights, repr(self.choice), *self.names)

    def release(self) -> None:
        """Hold nothing: the models belong to the caller."""


def check_tag_space(words: Tensor) -> Tensor:
    """Return tag embeddings `T D` if they can tell words apart, else raise ValueError.

    A text encoder whose file lacks the projection or its last layer gives zeros, NaN or one
    direction for everything.
    """
    directions = torch.nn.functional.normalize(words.double(), dim=-1)
    if not torch.isfinite(words).all() or float((directions - directions.mean(0)).norm(dim=-1).mean()) < 1e-3:
        raise ValueError(
            "this CLIP gives the same embedding for every word: its file has no text projection or lacks the last "
            "layer. Use the text encoder of the original SD2.1 checkpoint (not a diffusers one) with CLIP-ViT-H-14, "
            "or SDXL's with CLIP-ViT-bigG-14"
        )
    return words


def read_tags(path: Path = TAGS_PATH) -> list[str]:
    """Return a tag list, one per line, `#` lines left out; raises ValueError if it is empty or no text."""
    lines = read_text(path, limit=MAX_TEXT).splitlines()
    tags = list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not tags:
        raise ValueError(f"{path} holds no tags; write one per line")
    return check_tags(tags, str(path))


def check_tags(tags: list[str], where: str) -> list[str]:
    """Return a list of tags if it is no longer than CLIP can be asked for; raises ValueError naming `where`."""
    if len(tags) > MAX_TAGS:
        raise ValueError(f"{where} has {len(tags):,} tags, the limit is {MAX_TAGS:,}; shorten it")
    for tag in tags:
        check_text(tag, f"a tag of {where}", MAX_TAG)
    return tags
