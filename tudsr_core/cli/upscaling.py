"""`tudsr upscale` and `tudsr watch`: the options of the one-step methods and StableSR, and no logic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .batches import (
    BlocksOption,
    PyramidOption,
    RayOption,
    RecursiveOption,
    ReportOption,
    ShipOption,
    blocks_command,
    ray_command,
    run_command,
    watch_command,
)
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
    ending,
    given,
    one_line_errors,
    target_of,
    with_options_of,
)
from .stablesr import CFWOption, GuidanceOption, NegativeOption, StableSROption, stablesr_upscaler

if TYPE_CHECKING:
    from ..batch import Job

ModelOption = Annotated[
    str, typer.Option(help="'embedded', a tudsr-model .safetensors, or an SD2.1-base folder or checkpoint.")
]
StageOne = Annotated[
    Path | None,
    typer.Option(**PATH, help="Adapter for a base --model: TUDSR, OMGSR, HYPIR, OSEDiff, PiSA-SR or InvSR."),
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
InventiveOption = Annotated[
    float | None,
    typer.Option(
        help="One dial for all methods, 0 faithful to 1 inventive; default 0.5, as trained. The plan says what it does."
    ),
]


def add_upscale_commands(app: typer.Typer) -> None:
    """Give `app` the two commands."""
    for command in (upscale, watch):
        app.command()(one_line_errors(command))


def prepare(
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
    inventive: InventiveOption = None,
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
    bits: Annotated[
        int | None, typer.Option(help="8 or 16 per channel, 32 for floats (.tif, .exr); default: as the input.")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of JPEG and WebP.")] = 95,
    linear: Annotated[
        bool, typer.Option("--linear", help="Float TIFFs hold scene-linear light, as OpenEXR does.")
    ] = False,
    suffix: FormatOption = None,
    force: ForceOption = False,
    max_megapixels: MegapixelsOption = None,
) -> tuple[Any, Callable[[], dict]]:
    """Load what these options ask for; returns the `Work` on every picture, and what describes a run."""
    from ..backends import AdapterOptions
    from ..batch import Output, Work, describe_run
    from ..methods import NEUTRAL, TwoStage, UpscaleOptions

    inventive = None if inventive == NEUTRAL else inventive
    if bits not in (None, 8, 16, 32):
        raise ValueError(f"--bits {bits} is not possible; use 8, 16 or 32")
    tiles = given(tile_px=tile, overlap_px=overlap)
    how = given(tile_batch=tile_batch, window=window)
    if published and tiles.keys() | how.keys() - {"tile_batch"}:
        raise ValueError("--published has its own tile, overlap and window; leave out --tile, --overlap and --window")
    chosen = tiles | given(color_fix=color_fix, seed=seed)
    target = target_of(scale, width, height, long_edge)
    files = dict(stage_one=stage_one, stage_two=stage_two, stablesr=stablesr, cfw=cfw, tokenizer=tokenizer)
    words = given(prompt=prompt, negative=negative, method=method, dtype=dtype, format=suffix)
    if stablesr or method is MethodName.stablesr:
        others = dict(stage_one=stage_one, stage_two=stage_two, timestep=timestep, published=published)
        _refuse("--method stablesr", others | dict(detail=detail != 1, sample_posterior=sample_posterior))
        how |= given(steps=steps, guidance=guidance)
        loading = dict(device=device.value, dtype=dtype.value, tokenizer=tokenizer)
        upscaler = stablesr_upscaler(
            model, stablesr, cfw, given(fidelity=fidelity, inventive=inventive), prompt, negative, chosen, how, loading
        )
    else:
        _refuse("this method", dict(cfw=cfw, guidance=guidance, negative=negative))
        options = UpscaleOptions(
            **chosen, **how, sample_posterior=sample_posterior, published=published, native_size=native_size
        )
        weights = given(steps=steps, fidelity=fidelity, detail=detail, inventive=inventive)
        use = AdapterOptions(method and method.value, timestep, prompt=prompt, tokenizer=tokenizer, **weights)
        upscaler = TwoStage(load_model(model, stage_one, stage_two, device, dtype, use), options)
    numbers = given(steps=steps, timestep=timestep, fidelity=fidelity, detail=detail, inventive=inventive)
    work = Work(lambda job: upscaler, target, Output(bits, quality, force, max_megapixels, linear=linear or None))

    def describe() -> dict:
        return describe_run(_files(model, files), upscaler.options, target, work.output, **words, **numbers)

    return work, describe


@with_options_of(prepare)
def upscale(
    inputs: Inputs,
    output: OutputOption,
    *,
    recursive: RecursiveOption = False,
    report: ReportOption = None,
    blocks: BlocksOption = False,
    pyramid: PyramidOption = False,
    ray: RayOption = None,
    ship: ShipOption = False,
    dry_run: Annotated[bool, typer.Option(help="Show the plan and stop.")] = False,
    **options,
) -> None:
    """Enlarge pictures: tudsr upscale photo.png -o photo-x8.png --scale 8"""
    from ..batch import plan_jobs

    if pyramid and not blocks:
        raise ValueError("--pyramid belongs to --blocks; add it")
    if blocks and ray:
        raise ValueError("--blocks computes one picture on this machine; leave out --ray")
    if blocks and options["linear"]:
        raise ValueError("--blocks reads no scene-linear pictures; leave out --linear")
    if ship and not ray:
        raise ValueError("--ship belongs to --ray; add it")
    jobs = plan_jobs(inputs, output, ending(options["suffix"]), recursive)
    if ray and not dry_run:
        cluster = ray, ship, options["device"] is not Device.cpu
        return ray_command(jobs, output, cluster, partial(prepare, **_anywhere(options)), report)
    work, describe = prepare(**options)
    if blocks:
        return blocks_command(jobs, work, describe, pyramid, dry_run, report)
    return run_command(jobs, output, work, describe, dry_run, report)


@with_options_of(prepare)
def watch(
    folder: Annotated[Path, typer.Argument(**PATH, help="The folder in which pictures arrive.")],
    output: Annotated[Path, typer.Option("-o", "--output", **PATH, help="The folder for the results.")],
    *,
    recursive: RecursiveOption = False,
    settle: Annotated[
        float, typer.Option(min=0.1, help="Seconds without a change after which a file counts as complete.")
    ] = 2.0,
    **options,
) -> None:
    """Enlarge pictures as they arrive in a folder, until Ctrl-C: tudsr watch hot/ -o done/"""
    from ..batch import HotFolder, plan_jobs

    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; create it, or name another")
    if output.is_file():
        raise ValueError(f"{output} is a file, not a folder; choose another name with -o")
    hot = HotFolder(folder, settle, recursive, skip=output)

    def arrived() -> list[Job]:
        ready = hot.complete()
        found = plan_jobs([folder], output, ending(options["suffix"]), recursive) if ready else ()
        return [job for job in found if job.source in ready]

    watch_command(arrived, output, *prepare(**options), settle / 2)


def _anywhere(options: dict[str, Any]) -> dict[str, Any]:
    """Return options that say the same in another process, whose folder is another: with absolute paths."""
    found = {name: value.absolute() if isinstance(value, Path) else value for name, value in options.items()}
    is_path = found["model"] != "embedded" and Path(found["model"]).exists()
    return found | ({"model": str(Path(found["model"]).absolute())} if is_path else {})


def _files(model: str, others: dict[str, Path | None]) -> dict[str, Path | None]:
    """Return the files that decide what pictures look like, by the names of their options."""
    from ..weights import embedded_path

    return {"model": embedded_path() if model == "embedded" else Path(model), **others}


def _refuse(method: str, options: dict[str, object]) -> None:
    """Raise ValueError for options that were given and would be ignored."""
    if names := [f"--{name.replace('_', '-')}" for name, value in options.items() if value]:
        raise ValueError(f"{method} does not have {', '.join(names)}; leave that out")


def load_model(model: str, stage_one: Path | None, stage_two: Path | None, device: Device, dtype: Precision, use=None):
    """Return the embedded model, one of its kind, or a base with adapters; raises ValueError for what does not fit."""
    from ..backends import AdapterOptions, load_embedded, load_sd21
    from ..methods import NEUTRAL

    if not model:
        raise ValueError("--model is empty; leave it out for the embedded model")
    path = Path(model)
    if stage_one:
        if model == "embedded":
            raise ValueError("--stage-one belongs to a base model; add --model with SD2.1-base")
        return load_sd21(path, stage_one, stage_two, device.value, dtype.value, use)
    inventive = use.inventive if use else NEUTRAL
    if use not in (None, AdapterOptions(inventive=inventive)):
        raise ValueError("method, timestep, steps, prompt, fidelity and detail belong to an adapter; add --stage-one")
    if model == "embedded":
        return load_embedded(device.value, dtype.value, inventive=inventive)
    if path.is_dir() or stage_two:
        raise ValueError(f"--model {model} is a base model; add --stage-one with its adapter")
    return load_embedded(device.value, dtype.value, path, inventive)
