"""What the commands share: where they print, how they fail, and the choices of their options."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..methods import METHODS
from ..missing_packages import needs
from ..pictures import MAX_MEGAPIXELS
from ..untrusted import printable

if TYPE_CHECKING:
    from ..batch import Job, OpenJob, Output
    from ..methods import Target, Upscaler
    from ..pictures import Picture

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Precision = Enum("Precision", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
MethodName = Enum("MethodName", {name: name for name in (*METHODS, "stablesr")}, type=str)
Device = Enum("Device", {name: name for name in ("auto", "cpu", "cuda", "mps")}, type=str)
WindowName = Enum("WindowName", {name: name for name in ("gaussian", "uniform", "published")}, type=str)
ColorName = Enum("ColorName", {name: name for name in ("wavelet", "adain", "none")}, type=str)
Suffix = Enum("Suffix", {name: name for name in ("png", "jpg", "webp", "tif")}, type=str)


def _given_path(text: str) -> Path:
    if not str(text).strip():
        raise typer.BadParameter(f"it is empty ({str(text)!r}); '.' is the current folder")
    return Path(text)


# Path("") would be the current folder: what a script with an unset variable asks for.
PATH = {"parser": _given_path, "metavar": "PATH"}

Inputs = Annotated[
    list[Path], typer.Argument(parser=_given_path, metavar="IN...", help="Pictures or folders of pictures.")
]
OutputOption = Annotated[Path, typer.Option("-o", "--output", **PATH, help="A file for one input, else a folder.")]
MegapixelsOption = Annotated[
    float | None,
    typer.Option(
        "--max-megapixels",
        min=0,
        help=f"Largest picture to read; default: {MAX_MEGAPIXELS}, less for a small file that claims much.",
    ),
]
ScaleOption = Annotated[float | None, typer.Option(help="Enlarge by this factor, from 1 to 64 (default 4).")]
WidthOption = Annotated[int | None, typer.Option(help="Enlarge to this width in pixels.")]
HeightOption = Annotated[int | None, typer.Option(help="Enlarge to this height in pixels.")]
LongEdgeOption = Annotated[int | None, typer.Option(help="Enlarge until the longer side has this length.")]
OverlapOption = Annotated[int | None, typer.Option(help="Overlap of neighbouring tiles in pixels.")]
TileBatchOption = Annotated[int | None, typer.Option(help="Tiles computed at once on a GPU; default: as many as fit.")]
WindowOption = Annotated[WindowName | None, typer.Option(help="How overlapping tiles are weighted.")]
ColorFixOption = Annotated[ColorName | None, typer.Option(help="How colours follow the input.")]
FormatOption = Annotated[Suffix | None, typer.Option("--format", help="File type; default: as the input.")]
ForceOption = Annotated[bool, typer.Option(help="Replace files that exist.")]
DeviceOption = Annotated[Device, typer.Option(help="Where to compute.")]
PrecisionOption = Annotated[Precision, typer.Option("--dtype", help="Precision of the networks.")]


def never_fail_to_print() -> None:
    """Let stdout escape what its encoding lacks: a name that the console cannot show must not end a job."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # absent where a caller has put its own object in their place
            stream.reconfigure(errors="backslashreplace")


def complain(error: BaseException) -> None:
    """Print an error as one red line."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    err.print(f"error: {text}", style="red", markup=False)


def one_line_errors(command):
    """Wrap a command so that expected failures and Ctrl-C end it with one line and an exit code."""

    @wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, MemoryError) as error:
            complain(error)
            raise typer.Exit(1) from None
        except ImportError as error:
            complain(ImportError(f"this {needs(error)}"))
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            complain(RuntimeError("interrupted; nothing half-written was left"))
            raise typer.Exit(130) from None

    return wrapped


def given(**values: object) -> dict[str, object]:
    """Return the options that were given, enumerations by their names."""
    return {name: getattr(value, "value", value) for name, value in values.items() if value is not None}


def target_of(scale: float | None, width: int | None, height: int | None, long_edge: int | None) -> Target:
    """Return the size that is asked for: x4 when nothing is; raises ValueError as `Target` does."""
    from ..methods import Target

    if scale is width is height is long_edge is None:
        scale = 4.0
    return Target(scale, width, height, long_edge)


def run_command(
    jobs: Sequence[Job],
    folder: Path,
    upscaler_for: Callable[[Job], Upscaler],
    target: Target,
    output: Output,
    dry_run: bool = False,
) -> None:
    """Run a command's jobs; exit with 1 if any failed. A new `folder` is made, in an old one finished pictures stay."""
    from ..batch import finish_job, open_job

    into_folder = jobs[0].output.parent == folder
    if into_folder and not dry_run:
        folder.mkdir(parents=True, exist_ok=True)
    failed = run_jobs(
        jobs,
        lambda job: open_job(job, upscaler_for(job), target, output, dry_run),
        lambda opened, tick: finish_job(opened, upscaler_for(opened.job), output, tick),
        dry_run,
        keep=into_folder and not output.overwrite,
    )
    if failed:
        raise typer.Exit(1)


def run_jobs(
    jobs: Sequence[Job],
    open_one: Callable[[Job], OpenJob],
    finish_one: Callable[[OpenJob, Callable], Picture],
    dry_run: bool = False,
    keep: bool = False,
) -> int:
    """Read, announce, compute and write every job; return how many failed, each with one line.

    With `keep`, jobs whose output is there already are left as they are. Several jobs are counted,
    and summed up at the end or at an interrupt.
    """
    done, failed, began = Counter(), [], time.monotonic()
    try:
        for number, job in enumerate(jobs, 1):
            count = f"{number} of {len(jobs)}: " if len(jobs) > 1 else ""
            if keep and not dry_run and job.output.exists():
                done["kept"] += 1
                out.print(f"{count}{printable(job.output)} is there already and kept", markup=False)
                continue
            try:
                _run_job(job, count, open_one, finish_one, dry_run)
                done["planned" if dry_run else "written"] += 1
            except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
                failed.append(printable(job.source.name))
                complain(_explained(error, job))
    finally:
        if len(jobs) > 1:
            _sum_up(len(jobs), done, failed, time.monotonic() - began)
    return len(failed)


def _explained(error: Exception, job: Job) -> Exception:
    """Return what to say about `error`; RuntimeErrors other than "not enough memory" are mistakes and raised."""
    out_of_memory = "OutOfMemoryError" in type(error).__name__ or "allocate memory" in str(error)
    if out_of_memory or isinstance(error, MemoryError):
        return MemoryError(f"{job.source} needs more memory than there is")
    if isinstance(error, RuntimeError):
        raise error
    if isinstance(error, ImportError):
        return ImportError(f"{job.source} {needs(error)}")
    return error


def _run_job(job: Job, count: str, open_one: Callable, finish_one: Callable, dry_run: bool) -> None:
    began = time.monotonic()
    opened = open_one(job)
    names = printable(f"{job.source} -> {job.output}")
    out.print(f"{count}{names}", *(f"  {line}" for line in opened.describe()), sep="\n", markup=False)
    if dry_run:
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Where nobody watches, rich would leave an empty line per picture among the errors.
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(count + printable(job.source.name), total=None)

        def tick(done: int, total: int, preview: object) -> None:
            bar.update(task, completed=done, total=total)

        result = finish_one(opened, tick)
    height, width = result.size
    seconds = time.monotonic() - began
    rate = seconds / (height * width / 1e6)
    out.print(f"  {width} x {height} written in {seconds:.1f} s ({rate:.1f} s per megapixel)", markup=False)


def _sum_up(total: int, done: Counter[str], failed: list[str], seconds: float) -> None:
    parts = [f"{count} {what}" for what, count in done.items()]
    if failed:
        parts.append(f"{len(failed)} failed ({', '.join(failed[:10])}{', ...' if len(failed) > 10 else ''})")
    if left := total - done.total() - len(failed):
        parts.append(f"{left} not begun or not finished")
    hint = "; --force replaces what is there" if done["kept"] else ""
    out.print(f"{total} pictures: {', '.join(parts)}, in {seconds:.0f} s{hint}", markup=False)
