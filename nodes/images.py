"""Pictures as nodes get them, and the colour fix."""

from __future__ import annotations

import comfy.model_management
from comfy_api.latest import io
from torch import Tensor

from ..tudsr_core.methods import UpscaleOptions, check_image
from ..tudsr_core.pictures import COLOR_FIXES, match_color, resize
from .inputs import CATEGORY


def rgb(image: Tensor) -> Tensor:
    """Return `B 3 H W`, float, of an IMAGE `B H W C`; raises ValueError unless it is RGB or RGBA, finite, and some."""
    pixels = image.movedim(-1, 1)
    check_image(pixels)
    return pixels[:, :3].float()


class ColorFix(io.ComfyNode):
    """Give a picture the colours of its source."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRColorFix",
            display_name="Colour Fix",
            category=CATEGORY,
            description="Gives an upscaled picture the colours of the picture it came from; works in float.",
            inputs=[
                io.Image.Input("image", tooltip="The upscaled picture."),
                io.Image.Input("source", tooltip="The picture before upscaling; it is resized to fit."),
                io.Combo.Input(
                    "method",
                    options=list(COLOR_FIXES),
                    default=UpscaleOptions().color_fix,
                    tooltip="wavelet: keep detail, take all low frequencies from the source (safest). "
                    "adain: match mean and contrast of red, green and blue. lab: match those of lightness and of "
                    "the two colour axes of CIELAB, so that contrast moves no hue. none: only clamp.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The picture in its source's colours.")],
        )

    @classmethod
    def execute(cls, image, source, method) -> io.NodeOutput:
        if len(source) not in (1, len(image)):
            raise ValueError(f"{len(image)} pictures but {len(source)} sources; give one source or one for each")
        pixels = rgb(image)
        wanted = rgb(source).expand(len(pixels), -1, -1, -1)
        wanted = resize(wanted, tuple(pixels.shape[-2:]))
        fixed = match_color(pixels, wanted, method, comfy.model_management.get_torch_device())
        return io.NodeOutput(fixed.movedim(1, -1))
