"""The upscalers: stage one, stage two, and both together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..tudsr_core.methods import StageLimits, Target, TwoStageModel, UpscaleOptions, upscale
from ..tudsr_core.pictures import COLOR_FIXES, resize
from .host.kept import Kept
from .host.networks import ProgressBar
from .host.stages import build_stage, combine
from .host.tile_texts import TilePromptsType
from .inputs import CATEGORY, DEFAULTS, tile_inputs

_kept = Kept()

MODEL_TIP = "MODEL of stage {}: from Load Embedded TUDSR Model, or SD2.1-base through Load TUDSR Adapter."


def shared_inputs() -> list:
    """Return the options that all upscalers have, after their own inputs."""
    return [
        *tile_inputs(),
        io.Combo.Input(
            "color_fix",
            options=list(COLOR_FIXES),
            default=DEFAULTS.color_fix,
            tooltip="How colours follow the input. wavelet is safest; none shows the bare model.",
        ),
        io.Boolean.Input(
            "sample_posterior",
            default=DEFAULTS.sample_posterior,
            tooltip="Draw the latent at random, as the papers' scripts do, instead of taking its mode. "
            "Only VAEs with a posterior (SD) change; leave it off for repeatable pictures.",
        ),
        io.Int.Input(
            "seed",
            default=DEFAULTS.seed,
            min=0,
            max=2**31 - 1,
            control_after_generate=False,
            tooltip="Seed of what is drawn at random: the latent, or InvSR's noise. Without either, the picture "
            "does not depend on the seed, and another seed computes nothing anew.",
        ),
        io.Mask.Input(
            "mask", optional=True, tooltip="Transparency of the picture, as Load Image gives it; comes out enlarged."
        ),
    ]


def published_input() -> io.Boolean.Input:
    """Return the switch to the method's own tiles; the last widget, so that saved workflows keep their places."""
    return io.Boolean.Input(
        "published",
        default=DEFAULTS.published,
        optional=True,
        tooltip="Tiles exactly as the method's own script has them: OMGSR and TUDSR 512 px that overlap by 256, "
        "OSEDiff and PiSA-SR 768 by 256, with its places and weights; tile, overlap and window are then not used. "
        "Turn it on to reproduce a paper's picture.",
    )


def native_size_input() -> io.Boolean.Input:
    """Return the switch for small pictures; after every older widget, so that saved workflows keep their places."""
    return io.Boolean.Input(
        "native_size",
        default=DEFAULTS.native_size,
        optional=True,
        tooltip="Enlarge a small picture first, so that SD2.1 works at the 512 px it was trained on (InvSR: mirror its "
        "borders), and shrink the result to the size you asked for, as the methods' own scripts do. The embedded model "
        "needs none. Off: faster, and worse on pictures below 128 px at x4.",
    )


def timestep_input(trained: int) -> io.Int.Input:
    """Return the timestep widget; 0 means the adapter's own."""
    return io.Int.Input(
        "timestep",
        default=0,
        min=0,
        max=999,
        tooltip=f"Timestep of the one step. 0: as the adapter says, else {trained} (TUDSR). "
        "Change it only for adapters trained at another one (OMGSR: 273), and set it for a checkpoint that an adapter "
        "is merged into.",
    )


def vae_input() -> io.Vae.Input:
    """Return the autoencoder that all stages share."""
    return io.Vae.Input(
        "vae", tooltip="The VAE of the model. Each stage sees it with the changes of its own adapter, if it has any."
    )


def conditioning_input() -> io.Conditioning.Input:
    """Return the text input that every stage needs."""
    return io.Conditioning.Input(
        "conditioning", tooltip="The prompt the adapter was trained with; for TUDSR and OMGSR the empty prompt."
    )


def tile_prompt_inputs() -> list:
    """Return the prompts of the tiles and the CLIP that encodes them."""
    return [
        TilePromptsType.Input(
            "tile_prompts",
            optional=True,
            tooltip="A prompt per tile instead of the conditioning, for methods trained with tags (OSEDiff). "
            "Others ignore it and say so.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="The model's text encoder; needed with tile_prompts."),
    ]


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
    stages = [(stage.name, stage.steps) for stage in (model.first, model.second) if stage]
    values = target, options if model.draws(options) else replace(options, seed=0), model.limits, stages
    if made := _kept.find(image, (mask, *given), values):
        return io.NodeOutput(*made)
    pixels = image.movedim(-1, 1).float()
    if mask is not None and pixels.shape[1] == 3:
        pixels = torch.cat([pixels, 1 - _fit_mask(mask, pixels)], 1)
    result = upscale(pixels, model, target, options, ProgressBar(model.first.networks.model)).movedim(1, -1)
    alpha = 1 - result[..., 3] if result.shape[-1] == 4 else torch.zeros(result.shape[:3])
    made = result[..., :3], alpha
    _kept.keep(image, (mask, *given), values, made)
    return io.NodeOutput(*made)


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


def target_inputs() -> list:
    """Return factor, width and height."""
    return [
        io.Float.Input(
            "scale", default=4.0, min=1.0, max=64.0, step=0.01, tooltip="Enlarge by this factor; any number works."
        ),
        io.Int.Input("width", default=0, min=0, max=65536, tooltip="Enlarge to this width instead; 0: use the scale."),
        io.Int.Input(
            "height", default=0, min=0, max=65536, tooltip="Enlarge to this height instead; 0: use the scale."
        ),
    ]


def long_edge_input() -> io.Int.Input:
    """Return the last of the target's inputs: optional and behind all others, so that older workflows still fit."""
    return io.Int.Input(
        "long_edge",
        default=0,
        min=0,
        max=65536,
        optional=True,
        tooltip="Enlarge until the longer side has this length instead; 0: use the scale, width or height.",
    )


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
                io.Image.Input("image", tooltip="One or more pictures."),
                io.Model.Input("stage_one", tooltip=MODEL_TIP.format("one")),
                vae_input(),
                conditioning_input(),
                *target_inputs(),
                *shared_inputs(),
                io.Model.Input("stage_two", optional=True, tooltip=MODEL_TIP.format("two") + " Needed above x3 or x4."),
                *tile_prompt_inputs(),
                published_input(),
                native_size_input(),
                long_edge_input(),
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
        **options,
    ) -> io.NodeOutput:
        first = build_stage(stage_one, vae, conditioning, 1, 0, tile_prompts, clip)
        second = build_stage(stage_two, vae, conditioning, 2, 0) if stage_two is not None else None
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
                io.Image.Input("image", tooltip="One or more pictures."),
                io.Model.Input("model", tooltip=MODEL_TIP.format("one")),
                vae_input(),
                conditioning_input(),
                io.Float.Input(
                    "factor",
                    default=4.0,
                    min=1.0,
                    max=8.0,
                    step=0.01,
                    tooltip="Factor M of this stage; 2 to 4 as trained.",
                ),
                timestep_input(200),
                *shared_inputs(),
                *tile_prompt_inputs(),
                published_input(),
                native_size_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls, image, model, vae, conditioning, factor, timestep, mask=None, tile_prompts=None, clip=None, **options
    ) -> io.NodeOutput:
        stage = build_stage(model, vae, conditioning, 1, timestep, tile_prompts, clip)
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
                io.Image.Input("image", tooltip="The result of TUDSR Stage One (colour fix none)."),
                io.Model.Input("model", tooltip=MODEL_TIP.format("two")),
                vae_input(),
                conditioning_input(),
                io.Float.Input("factor", default=2.0, min=1.0, max=4.0, step=0.01, tooltip="Factor N; 2 as trained."),
                timestep_input(50),
                *shared_inputs(),
                published_input(),
                native_size_input(),
            ],
            outputs=outputs(),
        )

    @classmethod
    def execute(cls, image, model, vae, conditioning, factor, timestep, mask=None, **options) -> io.NodeOutput:
        stage = build_stage(model, vae, conditioning, 2, timestep)
        return _single(image, stage, factor, mask, options, (model, vae, conditioning))
