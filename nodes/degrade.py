"""Pictures made small and poor, as training does it or as a network has learned it, to try an upscaler on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from comfy_api.latest import io

from ..tudsr_core.models import downsampler_path, kind_of, load_downsampler
from ..tudsr_core.pictures import RECIPES, degrade, resize, sample_degradation
from ..tudsr_core.weights import CheckpointError
from .host.downsampler import ManagedDownsampler
from .host.model_files import find_weights, fingerprint, is_there, list_below, model_roots
from .images import rgb
from .inputs import CATEGORY, DownsamplerType, float_input, pixels_input, switch_input

SHIPPED = "shipped"


def _seed_input() -> io.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**31 - 1,
        control_after_generate=False,
        tooltip="Which damage is drawn; each picture of a batch gets the seed after the one before it.",
    )


def _enlarge_input() -> io.Input:
    return switch_input("enlarge", False, "Bring the result back to its old size with bicubic, for comparing.")


class DegradeImage(io.ComfyNode):
    """Real-ESRGAN's degradation of a picture, drawn from a seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRDegradeImage",
            display_name="Degrade Picture (Classical)",
            category=CATEGORY,
            description="Makes a picture small and poor as the training of upscalers does: blur, resizing, noise and "
            "JPEG, twice over (Real-ESRGAN). For trying an upscaler where the truth is known.",
            inputs=[
                io.Image.Input("image", tooltip="A good picture. Transparency is left out."),
                io.Combo.Input(
                    "recipe",
                    options=list(RECIPES),
                    default="omgsr",
                    tooltip="Published sets of ranges. real-esrgan: heavy damage, as OSEDiff and InvSR trained on. "
                    "omgsr: milder, as PiSA-SR and OMGSR did.",
                ),
                float_input(
                    "factor", 4.0, "How many times smaller. Above 4 larger blurs are drawn.", most=16.0, least=1.0
                ),
                _seed_input(),
                _enlarge_input(),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The degraded picture, in steps of 1/255."),
                io.String.Output(display_name="what", tooltip="What was done, a line for each picture."),
            ],
        )

    @classmethod
    def execute(cls, image, recipe, factor, seed, enlarge) -> io.NodeOutput:
        pixels = rgb(image)
        drawn = [
            sample_degradation(np.random.default_rng(seed + number), RECIPES[recipe], factor)
            for number in range(len(pixels))
        ]
        made = torch.cat([degrade(one[None], how) for one, how in zip(pixels, drawn, strict=True)])
        if enlarge:
            made = resize(made, tuple(pixels.shape[-2:])).clamp(0, 1)
        return io.NodeOutput(made.movedim(1, -1), "\n".join(how.describe() for how in drawn))


def list_downsamplers() -> list[str]:
    """Return the downsamplers' files below `models/tudsr`, known by what they say they are."""
    found = {
        file
        for root in model_roots()
        for file in list_below(root)
        if file.suffix == ".safetensors" and _is_downsampler(root / file)
    }
    return sorted(file.as_posix() for file in found)


def _is_downsampler(file: Path) -> bool:
    """Return whether a file is a downsampler that needs nothing else: adapters of SD2.1 are for the command line."""
    try:
        return kind_of(file) != "shared"
    except CheckpointError:
        return False


def _file_of(choice: str) -> Path:
    return downsampler_path() if choice == SHIPPED else find_weights(choice)


class LoadDownsampler(io.ComfyNode):
    """A file to a learned downsampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadDownsampler",
            display_name="Load Downsampler",
            category=CATEGORY,
            description="Loads a network that has learned how pictures get bad, from a folder of bad ones. Files are "
            "read without running any code in them.",
            inputs=[
                io.Combo.Input(
                    "downsampler",
                    options=[SHIPPED, *list_downsamplers()],
                    default=SHIPPED,
                    tooltip="The one that comes with this pack, or a file in models/tudsr that tudsr train downsampler "
                    "or tudsr train colearn has written.",
                )
            ],
            outputs=[
                DownsamplerType.Output(display_name="downsampler", tooltip="For Degrade Picture (Learned)."),
            ],
            is_experimental=True,
        )

    @classmethod
    def validate_inputs(cls, downsampler) -> bool | str:
        return downsampler == SHIPPED or is_there(downsampler)

    @classmethod
    def fingerprint_inputs(cls, downsampler) -> str:
        return fingerprint(_file_of(downsampler))

    @classmethod
    def execute(cls, downsampler) -> io.NodeOutput:
        return io.NodeOutput(ManagedDownsampler(load_downsampler(_file_of(downsampler))))


class DegradeLearned(io.ComfyNode):
    """A learned degradation of a picture, drawn from a seed or taken from a bad picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRDegradeLearned",
            display_name="Degrade Picture (Learned)",
            category=CATEGORY,
            description="Makes a picture small and poor as the pictures were that a downsampler has learned from. For "
            "test sets, training data and before-and-after pictures.",
            inputs=[
                io.Image.Input("image", tooltip="A good picture. Transparency is left out."),
                DownsamplerType.Input("downsampler", tooltip="From Load Downsampler."),
                float_input(
                    "factor",
                    4.0,
                    "How many times smaller. The damage is that of the small picture, whatever the factor; "
                    "networks are trained at 4.",
                    most=8.0,
                    least=1.0,
                ),
                _seed_input(),
                float_input("strength", 1.0, "0: the plain downscale; 1: as learned; above: more of it.", most=1.5),
                _enlarge_input(),
                pixels_input(
                    "tile",
                    256,
                    "Side of a tile in pixels of the small picture. The result does not depend on it; lower it "
                    "when memory runs out.",
                    step=8,
                    least=16,
                ),
                io.Image.Input(
                    "style",
                    optional=True,
                    tooltip="A bad picture whose kind of damage is taken. Without it the seed draws one.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The degraded picture.")],
            is_experimental=True,
        )

    @classmethod
    def execute(cls, image, downsampler, factor, seed, strength, enlarge, tile, style=None) -> io.NodeOutput:
        pixels = rgb(image)
        if style is not None and len(style) != 1:
            raise ValueError(f"{len(style)} pictures are connected to style; give one bad picture")
        made = downsampler.degrade(pixels, factor, seed, strength, None if style is None else rgb(style), tile)
        if enlarge:
            made = resize(made, tuple(pixels.shape[-2:])).clamp(0, 1)
        return io.NodeOutput(made.movedim(1, -1))
