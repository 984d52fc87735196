"""Pictures made small and poor, as training does it: to try an upscaler on a picture whose truth is known."""

from __future__ import annotations

import numpy as np
import torch
from comfy_api.latest import io

from ..tudsr_core.pictures import RECIPES, degrade, resize, sample_degradation
from .images import rgb
from .inputs import CATEGORY, float_input, switch_input


class DegradeImage(io.ComfyNode):
    """Real-ESRGAN's degradation of a picture, drawn from a seed."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRDegradeImage",
            display_name="Degrade Image",
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
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Which damage is drawn; each picture of a batch gets the seed after the one before it.",
                ),
                switch_input("enlarge", False, "Bring the result back to its old size with bicubic, for comparing."),
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
