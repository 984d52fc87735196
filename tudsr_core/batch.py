"""Many pictures: which file becomes which, and one picture from file to file.

The command line and (later) the folder node call this; it only combines `files` and `pipeline`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from .files import FORMATS, Picture, PictureError, pictures_in
from .image import split_alpha
from .networks import Tick
from .pipeline import Model, UpscaleOptions, plan_for, upscale
from .plan import Target, UpscalePlan
from .reading import read_picture
from .sampling import TextNetworks
from .stage_tiles import NetworkFacts, Size
from .writing import check_free, check_output, writable, write_picture
from .zoom import PromptSource, ZoomOptions, ZoomPlan, plan_zoom, write_prompts, zoom


@dataclass(frozen=True)
class Job:
    """One picture to read and the file to write."""

    source: Path
    output: Path


@dataclass(frozen=True)
class Output:
    """How results are written: `bits` 8 or 16 (None: as the source), JPEG / WebP quality, replacing.

    `max_megapixels` is what sources may have; None is the limit of `read_picture`.
    """

    bits: int | None = None
    quality: int = 95
    overwrite: bool = False
    max_megapixels: float | None = None


@dataclass(frozen=True)
class ZoomOutput(Output):
    """The same for a zoom; `prompts` writes every tile's prompts beside it, before the long part begins."""

    prompts: bool = False


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


def open_job(
    job: Job, model: Model, target: Target, options: UpscaleOptions, output: Output, dry_run: bool = False
) -> tuple[Picture, list[str]]:
    """Read the source, check that the result can be made and written; return it and the plan as text.

    Nothing is written; `dry_run` leaves out the check of the output. Raises PictureError or
    ValueError with one line that says what to change.
    """
    return _open(job, lambda size: plan_for(model, size, target, options), output, dry_run)


def open_zoom(
    job: Job,
    facts: NetworkFacts,
    target: Target,
    options: ZoomOptions,
    output: ZoomOutput,
    dry_run: bool = False,
) -> tuple[Picture, list[str]]:
    """Do what `open_job` does for "Zoomed In, Diffused Out"."""
    if output.prompts and not dry_run and prompts_path(job).exists() and not output.overwrite:
        raise PictureError(f"{prompts_path(job)} already exists; use --force to replace it")
    return _open(job, lambda size: plan_zoom(size, target, facts, options), output, dry_run)


def prompts_path(job: Job) -> Path:
    """Return where the tile prompts of a job are written."""
    return job.output.with_suffix(".prompts.json")


def _open(
    job: Job, plan_for_size: Callable[[Size], UpscalePlan | ZoomPlan], output: Output, dry_run: bool
) -> tuple[Picture, list[str]]:
    if not dry_run:
        check_free(job.output, output.overwrite)
    picture = read_picture(job.source, output.max_megapixels)
    try:
        plan = plan_for_size(picture.size)
    except ValueError as error:
        raise PictureError(f"{job.source}: {error}") from error
    picture = replace(picture, bits=output.bits or picture.bits)
    if not dry_run:
        check_output(job.output, plan.size, picture.has_alpha, picture.bits, output.overwrite)
    picture = writable(picture, job.output, plan.size)
    return picture, [*plan.describe(), *picture.notes]


def finish_job(
    job: Job,
    picture: Picture,
    model: Model,
    target: Target,
    options: UpscaleOptions,
    output: Output,
    tick: Tick | None = None,
) -> Picture:
    """Upscale `picture` and write it to `job.output`; returns what was written."""
    return _write(job, replace(picture, pixels=upscale(picture.pixels, model, target, options, tick)), output)


def finish_zoom(
    job: Job,
    picture: Picture,
    networks: TextNetworks,
    target: Target,
    options: ZoomOptions,
    source: PromptSource,
    output: ZoomOutput,
    tick: Tick | None = None,
) -> Picture:
    """Describe the tiles of `picture`, zoom it and write it to `job.output`.

    `tick` counts the tiles described, then starts again for the sampling. Returns what was written.
    """
    plan = plan_zoom(picture.size, target, networks.facts, options)
    prompts = source(split_alpha(picture.pixels)[0], plan, tick)
    if output.prompts:
        write_prompts(prompts_path(job), prompts)
    return _write(job, replace(picture, pixels=zoom(picture.pixels, networks, plan, prompts, tick)), output)


def _write(job: Job, result: Picture, output: Output) -> Picture:
    write_picture(job.output, result, overwrite=output.overwrite, quality=output.quality)
    return result
