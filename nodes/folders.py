"""Folders of pictures: all of one upscaled by one node, or one picture after the other through any graph."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..tudsr_core.batch import (
    Output,
    Summary,
    Work,
    describe_run,
    open_manifest,
    pictures_under,
    plan_jobs,
    run_jobs,
)
from ..tudsr_core.methods import NEUTRAL, TwoStage
from ..tudsr_core.pictures import FORMATS, Picture, bits_for, pictures_in, read_picture, resize, write_picture
from .host.folders import Cancelled, FolderProgress, fingerprint, result_folder, source_folder
from .host.networks import ProgressBar
from .host.stages import build_stage, combine
from .images import rgb
from .inputs import (
    CATEGORY,
    inventive_input,
    later_inputs,
    long_edge_input,
    shared_inputs,
    source_inputs,
    stage_input,
    switch_input,
    target_inputs,
)
from .upscale import options_from, target_from

SourceType = io.Custom("PICTURE_SOURCE")
TYPES = {"as the source": None, "png": ".png", "jpg": ".jpg", "webp": ".webp", "tif": ".tif", "exr": ".exr"}
EIGHT_BIT = {"jpg": 8, "webp": 8}  # what they hold, whatever the source has
SHOWN_ERRORS = 20


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a picture came from: its path inside its folder, and what travels along (its pixels left out)."""

    place: Path
    picture: Picture


def folder_inputs() -> list[io.Input]:
    """Return which pictures of which folder."""
    return [
        io.String.Input(
            "folder",
            default="",
            tooltip="Folder with pictures: a path, or the name of a folder inside ComfyUI's input folder.",
        ),
        io.String.Input("pattern", default="*", tooltip="Only names like this, such as *.jpg or scan_*; * is all."),
        switch_input("recursive", False, "Also the folders inside; the results keep them."),
    ]


def type_inputs() -> list[io.Input]:
    """Return the file type of results."""
    return [
        io.Combo.Input(
            "file_type",
            options=list(TYPES),
            default="as the source",
            tooltip="File type of the results. png and tif hold 16 bit, exr light of any range; jpg holds no "
            "transparency.",
        ),
        io.Int.Input("quality", default=95, min=1, max=100, tooltip="Of JPEG and WebP."),
        switch_input(
            "replace", False, "Replace files that are there, and begin anew where another run had other settings."
        ),
    ]


def sources_in(folder: Path, pattern: str, recursive: bool) -> list[Path]:
    """Return a folder's pictures whose names fit `pattern`; raises ValueError if there are none."""
    found = pictures_under(folder) if recursive else pictures_in(folder)
    fitting = [path for path in found if fnmatch(path.name.lower(), pattern.strip().lower() or "*")]
    if not fitting:
        raise ValueError(f"no picture in {folder} fits {pattern!r}; check folder, pattern and recursive")
    return fitting


class UpscaleFolder(io.ComfyNode):
    """Every picture of a folder, resumable."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRUpscaleFolder",
            display_name="TUDSR Upscale Folder",
            category=CATEGORY,
            description="Upscales every picture of a folder into ComfyUI's output folder. Cancelled, or ended in any "
            "other way, it goes on where it was: what is done and unchanged is skipped.",
            inputs=[
                *folder_inputs(),
                io.String.Input(
                    "output",
                    default="enlarged",
                    tooltip="Name of the folder for the results, inside ComfyUI's output folder.",
                ),
                *source_inputs("", "stage_one", "one")[1:],
                *target_inputs(),
                *shared_inputs()[:-1],
                *type_inputs(),
                stage_input("stage_two", "two", " Needed above x3 or x4.", optional=True),
                *later_inputs(),
                long_edge_input(),
                inventive_input(),
            ],
            outputs=[
                io.String.Output(display_name="text", tooltip="What was done, in words, as this node shows it."),
                io.Int.Output(display_name="failed", tooltip="Number of pictures without a result."),
            ],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs) -> float:
        # Never what it was: pictures may have come. What is done costs nothing to find out.
        return float("nan")

    @classmethod
    def execute(
        cls,
        folder,
        pattern,
        recursive,
        output,
        stage_one,
        vae,
        conditioning,
        scale,
        width,
        height,
        file_type,
        quality,
        replace,
        stage_two=None,
        long_edge=0,
        inventive=NEUTRAL,
        **options,
    ) -> io.NodeOutput:
        source, into = source_folder(folder), result_folder(output)
        first = build_stage(stage_one, vae, conditioning, 1, 0, inventive=inventive)
        second = None
        if stage_two is not None:
            second = build_stage(stage_two, vae, conditioning, 2, 0, inventive=inventive)
        upscaler = TwoStage(combine(first, second), options_from(options))
        target = target_from(scale, width, height, long_edge)
        work = Work(lambda job: upscaler, target, Output(EIGHT_BIT.get(file_type), quality, replace))
        model = fingerprint(stage_one, stage_two, vae, conditioning)
        more = dict(model=model, format=TYPES[file_type], inventive=None if inventive == NEUTRAL else inventive)
        settings = describe_run({}, upscaler.options, target, work.output, **more)
        wanted = set(sources_in(source, pattern, recursive))
        jobs = [job for job in plan_jobs([source], into, TYPES[file_type], recursive) if job.source in wanted]
        progress = FolderProgress(len(jobs), ProgressBar(stage_one))
        with open_manifest(into, settings, replace) as manifest:
            summary = run_jobs(jobs, work, progress, manifest, (Cancelled,))
        if error := summary.mistake or summary.stopped:
            raise error
        text = sums(summary, progress.lines)
        return io.NodeOutput(text, len(summary.failed), ui=ui.PreviewText(text))


def sums(summary: Summary, errors: list[str]) -> str:
    """Return how a run ended, in words."""
    counts = [f"{count} {what}" for what, count in summary.done.items()]
    counts += [f"{len(errors)} failed"] if errors else []
    more = [f"and {len(errors) - SHOWN_ERRORS} more"] if len(errors) > SHOWN_ERRORS else []
    first = f"{summary.total} pictures: {', '.join(counts)}, in {summary.seconds:.0f} s"
    return "\n".join([first, *errors[:SHOWN_ERRORS], *more])


class LoadFromFolder(io.ComfyNode):
    """One picture of a folder, the next one with every run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadFromFolder",
            display_name="Load Folder (One by One)",
            category=CATEGORY,
            description="Loads one picture of a folder. Queue the graph as often as there are pictures: the index "
            "counts up by itself. Save with Source Name keeps name, EXIF and colour profile.",
            inputs=[
                *folder_inputs(),
                io.Int.Input(
                    "index",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=True,
                    tooltip="Which picture, in name order, from 0. Set it to increment to go through the folder.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, upright."),
                io.Mask.Output(display_name="mask", tooltip="Its transparency."),
                SourceType.Output(display_name="source", tooltip="Name, EXIF and profile, for Save with Source Name."),
                io.String.Output(display_name="name", tooltip="Its path inside the folder."),
                io.Int.Output(display_name="count", tooltip="How many pictures there are."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder, pattern, recursive, index) -> str:
        path, _ = cls._pick(folder, pattern, recursive, index)
        status = path.stat()
        return f"{path} {status.st_size} {status.st_mtime_ns}"

    @classmethod
    def _pick(cls, folder: str, pattern: str, recursive: bool, index: int) -> tuple[Path, int]:
        found = sources_in(source_folder(folder), pattern, recursive)
        if index >= len(found):
            raise ValueError(f"index {index} is behind the last picture: there are {len(found)}, from 0; all are done")
        return found[index], len(found)

    @classmethod
    def execute(cls, folder, pattern, recursive, index) -> io.NodeOutput:
        path, count = cls._pick(folder, pattern, recursive, index)
        picture = read_picture(path)
        pixels = picture.pixels.movedim(1, -1)
        mask = 1 - pixels[..., 3] if picture.has_alpha else torch.zeros(pixels.shape[:3])
        place = path.relative_to(source_folder(folder))
        source = Source(place, dataclasses.replace(picture, pixels=picture.pixels[:, :, :1, :1].clone()))
        return io.NodeOutput(pixels[..., :3], mask, source, place.as_posix(), count)


class SaveWithSourceName(io.ComfyNode):
    """Save a picture under its source's name, with EXIF and profile."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRSaveWithSourceName",
            display_name="Save with Source Name",
            category=CATEGORY,
            description="Saves a picture under the name it was loaded from, with its EXIF, colour profile, resolution "
            "and bits per channel.",
            inputs=[
                io.Image.Input("image", tooltip="The picture to save; of several, later ones get numbers."),
                SourceType.Input("source", tooltip="From Load Folder (One by One)."),
                io.String.Input(
                    "output", default="enlarged", tooltip="Name of a folder inside ComfyUI's output folder."
                ),
                io.String.Input("ending", default="", tooltip="Added to the name, such as -x4."),
                *type_inputs(),
                io.Mask.Input("mask", optional=True, tooltip="Transparency to save, of any size."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The file that was written.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, source, output, ending, file_type, quality, replace, mask=None) -> io.NodeOutput:
        root, place, paths = result_folder(""), source.place, []
        kept = place.suffix if place.suffix.lower() in FORMATS else ".png"
        folder = (result_folder(output) / place).parent
        folder.mkdir(parents=True, exist_ok=True)
        for number, pixels in enumerate(rgb(image).split(1)):
            count = f"-{number + 1}" if number else ""
            path = folder.joinpath(place.name).with_name(f"{place.stem}{ending}{count}{TYPES[file_type] or kept}")
            facts = dataclasses.replace(source.picture, bits=bits_for(source.picture, path, EIGHT_BIT.get(file_type)))
            picture = with_pixels(facts, pixels, None if mask is None else mask[number % len(mask)])
            if path.exists() and not replace:
                raise ValueError(f"{path} is there already; turn 'replace' on, or give another ending or output")
            write_picture(path, picture, overwrite=replace, quality=quality)
            paths.append(path)
        shown = [(path.name, path.parent.relative_to(root).as_posix()) for path in paths]
        saved = [ui.SavedResult(name, "" if within == "." else within, io.FolderType.output) for name, within in shown]
        return io.NodeOutput("\n".join(map(str, paths)), ui=ui.SavedImages(saved))


def with_pixels(picture: Picture, pixels: torch.Tensor, mask: torch.Tensor | None) -> Picture:
    """Return `picture` with other pixels `1 3 H W`; it stays grey where they are."""
    grey = picture.is_grey and bool((pixels.amax(1) - pixels.amin(1)).max() < 1 / 512)
    if mask is not None:
        size = tuple(pixels.shape[-2:])
        alpha = 1 - mask.reshape(1, 1, *mask.shape[-2:]).float()
        alpha = alpha if tuple(alpha.shape[-2:]) == size else resize(alpha, size).clamp(0, 1)
        pixels = torch.cat([pixels, alpha.to(pixels)], 1)
    return dataclasses.replace(picture, pixels=pixels.cpu(), is_grey=grey)
