"""Exact tiled VAE encode and decode as nodes: the untiled result with the memory of a tile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from ..tudsr_core.vae import VAETiling
from .host.exact_vae import ExactVAE
from .images import rgb
from .inputs import CATEGORY, pixels_input

DEFAULTS = VAETiling()


def tiling_inputs() -> list:
    """Return the inputs of both nodes, after the picture and the VAE."""
    return [
        pixels_input(
            "tile",
            DEFAULTS.tile_px,
            "Side of a tile in pixels. The result does not depend on it: lower it when memory runs out, "
            "raise it on a large GPU.",
            step=64,
            least=64,
        ),
        io.Combo.Input(
            "planes",
            options=["auto", "host", "device"],
            default=DEFAULTS.planes,
            tooltip="Where activations wait between passes. device is faster, host needs no more GPU memory than a "
            "tile; auto takes the device when they fit there.",
        ),
        io.Combo.Input(
            "attention",
            options=["exact", "windowed"],
            default=DEFAULTS.attention,
            tooltip="exact: the same picture as without tiles. windowed: NOT exact, but much faster on pictures "
            "above about 4096 x 4096, whose global attention takes minutes.",
        ),
    ]


def progress(total: int) -> Callable[[], None]:
    """Return an `on_tile` that moves ComfyUI's bar, of `total` tiles, and raises when the user cancels."""
    bar = comfy.utils.ProgressBar(total)

    def on_tile() -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update(1)

    return on_tile


def latents_of(samples: dict, vae: Any) -> Tensor:
    """Return `B C H W` of a LATENT; raises ValueError if the VAE does not decode it."""
    z = samples["samples"]
    if z.ndim != 4 or z.shape[1] != vae.latent_channels or 0 in z.shape:
        raise ValueError(
            f"this latent is {tuple(z.shape)}, but this VAE decodes pictures of {vae.latent_channels} channels "
            "(B C H W); connect the VAE of the model that made it"
        )
    return z


class VAEEncode(io.ComfyNode):
    """IMAGE to LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRVAEEncode",
            display_name="Exact Tiled VAE Encode",
            category=CATEGORY,
            description="Encodes pictures of any size with the memory of one tile, and gives the latent that VAE "
            "Encode would give with enough memory: no seams, no drift of colour or contrast.",
            inputs=[
                io.Image.Input("pixels", tooltip="One or more pictures."),
                io.Vae.Input(
                    "vae", tooltip="A VAE of Stable Diffusion (1.x, 2.x, XL, 3), Flux, Flux.2 or the embedded model."
                ),
                *tiling_inputs(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="What VAE Encode would give.")],
        )

    @classmethod
    def execute(cls, pixels, vae, tile, planes, attention) -> io.NodeOutput:
        exact, tiling = ExactVAE(vae), VAETiling(tile, planes, attention)
        image = rgb(pixels)
        height, width = image.shape[-2:]
        if min(height, width) < exact.scale:
            raise ValueError(
                f"a picture of {width} x {height} is smaller than one latent of this VAE ({exact.scale} px); enlarge it"
            )
        image = vae.vae_encode_crop_pixels(image.movedim(1, -1)).movedim(-1, 1)
        calls = len(image) * exact.tiled.count("encoder", tuple(image.shape[-2:]), tiling)
        return io.NodeOutput({"samples": exact.encode(image, progress(calls), tiling)})


class VAEDecode(io.ComfyNode):
    """LATENT to IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRVAEDecode",
            display_name="Exact Tiled VAE Decode",
            category=CATEGORY,
            description="Decodes latents of any size with the memory of one tile, and gives the picture that VAE "
            "Decode would give with enough memory: no seams, no drift of colour or contrast.",
            inputs=[
                io.Latent.Input("samples", tooltip="One or more latents."),
                io.Vae.Input("vae", tooltip="The VAE of the model that made the latent."),
                *tiling_inputs(),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="What VAE Decode would give.")],
        )

    @classmethod
    def execute(cls, samples, vae, tile, planes, attention) -> io.NodeOutput:
        exact, tiling, z = ExactVAE(vae), VAETiling(tile, planes, attention), latents_of(samples, vae)
        size = tuple(side * exact.scale for side in z.shape[-2:])
        on_tile = progress(len(z) * exact.tiled.count("decoder", size, tiling))
        return io.NodeOutput(exact.decode(z, on_tile, tiling).movedim(1, -1))
