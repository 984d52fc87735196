"""The `tudsr` command: words and progress bars around the library's functions, and no logic."""

from __future__ import annotations

import logging
import os
import platform
import time
from enum import Enum
from functools import wraps
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__

app = typer.Typer(
    help="Diffusion super-resolution in two one-step stages (TUDSR).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Device = Enum("Device", {name: name for name in ("auto", "cpu", "cuda", "mps")}, type=str)
Precision = Enum("Precision", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
WindowName = Enum("WindowName", {name: name for name in ("gaussian", "uniform", "published")}, type=str)
ColorName = Enum("ColorName", {name: name for name in ("wavelet", "adain", "none")}, type=str)
Suffix = Enum("Suffix", {name: name for name in ("png", "jpg", "webp", "tif")}, type=str)

ModelOption = Annotated[
    str, typer.Option(help="'embedded', a tudsr-model .safetensors, or an SD2.1-base folder or checkpoint.")
]
StageOne = Annotated[Path | None, typer.Option(help="Stage-one adapter, when --model is SD2.1-base.")]
StageTwo = Annotated[Path | None, typer.Option(help="Stage-two adapter, when --model is SD2.1-base.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="Precision of the networks.")]


def _complain(error: BaseException) -> None:
    text = " ".join(str(error).split()) or type(error).__name__
    err.print(f"error: {text}", style="red", markup=False)


def one_line_errors(command):
    """Wrap a command so that expected failures and Ctrl-C end it with one line and an exit code."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, MemoryError) as error:
            _complain(error)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            _complain(RuntimeError("interrupted; nothing half-written was left"))
            raise typer.Exit(130) from None

    return wrapped


@app.command()
@one_line_errors
def upscale(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Pictures or folders of pictures.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A file for one input, else a folder.")],
    scale: Annotated[float | None, typer.Option(help="Enlarge by this factor, from 1 to 64 (default 4).")] = None,
    width: Annotated[int | None, typer.Option(help="Enlarge to this width in pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Enlarge to this height in pixels.")] = None,
    long_edge: Annotated[int | None, typer.Option(help="Enlarge until the longer side has this length.")] = None,
    model: ModelOption = "embedded",
    stage_one: StageOne = None,
    stage_two: StageTwo = None,
    device: DeviceOption = Device.auto,
    dtype: PrecisionOption = Precision.fp32,
    tile: Annotated[int | None, typer.Option(help="Tile side in pixels; lower it if memory runs out.")] = None,
    overlap: Annotated[int | None, typer.Option(help="Overlap of neighbouring tiles in pixels.")] = None,
    tile_batch: Annotated[int | None, typer.Option(help="Tiles computed at once on a GPU.")] = None,
    window: Annotated[WindowName | None, typer.Option(help="How overlapping tiles are weighted.")] = None,
    color_fix: Annotated[ColorName | None, typer.Option(help="How colours follow the input.")] = None,
    sample_posterior: Annotated[bool, typer.Option(help="Draw latents instead of taking their mode.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of that draw.")] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 16 per channel; default: as the input.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 95,
    suffix: Annotated[Suffix | None, typer.Option("--format", help="File type; default: as the input.")] = None,
    force: Annotated[bool, typer.Option(help="Replace files that exist.")] = False,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and stop.")] = False,
) -> None:
    """Enlarge pictures: tudsr upscale photo.png -o photo-x8.png --scale 8"""
    from .batch import Output, finish_job, open_job, plan_jobs
    from .pipeline import UpscaleOptions
    from .plan import Target

    if bits not in (None, 8, 16):
        raise ValueError(f"--bits {bits} is not possible; use 8 or 16")
    chosen = {
        "tile_px": tile,
        "overlap_px": overlap,
        "tile_batch": tile_batch,
        "window": window and window.value,
        "color_fix": color_fix and color_fix.value,
        "sample_posterior": sample_posterior,
        "seed": seed,
    }
    options = UpscaleOptions(**{name: value for name, value in chosen.items() if value is not None})
    if scale is width is height is long_edge is None:
        scale = 4.0
    target = Target(scale, width, height, long_edge)
    jobs = plan_jobs(inputs, output, f".{suffix.value}" if suffix else None)
    networks = _load(model, stage_one, stage_two, device, dtype)
    if not dry_run and jobs[0].output.parent == output:
        output.mkdir(parents=True, exist_ok=True)
    written = Output(bits, quality, force)
    failed = run_jobs(
        jobs,
        lambda job: open_job(job, networks, target, options, written, dry_run),
        lambda job, picture, tick: finish_job(job, picture, networks, target, options, written, tick),
        dry_run,
    )
    if failed:
        raise typer.Exit(1)


def _load(model: str, stage_one: Path | None, stage_two: Path | None, device: Device, dtype: Precision):
    from .local import load_embedded, load_sd21

    path = Path(model)
    if stage_one:
        if model == "embedded":
            raise ValueError("--stage-one belongs to a base model; add --model with SD2.1-base")
        return load_sd21(path, stage_one, stage_two, device.value, dtype.value)
    if model == "embedded":
        return load_embedded(device.value, dtype.value)
    if path.is_dir() or stage_two:
        raise ValueError(f"--model {model} is a base model; add --stage-one with its adapter")
    return load_embedded(device.value, dtype.value, path)


def run_jobs(jobs, open_one, finish_one, dry_run: bool = False) -> int:
    """Read, show, compute and write every job; return how many failed."""
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    for job in jobs:
        began = time.monotonic()
        try:
            picture, lines = open_one(job)
            out.print(f"{job.source} -> {job.output}", *(f"  {line}" for line in lines), sep="\n", markup=False)
            if dry_run:
                continue
            with Progress(*columns, console=err, transient=True) as bar:
                task = bar.add_task(job.source.name, total=None)

                def tick(done: int, total: int, preview: object, bar=bar, task=task) -> None:
                    bar.update(task, completed=done, total=total)

                result = finish_one(job, picture, tick)
            height, width = result.size
            seconds = time.monotonic() - began
            rate = seconds / (height * width / 1e6)
            out.print(f"  {width} x {height} written in {seconds:.1f} s ({rate:.1f} s per megapixel)", markup=False)
        except (ValueError, MemoryError) as error:
            failed += 1
            _complain(error)
    return failed


@app.command()
@one_line_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the two pictures.")] = Path("out"),
    device: DeviceOption = Device.auto,
) -> None:
    """Upscale the shipped photo x8 and write it with a comparison (nearest, bicubic, ours)."""
    from dataclasses import replace

    from .batch import Job, Output, finish_job, open_job
    from .evaluation import compare, example_path
    from .files import read_picture, write_picture
    from .pipeline import UpscaleOptions
    from .plan import Target

    output.mkdir(parents=True, exist_ok=True)
    job = Job(example_path(), output / "demo-x8.png")
    networks = _load("embedded", None, None, device, Precision.fp32)
    run = networks, Target(scale=8), UpscaleOptions(), Output(overwrite=True)
    if run_jobs(
        [job], lambda job: open_job(job, *run), lambda job, picture, tick: finish_job(job, picture, *run, tick)
    ):
        raise typer.Exit(1)
    small, ours = read_picture(job.source), read_picture(job.output)
    panels = output / "demo-compare.png"
    write_picture(panels, replace(small, pixels=compare(small.pixels, ours.pixels)), overwrite=True)
    out.print(f"{panels}: nearest | bicubic | ours, one part at full size", markup=False)


@app.command()
@one_line_errors
def info() -> None:
    """Show versions, devices and the models found."""
    import torch

    from .checkpoints import embedded_path, read_model
    from .local import pick_device

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
    stages = f"stage one t={file.first_step.t}, stage two t={file.second.step.t}"
    table.add_row("embedded model", f"{file.name}, {embedded_path().stat().st_size / 2**20:.1f} MiB, {stages}")
    out.print(table)


@app.command()
@one_line_errors
def evaluate(
    folder: Annotated[
        Path | None, typer.Argument(help="Sharp pictures; default: the five public test pictures.")
    ] = None,
    model: ModelOption = "embedded",
    stage_one: StageOne = None,
    stage_two: StageTwo = None,
    device: DeviceOption = Device.auto,
    dtype: PrecisionOption = Precision.fp32,
) -> None:
    """Measure PSNR-Y and SSIM against bicubic, Lanczos and a filter bank, at x4 and x8."""
    from .evaluation import evaluate_model, read_folder, summary_rows
    from .training.data import read_held_out

    pictures = read_folder(folder) if folder else read_held_out()
    networks = _load(model, stage_one, stage_two, device, dtype)
    with err.status("measuring"):
        scores = evaluate_model(networks, pictures)
    table = Table(title="PSNR-Y in dB / SSIM; gain and worst are over Lanczos", title_justify="left")
    for index, head in enumerate(("case", "method", *pictures, "mean", "gain", "worst")):
        table.add_column(head, justify="left" if index < 2 else "right", no_wrap=True)
    for row in summary_rows(scores):
        table.add_row(*row)
    Console(width=max(out.width, 62 + 16 * (len(pictures) + 1)), highlight=False).print(table)


def main() -> None:
    """Run the command; usage errors exit with 2, every expected failure with 1 and one line on stderr."""
    handler = RichHandler(console=err, show_path=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    app()
