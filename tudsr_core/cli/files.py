"""The commands about weight files: inspect, convert, download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from .console import PATH, MethodName, Precision, err, one_line_errors, out

File = Annotated[Path, typer.Argument(**PATH, help="A weight file, or a peft or diffusers folder.")]


def add_file_commands(app: typer.Typer) -> None:
    """Give `app` the three commands."""
    for command in (inspect, convert, download):
        app.command()(one_line_errors(command))


def inspect(file: File) -> None:
    """Say what a weight file is: method, base model, steps, what it changes, licence."""
    from .inspection import inspect_file

    table = Table(show_header=False, box=None)
    for name, value in inspect_file(file):
        table.add_row(name, escape(value))
    out.print(table)


def convert(
    file: File,
    output: Annotated[Path, typer.Option("-o", "--output", **PATH, help="The .safetensors file to write.")],
    method: Annotated[MethodName | None, typer.Option(help="For peft folders, which do not say.")] = None,
    stage: Annotated[int | None, typer.Option(min=1, max=2, help="For TUDSR's folders: 1 or 2.")] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Precision to store; default: as it is.")] = None,
    force: Annotated[bool, typer.Option(help="Replace a file that exists.")] = False,
) -> None:
    """Write an adapter of any known format, or a folder with RAM and DAPE, as one safetensors file."""
    from ..models import RAM_FILE
    from ..weights import read_adapter, write_adapter
    from .inspection import describe_adapter

    if output.suffix != ".safetensors":
        raise ValueError(f"{output} must end in .safetensors")
    if output.exists() and not force:
        raise ValueError(f"{output} exists; add --force to replace it")
    if (file / RAM_FILE).is_file():
        return _convert_tagger(file, output)
    adapter = read_adapter(file, method and method.value, stage)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_adapter(output, adapter, dtype and dtype.value)
    summary = "; ".join(f"{name}: {value}" for name, value in describe_adapter(adapter))
    out.print(f"{output}: {summary}", markup=False)


def _convert_tagger(folder: Path, output: Path) -> None:
    from ..models import load_tagger, write_tagger

    tagger = load_tagger(folder)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_tagger(output, tagger)
    out.print(f"{output}: {tagger.name}, {len(tagger.labels):,} tags, fp16", markup=False)


def download(
    name: Annotated[str | None, typer.Argument(help="A name from the list; without one, the list is shown.")] = None,
    to: Annotated[Path, typer.Option(**PATH, help="ComfyUI's models folder, or any other.")] = Path("models"),
) -> None:
    """Fetch one known weight file, checked and resumable, into the right folder; or list them."""
    from ..weights import KNOWN_FILES, download_file, known_file

    if name is None:
        table = Table(box=None)
        for head in ("file", "gives", "licence", "folder", "from"):
            table.add_column(head, no_wrap=head == "file", overflow="fold")
        for file in KNOWN_FILES:
            table.add_row(file.name, file.gives, file.licence, file.folder, file.page)
        out.print(table)
        return
    known = known_file(name)
    if known is None:
        raise ValueError(f"{name!r} is not in the list; see: tudsr download")
    if known.url is None:
        raise ValueError(
            f"{name} has no direct address; follow its authors' link at {known.page} (licence: {known.licence})"
        )
    path = to / known.folder / known.name
    out.print(f"{known.name}, licence: {known.licence}, from {known.url}", markup=False)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(known.name, total=None)
        digest = download_file(
            known.url, path, known.digest, lambda done, total: bar.update(task, completed=done, total=total)
        )
    out.print(f"{path} ({digest})", markup=False)
