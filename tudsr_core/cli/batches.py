"""Runs over pictures on the command line: what is said while they go, and how they end. No logic of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..untrusted import printable
from . import console
from .console import PATH, complain

if TYPE_CHECKING:
    from ..batch import Job, Listener, Manifest, OpenJob, Outcome, State, Summary, Work
    from ..methods import Tick

RecursiveOption = Annotated[
    bool, typer.Option("--recursive", "-r", help="Also the pictures of folders inside, kept as folders of the output.")
]


ReportOption = Annotated[
    Path | None, typer.Option(**PATH, help="Write a page about the run: pictures before and after, seconds, errors.")
]


def check_report(path: Path | None) -> None:
    """Raise ValueError, before any work, for a report that could not be written."""
    if path and (path.suffix.lower() not in (".html", ".htm") or path.is_dir()):
        raise ValueError(f"--report {path} must end in .html")
    if path and not path.parent.is_dir():
        raise ValueError(f"--report {path}: folder {path.parent} does not exist; create it or choose another")


def run_command(
    jobs: Sequence[Job],
    folder: Path,
    work: Work,
    describe: Callable[[], dict] | None = None,
    dry_run: bool = False,
    report: Path | None = None,
) -> None:
    """Run a command's jobs; exit with 1 if any failed or is left.

    Where the jobs go into `folder`, it is made, and its manifest says what is done already, unless `describe`,
    which returns the run's settings, is None. `report` is a page to be written about the run, also when it is
    interrupted.
    """
    from ..batch import run_jobs

    check_report(report)
    if dry_run:
        raise typer.Exit(1 if _show_plans(jobs, work) else 0)
    _run(jobs, folder, describe, work.output.overwrite, report, lambda *told: run_jobs(jobs, work, *told))


RayOption = Annotated[
    str | None,
    typer.Option(
        metavar="local|HOST:PORT",
        help="Compute on a Ray cluster, in one process per GPU (or CPU); local: on those of this machine.",
    ),
]
ShipOption = Annotated[
    bool, typer.Option(help="With --ray, where the machines share no disk: send the pictures' files there and back.")
]


def ray_command(
    jobs: Sequence[Job],
    folder: Path,
    cluster: tuple[str, bool, bool],
    make: Callable[[], tuple],
    report: Path | None,
) -> None:
    """Run a command's jobs on a Ray cluster, as `run_command` does; `make` loads the model there.

    `cluster` is its address, whether files are to be sent, and whether GPUs are to be used.
    """
    from ..batch import ray_crew, run_on_workers

    check_report(report)
    address, ship, gpus = cluster
    with ray_crew(address, make, len(jobs), ship, gpus) as crew:
        said = crew.said
        _run(jobs, folder, lambda: said.settings, said.output.overwrite, report, partial(run_on_workers, jobs, crew))


def _run(
    jobs: Sequence[Job],
    folder: Path,
    describe: Callable[[], dict] | None,
    force: bool,
    report: Path | None,
    run: Callable[[Listener, Manifest | None], Summary],
) -> None:
    from ..batch import Report, Together, open_manifest

    with ExitStack() as held:
        manifest, into_folder = None, describe is not None and jobs[0].output != folder
        settings = describe() if describe and (into_folder or report) else {}  # it reads all weight files
        if into_folder:
            folder.mkdir(parents=True, exist_ok=True)
            manifest = held.enter_context(open_manifest(folder, settings, force))
        listener = Voice(len(jobs))
        if report:
            page = Report(jobs, settings, manifest)
            listener = Together(listener, page)
            held.callback(page.write, report)
        summary = run(listener, manifest)
    if summary.mistake:
        raise summary.mistake
    if summary.failed or summary.stopped:
        raise typer.Exit(1)


BlocksOption = Annotated[
    bool,
    typer.Option(help="For one result larger than memory: computed and written block by block, as a tiled BigTIFF."),
]
PyramidOption = Annotated[bool, typer.Option(help="With --blocks: half-size versions in the same file, for viewers.")]


def blocks_command(
    jobs: Sequence[Job],
    work: Work,
    describe: Callable[[], dict],
    pyramid: bool,
    dry_run: bool,
    report: Path | None,
) -> None:
    """Enlarge one picture block by block, on from where a run that `describe`s itself the same was ended.

    Raises ValueError for what only whole pictures have.
    """
    from ..batch import plan_blocks, upscale_in_blocks
    from ..pictures import WHOLE_PICTURE, RowReader

    if len(jobs) != 1 or report:
        raise ValueError("--blocks takes one picture, and writes no report; leave it out for several")
    (job,) = jobs
    upscaler = work.upscaler_for(job)
    if (fix := upscaler.options.color_fix) in WHOLE_PICTURE:
        raise ValueError(f"--color-fix {fix} looks at the whole picture; with --blocks use wavelet or none")
    reader = RowReader(job.source, work.output.max_megapixels)
    plan = plan_blocks(reader.size, work.target)
    names = printable(f"{job.source} -> {job.output}")
    console.out.print(names, *(f"  {line}" for line in plan.describe()), sep="\n", markup=False)
    if dry_run:
        return
    began = time.monotonic()
    with _tile_bar() as bar:
        task = bar.add_task(printable(job.source.name), total=len(plan.tiles))

        def tick(done: int, total: int, preview: object) -> None:
            bar.update(task, completed=done)

        more = dict(pyramid=pyramid, reader=reader, settings=describe(), tick=tick)
        try:
            upscale_in_blocks(job.source, job.output, upscaler, work.target, work.output, **more)
        except KeyboardInterrupt:
            complain(RuntimeError("interrupted; the same command goes on with what is written"))
            raise typer.Exit(130) from None
    height, width = plan.size
    console.out.print(f"  {width} x {height} written in {time.monotonic() - began:.1f} s", markup=False)


def _tile_bar() -> Progress:
    parts = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    # Where nobody watches, rich would leave an empty line per picture among the errors.
    return Progress(*parts, console=console.err, transient=True, disable=not console.err.is_terminal)


def watch_command(
    arrived: Callable[[], Sequence[Job]],
    folder: Path,
    work: Work,
    describe: Callable[[], dict],
    pause: float,
) -> None:
    """Run what `arrived` gives, again every `pause` seconds, until Ctrl-C; exit with 1 where a disk is full."""
    from ..batch import open_manifest, run_jobs

    folder.mkdir(parents=True, exist_ok=True)
    with open_manifest(folder, describe(), work.output.overwrite) as manifest:
        console.out.print(f"watching; results go into {printable(folder)}; Ctrl-C ends it", markup=False)
        try:
            while True:
                if jobs := arrived():
                    summary = run_jobs(jobs, work, Voice(len(jobs)), manifest)
                    if summary.mistake:
                        raise summary.mistake
                    if summary.stopped:
                        raise typer.Exit(1)
                time.sleep(pause)
        except KeyboardInterrupt:
            console.out.print("stopped; what was computed is written")


def _show_plans(jobs: Sequence[Job], work: Work) -> int:
    """Print what would be done; returns how many pictures cannot be."""
    from ..batch import explain, open_job

    voice, failed = Voice(len(jobs)), 0
    for number, job in enumerate(jobs, 1):
        try:
            voice.announce(number, open_job(job, work.upscaler_for(job), work.target, work.output, dry_run=True))
        except (ValueError, OSError, MemoryError, ImportError) as error:
            failed += 1
            complain(explain(error, job))
    if len(jobs) > 1:
        ends = f", {failed} failed" if failed else ""
        console.out.print(f"{len(jobs)} pictures: {len(jobs) - failed} planned{ends}", markup=False)
    return failed


class Voice:
    """Says on the console how a run over `total` pictures goes: a `Listener`. Several are counted and summed up."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.bar: Progress | None = None

    def announce(self, number: int, opened: OpenJob) -> None:
        """Print a picture's name and plan."""
        names = printable(f"{opened.job.source} -> {opened.job.output}")
        lines = (f"  {line}" for line in opened.describe())
        console.out.print(f"{self._count(number)}{names}", *lines, sep="\n", markup=False)

    def left(self, number: int, job: Job, state: State) -> None:
        """Print that a file is kept; what an earlier run made is only counted."""
        from ..batch import State

        self._end_bar()
        if state is State.foreign:
            console.out.print(f"{self._count(number)}{printable(job.output)} is there already and kept", markup=False)

    def begins(self, number: int, opened: OpenJob) -> Tick:
        """Announce the picture and show a bar for its tiles."""
        self._end_bar()
        self.announce(number, opened)
        self.bar = bar = _tile_bar()
        bar.start()
        task = bar.add_task(self._count(number) + printable(opened.job.source.name), total=None)

        def tick(done: int, total: int, preview: object) -> None:
            bar.update(task, completed=done, total=total)

        return tick

    def wrote(self, number: int, outcome: Outcome) -> None:
        """Print size and time."""
        self._end_bar()
        height, width = outcome.opened.plan.size
        rate = outcome.seconds / (height * width / 1e6)
        name = f"{printable(outcome.opened.job.output.name)}: " if self.total > 1 else ""
        took = f"{width} x {height} written in {outcome.seconds:.1f} s ({rate:.1f} s per megapixel)"
        console.out.print(f"  {name}{took}", markup=False)

    def failed(self, number: int, job: Job, error: Exception) -> None:
        """Print the error as one red line."""
        self._end_bar()
        complain(error)

    def ended(self, summary: Summary) -> None:
        """Print why a run stopped, and the sum of several pictures."""
        self._end_bar()
        if summary.stopped:
            complain(summary.stopped)
        if self.total == 1:
            return
        parts = [f"{count} {what}" for what, count in summary.done.items()]
        if names := [printable(job.source.name) for job in summary.failed]:
            parts.append(f"{len(names)} failed ({', '.join(names[:10])}{', ...' if len(names) > 10 else ''})")
        if summary.left:
            parts.append(f"{summary.left} not begun or not finished")
        hint = "; --force replaces what is there" if summary.done["kept"] else ""
        hint += "; the same command goes on where this one ended" if summary.left else ""
        took = f"in {summary.seconds:.0f} s"
        console.out.print(f"{self.total} pictures: {', '.join(parts)}, {took}{hint}", markup=False)

    def _count(self, number: int) -> str:
        return f"{number} of {self.total}: " if self.total > 1 else ""

    def _end_bar(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None
