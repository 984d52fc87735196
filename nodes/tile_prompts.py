"""Tile prompts: extracted by a prompter or taken from strings, edited in the browser or as text."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..tudsr_core.pictures import resize
from ..tudsr_core.prompts import (
    Edits,
    StaticPrompter,
    Style,
    TilePrompt,
    TilePrompts,
    content_key,
    cut_tiles,
    describe,
    picture_mark,
    prompts_from_strings,
    read_edits,
    write_header,
)
from ..tudsr_core.tiling import TilePlan
from .host.tile_texts import TilePromptsType
from .inputs import CATEGORY, PrompterType, context_input, plan_input
from .tile_plan import one_picture

STYLE = Style()
PICTURE_SIDE = 1024
KEPT = 8
_described: OrderedDict[str, list[TilePrompt]] = OrderedDict()


def described(prompter: Any, image: Tensor, plan: TilePlan, context: float) -> list[TilePrompt]:
    """Return the prompter's description of every tile; the last few are kept, so that edits cost nothing."""
    key = content_key(prompter.fingerprint(), repr(plan), repr(context), image)
    if key not in _described:
        bar = None

        def tick(done: int, total: int) -> None:
            nonlocal bar
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar = bar or comfy.utils.ProgressBar(total)
            bar.update_absolute(done, total)

        try:
            _described[key] = describe(prompter, cut_tiles(image, plan, context), tick)
        finally:
            prompter.release()
        while len(_described) > KEPT:
            _described.popitem(last=False)
    _described.move_to_end(key)
    return _described[key]


def style_inputs() -> list:
    """Return the words that all tiles share."""
    return [
        io.String.Input(
            "prefix",
            default=STYLE.prefix,
            tooltip="Words before every tile's own. Add what is true everywhere (a style, a season); leave it empty "
            "to let tiles speak for themselves.",
        ),
        io.String.Input(
            "suffix",
            default=STYLE.suffix,
            tooltip="Quality words after every tile's own; never cut off. Add some for crisper, lower their number "
            "for calmer pictures.",
        ),
        io.String.Input(
            "negative",
            default=STYLE.negative,
            tooltip="The negative prompt of every tile. Add what you see too much of; leave it empty for none.",
        ),
    ]


def edits_input() -> io.String.Input:
    """Return the text in which edits are saved; the editor writes it."""
    return io.String.Input(
        "edits",
        default="",
        multiline=True,
        tooltip="Your changes, one line per tile: `3: text` replaces, `3+ text` adds, `3-` clears. The editor "
        "writes them; without it, type them. Remove a line to get the extracted text back.",
    )


def prompts_outputs() -> list:
    """Return TILE_PROMPTS and the descriptions."""
    return [
        TilePromptsType.Output(
            display_name="tile_prompts",
            tooltip="For MultiDiffusion (Tiled), TUDSR Upscale or Tile Prompts to Conditioning.",
        ),
        io.String.Output(
            display_name="texts", is_output_list=True, tooltip="What each tile says, in reading order, after edits."
        ),
    ]


def finish(
    plan: TilePlan, found: list[TilePrompt], style: Style, edits: str, image: Tensor | None, cls: Any
) -> io.NodeOutput:
    """Apply the edits that still fit and tell the editor everything it draws."""
    mark = picture_mark(image) if image is not None else None
    fitted = read_edits(edits).fit(plan, mark)
    plain = TilePrompts(plan, tuple(found), style)
    prompts = fitted.apply(plain)
    facts = {
        "picture": _save_picture(image, cls),
        "aspect": plan.width / plan.height if image is None else image.shape[-1] / image.shape[-2],
        "boxes": [
            [
                round(value, 5)
                for value in (
                    tile.left / plan.width,
                    tile.top / plan.height,
                    (tile.left + tile.width) / plan.width,
                    (tile.top + tile.height) / plan.height,
                )
            ]
            for tile in plan
        ],
        "found": [prompt.text for prompt in found],
        "prompts": [prompts.positive(index) for index in range(len(plan))],
        "header": write_header(plan, mark),
        "edits": Edits(fitted.by_tile).write(),
    }
    texts = [prompt.text for prompt in prompts.prompts]
    return io.NodeOutput(prompts, texts, ui={"tudsr_tiles": [facts]})


def _save_picture(image: Tensor | None, cls: Any) -> dict | None:
    """Save a small copy among ComfyUI's temporary files; returns what its `/view` wants."""
    if image is None:
        return None
    zoom = min(1.0, PICTURE_SIDE / max(image.shape[-2:]))
    size = tuple(max(1, round(side * zoom)) for side in image.shape[-2:])
    small = resize(image[None], size).clamp(0, 1).movedim(1, -1).to(torch.float32).cpu()
    return dict(ui.PreviewImage(small, cls=cls).as_dict()["images"][0])


class ExtractTilePrompts(io.ComfyNode):
    """Picture, plan and prompter to one prompt per tile."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRExtractTilePrompts",
            display_name="Extract Tile Prompts",
            category=CATEGORY,
            description="Describes every tile of the picture and shows the result over it: point at a tile to read "
            "its prompt, click to change it. Changes are saved in the workflow.",
            inputs=[
                io.Image.Input("image", tooltip="The picture, small or enlarged."),
                plan_input(),
                *style_inputs(),
                context_input(),
                edits_input(),
                PrompterType.Input(
                    "prompter",
                    optional=True,
                    tooltip="Who describes: CLIP Tag Prompter, Load DAPE or Load Captioner. Without one, tiles start "
                    "empty and you write what matters.",
                ),
            ],
            outputs=prompts_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, plan, prefix, suffix, negative, context, edits, prompter=None) -> io.NodeOutput:
        picture = one_picture(image, "Extract Tile Prompts")
        found = described(prompter or StaticPrompter(), picture, plan, context)
        return finish(plan, found, Style(prefix, suffix, negative), edits, picture, cls)


class TilePromptsFromStrings(io.ComfyNode):
    """Texts of any captioner to one prompt per tile."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRTilePromptsFromStrings",
            display_name="Tile Prompts from Strings",
            category=CATEGORY,
            description="Takes one text per tile from any captioning node (a list, a list in a list, or one text "
            "with a line per tile), or one text for all.",
            is_input_list=True,
            inputs=[
                io.String.Input(
                    "strings",
                    multiline=True,
                    default="",
                    tooltip="One text per tile in reading order, or a single one for all tiles.",
                ),
                plan_input(),
                *style_inputs(),
                edits_input(),
                io.Image.Input("image", optional=True, tooltip="The picture, to be shown under the editor's grid."),
            ],
            outputs=prompts_outputs(),
            is_output_node=True,
        )

    @classmethod
    def execute(cls, strings, plan, prefix, suffix, negative, edits, image=None) -> io.NodeOutput:
        picture = one_picture(image[0], "Tile Prompts from Strings") if image else None
        found = prompts_from_strings(strings, len(plan[0]))
        return finish(plan[0], found, Style(prefix[0], suffix[0], negative[0]), edits[0], picture, cls)
