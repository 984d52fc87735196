"""The recipe of "Zoomed In, Diffused Out": enlarge once, then sample with MultiDiffusion and a prompt per tile.

No training and no adapter: any Stable Diffusion 2.x serves. One TilePlan addresses the pixels that
are described and the latents that are sampled. The loop itself is in `sampling.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .color import ColorFix, match_color
from .files import temporary_beside
from .image import join_alpha, pad_to_multiple, resize, split_alpha
from .networks import Tick
from .pipeline import Progress, check_image
from .plan import Target
from .prompts import Style, TilePrompter, TilePrompts, cut_tiles, describe
from .sampling import SampleOptions, TextNetworks, TilePair, count_calls, draw, noised, sample
from .stage_tiles import NetworkFacts, Size, check_tiles, fit_overlap
from .tiles import Spacing, TilePlan, plan_tiles
from .untrusted import check_text, parse_json, read_text

PromptSource = Callable[[Tensor, "ZoomPlan", "Tick | None"], list[TilePair]]
"""`source(image, plan, tick)`: one pair per tile for the source picture `1 3 H W`."""

Start = Literal["picture", "noise"]


@dataclass(frozen=True)
class ZoomOptions:
    """How to run; `start` is the noised low-resolution latent ("picture") or pure noise.

    `spacing` of the tiles is as in `plan_tiles`.
    """

    tile_px: int = 512
    overlap_px: int = 256
    start: Start = "picture"
    color_fix: ColorFix = "adain"
    seed: int = 0
    sample: SampleOptions = field(default_factory=SampleOptions)
    spacing: Spacing = "even"

    def __post_init__(self) -> None:
        object.__setattr__(self, "overlap_px", fit_overlap(self.tile_px, self.overlap_px))
        if self.start not in ("picture", "noise"):
            raise ValueError(f"start is {self.start!r}; use 'picture' or 'noise'")
        if self.start == "noise" and self.sample.strength < 1:
            raise ValueError("a start from noise needs the whole chain; set strength to 1 or start from the picture")


@dataclass(frozen=True)
class ZoomPlan:
    """What a run will do with one picture: sizes, tiles, and UNet evaluations."""

    source: Size
    size: Size
    padded: Size
    tiles: TilePlan
    calls: int
    options: ZoomOptions

    def describe(self) -> list[str]:
        """Return the plan as lines of plain text."""
        scale, tiles, sampling = self.padded[0] // self.tiles.height, self.tiles, self.options.sample
        side = f"{tiles.tile_width * scale} x {tiles.tile_height * scale}"
        grid = f"{len(tiles)} tiles ({len(tiles.lefts)} x {len(tiles.tops)}) of {side}"
        run, whole = sampling.steps_run, sampling.steps
        steps = f"{run} of {whole}" if run < whole else run
        both = ", each with its positive and its negative prompt" if sampling.passes == 2 else ""
        return [
            f"{self.source[1]} x {self.source[0]} to {self.size[1]} x {self.size[0]}, {self.calls} network calls",
            f"{grid}, {steps} steps{both}",
        ]


def plan_zoom(source: Size, target: Target, facts: NetworkFacts, options: ZoomOptions) -> ZoomPlan:
    """Plan the enlargement of one picture of `source = (height, width)`; raises ValueError as `plan_upscale` does."""
    size = target.size_for(source)
    check_tiles(options.tile_px, options.overlap_px, options.sample.tile_batch, facts)
    padded = tuple(-(-side // facts.multiple) * facts.multiple for side in size)
    scale = facts.latent_scale
    tiles = plan_tiles(
        padded[0] // scale,
        padded[1] // scale,
        options.tile_px // scale,
        options.overlap_px // scale,
        multiple=facts.multiple // scale,
        spacing=options.spacing,
    )
    return ZoomPlan(source, size, padded, tiles, count_calls(tiles, options.sample), options)


@torch.inference_mode()
def zoom(
    image: Tensor, networks: TextNetworks, plan: ZoomPlan, prompts: Sequence[TilePair], tick: Tick | None = None
) -> Tensor:
    """Enlarge `B C H W` (C = 3 or 4, float, 0..1) as planned and return `B C H' W'`, float32, 0..1.

    `prompts` are one pair per tile in reading order. Raises ValueError for wrong shapes, sizes,
    non-finite values or a wrong number of prompts, MemoryError if a tile does not fit.
    """
    check_image(image)
    if tuple(image.shape[-2:]) != plan.source:
        height, width = image.shape[-2:]
        raise ValueError(f"the plan is for {plan.source[1]} x {plan.source[0]}, the picture is {width} x {height}")
    color, alpha = split_alpha(image.float())
    options, per_picture = plan.options, networks.vae_calls(plan.padded) + plan.calls
    progress = Progress(tick, len(color) * per_picture)
    results = []
    for number, picture in enumerate(color.split(1)):
        enlarged = resize(picture, plan.size).clamp(0, 1)
        try:
            made = _zoom_one(enlarged, networks, plan, prompts, options.seed + number, progress)
        except RuntimeError as error:
            if not networks.is_out_of_memory(error):
                raise
            raise MemoryError(
                f"out of memory with {options.sample.tile_batch} tiles of {options.tile_px} px at once; "
                "lower the tile batch, then the tile"
            ) from error
        results.append(match_color(made, enlarged, options.color_fix))
    return join_alpha(torch.cat(results), alpha)


def _zoom_one(
    enlarged: Tensor,
    networks: TextNetworks,
    plan: ZoomPlan,
    prompts: Sequence[TilePair],
    seed: int,
    progress: Progress,
) -> Tensor:
    options = plan.options
    padded, padding = pad_to_multiple(enlarged, networks.facts.multiple)
    noise = torch.Generator().manual_seed(seed)
    z = networks.encode(padded, None, progress.advance).float()
    z = noised(z, noise, options.sample) if options.start == "picture" else draw(z, noise)
    z = sample(z, networks, plan.tiles, prompts, noise, options.sample, progress.advance)
    decoded = networks.decode(z, progress.advance).float()
    if not torch.isfinite(decoded).all():
        raise ValueError("the decoder produced NaN or infinite pixels; run it in float32 (tudsr: --dtype fp32)")
    return padding.crop(decoded).clamp(0, 1)


def described(prompter: TilePrompter, style: Style) -> PromptSource:
    """Return a source that has every tile described by `prompter`, in the words of `style`."""

    def prompts(image: Tensor, plan: ZoomPlan, tick: Tick | None) -> list[TilePair]:
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

    def prompts(image: Tensor, plan: ZoomPlan, tick: Tick | None) -> list[TilePair]:
        if len(pairs) != len(plan.tiles):
            raise ValueError(f"{path} has {len(pairs)} prompts, but the plan has {len(plan.tiles)} tiles")
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
