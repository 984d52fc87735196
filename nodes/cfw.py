"""StableSR's CFW: a decode that follows the low-resolution picture, and the loader of its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable

import comfy.model_management
import torch
from comfy_api.latest import io
from torch import Tensor

from ..tudsr_core.models import load_wrapping
from ..tudsr_core.pictures import match_color, pad_to_multiple
from ..tudsr_core.vae import VAETiling
from .host.exact_vae import ExactVAE, ManagedWrapping
from .host.model_files import find_weights, fingerprint, is_there, list_weights
from .images import rgb
from .inputs import CATEGORY, CFWType, color_fix_input, float_input
from .vae import latents_of, progress, tiling_inputs

log = logging.getLogger(__name__)

NOTHING = "(put vqgan_cfw_00011.ckpt into models/tudsr)"


class LoadCFW(io.ComfyNode):
    """A file that holds CFW to CFW."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadCFW",
            display_name="Load CFW",
            category=CATEGORY,
            description="Loads StableSR's controllable feature wrapping, with which a decoder follows the "
            "low-resolution picture. Files are read without running any code in them.",
            inputs=[
                io.Combo.Input(
                    "cfw",
                    options=list_weights() or [NOTHING],
                    tooltip="A file in models/tudsr that holds CFW, such as vqgan_cfw_00011.ckpt. The VAE's own "
                    "weights, which it also holds, are left alone.",
                )
            ],
            outputs=[CFWType.Output(display_name="cfw", tooltip="For CFW Decode.")],
        )

    @classmethod
    def validate_inputs(cls, cfw) -> bool | str:
        return is_there(cfw)

    @classmethod
    def fingerprint_inputs(cls, cfw) -> str:
        return fingerprint(find_weights(cfw))

    @classmethod
    def execute(cls, cfw) -> io.NodeOutput:
        return io.NodeOutput(ManagedWrapping(load_wrapping(find_weights(cfw))))


class CFWDecode(io.ComfyNode):
    """LATENT and the enlarged low-resolution picture to IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        tile, planes, _ = tiling_inputs()
        return io.Schema(
            node_id="TUDSRCFWDecode",
            display_name="CFW Decode",
            category=CATEGORY,
            description="Decodes StableSR's latents with CFW: what the VAE's encoder sees in the enlarged "
            "low-resolution picture is fused into the decoder. Any size with the memory of one tile, without seams; "
            "gives the exact size of the picture, in its colours.",
            inputs=[
                io.Latent.Input("samples", tooltip="One or more latents of the picture."),
                io.Vae.Input("vae", tooltip="The VAE of SD2.1, for which CFW was trained."),
                io.Image.Input(
                    "image",
                    tooltip="The enlarged low-resolution picture that the latents were made of: one for all of them, "
                    "or one for each.",
                ),
                CFWType.Input("cfw", optional=True, tooltip="From Load CFW. Without it: the plain decode."),
                float_input(
                    "w",
                    0.5,
                    "Raise it to stay closer to the low-resolution picture, lower it for more of what the model drew. "
                    "1 is as CFW was trained; 0 is the plain decode, in less than half the time.",
                    most=1.0,
                ),
                color_fix_input(),
                tile,
                planes,
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The pictures, as large as the one given.")],
        )

    @classmethod
    def execute(cls, samples, vae, image, w, color_fix, tile, planes, cfw=None) -> io.NodeOutput:
        z, pixels, tiling = latents_of(samples, vae), rgb(image), VAETiling(tile, planes)
        if w and cfw is None:
            log.warning("no CFW is connected, so this is the plain decode; connect Load CFW, or set w to 0")
        exact = ExactVAE(vae, cfw, w)
        padded, padding = pad_to_multiple(pixels, exact.scale)
        check_fits(z, padded, pixels, exact.scale)
        decoded = padding.crop(decode(exact, z, padded, tiling))
        device, sources = comfy.model_management.get_torch_device(), pixels.expand(len(z), -1, -1, -1)
        return io.NodeOutput(match_color(decoded, sources, color_fix, device).movedim(1, -1))


def check_fits(z: Tensor, padded: Tensor, pixels: Tensor, scale: int) -> None:
    """Raise ValueError unless `z` are latents of these pictures, `padded` to a multiple of `scale`."""
    if len(pixels) not in (1, len(z)):
        raise ValueError(f"{len(z)} latents but {len(pixels)} pictures; give one picture or one for each")
    made, given, wanted = ([*x.shape[-2:]] for x in (z, pixels, padded))
    if [side * scale for side in made] != wanted:
        raise ValueError(
            f"these latents are of a picture of {made[1] * scale} x {made[0] * scale}, but the one given is "
            f"{given[1]} x {given[0]}; connect the enlarged picture that they were made of (VAE Encode cuts off what "
            f"is no multiple of {scale}: there, cut or pad it before)"
        )


def decode(exact: ExactVAE, z: Tensor, padded: Tensor, tiling: VAETiling) -> Tensor:
    """Return the pictures of `z`, fused with the features of `padded`, each of which is encoded once, if at all."""
    size, fuse = tuple(padded.shape[-2:]), exact.fuse
    calls = len(z) * exact.tiled.count("decoder", size, tiling, fuse)
    if not fuse:
        return exact.decode(z, progress(calls), tiling)
    on_tile = progress(calls + len(padded) * exact.tiled.count("encoder", size, tiling, keep=fuse))
    parts = zip(padded.split(1), z.chunk(len(padded)), strict=True)
    return torch.cat([_decode_part(exact, latents, one, tiling, on_tile) for one, latents in parts])


def _decode_part(
    exact: ExactVAE, latents: Tensor, pixels: Tensor, tiling: VAETiling, on_tile: Callable[[], None]
) -> Tensor:
    """Return all the pictures that one picture's features are for; they are let go before the next one's are made."""
    features = exact.features(pixels, on_tile, tiling)
    shared = {level: [*maps] * len(latents) for level, maps in features.items()}
    return exact.decode(latents, on_tile, tiling, shared)
