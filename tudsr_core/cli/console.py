"""What the commands share: where they print, how they fail, and the choices of their options."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import Enum
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..methods import METHODS
from ..missing_packages import needs
from ..pictures import MAX_MEGAPIXELS
from ..untrusted import printable

if TYPE_CHECKING:
    from ..methods import Target

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Precision = Enum("Precision", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
MethodName = Enum("MethodName", {name: name for name in (*METHODS, "stablesr")}, type=str)
Device = Enum("Device", {name: name for name in ("auto", "cpu", "cuda", "mps")}, type=str)
WindowName = Enum("WindowName", {name: name for name in ("gaussian", "uniform", "published")}, type=str)
ColorName = Enum("ColorName", {name: name for name in ("wavelet", "adain", "lab", "none")}, type=str)
Suffix = Enum("Suffix", {name: name for name in ("png", "jpg", "webp", "tif", "exr")}, type=str)


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


def with_options_of(other: Callable[..., object]) -> Callable[[Callable], Callable]:
    """Give a command that takes `**options` the options of the function `other`, before its own keyword-only ones."""

    def decorate(command: Callable) -> Callable:
        own = [p for p in signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        options = [p.replace(kind=p.KEYWORD_ONLY) for p in signature(other, eval_str=True).parameters.values()]
        first = [p for p in own if p.kind is not p.KEYWORD_ONLY]
        parameters = [*first, *options, *own[len(first) :]]
        command.__signature__ = Signature(parameters)
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def given(**values: object) -> dict[str, object]:
    """Return the options that were given, enumerations by their names."""
    return {name: getattr(value, "value", value) for name, value in values.items() if value is not None}


def ending(suffix: Suffix | None) -> str | None:
    """Return the ending of files of a chosen type."""
    return f".{suffix.value}" if suffix else None


def target_of(scale: float | None, width: int | None, height: int | None, long_edge: int | None) -> Target:
    """Return the size that is asked for: x4 when nothing is; raises ValueError as `Target` does."""
    from ..methods import Target

    if scale is width is height is long_edge is None:
        scale = 4.0
    return Target(scale, width, height, long_edge)
