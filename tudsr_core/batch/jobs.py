"""One picture from file to file: read, planned, computed, written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..methods import RunPlan, Target, Tick, Upscaler
from ..pictures import (
    Picture,
    PictureError,
    bits_for,
    check_free,
    check_output,
    read_picture,
    writable,
    write_picture,
)


@dataclass(frozen=True)
class Job:
    """One picture to read and the file to write; `also` are files that its upscaler writes beside it."""

    source: Path
    output: Path
    also: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Output:
    """How results are written: `bits` 8, 16 or 32 (None: as the source), JPEG / WebP quality, replacing.

    `max_megapixels` is what sources may have; None is the limit of `read_picture`. `rgb`: three channels, whatever
    the source has; its transparency is left out. `linear`: float TIFFs hold scene-linear light (None: they do not).
    """

    bits: int | None = None
    quality: int = 95
    overwrite: bool = False
    max_megapixels: float | None = None
    rgb: bool = False
    linear: bool | None = None


@dataclass(frozen=True)
class Work:
    """What is done to every picture of a run."""

    upscaler_for: Callable[[Job], Upscaler]
    target: Target
    output: Output = Output()


@dataclass(frozen=True)
class OpenJob:
    """A job whose picture was read and whose result can be made and written."""

    job: Job
    picture: Picture
    plan: RunPlan

    def describe(self) -> list[str]:
        """Return the plan, and what had to be assumed about the picture, as lines of plain text."""
        return [*self.plan.describe(), *self.picture.notes]


def read_source(job: Job, output: Output, dry_run: bool = False) -> Picture:
    """Read a job's picture, once its files may be written; raises PictureError. `dry_run` leaves out that check."""
    if not dry_run:
        for path in (job.output, *job.also):
            check_free(path, output.overwrite)
    return read_picture(job.source, output.max_megapixels, bool(output.linear))


def plan_job(
    job: Job, picture: Picture, upscaler: Upscaler, target: Target, output: Output, dry_run: bool = False
) -> OpenJob:
    """Plan the picture that was read, and check that its result can be made and written; raises PictureError."""
    try:
        plan = upscaler.plan(picture.size, target)
    except ValueError as error:
        raise PictureError(f"{job.source}: {error}") from error
    picture = replace(picture, bits=bits_for(picture, job.output, output.bits))
    if output.rgb:
        notes = (*picture.notes, "its transparency is left out") if picture.has_alpha else picture.notes
        picture = replace(picture, pixels=picture.pixels[:, :3], is_grey=False, notes=notes)
    if not dry_run:
        check_output(job.output, plan.size, picture.has_alpha, picture.bits, output.overwrite)
    return OpenJob(job, writable(picture, job.output, plan.size), plan)


def open_job(job: Job, upscaler: Upscaler, target: Target, output: Output, dry_run: bool = False) -> OpenJob:
    """Read the source, plan it, and check that the result can be made and written.

    Nothing is written; `dry_run` leaves out the check of the output. Raises PictureError or
    ValueError with one line that says what to change.
    """
    return plan_job(job, read_source(job, output, dry_run), upscaler, target, output, dry_run)


def compute(opened: OpenJob, upscaler: Upscaler, tick: Tick | None = None) -> Picture:
    """Run the plan; returns the result with what travels along, not yet written."""
    return replace(opened.picture, pixels=upscaler.run(opened.picture.pixels, opened.plan, tick))


def write_result(job: Job, result: Picture, output: Output, before_rename: Callable[[Path], None] | None = None):
    """Write what was computed to the job's output, as `write_picture` does."""
    write_picture(job.output, result, overwrite=output.overwrite, quality=output.quality, before_rename=before_rename)
