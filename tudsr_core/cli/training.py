"""`tudsr train` and `tudsr timestep`: options, a progress bar, and no logic."""

from __future__ import annotations

import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .console import PATH, Device, DeviceOption, complain, err, one_line_errors, out

if TYPE_CHECKING:
    from ..training import Outcome

ConfigFile = Annotated[Path, typer.Argument(**PATH, help="A TOML file of settings; see docs/training.md.")]
ResumeOption = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the output folder.")]
DamageName = Enum("DamageName", {name: name for name in ("omgsr", "real-esrgan")}, type=str)
SHOWN = ("mae", "dists", "adversarial", "critic_fake", "critic_real", "skipped")
SHOWN += ("teacher", "pixel", "cycle", "down_adversarial", "low_frequency")


def add_training_commands(app: typer.Typer) -> None:
    """Give `app` the commands."""
    group = typer.Typer(help="Train adapters and downsamplers on your own pictures.", no_args_is_help=True)
    group.command("stage-one")(one_line_errors(stage_one))
    group.command("stage-two")(one_line_errors(stage_two))
    group.command("downsampler")(one_line_errors(downsampler))
    group.command("colearn")(one_line_errors(colearn))
    app.add_typer(group, name="train")
    app.command()(one_line_errors(timestep))


def stage_one(config: ConfigFile, resume: ResumeOption = False) -> None:
    """Train stage one: tudsr train stage-one stage-one.toml; several GPUs: accelerate launch -m tudsr_core train ..."""
    _train(config, 1, resume)


def stage_two(config: ConfigFile, resume: ResumeOption = False) -> None:
    """Train stage two behind a trained stage one: tudsr train stage-two stage-two.toml"""
    _train(config, 2, resume)


def downsampler(config: ConfigFile, resume: ResumeOption = False) -> None:
    """Train a downsampler on good and on poor pictures: tudsr train downsampler downsampler.toml"""
    from ..training import read_colearn, train_colearn

    settings = read_colearn(config, "downsampler")
    _watch(settings.steps, lambda *reporters: train_colearn(settings, resume, *reporters))


def colearn(config: ConfigFile, resume: ResumeOption = False) -> None:
    """Train an upsampler and a downsampler together, for one kind of damage: tudsr train colearn colearn.toml"""
    from ..training import read_colearn, train_colearn

    settings = read_colearn(config, "colearn")
    _watch(settings.steps, lambda *reporters: train_colearn(settings, resume, *reporters))


def _train(path: Path, stage: int, resume: bool) -> None:
    from ..training import read_config, train

    config = read_config(path, stage)
    _watch(config.optimizer.steps, lambda *reporters: train(config, stage, resume, *reporters))


def _watch(steps: int, run: Callable[..., Outcome]) -> None:
    """Run a training with a progress bar, and print what it has written."""
    from ..training import TrainingError

    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    shown = err.is_terminal and os.environ.get("RANK", "0") == "0"
    try:
        with Progress(*columns, console=err, disable=not shown) as bar:
            outcome = run(*_reporters(bar, steps))
    except TrainingError as error:
        complain(error)
        raise typer.Exit(1) from None
    if not outcome.is_main:
        return
    for file in outcome.files:
        out.print(str(file), markup=False)
    if not outcome.finished:
        complain(RuntimeError(f"stopped at step {outcome.step}; add --resume to go on"))
        raise typer.Exit(130)


def _reporters(bar: Progress, steps: int) -> tuple[Callable, Callable]:
    task = bar.add_task("", total=steps)

    def report(step: int, numbers: dict[str, float]) -> None:
        said = "  ".join(f"{name} {numbers[name]:.3f}" for name in SHOWN if name in numbers)
        bar.update(task, completed=step, description=said)

    def started(step: int) -> None:
        bar.reset(task, completed=step, total=steps)

    return report, started


def timestep(
    folder: Annotated[Path, typer.Argument(**PATH, help="Sharp pictures, as for training.")],
    model: Annotated[str, typer.Option(help="SD2.1-base (folder or checkpoint), a tudsr-model file, or 'embedded'.")],
    factor: Annotated[int, typer.Option(min=1, help="How much smaller low-quality pictures are; 8 for x8.")] = 4,
    size: Annotated[int, typer.Option(min=16, help="Side of the networks' pictures.")] = 512,
    degradation: Annotated[DamageName, typer.Option(help="Published set of parameters.")] = DamageName.omgsr,
    adapter: Annotated[
        Path | None, typer.Option("--stage-one", **PATH, help="For stage two's timestep: the adapter of stage one.")
    ] = None,
    chunks: Annotated[int, typer.Option(min=1, help="2 for stage two: its pictures are enlarged so much.")] = 1,
    count: Annotated[int, typer.Option(min=1, help="Pictures to look at.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of crops and degradations.")] = 123,
    device: DeviceOption = Device.auto,
) -> None:
    """Estimate which timestep low-quality latents resemble: tudsr timestep photos/ --model sd21-base/"""
    from ..backends import pick_device
    from ..training import DataConfig, ModelConfig, RunConfig, TrainingConfig, estimate_timestep

    config = TrainingConfig(
        output=Path(),
        model=ModelConfig(model, stage_one=adapter),
        data=DataConfig((folder,), size, chunks, factor, degradation.value, workers=0),
        run=RunConfig("fp32"),
        seed=seed,
    )
    if adapter and chunks == 1:
        raise ValueError("--stage-one is for stage two; add --chunks 2")
    with err.status("encoding"):
        found = estimate_timestep(config, 1 if chunks == 1 else 2, count, pick_device(device.value))
    out.print(f"t = {found.timestep}  (median squared distance {found.distance:.4f} of {found.pairs} pairs)")
