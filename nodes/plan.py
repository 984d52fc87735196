"""The plan of an upscale, as text and as a numbered grid, before anything runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..tudsr_core.methods import NEUTRAL, UpscalePlan, plan_for
from ..tudsr_core.pictures import resize
from ..tudsr_core.tiling import TilePlan
from .host.stages import build_stage, combine
from .images import rgb
from .inputs import (
    CATEGORY,
    DEFAULTS,
    TilePlanType,
    inventive_input,
    later_inputs,
    long_edge_input,
    stage_input,
    target_inputs,
    tile_inputs,
)
from .upscale import target_from


class Plan(io.ComfyNode):
    """What an upscale will do, before it runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tile, overlap, tile_batch, _ = tile_inputs()
        return io.Schema(
            node_id="TUDSRPlan",
            display_name="TUDSR Plan",
            category=CATEGORY,
            description="Shows stages, sizes, tiles, network calls and memory of an upscale, as text and as a "
            "numbered grid over the picture. Nothing is computed.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to be enlarged."),
                stage_input("stage_one", "one"),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                *target_inputs(),
                tile,
                overlap,
                tile_batch,
                *later_inputs(),
                long_edge_input(),
                inventive_input(),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="The picture with the last stage's tiles."),
                io.String.Output(display_name="text", tooltip="The plan in words, as this node shows it."),
                io.Int.Output(display_name="calls", tooltip="Number of network evaluations for one picture."),
                TilePlanType.Output(
                    display_name="plan", tooltip="The last stage's tiles, for Compare Pictures to look for seams."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        image,
        stage_one,
        vae,
        scale,
        width,
        height,
        tile,
        overlap,
        tile_batch,
        published=DEFAULTS.published,
        native_size=DEFAULTS.native_size,
        long_edge=0,
        inventive=NEUTRAL,
    ) -> io.NodeOutput:
        stage = build_stage(stage_one, vae, None, 1, 0, inventive=inventive)
        tiles = {"tile_px": tile, "overlap_px": overlap, "tile_batch": tile_batch}
        options = replace(DEFAULTS, **tiles, published=published, native_size=native_size)
        model = combine(stage, stage)
        pixels = rgb(image)
        plan = plan_for(model, tuple(pixels.shape[-2:]), target_from(scale, width, height, long_edge), options)
        text = "\n".join(plan.describe())
        tiles = plan.stages[-1].tiles
        return io.NodeOutput(draw_grid(pixels[:1], plan), text, plan.calls, tiles, ui=ui.PreviewText(text))


def draw_grid(image: Tensor, plan: UpscalePlan) -> Tensor:
    """Return the picture `1 3 H W` as `1 h w 3` with the last stage's tiles outlined and numbered."""
    part = plan.stages[-1]
    return draw_tiles(image, part.tiles, part.size, part.padded[0] / part.tiles.height)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size, and ComfyUI takes any Pillow
        return ImageFont.load_default()


def draw_tiles(image: Tensor, tiles: TilePlan, wanted: tuple[int, int], unit: float, longest: int = 1024) -> Tensor:
    """Return `1 3 H W` as `1 h w 3` of at most `longest`, with numbered tiles of `unit` pixels of size `wanted`."""
    zoom = min(1.0, longest / max(wanted))
    size = tuple(max(1, round(side * zoom)) for side in wanted)
    pixels = resize(image, size).clamp(0, 1)
    picture = Image.fromarray((pixels[0].movedim(0, -1) * 255).round().byte().numpy())
    draw = ImageDraw.Draw(picture, "RGBA")
    font = _font(max(10, round(24 * zoom * tiles.tile_width * unit / 512)))
    for tile in tiles:
        box = [value * unit * zoom for value in (tile.left, tile.top, tile.left + tile.width, tile.top + tile.height)]
        hue = (255, 190, 60) if (tile.index // len(tiles.lefts) + tile.index) % 2 else (90, 200, 255)
        inset = [box[0] + 2, box[1] + 2, min(box[2], size[1]) - 3, min(box[3], size[0]) - 3]
        if inset[2] > inset[0] and inset[3] > inset[1]:
            draw.rectangle(inset, outline=(*hue, 230), width=2, fill=(*hue, 22))
            center = (inset[0] + inset[2]) / 2, (inset[1] + inset[3]) / 2
            draw.text(
                center, str(tile.index + 1), fill=(255, 255, 255), font=font, anchor="mm", stroke_width=2, stroke_fill=0
            )
    return torch.from_numpy(np.array(picture))[None].float() / 255
