"""Single pictures from and to files, without rounding to 8 bits: PNG and TIFF of 16 bits, float TIFF, OpenEXR."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..tudsr_core.pictures import Picture, displayed, read_picture, writable, write_picture
from .folders import Source, SourceType, with_pixels
from .host.folders import free_name, input_pictures, source_picture
from .images import rgb
from .inputs import CATEGORY

NOTHING = "(put a picture into ComfyUI's input folder)"
LIGHTS = ["sRGB", "linear"]
FILES = {
    "png 8 bit": (".png", 8),
    "png 16 bit": (".png", 16),
    "tif 16 bit": (".tif", 16),
    "tif float": (".tif", 32),
    "exr half": (".exr", 16),
    "exr float": (".exr", 32),
}


class LoadPicture(io.ComfyNode):
    """A picture file as IMAGE in its full depth, with what travels along."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadPicture",
            display_name="Load Picture (16 Bit)",
            category=CATEGORY,
            description="Loads a PNG, TIFF, OpenEXR, JPEG or WebP file as it is: 16 bits stay 16, float TIFF and "
            "OpenEXR keep every value. Save Picture and Save with Source Name write EXIF, colour profile and "
            "highlights back.",
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=input_pictures() or [NOTHING],
                    tooltip="A picture in ComfyUI's input folder; press R after you have put one there.",
                ),
                io.Combo.Input(
                    "light",
                    options=LIGHTS,
                    default=LIGHTS[0],
                    tooltip="What OpenEXR and float TIFF become. sRGB: a picture of 0 to 1 for upscalers and all other "
                    "nodes; what is brighter travels in source. linear: the file's own numbers, of any range, for "
                    "nodes that want light. Other files are not changed.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture, upright."),
                io.Mask.Output(display_name="mask", tooltip="Its transparency."),
                SourceType.Output(
                    display_name="source", tooltip="Name, EXIF, profile and highlights, for Save Picture."
                ),
                io.String.Output(display_name="name", tooltip="Its file name."),
            ],
        )

    @classmethod
    def validate_inputs(cls, picture) -> bool | str:
        try:
            source_picture(picture)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, picture, light) -> str:
        status = source_picture(picture).stat()
        return f"{picture} {light} {status.st_size} {status.st_mtime_ns}"

    @classmethod
    def execute(cls, picture, light) -> io.NodeOutput:
        read = read_picture(source_picture(picture), floats_are_light=True)
        facts, pixels = read, read.pixels
        if light == "linear" and read.light is not None:
            facts, pixels = dataclasses.replace(read, light=None), read.light.float()
        facts = dataclasses.replace(facts, pixels=read.pixels[:, :, :1, :1].clone())
        image = pixels.movedim(1, -1)
        mask = 1 - image[..., 3] if read.has_alpha else torch.zeros(image.shape[:3])
        shown = preview(read.pixels)
        text = "\n".join([describe(read, light), *read.notes])
        source = Source(Path(picture), facts)
        return io.NodeOutput(image[..., :3], mask, source, Path(picture).name, ui={"images": shown, "text": [text]})


def describe(picture: Picture, light: str) -> str:
    """Return size and depth in words, and which light floats were turned into."""
    height, width = picture.size
    if picture.light is None:
        return f"{width} x {height}, {picture.bits} bit"
    depth = "half" if picture.light.dtype == torch.float16 else "float"
    colors = picture.light[:, :3]
    return f"{width} x {height}, {depth}, light from {float(colors.min()):.3g} to {float(colors.max()):.3g}, as {light}"


def preview(pixels: Tensor) -> list[ui.SavedResult]:
    """Return a temporary 8-bit file of sRGB pixels `B C H W`, which browsers can show."""
    batch = pixels[:, :3].clamp(0, 1).movedim(1, -1)
    return ui.ImageSaveHelper.save_images(batch, "tudsr-picture", io.FolderType.temp, None, compress_level=1)


class SavePicture(io.ComfyNode):
    """IMAGE to a file of 8 or 16 bits, or of floats."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRSavePicture",
            display_name="Save Picture (16 Bit)",
            category=CATEGORY,
            description="Saves pictures as PNG or TIFF of 16 bits, float TIFF or OpenEXR, with EXIF and colour profile "
            "of their source where the file holds them. Nothing is ever overwritten.",
            inputs=[
                io.Image.Input("image", tooltip="One or more pictures."),
                io.String.Input(
                    "file_name",
                    default="tudsr",
                    tooltip="How names begin; a number follows. folder/name is a folder inside ComfyUI's output "
                    "folder. Empty: the source's name.",
                ),
                io.Combo.Input(
                    "file_type",
                    options=list(FILES),
                    default="png 16 bit",
                    tooltip="exr and tif float hold linear light of any range; half takes half the room and is what "
                    "most renderers write. png 8 bit for the web.",
                ),
                io.Combo.Input(
                    "light",
                    options=LIGHTS,
                    default=LIGHTS[0],
                    tooltip="What image holds: sRGB, as nearly all nodes make it, or linear, as Load Picture gives it "
                    "if asked. Files get what belongs into them: png and tif 16 bit sRGB, exr and tif float light.",
                ),
                SourceType.Input(
                    "source",
                    optional=True,
                    tooltip="From Load Picture or Load Folder (One by One): EXIF, profile, resolution, and for exr and "
                    "tif float the highlights of the original, enlarged.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Transparency to save, of any size."),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="The files that were written, one a line.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, file_name, file_type, light, source=None, mask=None) -> io.NodeOutput:
        suffix, bits = FILES[file_type]
        facts = Picture(torch.zeros(1, 3, 1, 1)) if source is None else source.picture
        facts = dataclasses.replace(facts, bits=bits, notes=())
        name = file_name.strip() or (source.place.stem if source else "tudsr")
        paths, shown, notes = [], [], []
        for number, pixels in enumerate(rgb(image).split(1)):
            own = None if mask is None else mask[number % len(mask)]
            picture = with_pixels(facts, pixels, own)
            if light == "linear":
                picture = dataclasses.replace(picture, light=picture.pixels, pixels=displayed(picture.pixels))
            path = free_name(name, suffix)
            picture = writable(picture, path, picture.size)
            write_picture(path, picture)
            paths.append(str(path))
            shown += preview(picture.pixels)
            notes += picture.notes
        text = "\n".join([*paths, *dict.fromkeys(notes)])
        return io.NodeOutput("\n".join(paths), ui={"images": shown, "text": [text]})
