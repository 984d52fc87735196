"""The `tudsr` command: words and progress bars around the library's functions, and no logic."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

from .. import __version__
from .batches import run_command
from .console import (
    PATH,
    Device,
    DeviceOption,
    ForceOption,
    MegapixelsOption,
    Precision,
    PrecisionOption,
    err,
    never_fail_to_print,
    one_line_errors,
    out,
)
from .degrading import add_degrade_command
from .files import add_file_commands
from .training import add_training_commands
from .upscaling import ModelOption, StageOne, StageTwo, add_upscale_commands, load_model
from .zoom import add_zoom_command

if TYPE_CHECKING:
    from ..evaluation import Result

app = typer.Typer(
    help="Diffusion super-resolution in two one-step stages (TUDSR).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
add_upscale_commands(app)
add_file_commands(app)
add_zoom_command(app)
add_degrade_command(app)
add_training_commands(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.print(f"tudsr {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and stop.", is_eager=True, callback=_show_version)
    ] = False,
) -> None:
    """Take the options that stand before every command."""


@app.command()
@one_line_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", **PATH, help="Folder for the two pictures.")] = Path("out"),
    device: DeviceOption = Device.auto,
) -> None:
    """Upscale the shipped photo x8 and write it with a comparison (nearest, bicubic, ours)."""
    from dataclasses import replace

    from ..batch import Job, Output, Work
    from ..evaluation import compare, example_path
    from ..methods import Target, TwoStage
    from ..pictures import read_picture, write_picture

    output.mkdir(parents=True, exist_ok=True)
    job = Job(example_path(), output / "demo-x8.png")
    upscaler = TwoStage(load_model("embedded", None, None, device, Precision.fp32))
    run_command([job], output, Work(lambda job: upscaler, Target(scale=8), Output(overwrite=True)))
    small, ours = read_picture(job.source), read_picture(job.output)
    panels = output / "demo-compare.png"
    write_picture(panels, replace(small, pixels=compare(small.pixels, ours.pixels)), overwrite=True)
    out.print(f"{panels}: nearest | bicubic | ours, one part at full size", markup=False)


@app.command()
@one_line_errors
def info() -> None:
    """Show versions, devices and the models found."""
    import torch

    from ..backends import pick_device
    from ..weights import embedded_path, read_model

    table = Table(show_header=False, box=None)
    table.add_row("tudsr", __version__)
    table.add_row("python", f"{platform.python_version()} on {platform.platform()}")
    for name in ("torch", "diffusers", "safetensors", "numpy", "pillow", "transformers"):
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    table.add_row("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} used")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        table.add_row(f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB")
    table.add_row("mps", "available" if torch.backends.mps.is_available() else "not available")
    table.add_row("device used", str(pick_device()))
    file = read_model(embedded_path())
    stages = f"stage one t={file.first_step.t}, stage two t={file.second.steps_for(2)[0].t}"
    table.add_row("embedded model", f"{file.name}, {embedded_path().stat().st_size / 2**20:.1f} MiB, {stages}")
    out.print(table)


@app.command()
@one_line_errors
def evaluate(
    folder: Annotated[
        Path | None, typer.Argument(**PATH, help="Sharp pictures; default: the five public test pictures.")
    ] = None,
    model: ModelOption = "embedded",
    stage_one: StageOne = None,
    stage_two: StageTwo = None,
    device: DeviceOption = Device.auto,
    dtype: PrecisionOption = Precision.fp32,
    perceptual: Annotated[
        str | None,
        typer.Option(
            help="Metrics of pyiqa as well, such as lpips,musiq, or 'all'; most fetch weights the first time."
        ),
    ] = None,
    sheets: Annotated[
        Path | None, typer.Option(**PATH, help="Folder for a comparison of every picture: nearest | bicubic | ours.")
    ] = None,
) -> None:
    """Measure PSNR-Y, SSIM and seams against bicubic, Lanczos and a filter bank, at x4 and x8."""
    from ..backends import pick_device
    from ..evaluation import Perceptual, evaluate_model, perceptual_rows, read_folder, summary_rows
    from ..training import read_held_out

    measured = Perceptual(perceptual, str(pick_device(device.value))) if perceptual else None
    pictures = read_folder(folder) if folder else read_held_out()
    networks = load_model(model, stage_one, stage_two, device, dtype)

    def watch(result: Result) -> None:
        if measured:
            measured.add(result)
        if sheets and result.method == "ours":
            _write_sheet(sheets, result)

    with err.status("measuring"):
        scores = evaluate_model(networks, pictures, watch=watch)
    heads = ("case", "method", *pictures, "mean", "gain", "worst", "seams")
    title = "PSNR-Y in dB / SSIM; gain and worst are over Lanczos; seams: edges at our tiles' borders over all others"
    _print_table(title, heads, summary_rows(scores), 16 * (len(pictures) + 1))
    if measured:
        _print_table("Perceptual metrics", *perceptual_rows(measured), 10 * len(measured.names))


@app.command()
@one_line_errors
def compare(
    before: Annotated[Path, typer.Argument(**PATH, help="A picture, such as the small one.")],
    after: Annotated[Path, typer.Argument(**PATH, help="Another of the same view; it gives the size.")],
    output: Annotated[Path, typer.Option("-o", "--output", **PATH, help="The page to write (.html).")],
    reference: Annotated[
        Path | None, typer.Option(**PATH, help="The sharp original: PSNR and SSIM of both are measured against it.")
    ] = None,
    tile: Annotated[
        int | None, typer.Option(min=16, help="Measure seams of such tiles in both: the side that the upscaler had.")
    ] = None,
    overlap: Annotated[int, typer.Option(min=0, help="With --tile: their overlap in pixels.")] = 128,
    force: ForceOption = False,
    max_megapixels: MegapixelsOption = None,
) -> None:
    """Put two pictures into one page with a divider, zoom and difference: tudsr compare a.png b.png -o page.html"""
    from ..evaluation import figures_of, seams_of, tiles_over, write_page
    from ..pictures import read_picture

    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{output} is no name of a page; give one that ends in .html")
    if output.exists() and not force:
        raise ValueError(f"{output} exists; choose another name, or replace it with --force")
    paths = [before, after, *([reference] if reference else [])]
    pictures = [read_picture(path, max_megapixels) for path in paths]
    names = [path.name for path in paths] if before.name != after.name else [str(path) for path in paths]
    shown = dict(zip(names[:2], pictures[:2], strict=True))
    if len(shown) < 2:
        raise ValueError(f"{before} was given twice; give two pictures")
    pixels = {name: picture.pixels for name, picture in shown.items()}
    truth = pictures[2].pixels if reference else None
    figures = figures_of(pixels, truth)
    seams = seams_of(pixels, truth, tiles_over(pictures[1].size, tile, overlap)) if tile else []
    for figure in (*figures, *seams):
        out.print(figure.describe(), markup=False)
    if reference and not figures:
        sizes = ", ".join(f"{path.name} {p.size[1]} x {p.size[0]}" for path, p in zip(paths, pictures, strict=True))
        raise ValueError(f"nothing can be measured against {reference}: sizes differ ({sizes})")
    write_page(output, shown, figures, seams)
    out.print(f"wrote {output}", markup=False)


def _write_sheet(folder: Path, result: Result) -> None:
    from ..evaluation import compare
    from ..pictures import Picture, write_picture

    folder.mkdir(parents=True, exist_ok=True)
    panels = compare(result.small, result.made)
    write_picture(folder / f"{result.name} {result.case}.png", Picture(panels), overwrite=True)


def _print_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> None:
    table = Table(title=title, title_justify="left")
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=max(out.width, 72 + width), highlight=False).print(table)


def main() -> None:
    """Run the command; usage errors exit with 2, every expected failure with 1 and one line on stderr."""
    never_fail_to_print()
    handler = RichHandler(console=err, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    app()
