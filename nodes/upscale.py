"""The upscalers: stage one, stage two, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..tudsr_core.methods import NEUTRAL, StageLimits, Target, TwoStageModel, UpscaleOptions, upscale
from ..tudsr_core.pictures import resize
from .host.networks import ProgressBar
from .host.result_cache import ResultCache
from .host.stages import build_stage, combine
from .inputs import (
    CATEGORY,
    DEFAULTS,
    float_input,
    inventive_input,
    later_inputs,
    long_edge_input,
    shared_inputs,
    source_inputs,
    stage_input,
    target_inputs,
    tile_prompt_inputs,
    timestep_input,
)

_results = ResultCache()

TILE_PROMPTS_SAY = (
    "A prompt per tile instead of the conditioning, for methods trained with tags (OSEDiff). "
    "Others ignore it and say so."
)


def outputs() -> list:
    """Return picture and mask."""
    return [
        io.Image.Output(display_name="image", tooltip="The enlarged pictures."),
        io.Mask.Output(
            display_name="mask", tooltip="Their transparency, enlarged; Join Image with Alpha puts it back."
        ),
    ]


def options_from(values: dict) -> UpscaleOptions:
    """Build the core's options from the shared widgets."""
    return UpscaleOptions(
        tile_px=values["tile"],
        overlap_px=values["overlap"],
        tile_batch=values["tile_batch"],
        window=values["window"],
        color_fix=values["color_fix"],
        sample_posterior=values["sample_posterior"],
        seed=values["seed"],
        published=values.get("published", DEFAULTS.published),
        native_size=values.get("native_size", DEFAULTS.native_size),
    )


def run(
    image: Tensor,
    mask: Tensor | None,
    model: TwoStageModel,
    target: Target,
    options: UpscaleOptions,
    given: Sequence[Any],
) -> io.NodeOutput:
    """Call the core on `B H W C` and an optional mask, return IMAGE and MASK.

    `given` are the objects that `model` was made of. The last result is returned again when all is as
    it was, but for a seed that draws nothing.
    """
    stages = [stage for stage in (model.first, model.second) if stage]
    facts = [(stage.name, stage.steps, stage.strength, [weight for weight, _ in stage.branches]) for stage in stages]
    values = target, options if model.draws(options) else replace(options, seed=0), model.limits, facts
    turned = dict.fromkeys(f"{stage.name}: {stage.dial}" for stage in stages if stage.dial)
    said = ui.PreviewText("\n".join(turned)) if turned else None
    if made := _results.find(image, (mask, *given), values):
        return io.NodeOutput(*made, ui=said)
    pixels = image.movedim(-1, 1).float()
    if mask is not None and pixels.shape[1] == 3:
        pixels = torch.cat([pixels, 1 - _fit_mask(mask, pixels)], 1)
    result = upscale(pixels, model, target, options, ProgressBar(model.first.networks.model)).movedim(1, -1)
    alpha = 1 - result[..., 3] if result.shape[-1] == 4 else torch.zeros(result.shape[:3])
    made = result[..., :3], alpha
    _results.keep(image, (mask, *given), values, made)
    return io.NodeOutput(*made, ui=said)


def _fit_mask(mask: Tensor, pixels: Tensor) -> Tensor:
    """Return `B 1 H W`; Load Image gives an empty 64 x 64 mask for pictures without alpha."""
    size = tuple(pixels.shape[-2:])
    if mask.ndim < 2 or 0 in mask.shape:
        raise ValueError(f"this mask is empty: shape {tuple(mask.shape)}; disconnect it or connect another")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(mask) not in (1, len(pixels)):
        raise ValueError(f"{len(pixels)} pictures but {len(mask)} masks; give one mask or one for each picture")
    if tuple(mask.shape[-2:]) != size:
        mask = resize(mask, size).clamp(0, 1)
    return mask.expand(len(pixels), -1, -1, -1)


def target_from(scale: float, width: int, height: int, long_edge: int = 0) -> Target:
    """Return the target: sizes above 0 win over the factor."""
    if width or height or long_edge:
        return Target(width=width or None, height=height or None, long_edge=long_edge or None)
    return Target(scale=scale)


class Upscale(io.ComfyNode):
    """Both stages, any factor or size."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRUpscale",
            display_name="TUDSR Upscale",
            category=CATEGORY,
            description="Enlarges pictures in two one-step diffusion stages (x8 = 4 x 2). Any factor, any size, "
            "any number of pictures; transparency is kept.",
            inputs=[
                *source_inputs("One or more pictures.", "stage_one", "one"),
                *target_inputs(),
                *shared_inputs(),
                stage_input("stage_two", "two", " Needed above x3 or x4.", optional=True),
                *tile_prompt_inputs(TILE_PROMPTS_SAY),
                *later_inputs(),
                long_edge_input(),
                inventive_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        image,
        stage_one,
        vae,
        conditioning,
        scale,
        width,
        height,
        stage_two=None,
        mask=None,
        tile_prompts=None,
        clip=None,
        long_edge=0,
        inventive=NEUTRAL,
        **options,
    ) -> io.NodeOutput:
        first = build_stage(stage_one, vae, conditioning, 1, 0, tile_prompts, clip, inventive)
        second = None
        if stage_two is not None:
            second = build_stage(stage_two, vae, conditioning, 2, 0, inventive=inventive)
        target = target_from(scale, width, height, long_edge)
        given = stage_one, stage_two, vae, conditioning, tile_prompts, clip
        return run(image, mask, combine(first, second), target, options_from(options), given)


def _single(image, stage, factor, mask, options, given) -> io.NodeOutput:
    alone = combine(stage, None, StageLimits(first_max=factor, single_up_to=factor))
    return run(image, mask, alone, Target(scale=factor), options_from(options), given)


class StageOne(io.ComfyNode):
    """Stage one alone: enlarge by M, one step at t = 200."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRStageOne",
            display_name="TUDSR Stage One",
            category=CATEGORY,
            description="The first stage: bicubic enlargement and one diffusion step at a large timestep.",
            inputs=[
                *source_inputs("One or more pictures.", "model", "one"),
                float_input("factor", 4.0, "Factor M of this stage; 2 to 4 as trained.", most=8.0, least=1.0),
                timestep_input(200),
                *shared_inputs(),
                *tile_prompt_inputs(TILE_PROMPTS_SAY),
                *later_inputs(),
                inventive_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls,
        image,
        model,
        vae,
        conditioning,
        factor,
        timestep,
        mask=None,
        tile_prompts=None,
        clip=None,
        inventive=NEUTRAL,
        **options,
    ) -> io.NodeOutput:
        stage = build_stage(model, vae, conditioning, 1, timestep, tile_prompts, clip, inventive)
        return _single(image, stage, factor, mask, options, (model, vae, conditioning, tile_prompts, clip))


class StageTwo(io.ComfyNode):
    """Stage two alone, on stage one's output: enlarge by N, one step at t = 50."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRStageTwo",
            display_name="TUDSR Stage Two",
            category=CATEGORY,
            description="The second stage: enlarges stage one's result once more, with one small diffusion step. "
            "It is trained on stage one's pictures and does little on others.",
            inputs=[
                *source_inputs("The result of TUDSR Stage One (colour fix none).", "model", "two"),
                float_input("factor", 2.0, "Factor N; 2 as trained.", most=4.0, least=1.0),
                timestep_input(50),
                *shared_inputs(),
                *later_inputs(),
                inventive_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls, image, model, vae, conditioning, factor, timestep, mask=None, inventive=NEUTRAL, **options
    ) -> io.NodeOutput:
        stage = build_stage(model, vae, conditioning, 2, timestep, inventive=inventive)
        return _single(image, stage, factor, mask, options, (model, vae, conditioning))
