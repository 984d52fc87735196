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
    MethodName,
    OutputOption,
    OverlapOption,
    Precision,
    PrecisionOption,
    ScaleOption,
    TileBatchOption,
    WidthOption,
    WindowOption,
    err,
    given,
    never_fail_to_print,
    one_line_errors,
    out,
    run_command,
    target_of,
)
from .degrading import add_degrade_command
from .files import add_file_commands
from .stablesr import CFWOption, GuidanceOption, NegativeOption, StableSROption, stablesr_upscaler
from .training import add_training_commands
from .zoom import add_zoom_command

if TYPE_CHECKING:
    from ..evaluation import Result

app = typer.Typer(
    help="Diffusion super-resolution in two one-step stages (TUDSR).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
add_file_commands(app)
add_zoom_command(app)
add_degrade_command(app)
add_training_commands(app)


ModelOption = Annotated[
    str, typer.Option(help="'embedded', a tudsr-model .safetensors, or an SD2.1-base folder or checkpoint.")
]
StageOne = Annotated[
    Path | None,
    typer.Option(**PATH, help="Adapter for a base --model: TUDSR, OMGSR, OSEDiff, PiSA-SR or InvSR."),
]
StageTwo = Annotated[Path | None, typer.Option(**PATH, help="TUDSR's stage-two adapter, for more than x4.")]
MethodOption = Annotated[
    MethodName | None, typer.Option(help="For peft folders, which do not say: tudsr or omgsr. Or stablesr.")
]
PromptOption = Annotated[str | None, typer.Option(help="Prompt instead of the method's own.")]
TokenizerOption = Annotated[
    Path | None,
    typer.Option(**PATH, help="CLIP's vocab.json and merges.txt, for prompts with a single file."),
]
StepsOption = Annotated[
    int | None,
    typer.Option(help="Network evaluations per tile: 1 to 5 with InvSR, 200 with StableSR (Turbo: 4), else 1."),
]
FidelityOption = Annotated[
    float | None,
    typer.Option(help="PiSA-SR: weight of the pixel-level part (1). StableSR: --cfw's weight, 0 to 1 (0.5)."),
]
DetailOption = Annotated[float, typer.Option(help="PiSA-SR: weight of the semantic part.")]


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
def upscale(
    inputs: Inputs,
    output: OutputOption,
    scale: ScaleOption = None,
    width: WidthOption = None,
    height: HeightOption = None,
    long_edge: LongEdgeOption = None,
    model: ModelOption = "embedded",
    stage_one: StageOne = None,
    stage_two: StageTwo = None,
    method: MethodOption = None,
    timestep: Annotated[int, typer.Option(help="Timestep of stage one; 0: as trained.")] = 0,
    steps: StepsOption = None,
    fidelity: FidelityOption = None,
    detail: DetailOption = 1.0,
    stablesr: StableSROption = None,
    cfw: CFWOption = None,
    guidance: GuidanceOption = None,
    negative: NegativeOption = None,
    prompt: PromptOption = None,
    tokenizer: TokenizerOption = None,
    device: DeviceOption = Device.auto,
    dtype: PrecisionOption = Precision.fp32,
    tile: Annotated[
        int | None, typer.Option(help="Tile side in pixels; default: 512 to 640, as computes least.")
    ] = None,
    overlap: OverlapOption = None,
    tile_batch: TileBatchOption = None,
    window: WindowOption = None,
    published: Annotated[
        bool, typer.Option(help="Tiles as the method's own script has them: side, overlap, places, weights.")
    ] = False,
    native_size: Annotated[
        bool, typer.Option(help="Enlarge small pictures first, so that networks work at their native size (512 px).")
    ] = True,
    color_fix: ColorFixOption = None,
    sample_posterior: Annotated[bool, typer.Option(help="Draw latents instead of taking their mode.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of that draw.")] = None,
    bits: Annotated[int | None, typer.Option(help="8 or 16 per channel; default: as the input.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 95,
    suffix: FormatOption = None,
    force: ForceOption = False,
    max_megapixels: MegapixelsOption = None,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and stop.")] = False,
) -> None:
    """Enlarge pictures: tudsr upscale photo.png -o photo-x8.png --scale 8"""
    from ..backends import AdapterOptions
    from ..batch import Output, plan_jobs
    from ..methods import TwoStage, UpscaleOptions

    if bits not in (None, 8, 16):
        raise ValueError(f"--bits {bits} is not possible; use 8 or 16")
    tiles = given(tile_px=tile, overlap_px=overlap)
    how = given(tile_batch=tile_batch, window=window)
    if published and tiles.keys() | how.keys() - {"tile_batch"}:
        raise ValueError("--published has its own tile, overlap and window; leave out --tile, --overlap and --window")
    chosen = tiles | given(color_fix=color_fix, seed=seed)
    target = target_of(scale, width, height, long_edge)
    jobs = plan_jobs(inputs, output, f".{suffix.value}" if suffix else None)
    if stablesr or method is MethodName.stablesr:
        others = dict(stage_one=stage_one, stage_two=stage_two, timestep=timestep, published=published)
        _refuse("--method stablesr", others | dict(detail=detail != 1, sample_posterior=sample_posterior))
        how |= given(steps=steps, guidance=guidance)
        loading = dict(device=device.value, dtype=dtype.value, tokenizer=tokenizer)
        upscaler = stablesr_upscaler(model, stablesr, cfw, fidelity, prompt, negative, chosen, how, loading)
    else:
        _refuse("this method", dict(cfw=cfw, guidance=guidance, negative=negative))
        options = UpscaleOptions(
            **chosen, **how, sample_posterior=sample_posterior, published=published, native_size=native_size
        )
        weights = given(steps=steps, fidelity=fidelity, detail=detail)
        use = AdapterOptions(method and method.value, timestep, prompt=prompt, tokenizer=tokenizer, **weights)
        upscaler = TwoStage(_load(model, stage_one, stage_two, device, dtype, use), options)
    written = Output(bits, quality, force, max_megapixels)
    run_command(jobs, output, lambda job: upscaler, target, written, dry_run)


def _refuse(method: str, options: dict[str, object]) -> None:
    """Raise ValueError for options that were given and would be ignored."""
    if names := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        raise ValueError(f"{method} does not have {', '.join(names)}; leave that out")


def _load(model: str, stage_one: Path | None, stage_two: Path | None, device: Device, dtype: Precision, use=None):
    from ..backends import AdapterOptions, load_embedded, load_sd21

    if not model:
        raise ValueError("--model is empty; leave it out for the embedded model")
    path = Path(model)
    if stage_one:
        if model == "embedded":
            raise ValueError("--stage-one belongs to a base model; add --model with SD2.1-base")
        return load_sd21(path, stage_one, stage_two, device.value, dtype.value, use)
    if use not in (None, AdapterOptions()):
        raise ValueError("method, timestep, steps, prompt, fidelity and detail belong to an adapter; add --stage-one")
    if model == "embedded":
        return load_embedded(device.value, dtype.value)
    if path.is_dir() or stage_two:
        raise ValueError(f"--model {model} is a base model; add --stage-one with its adapter")
    return load_embedded(device.value, dtype.value, path)


@app.command()
@one_line_errors
def demo(
    output: Annotated[Path, typer.Option("-o", "--output", **PATH, help="Folder for the two pictures.")] = Path("out"),
    device: DeviceOption = Device.auto,
) -> None:
    """Upscale the shipped photo x8 and write it with a comparison (nearest, bicubic, ours)."""
    from dataclasses import replace

    from ..batch import Job, Output
    from ..evaluation import compare, example_path
    from ..methods import Target, TwoStage
    from ..pictures import read_picture, write_picture

    output.mkdir(parents=True, exist_ok=True)
    job = Job(example_path(), output / "demo-x8.png")
    upscaler = TwoStage(_load("embedded", None, None, device, Precision.fp32))
    run_command([job], output, lambda job: upscaler, Target(scale=8), Output(overwrite=True))
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
    networks = _load(model, stage_one, stage_two, device, dtype)

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
