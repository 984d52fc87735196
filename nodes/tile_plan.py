"""One tile plan for prompts, hints and sampling, and the pictures of its tiles."""

from __future__ import annotations

import torch
from comfy_api.latest import io, ui

from ..tudsr_core.methods import MAX_FACTOR, MAX_PIXELS
from ..tudsr_core.pictures import resize
from ..tudsr_core.prompts import cut_tiles
from ..tudsr_core.tiling import TilePlan, fit_overlap, plan_tiles
from .host.networks import pixels_per_latent
from .images import rgb
from .inputs import (
    CATEGORY,
    TilePlanType,
    context_input,
    float_input,
    pixels_input,
    plan_input,
    sampling_tile_inputs,
    side_input,
)
from .plan import draw_tiles


def one_picture(image: torch.Tensor, node: str) -> torch.Tensor:
    """Return `3 H W` of an IMAGE; raises ValueError if it holds several."""
    pixels = rgb(image)
    if len(pixels) != 1:
        raise ValueError(f"{node} takes one picture, got {len(pixels)}; run it once per picture")
    return pixels[0]


def latent_size(image, latent, scale: float, width: int, height: int, unit: int) -> tuple[int, int]:
    """Return rows and columns of the latent (of `unit` pixels) to be sampled; raises ValueError if nothing says."""
    if latent is not None:
        return tuple(latent["samples"].shape[-2:])
    if image is None and not (width and height):
        raise ValueError("Tile Plan needs a size: connect image or latent, or set width and height")
    if image is not None:
        if not 0 < scale <= MAX_FACTOR:
            raise ValueError(f"scale {scale:g} is not possible; use a factor up to {MAX_FACTOR:g}")
        width, height = width or round(image.shape[2] * scale), height or round(image.shape[1] * scale)
    if min(width, height) < unit:
        raise ValueError(f"{width} x {height} is smaller than one latent ({unit} px)")
    if width * height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} has more than {MAX_PIXELS:,} pixels; plan a smaller picture")
    return height // unit, width // unit


def tell(plan: TilePlan, steps: int, unit: int) -> str:
    """Return size, tiles and network calls in words; `unit`: pixels per latent."""
    calls = len(plan) * steps
    return "\n".join(
        (
            tell_tiles(plan, unit),
            f"{steps} steps: {calls:,} tile calls, each for the positive and the negative prompt: "
            f"{2 * calls:,} network calls (half of them with CFG 1)",
            f"overlap costs {len(plan) * plan.tile_height * plan.tile_width / (plan.height * plan.width):.2f} "
            "times the untiled work",
        )
    )


def tell_tiles(plan: TilePlan, unit: int) -> str:
    """Return size and tiles in words."""
    height, width = plan.height * unit, plan.width * unit
    side = f"{plan.tile_width * unit} x {plan.tile_height * unit}"
    return f"{width} x {height} px: {len(plan.lefts)} x {len(plan.tops)} = {len(plan)} tiles of {side} px"


def _size_inputs() -> list[io.Input]:
    """How large the sampled picture is, where nothing connected says so."""
    return [
        float_input(
            "scale",
            1.0,
            "Size to be sampled, relative to image. Set it to the enlargement if image is the "
            "small picture; leave it at 1 if image is already enlarged. Not used with a latent.",
            most=64.0,
            least=0.125,
        ),
        side_input("width", "Width in pixels instead; 0: from image or latent."),
        side_input("height", "Height in pixels instead; 0: from image or latent."),
    ]


def _counting_inputs() -> list[io.Input]:
    """Where tiles lie, and how often each is computed."""
    return [
        io.Combo.Input(
            "spacing",
            options=["even", "stride"],
            default="even",
            tooltip="even spreads the tiles evenly; stride puts them at every tile - overlap with the last "
            "one flush, as the published scripts do. Choose stride to reproduce those.",
        ),
        io.Int.Input(
            "steps",
            default=50,
            min=1,
            max=10000,
            tooltip="Steps of the sampler, only to count calls. Lower it, or raise the tile, if the count "
            "frightens you.",
        ),
    ]


def _source_inputs() -> list[io.Input]:
    """What says how large the sampled picture is."""
    return [
        io.Image.Input("image", optional=True, tooltip="The picture: small (then set scale) or enlarged."),
        io.Latent.Input("latent", optional=True, tooltip="The latent to be sampled; its size wins over all."),
        io.Model.Input(
            "model",
            optional=True,
            tooltip="The model that will sample. Connect it where a latent is not 8 pixels wide: the embedded "
            "model (4), Flux.2 and Wan 2.2 (16), HunyuanImage (32).",
        ),
    ]


class PlanTiles(io.ComfyNode):
    """Where the tiles lie: one plan for prompts, hints, latents and pixels."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRTilePlan",
            display_name="Tile Plan",
            category=CATEGORY,
            description="Lays overlapping tiles over the picture to be sampled, and says how many calls that costs. "
            "One plan gives the boxes for prompts, ControlNet hints and sampling.",
            inputs=[*_size_inputs(), *sampling_tile_inputs(), *_counting_inputs(), *_source_inputs()],
            outputs=[
                TilePlanType.Output(display_name="plan", tooltip="The tiles, for all nodes about this picture."),
                io.Image.Output(display_name="grid", tooltip="The picture with its numbered tiles."),
                io.String.Output(display_name="text", tooltip="The plan in words, as this node shows it."),
                io.Int.Output(
                    display_name="calls",
                    tooltip="Tile calls: tiles times steps. With a negative prompt each is two network calls.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, scale, width, height, tile, overlap, spacing, steps, image=None, latent=None, model=None
    ) -> io.NodeOutput:
        overlap = fit_overlap(tile, overlap)
        unit = pixels_per_latent(model)
        rows, columns = latent_size(image, latent, scale, width, height, unit)
        plan = plan_tiles(rows, columns, tile // unit, overlap // unit, spacing=spacing)
        text, size = tell(plan, steps, unit), (rows * unit, columns * unit)
        picture = torch.full((1, 3, 64, 64), 0.25) if image is None else rgb(image)[:1]
        grid = draw_tiles(picture, plan, size, unit)
        return io.NodeOutput(plan, grid, text, len(plan) * steps, ui=ui.PreviewText(text))


class TileImages(io.ComfyNode):
    """What each tile shows, for any captioner."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRTileImages",
            display_name="Tile Images",
            category=CATEGORY,
            description="Cuts the picture into the plan's tiles, in reading order, for any captioning or tagging "
            "node. Give its texts to Tile Prompts from Strings.",
            inputs=[
                io.Image.Input("image", tooltip="The picture, small or enlarged."),
                plan_input(),
                context_input(),
                pixels_input(
                    "side",
                    0,
                    "Resize the tiles to this longer side in pixels; 0: as they are. Raise it (384, 512) for "
                    "captioners that see little in small pictures; lower it if they are slow.",
                    step=8,
                ),
            ],
            outputs=[
                io.Image.Output(display_name="batch", tooltip="All tiles in one batch."),
                io.Image.Output(
                    display_name="list", is_output_list=True, tooltip="One by one, for nodes that take one picture."
                ),
            ],
        )

    @classmethod
    def execute(cls, image, plan, context, side) -> io.NodeOutput:
        cuts = cut_tiles(one_picture(image, "Tile Images"), plan, context)
        height, width = (max(cut.shape[axis] for cut in cuts) for axis in (-2, -1))
        if side:
            zoom = side / max(height, width)
            height, width = max(1, round(height * zoom)), max(1, round(width * zoom))
        same = [cut if cut.shape[-2:] == (height, width) else resize(cut[None], (height, width))[0] for cut in cuts]
        batch = torch.stack(same).clamp(0, 1).movedim(1, -1)
        return io.NodeOutput(batch, list(batch.split(1)))
