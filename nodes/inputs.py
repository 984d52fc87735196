"""Inputs that several nodes have, and the pack's own kinds of sockets, each said once.

Order is part of saved workflows: which inputs a node has, and in which order, stands in its `define_schema`.
"""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..tudsr_core.methods import NEUTRAL, UpscaleOptions
from ..tudsr_core.pictures import COLOR_FIXES
from ..tudsr_core.tiling import AUTO_TILES_PX
from .host.tile_texts import TilePromptsType

CATEGORY = "image/upscaling/TUDSR"
DEFAULTS = UpscaleOptions()
LARGEST_SIDE = 65536  # pixels
TILE_BATCH_SAYS = "A CPU computes one at a time. The picture does not depend on it, on a GPU but for rounding."

TilePlanType = io.Custom("TILE_PLAN")
PrompterType = io.Custom("TILE_PROMPTER")
CFWType = io.Custom("CFW")
DownsamplerType = io.Custom("DOWNSAMPLER")


def float_input(name: str, default: float, tooltip: str, most: float, least: float = 0.0, **more: Any) -> io.Input:
    """Return a number with two decimals from `least` to `most`."""
    return io.Float.Input(name, default=default, min=least, max=most, step=0.01, tooltip=tooltip, **more)


def pixels_input(name: str, default: int, tooltip: str, step: int, most: int = 4096, least: int = 0) -> io.Input:
    """Return a length of tiles in pixels, in steps of `step`."""
    return io.Int.Input(name, default=default, min=least, max=most, step=step, tooltip=tooltip)


def side_input(name: str, tooltip: str, **more: Any) -> io.Input:
    """Return a side of the finished picture in pixels; 0 leaves it to another input."""
    return io.Int.Input(name, default=0, min=0, max=LARGEST_SIDE, tooltip=tooltip, **more)


def switch_input(name: str, default: bool, tooltip: str, **more: Any) -> io.Input:
    """Return something that is on or off."""
    return io.Boolean.Input(name, default=default, tooltip=tooltip, **more)


def sampling_tile_inputs() -> list[io.Input]:
    """Return tile and overlap for samplers, which work at the side that the model was trained at."""
    tile, overlap, _, _ = tile_inputs()
    tile.default, tile.min = AUTO_TILES_PX[0], 64
    tile.tooltip = "Side of a tile in output pixels. Models trained at 512 px are best at 512, those at 768 at 768."
    return [tile, overlap]


def tile_inputs(defaults: UpscaleOptions = DEFAULTS) -> list[io.Input]:
    """Return the inputs tile, overlap, tile batch and window, with the core's defaults."""
    return [
        pixels_input(
            "tile",
            defaults.tile_px,
            "Side of a tile in output pixels. 0: from 512 to 640, whichever computes least for the picture. "
            "Raise it for fewer, slower tiles and wider context; lower it when memory runs out.",
            step=64,
        ),
        pixels_input(
            "overlap",
            defaults.overlap_px,
            "Overlap of neighbouring tiles in output pixels. Raise it if you see a grid; "
            "lower it for speed. A quarter of the tile is a good start; what does not fit a tile becomes its half.",
            step=8,
            most=2048,
        ),
        io.Int.Input(
            "tile_batch",
            default=defaults.tile_batch,
            min=0,
            max=64,
            tooltip="Tiles computed at once. 0: as many as fit in free memory. Raise it on a large GPU for speed; "
            f"lower it when memory runs out. {TILE_BATCH_SAYS}",
        ),
        io.Combo.Input(
            "window",
            options=["gaussian", "uniform", "published"],
            default=defaults.window,
            tooltip="How overlapping tiles are weighted: gaussian is smooth, uniform is the plain average, "
            "published is the off-centre window of OMGSR and OSEDiff, and nothing but the window.",
        ),
    ]


def stage_input(name: str, word: str, also: str = "", **more: Any) -> io.Input:
    """Return the MODEL of stage `word`; `also` is added to what it says."""
    says = f"MODEL of stage {word}: from Load Embedded TUDSR Model, or SD2.1-base through Load TUDSR Adapter."
    return io.Model.Input(name, tooltip=says + also, **more)


def source_inputs(picture: str, model: str, word: str) -> list[io.Input]:
    """Return what every upscaler begins with: picture, MODEL of stage `word` (called `model`), VAE and text."""
    return [
        io.Image.Input("image", tooltip=picture),
        stage_input(model, word),
        io.Vae.Input(
            "vae",
            tooltip="The VAE of the model. Each stage sees it with the changes of its own adapter, if it has any.",
        ),
        io.Conditioning.Input(
            "conditioning", tooltip="The prompt the adapter was trained with; for TUDSR and OMGSR the empty prompt."
        ),
    ]


def color_fix_input() -> io.Input:
    """Return how a result's colours follow its source."""
    return io.Combo.Input(
        "color_fix",
        options=list(COLOR_FIXES),
        default=DEFAULTS.color_fix,
        tooltip="How colours follow the input. wavelet is safest; adain matches mean and contrast of red, green and "
        "blue; lab those of lightness and colour (CIELAB); none shows the bare model.",
    )


def shared_inputs() -> list[io.Input]:
    """Return the options that all upscalers have, after their own inputs."""
    return [
        *tile_inputs(),
        color_fix_input(),
        switch_input(
            "sample_posterior",
            DEFAULTS.sample_posterior,
            "Draw the latent at random, as the papers' scripts do, instead of taking its mode. "
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


def later_inputs() -> list[io.Input]:
    """Return the switches to a method's own tiles and to its native size.

    They stand after every older widget, so that saved workflows keep their places.
    """
    return [
        switch_input(
            "published",
            DEFAULTS.published,
            "Tiles exactly as the method's own script has them: OMGSR, HYPIR and TUDSR 512 px that overlap by 256, "
            "OSEDiff and PiSA-SR 768 by 256, with its places and weights; tile, overlap and window are then not used. "
            "Turn it on to reproduce a paper's picture.",
            optional=True,
        ),
        switch_input(
            "native_size",
            DEFAULTS.native_size,
            "Enlarge a small picture first, so that SD2.1 works at the 512 px it was trained on (InvSR: mirror its "
            "borders), and shrink the result to the size you asked for, as the methods' own scripts do. The embedded "
            "model needs none. Off: faster, and worse on pictures below 128 px at x4.",
            optional=True,
        ),
    ]


def timestep_input(trained: int) -> io.Input:
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


def target_inputs() -> list[io.Input]:
    """Return factor, width and height."""
    return [
        float_input("scale", 4.0, "Enlarge by this factor; any number works.", most=64.0, least=1.0),
        side_input("width", "Enlarge to this width instead; 0: use the scale."),
        side_input("height", "Enlarge to this height instead; 0: use the scale."),
    ]


def long_edge_input() -> io.Input:
    """Return the last of the target's inputs: optional and behind all others, so that older workflows still fit."""
    says = "Enlarge until the longer side has this length instead; 0: use the scale, width or height."
    return side_input("long_edge", says, optional=True)


def inventive_input() -> io.Input:
    """Return the dial that all upscalers share: optional and behind all others, so that older workflows still fit."""
    return float_input(
        "inventive",
        NEUTRAL,
        "From faithful (0) to inventive (1); 0.5: as trained, and as the loader's own dials are set. TUDSR, OMGSR, "
        "HYPIR, OSEDiff: half to one and a half of what the step changes. PiSA-SR: its detail, from none to 1.5. "
        "InvSR: up to 5 steps above 0.5, less of its change below. The embedded model sharpens less or more and never "
        "invents. TUDSR Plan says what it comes to.",
        most=1.0,
        optional=True,
        display_mode=io.NumberDisplay.slider,
    )


def plan_input() -> io.Input:
    """Return the plan socket that everything about one picture shares."""
    return TilePlanType.Input(
        "plan", tooltip="The tiles, from Tile Plan. Use one plan for prompts, hints and sampling of a picture."
    )


def context_input() -> io.Input:
    """Return the widget for surroundings that a prompter sees."""
    return float_input(
        "context",
        0.0,
        "Surroundings to show with each tile, as a part of its side. Raise it if tiles are recognised "
        "poorly; lower it if prompts name things that are only in the neighbouring tiles.",
        most=1.0,
    )


def tile_prompt_inputs(says: str) -> list[io.Input]:
    """Return the prompts of the tiles, which `says` explains, and the CLIP that encodes them; both may be left out."""
    return [
        TilePromptsType.Input("tile_prompts", optional=True, tooltip=says),
        io.Clip.Input("clip", optional=True, tooltip="The model's text encoder; needed with tile_prompts."),
    ]


def prompter_output() -> io.Output:
    """Return the prompter that a loader of one gives."""
    return PrompterType.Output(display_name="prompter", tooltip="For Extract Tile Prompts.")
