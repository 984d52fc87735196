"""What the commands share: where they print, how they fail, and the choices of their options."""

from __future__ import annotations

from enum import Enum
from functools import wraps

import typer
from rich.console import Console

from .methods import METHODS

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

Precision = Enum("Precision", {name: name for name in ("fp32", "bf16", "fp16")}, type=str)
MethodName = Enum("MethodName", {name: name for name in METHODS}, type=str)


def complain(error: BaseException) -> None:
    """Print an error as one red line."""
    text = " ".join(str(error).split()) or type(error).__name__
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
        except KeyboardInterrupt:
            complain(RuntimeError("interrupted; nothing half-written was left"))
            raise typer.Exit(130) from None

    return wrapped
