"""Tile prompts as CONDITIONING: area lists for stock samplers, and per-tile texts for the tiled one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ..tudsr_core.tiling import TilePlan
from .host.conditions import crop_control
from .host.tile_texts import Conditioning, TilePromptsType, encode_texts, positive_texts
from .inputs import CATEGORY, float_input


def region_conditioning(
    plan: TilePlan, per_tile: Sequence[Conditioning], controls: Sequence[Any] | None
) -> Conditioning:
    """Return one entry per tile (and per entry of its CONDITIONING) that acts in the tile's box with weight 1.

    ComfyUI fades an area's border over 8 latents unless the entry has a mask; an all-ones mask
    makes overlapping boxes their plain mean, which is MultiDiffusion (Bar-Tal et al. 2023, eq. 5).
    """
    # One number seen as a plane, on the device it is used on: no copies, whatever the picture's size.
    device = comfy.model_management.get_torch_device()
    mask = torch.ones(1, 1, 1, device=device).expand(1, plan.height, plan.width)
    entries = []
    for tile in plan:
        for tensor, options in per_tile[tile.index]:
            box = {"area": (tile.height, tile.width, tile.top, tile.left), "strength": 1.0}
            box |= {"mask": mask, "mask_strength": 1.0, "set_area_to_bounds": False}
            if controls is not None:
                box |= {"control": controls[tile.index], "control_apply_to_uncond": False}
            entries.append([tensor, options | box])
    return entries


def spread(conditioning: Conditioning, count: int) -> list[Conditioning]:
    """Return a plain CONDITIONING once per tile; raises ValueError if it is empty or already bound to a place."""
    if not conditioning:
        raise ValueError("this negative CONDITIONING is empty; connect one from CLIP Text Encode, or none")
    for _, options in conditioning:
        if found := [key for key in ("area", "mask", "control", "gligen") if options.get(key) is not None]:
            raise ValueError(
                f"this negative CONDITIONING already has {found[0]!r}; connect a plain one from CLIP Text Encode, "
                "and give the ControlNet to this node"
            )
    return [conditioning] * count


class RegionConditioning(io.ComfyNode):
    """TILE_PROMPTS to positive and negative area lists for any stock sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRTilePromptsToConditioning",
            display_name="Tile Prompts to Conditioning",
            category=CATEGORY,
            description="Makes stock KSampler an exact regional MultiDiffusion: one positive and one negative entry "
            "per tile, each with its own ControlNet hint. Use the plain MODEL, without MultiDiffusion (Tiled); "
            "for videos, whose number of frames is not known here, give the prompts to MultiDiffusion (Tiled) instead.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of the sampled model."),
                prompts_input(),
                io.ControlNet.Input(
                    "control_net", optional=True, tooltip="A tile ControlNet; each tile gets its part of hint."
                ),
                io.Image.Input("hint", optional=True, tooltip="The ControlNet's picture: usually the enlarged input."),
                *control_widgets(),
                io.Vae.Input("vae", optional=True, tooltip="Only for ControlNets that encode their hint."),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="A negative to use instead of the prompts' own; it is repeated for every tile.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(
                    display_name="positive", tooltip="One entry per tile, for the sampler's positive."
                ),
                io.Conditioning.Output(
                    display_name="negative", tooltip="One entry per tile, for the sampler's negative."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        clip,
        tile_prompts,
        strength,
        start_percent,
        end_percent,
        control_net=None,
        hint=None,
        vae=None,
        negative=None,
    ) -> io.NodeOutput:
        plan = tile_prompts.plan
        positive = encode_texts(clip, positive_texts(clip, tile_prompts))
        if negative is None:
            refused = encode_texts(clip, [tile_prompts.style.negative]) * len(plan)
        else:
            refused = spread(negative, len(plan))
        controls = None
        if control_net is not None and strength:
            controls = tile_controls(plan, control_net, hint, strength, (start_percent, end_percent), vae)
        return io.NodeOutput(*(region_conditioning(plan, entries, controls) for entries in (positive, refused)))


def tile_controls(
    plan: TilePlan, control_net: Any, hint: Any, strength: float, span: tuple[float, float], vae: Any
) -> list[Any]:
    """Return a control object per tile that sees its part of `hint` (`1 H W 3`); they share one network."""
    if hint is None:
        raise ValueError("control_net needs its picture: connect hint, usually the enlarged input")
    control = control_net.copy().set_cond_hint(hint.movedim(-1, 1), strength, span, vae=vae)
    cache: dict = {}
    return [crop_control(control, tile, (1, 4, plan.height, plan.width), cache) for tile in plan]


def prompts_input() -> io.Input:
    """Return the TILE_PROMPTS socket."""
    return TilePromptsType.Input(
        "tile_prompts", tooltip="One prompt per tile, from Extract Tile Prompts or Tile Prompts from Strings."
    )


def control_widgets() -> list:
    """Return strength and range of the ControlNet."""
    return [
        float_input(
            "strength",
            1.0,
            "Strength of the ControlNet. Raise it to stay closer to hint; lower it for more invention.",
            most=10.0,
        ),
        float_input(
            "start_percent",
            0.0,
            "When the ControlNet starts. Raise it to leave the first, coarse steps free.",
            most=1.0,
        ),
        float_input(
            "end_percent", 1.0, "When the ControlNet ends. Lower it to leave the last, fine steps free.", most=1.0
        ),
    ]
