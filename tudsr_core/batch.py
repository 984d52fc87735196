"""Many pictures: which file becomes which, and one picture from file to file.

Knows upscalers only as something that plans and runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .methods import RunPlan, Target, Tick, Upscaler
from .pictures import (
    FORMATS,
    Picture,
    PictureError,
    check_free,
    check_output,
    pictures_in,
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
    """How results are written: `bits` 8 or 16 (None: as the source), JPEG / WebP quality, replacing.

    `max_megapixels` is what sources may have; None is the limit of `read_picture`.
    """

    bits: int | None = None
    quality: int = 95
    overwrite: bool = False
    max_megapixels: float | None = None


def plan_jobs(inputs: Sequence[Path], output: Path, suffix: str | None = None) -> list[Job]:
    """Pair every input picture with an output path.

    Inputs are files or folders (their pictures, in name order, without hidden ones). `output` is a
    file for exactly one input file, otherwise a folder. `suffix` (".png") changes the type. Raises
    PictureError for missing inputs, empty folders, a type that cannot be written or is named twice,
    and outputs that would meet each other or an input.
    """
    sources = [file for path in inputs for file in _expand(path)]
    if _is_one_file(output, inputs, suffix):
        jobs = [Job(sources[0], output)]
    else:
        jobs = [Job(source, output / (source.stem + (suffix or _writable_suffix(source)))) for source in sources]
    taken: dict[Path, Path] = {}
    originals = {source.resolve() for source in sources}
    for job in jobs:
        target = job.output.resolve()
        if target in originals:
            raise PictureError(f"{job.output} is an input and would be replaced; choose another folder with -o")
        if target in taken:
            raise PictureError(f"{job.source} and {taken[target]} would both become {job.output}; rename one")
        taken[target] = job.source
    return jobs


def _is_one_file(output: Path, inputs: Sequence[Path], suffix: str | None) -> bool:
    """Whether `output` names a picture file; raises PictureError where it can be neither file nor folder."""
    ending = output.suffix.lower()
    if output.is_dir():
        return False
    if ending in FORMATS:
        if len(inputs) != 1 or inputs[0].is_dir():
            what = f"{inputs[0]} is a folder" if len(inputs) == 1 else "there are several inputs"
            raise PictureError(f"{output} is one file, but {what}; give a folder: -o {output.with_suffix('')}")
        if suffix and FORMATS[suffix] != FORMATS[ending]:
            raise PictureError(f"{output} is no {FORMATS[suffix]} file, which --format asks for; leave one of them out")
        return True
    if output.exists():
        raise PictureError(f"{output} is a file, not a folder; choose another name with -o")
    # Unknown words after a dot are mistyped formats rather than folders; "v1.2" is a folder.
    if ending[1:].isalpha() or ending in Image.registered_extensions():
        raise PictureError(
            f"{output}: pictures of type {ending} are not written; use {', '.join(FORMATS)}, "
            "or create that folder first if it is one"
        )
    return False


def _expand(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = pictures_in(path)
    if not found:
        raise PictureError(f"folder {path} holds no pictures ({', '.join(FORMATS)}; hidden files are not read)")
    return found


def _writable_suffix(source: Path) -> str:
    return source.suffix if source.suffix.lower() in FORMATS else ".png"


@dataclass(frozen=True)
class OpenJob:
    """A job whose picture was read and whose result can be made and written."""

    job: Job
    picture: Picture
    plan: RunPlan

    def describe(self) -> list[str]:
        """Return the plan, and what had to be assumed about the picture, as lines of plain text."""
        return [*self.plan.describe(), *self.picture.notes]


def open_job(job: Job, upscaler: Upscaler, target: Target, output: Output, dry_run: bool = False) -> OpenJob:
    """Read the source, plan it, and check that the result can be made and written.

    Nothing is written; `dry_run` leaves out the check of the output. Raises PictureError or
    ValueError with one line that says what to change.
    """
    if not dry_run:
        for path in (job.output, *job.also):
            check_free(path, output.overwrite)
    picture = read_picture(job.source, output.max_megapixels)
    try:
        plan = upscaler.plan(picture.size, target)
    except ValueError as error:
        raise PictureError(f"{job.source}: {error}") from error
    picture = replace(picture, bits=output.bits or picture.bits)
    if not dry_run:
        check_output(job.output, plan.size, picture.has_alpha, picture.bits, output.overwrite)
    return OpenJob(job, writable(picture, job.output, plan.size), plan)


def finish_job(opened: OpenJob, upscaler: Upscaler, output: Output, tick: Tick | None = None) -> Picture:
    """Run the plan and write the result to the job's output; returns what was written."""
    result = replace(opened.picture, pixels=upscaler.run(opened.picture.pixels, opened.plan, tick))
    write_picture(opened.job.output, result, overwrite=output.overwrite, quality=output.quality)
    return result
