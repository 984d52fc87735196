"""`tudsr upscale --method stablesr`: StableSR's options as an upscaler, and no logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import PATH

if TYPE_CHECKING:
    from ..methods import Zoom

StableSROption = Annotated[
    Path | None,
    typer.Option(**PATH, help="StableSR's file, for a base --model: stablesr_000117.ckpt, webui_768v_139.ckpt."),
]
CFWOption = Annotated[
    Path | None, typer.Option(**PATH, help="StableSR: its decoder's file (vqgan_cfw_00011.ckpt), used at --fidelity.")
]
GuidanceOption = Annotated[float | None, typer.Option(help="StableSR: guidance scale; 1, the default, is off.")]
NegativeOption = Annotated[str | None, typer.Option(help="StableSR: what guidance leads away from.")]


def stablesr_upscaler(
    model: str,
    stablesr: Path | None,
    cfw: Path | None,
    dials: Mapping[str, float],
    prompt: str | None,
    negative: str | None,
    chosen: Mapping[str, Any],
    sampling: Mapping[str, Any],
    loading: Mapping[str, Any],
) -> Zoom:
    """Return StableSR over `model`; `dials`, `chosen`, `sampling` and `loading` are the options that were given.

    `dials` are "fidelity" and "inventive". Raises ValueError for both together and for files that are not named,
    CheckpointError for such that do not fit.
    """
    from ..backends import load_stablesr_networks
    from ..methods import NEGATIVE, NEUTRAL, StableSROptions, Zoom, fixed, fusion_weight
    from ..prompts import Style

    if model == "embedded" or stablesr is None:
        raise ValueError("--method stablesr needs --model with SD2.1-base and --stablesr with StableSR's file")
    options = StableSROptions()
    options = replace(options, **chosen, sample=replace(options.sample, **sampling))
    inventive = dials.get("inventive", NEUTRAL)
    weight, turned = fusion_weight(inventive), inventive != NEUTRAL
    if turned and cfw is None:
        raise ValueError("--inventive turns the weight of --cfw; add that")
    if turned and "fidelity" in dials:
        raise ValueError("--inventive and --fidelity are one dial here; leave one out")
    note = f"inventive {inventive:g} (CFW's weight {weight:g})" if turned else ""
    networks = load_stablesr_networks(Path(model), stablesr, cfw, dials.get("fidelity", weight), **loading)
    style = Style(prefix="", suffix="", negative=NEGATIVE if negative is None else negative)
    return Zoom(networks, options, fixed(prompt or "", style), note)
