"""StableSR for any sampler: its networks on a MODEL, the picture that steers it, and its noise levels."""

from __future__ import annotations

from comfy_api.latest import io, ui
from torch import Tensor

from ..tudsr_core.diffusion import respaced_timesteps
from ..tudsr_core.methods import MAX_PIXELS, StableSROptions
from ..tudsr_core.pictures import pad_to_multiple, resize
from ..tudsr_core.tiling import TilePlan, fit_overlap, plan_tiles
from .host.exact_vae import ExactVAE
from .host.model_files import find_weights, fingerprint, is_there, list_weights
from .host.stablesr import ManagedStableSR, StableSRType, steered_sigmas, with_picture
from .host.stages import check_companions
from .images import rgb
from .inputs import (
    CATEGORY,
    float_input,
    long_edge_input,
    sampling_tile_inputs,
    target_inputs,
    tile_inputs,
    tile_prompt_inputs,
)
from .multidiffusion import in_tiles
from .tile_plan import tell_tiles
from .upscale import target_from
from .vae import progress

DEFAULTS = StableSROptions()
FOLDER = "stablesr"
NOTHING = "(put StableSR's file into models/tudsr)"
MAX_STEPS = 1000


class LoadStableSR(io.ComfyNode):
    """StableSR's two networks from one of its published files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadStableSR",
            display_name="Load StableSR",
            category=CATEGORY,
            description="Loads StableSR's time-aware encoder and feature transforms: the file made for webui (376 "
            "tensors, 400 MB), or the whole checkpoint. Its licence allows non-commercial use only.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=list_weights(FOLDER) or [NOTHING],
                    tooltip="A file in models/tudsr or models/stablesr: stablesr_000117.ckpt with SD2.1-base or "
                    "SD-Turbo, webui_768v_139.ckpt with SD2.1 (768).",
                ),
            ],
            outputs=[StableSRType.Output(display_name="stablesr", tooltip="For Apply StableSR.")],
        )

    @classmethod
    def validate_inputs(cls, file) -> bool | str:
        return is_there(file, FOLDER)

    @classmethod
    def fingerprint_inputs(cls, file) -> str:
        return fingerprint(find_weights(file, FOLDER))

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        return io.NodeOutput(ManagedStableSR(find_weights(file, FOLDER)))


def _tiles() -> list[io.Input]:
    """Tile, overlap, tile batch and window, with StableSR's defaults."""
    tile, overlap = sampling_tile_inputs()
    _, _, tile_batch, window = tile_inputs()
    overlap.default = DEFAULTS.overlap_px
    overlap.tooltip = "Overlap of neighbouring tiles in output pixels. StableSR's own is half the tile."
    tile_batch.default = tile_batch.min = 1
    window.options = ["centred", *window.options]
    window.default = DEFAULTS.sample.window
    window.tooltip = (
        "How overlapping tiles are weighted: centred is StableSR's narrow bell, gaussian a wider one, uniform the "
        "plain average."
    )
    return [tile, overlap, tile_batch, window]


class ApplyStableSR(io.ComfyNode):
    """A MODEL, its conditions and its start for one or more low-resolution pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRApplyStableSR",
            display_name="Apply StableSR",
            category=CATEGORY,
            description="Steers Stable Diffusion 2.1 by a low-resolution picture, in tiles of its native size, so that "
            "any size works (aggregation sampling). Give the outputs to SamplerCustom with StableSR Sigmas and the "
            "ddpm sampler, then to CFW Decode. The node says how many tiles that are.",
            inputs=[
                io.Model.Input("model", tooltip="SD2.1-base or SD-Turbo; SD2.1 (768) for the 768v file."),
                StableSRType.Input("stablesr", tooltip="From Load StableSR."),
                io.Conditioning.Input("positive", tooltip="The prompt; StableSR's own runs leave it empty."),
                io.Conditioning.Input(
                    "negative", tooltip="Used when the sampler's CFG is above 1; StableSR's is in the help page."
                ),
                io.Image.Input("image", tooltip="One or more low-resolution pictures."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                *target_inputs(),
                *_tiles(),
                *tile_prompt_inputs(
                    "A prompt per tile instead of positive; its plan, which must be of the enlarged picture, "
                    "replaces tile and overlap."
                ),
                long_edge_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The steered MODEL, in tiles, for any sampler."),
                io.Conditioning.Output(display_name="positive", tooltip="The prompt, with the picture."),
                io.Conditioning.Output(display_name="negative", tooltip="The negative prompt, with the picture."),
                io.Latent.Output(display_name="latent", tooltip="The enlarged picture: where sampling starts."),
                io.Image.Output(display_name="image", tooltip="The enlarged picture, for CFW Decode."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model,
        stablesr,
        positive,
        negative,
        image,
        vae,
        scale,
        width,
        height,
        tile,
        overlap,
        tile_batch,
        window,
        tile_prompts=None,
        clip=None,
        long_edge=0,
    ) -> io.NodeOutput:
        steered = stablesr.apply(model)
        for conditioning in (positive, negative):
            check_companions(model, vae, conditioning)
        exact, pixels = ExactVAE(vae), rgb(image)
        wanted = target_from(scale, width, height, long_edge).size_for(tuple(pixels.shape[-2:]))
        if wanted[0] * wanted[1] > MAX_PIXELS:
            raise ValueError(f"{wanted[1]} x {wanted[0]} has more than {MAX_PIXELS:,} pixels; enlarge less")
        enlarged = resize(pixels, wanted).clamp(0, 1)
        padded, _ = pad_to_multiple(enlarged, exact.scale)
        on_tile = progress(len(padded) * exact.tiled.count("encoder", tuple(padded.shape[-2:])))
        z = exact.encode(padded, on_tile)
        plan = tile_prompts.plan if tile_prompts else _plan(z, tile, overlap, exact.scale)
        low = model.model.process_latent_in(z)
        return io.NodeOutput(
            in_tiles(steered, tile, overlap, tile_batch, window, tile_prompts=tile_prompts, clip=clip),
            with_picture(positive, low),
            with_picture(negative, low),
            {"samples": z},
            enlarged.movedim(1, -1),
            ui=ui.PreviewText(_tell(plan, exact.scale)),
        )


def _tell(plan: TilePlan, unit: int) -> str:
    each = "one network call" if len(plan) == 1 else f"{len(plan):,} network calls"
    return f"{tell_tiles(plan, unit)}\n{each} for each step and picture, twice as many with CFG above 1"


def _plan(z: Tensor, tile: int, overlap: int, scale: int) -> TilePlan:
    return plan_tiles(z.shape[-2], z.shape[-1], tile // scale, fit_overlap(tile, overlap) // scale)


class StableSRSigmas(io.ComfyNode):
    """SIGMAS of StableSR's respaced chain."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRStableSRSigmas",
            display_name="StableSR Sigmas",
            category=CATEGORY,
            description="The noise levels of StableSR's steps, for SamplerCustom with the ddpm sampler: evenly from "
            "the first to the last timestep it was trained with.",
            inputs=[
                io.Model.Input("model", tooltip="The MODEL that is sampled."),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.sample.steps,
                    min=1,
                    max=MAX_STEPS,
                    tooltip="200 are the authors', 20 with the 768 model, 4 with SD-Turbo. Fewer are faster.",
                ),
                float_input(
                    "strength",
                    1.0,
                    "How far to redraw: 1 is all steps, 0.3 only the last third, which keeps closer to the picture.",
                    most=1.0,
                    least=0.01,
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom.")],
        )

    @classmethod
    def execute(cls, model, steps, strength) -> io.NodeOutput:
        left = max(1, round(steps * strength))
        return io.NodeOutput(steered_sigmas(model, respaced_timesteps(steps, respacing="whole")[-left:]))
