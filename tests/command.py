"""The `tudsr` command for tests: every call a process of its own, but torch is loaded once for all of them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from multiprocessing.process import BaseProcess
from pathlib import Path

TUDSR = [sys.executable, "-m", "tudsr_core"]
WIDE = {**os.environ, "COLUMNS": "400"}
# Not the command's own modules: they look at the environment when they are imported.
HEAVY = [
    "torch",
    "tudsr_core.backends.local",
    "tudsr_core.cli.inspection",
    "tudsr_core.pictures.reading",
    "tudsr_core.pictures.writing",
    "tudsr_core.training.session",
    "tudsr_core.training.colearn_session",
    "diffusers.models.unets.unet_2d_condition",
    "peft",
    "accelerate",
]


def _run(arguments: list[str], folder: str, env: dict[str, str], files: list[str], group: bool) -> None:
    os.chdir(folder)
    if group:
        os.setsid()
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(files, 1):
        written = os.open(path, os.O_WRONLY)
        os.dup2(written, number)
        os.close(written)
    sys.stdin.close()
    sys.argv = ["tudsr", *arguments]
    from tudsr_core.cli.app import main

    main()


def start(
    arguments: list[object], files: list[Path], env: dict[str, str] | None = None, group: bool = False
) -> BaseProcess:
    """Start the command, with `group` in a group of processes of its own; its two `files` get out and err."""
    words = [str(word) for word in arguments]
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    context.set_forkserver_preload(HEAVY)
    for path in files:
        path.touch()
    names = [str(path) for path in files]
    child = context.Process(target=_run, args=(words, os.getcwd(), dict(env or os.environ), names, group))
    child.start()
    return child


def tudsr(*arguments: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command to its end; returns its code and what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, name) for name in ("out", "err")]
        child = start(list(arguments), files, env)
        child.join()
        out, err = (path.read_text("utf-8") for path in files)
    return subprocess.CompletedProcess([*TUDSR, *map(str, arguments)], child.exitcode, out, err)
