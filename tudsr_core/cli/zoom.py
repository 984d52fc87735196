"""`tudsr zoom`: the options of "Zoomed In, Diffused Out" on the command line, and no logic."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .batches import RecursiveOption, ReportOption, run_command
from .console import (
    PATH,
    ColorFixOption,
    Device,
    DeviceOption,
    ForceOption,
    FormatOption,
    HeightOption,
    Inputs,
    LongEdgeOption,
    MegapixelsOption,
    OutputOption,
    OverlapOption,
    Precision,
    PrecisionOption,
    ScaleOption,
    WidthOption,
    WindowOption,
    ending,
    given,
    one_line_errors,
    target_of,
)

if TYPE_CHECKING:
    from ..batch import Job

StartName = Enum("StartName", {name: name for name in ("picture", "noise")}, type=str)
SpacingName = Enum("SpacingName", {name: name for name in ("even", "stride")}, type=str)


def add_zoom_command(app: typer.Typer) -> None:
    """Give `app` the command."""
    app.command()(one_line_errors(zoom))


def zoom(
    inputs: Inputs,
    output: OutputOption,
    model: Annotated[Path, typer.Option(**PATH, help="Stable Diffusion 2.x: a diffusers folder, or a file.")],
    tokenizer: Annotated[Path | None, typer.Option(**PATH, help="CLIP's folder, for a --model in one file.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The same words for every tile.")] = None,
    tile_prompts: Annotated[
        Path | None, typer.Option(**PATH, help="One prompt per tile, in reading order: JSON, or a text file of lines.")
    ] = None,
    dape: Annotated[
        Path | None,
        typer.Option(**PATH, help="Tag every tile: a converted DAPE file, or the published folder."),
    ] = None,
    quality_words: Annotated[str | None, typer.Option(help="Added to every prompt of --prompt and --dape.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt of every tile.")] = None,
    scale: ScaleOption = None,
    width: WidthOption = None,
    height: HeightOption = None,
    long_edge: LongEdgeOption = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps; each runs over all tiles.")] = None,
    strength: Annotated[float | None, typer.Option(help="How far to redraw: 1 all, 0.3 keeps to the picture.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is off and half the work.")] = None,
    eta: Annotated[float | None, typer.Option(help="Fresh noise per step: 1 is DDPM, 0 is DDIM.")] = None,
    start: Annotated[StartName | None, typer.Option(help="The noised picture, or noise alone.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of all noise.")] = None,
    tile: Annotated[int | None, typer.Option(help="Tile side in pixels; what the model was trained at.")] = None,
    overlap: OverlapOption = None,
    spacing: Annotated[
        SpacingName | None,
        typer.Option(help="Tiles spread evenly, or at every tile - overlap with the last one flush (stride)."),
    ] = None,
    tile_batch: Annotated[int | None, typer.Option(help="Tiles computed at once on a GPU.")] = None,
    window: WindowOption = None,
    color_fix: ColorFixOption = None,
    device: DeviceOption = Device.auto,
    dtype: PrecisionOption = Precision.fp32,
    save_prompts: Annotated[bool, typer.Option(help="Write every tile's prompts beside the picture, as JSON.")] = False,
    suffix: FormatOption = None,
    recursive: RecursiveOption = False,
    report: ReportOption = None,
    force: ForceOption = False,
    max_megapixels: MegapixelsOption = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan with its number of network calls and stop.")] = False,
) -> None:
    """Enlarge with any SD 2.x and a prompt per tile: tudsr zoom in.png -o out.png --model sd21/ --dape dape/"""
    from ..backends import load_sd2
    from ..batch import Output, Work, describe_run, plan_jobs
    from ..methods import SampleOptions, Zoom, ZoomOptions, saved

    how = given(steps=steps, strength=strength, guidance=guidance, eta=eta, tile_batch=tile_batch, window=window)
    chosen = given(tile_px=tile, overlap_px=overlap, spacing=spacing, seed=seed, start=start, color_fix=color_fix)
    options = ZoomOptions(**chosen, sample=SampleOptions(**how))
    target = target_of(scale, width, height, long_edge)
    jobs = plan_jobs(inputs, output, ending(suffix), recursive)
    source = _source(prompt, tile_prompts, dape, given(suffix=quality_words, negative=negative), device)
    networks = load_sd2(model, device.value, dtype.value, tokenizer)
    if save_prompts:
        jobs = [replace(job, also=(job.output.with_suffix(".prompts.json"),)) for job in jobs]

    def upscaler_for(job: Job) -> Zoom:
        return Zoom(networks, options, saved(source, *job.also) if job.also else source)

    work = Work(upscaler_for, target, Output(overwrite=force, max_megapixels=max_megapixels))
    files = dict(model=model, tokenizer=tokenizer, tile_prompts=tile_prompts, dape=dape)
    words = given(prompt=prompt, quality_words=quality_words, negative=negative, dtype=dtype, format=suffix)

    def describe() -> dict:
        return describe_run(files, options, target, work.output, **words)

    run_command(jobs, output, work, describe, dry_run, report)


def _source(prompt: str | None, tile_prompts: Path | None, dape: Path | None, words: dict, device: Device):
    from ..backends import pick_device
    from ..methods import described, fixed, from_file
    from ..models import load_tagger
    from ..prompts import Style, TaggerPrompter

    style = Style(**words)
    if sum(given is not None for given in (prompt, tile_prompts, dape)) > 1:
        raise ValueError("give only one of --prompt, --tile-prompts and --dape")
    if tile_prompts:
        if "suffix" in words:
            raise ValueError("--quality-words are not added to --tile-prompts; write them into the file")
        return from_file(tile_prompts, style.negative)
    if dape:
        tagger = load_tagger(dape)
        tagger.device = pick_device(device.value)
        return described(TaggerPrompter(tagger), style)
    return fixed(prompt or "", style)
