"""`tudsr degrade`: options, and no logic."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .batches import run_command
from .console import (
    PATH,
    Device,
    DeviceOption,
    ForceOption,
    FormatOption,
    Inputs,
    MegapixelsOption,
    OutputOption,
    one_line_errors,
)

RECIPE_NAMES = ("omgsr", "real-esrgan")  # spelled out: what knows them loads torch
RecipeName = Enum("RecipeName", {name: name for name in RECIPE_NAMES}, type=str)


def add_degrade_command(app: typer.Typer) -> None:
    """Give `app` the command."""
    app.command()(one_line_errors(degrade))


def degrade(
    inputs: Inputs,
    output: OutputOption,
    downsampler: Annotated[
        Path | None,
        typer.Option(**PATH, help="A file of tudsr train downsampler or colearn; without it, the shipped one."),
    ] = None,
    base: Annotated[
        Path | None, typer.Option(**PATH, help="SD2.1-base, for a downsampler of kind shared, which is its adapter.")
    ] = None,
    recipe: Annotated[
        RecipeName | None, typer.Option(help="Instead: the classical damage, with these published ranges.")
    ] = None,
    factor: Annotated[float, typer.Option(help="How many times smaller, from 1 to 8.")] = 4.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed; every further picture gets the one after it.")] = 0,
    strength: Annotated[
        float | None, typer.Option(help="Of the learned damage: 0 is the plain downscale, 1 as learned, up to 1.5.")
    ] = None,
    style: Annotated[
        Path | None, typer.Option(**PATH, help="A bad picture whose kind of damage is taken; without it one is drawn.")
    ] = None,
    device: DeviceOption = Device.auto,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 95,
    suffix: FormatOption = None,
    force: ForceOption = False,
    max_megapixels: MegapixelsOption = None,
) -> None:
    """Make good pictures small and poor: tudsr degrade photos/ -o poor/ --seed 3"""
    from ..backends import load_shared_networks, pick_device
    from ..batch import Output, Work, describe_run, plan_jobs
    from ..degrading import Classical, Degrader, Learned, beside
    from ..methods import Target
    from ..models import downsampler_path
    from ..pictures import FORMATS

    if downsampler and recipe:
        raise ValueError("--downsampler is learned damage and --recipe classical; leave one of them out")
    if not 1 <= factor <= 8:
        raise ValueError(f"--factor {factor:g} must be from 1 to 8")
    if recipe and (strength is not None or style or base):
        raise ValueError("--strength, --style and --base belong to learned damage; leave them out with --recipe")
    # PNG unless asked for: another JPEG would be damage that nobody has learned.
    lossless = None if output.suffix.lower() in FORMATS and not output.is_dir() else ".png"
    jobs = plan_jobs(inputs, output, f".{suffix.value}" if suffix else lossless)
    if recipe:
        damage: Classical | Learned = Classical(recipe.value, factor)
    else:
        downsampler = downsampler or downsampler_path()
        on = pick_device(device.value)
        networks = base and load_shared_networks(base, str(on))
        damage = Learned(downsampler, factor, 1.0 if strength is None else strength, style, networks)
        damage.network.to(on)
    jobs = [replace(job, also=(beside(job.output),)) for job in jobs]
    seeds = {job.output: seed + number for number, job in enumerate(jobs)}
    written = Output(8, quality, force, max_megapixels, rgb=True)
    # Damage has a factor of its own; the target is not asked.
    work = Work(lambda job: Degrader(damage, seeds[job.output], job), Target(scale=1), written)
    files = dict(downsampler=downsampler, style=style)

    def describe() -> dict:
        return describe_run(files, written, factor=factor, seed=seed, strength=strength, recipe=recipe and recipe.value)

    run_command(jobs, output, work, describe)
