"""Checks of Load Picture and Save Picture, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_pictures.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}

TUDSR_TEST_PACKAGES is a folder with the packages that deep pictures need; without it, or in another Python, only what
works without them is checked.
"""

import os
import sys
import tempfile
from pathlib import Path

from inside import NODES, embedded, main, part, refused, upscale  # first: it makes ComfyUI importable

import folder_paths
import numpy as np
import torch
from PIL import Image

ROOT = Path(tempfile.mkdtemp())
for kind in ("input", "output", "temp"):
    (ROOT / kind).mkdir()
    getattr(folder_paths, f"set_{kind}_directory")(str(ROOT / kind))
LOAD, SAVE = NODES["TUDSRLoadPicture"].execute, NODES["TUDSRSavePicture"].execute


def with_packages(check):
    """Run `check` with the packages importable; it is left out where they are not."""

    def run():
        sys.path.append(os.environ.get("TUDSR_TEST_PACKAGES", ""))
        try:
            import imagecodecs  # noqa: F401
            import OpenEXR  # noqa: F401
            import tifffile  # noqa: F401
        except ImportError:
            return
        check()

    return run


def said(output):
    return "\n".join(output.ui["text"])


def check_plain_pictures_need_no_package():
    array = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    Image.fromarray(array).save(ROOT / "input" / "plain.png", exif=exif, dpi=(240, 240))
    output = LOAD("plain.png", "sRGB")
    image, mask, source, name = output.args
    assert name == "plain.png" and said(output) == "4 x 4, 8 bit" and not mask.any()
    saved = SAVE(image, "", "png 8 bit", "sRGB", source)
    (path,) = saved.args[0].splitlines()
    assert Path(path) == ROOT / "output" / "plain_00001.png"
    with Image.open(path) as made:
        assert np.array_equal(np.array(made), array)
        assert made.getexif()[0x010F] == "Camera" and round(made.info["dpi"][0]) == 240
    assert saved.ui["images"][0]["type"] == "temp"
    more = SAVE(torch.rand(2, 4, 4, 3), "a/b.png", "png 8 bit", "sRGB").args[0].splitlines()
    assert [Path(path).relative_to(ROOT / "output").as_posix() for path in more] == ["a/b_00001.png", "a/b_00002.png"]
    assert not list((ROOT / "output").rglob(".*")), "no temporary files are left"


def check_names_stay_inside_and_missing_pictures_are_named():
    image = torch.rand(1, 4, 4, 3)
    refused(lambda: SAVE(image, "../x", "png 8 bit", "sRGB"), "outside ComfyUI's output folder")
    refused(lambda: SAVE(image, "..", "png 8 bit", "sRGB"), "no name for a file")
    refused(lambda: LOAD("../secret.png", "sRGB"), "there is no picture ../secret.png")
    assert "there is no picture none.exr" in NODES["TUDSRLoadPicture"].validate_inputs("none.exr")


def check_what_is_missing_is_one_line():
    names = ("imagecodecs", "tifffile", "OpenEXR")
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(dict.fromkeys(names))
    try:
        for kind, package in (("png 16 bit", "imagecodecs"), ("tif float", "tifffile"), ("exr half", "OpenEXR")):
            refused(
                lambda kind=kind: SAVE(torch.rand(1, 4, 4, 3), "x", kind, "sRGB"), f"needs {package}; run: pip install"
            )
        (ROOT / "input" / "x.exr").write_bytes(b"\x76\x2f\x31\x01" + bytes(60))
        refused(lambda: LOAD("x.exr", "sRGB"), "x.exr needs OpenEXR; run: pip install")
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module:
                sys.modules[name] = module
    assert not list((ROOT / "output").glob("x*"))


@with_packages
def check_sixteen_bits_stay_sixteen():
    import imagecodecs
    import tifffile

    array = np.random.default_rng(0).integers(0, 2**16, (5, 7, 4), np.uint16)
    (ROOT / "input" / "deep.png").write_bytes(imagecodecs.png_encode(array))
    image, mask, source, _ = LOAD("deep.png", "sRGB").args
    (path,) = SAVE(image, "deep", "png 16 bit", "sRGB", source, mask).args[0].splitlines()
    assert np.array_equal(imagecodecs.png_decode(Path(path).read_bytes()), array)
    (path,) = SAVE(image, "deep", "tif 16 bit", "sRGB", source, mask).args[0].splitlines()
    assert np.array_equal(tifffile.imread(path), array) and path.endswith("deep_00002.tif")


@with_packages
def check_light_goes_in_and_out_to_the_bit():
    import OpenEXR
    import tifffile

    light = np.random.default_rng(1).normal(0.5, 2, (6, 8, 3)).astype(np.float32)
    tifffile.imwrite(ROOT / "input" / "scene.tif", light, photometric="rgb")
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    for name, array in (("scene.exr", light), ("half.exr", light.astype(np.float16))):
        with OpenEXR.File(header, {"RGB": array}) as file:
            file.write(str(ROOT / "input" / name))
    for name, kind in (("scene.exr", "exr float"), ("half.exr", "exr half"), ("scene.tif", "tif float")):
        for how in ("sRGB", "linear"):
            output = LOAD(name, how)
            image, _, source, _ = output.args
            assert "light from -" in said(output) and said(output).splitlines()[0].endswith(f"as {how}")
            assert (image.max() <= 1 and image.min() >= 0) == (how == "sRGB")
            (path,) = SAVE(image, "out", kind, how, source).args[0].splitlines()
            again = part("tudsr_core.pictures").read_picture(Path(path), floats_are_light=True).light
            first = part("tudsr_core.pictures").read_picture(ROOT / "input" / name, floats_are_light=True).light
            assert torch.equal(again.float(), first.float()), (name, how)


@with_packages
def check_a_folder_keeps_floats():
    import OpenEXR

    light = np.random.default_rng(2).normal(0.5, 2, (6, 8, 3)).astype(np.float32)
    (ROOT / "input" / "shots").mkdir()
    with OpenEXR.File({"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}, {"RGB": light}) as file:
        file.write(str(ROOT / "input" / "shots" / "a.exr"))
    image, _, source, _, _ = NODES["TUDSRLoadFromFolder"].execute("shots", "*", False, 0).args
    save = NODES["TUDSRSaveWithSourceName"].execute
    (path,) = save(image, source, "shots", "", "as the source", 95, False).args
    with OpenEXR.File(path) as file:
        assert np.array_equal(file.channels()["RGB"].pixels, light)
    (path,) = save(image, source, "shots", "", "jpg", 95, False).args
    with Image.open(path) as made:
        assert made.size == (8, 6)


@with_packages
def check_highlights_come_through_an_upscaler():
    import OpenEXR

    light = np.full((16, 20, 3), 0.25, np.float16)
    light[6:10, 6:10] = 30
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with OpenEXR.File(header, {"RGB": light}) as file:
        file.write(str(ROOT / "input" / "lamp.exr"))
    image, _, source, _ = LOAD("lamp.exr", "sRGB").args
    big = upscale(4.0, image, embedded(), color_fix="wavelet").args[0]
    (path,) = SAVE(big, "lamp", "exr half", "sRGB", source).args[0].splitlines()
    with OpenEXR.File(path) as file:
        made = file.channels()["RGB"].pixels.astype(np.float32)
    assert made.shape == (64, 80, 3) and abs(made[32, 32] - 30).max() < 1 and abs(made[4:12, 60:76] - 0.25).max() < 0.03
    (line, note) = said(SAVE(big, "lamp", "png 16 bit", "sRGB", source)).splitlines()
    assert line.endswith("lamp_00002.png") and note.startswith("light above 1 and below 0 is cut off")
    (path,) = SAVE(big, "lamp", "exr half", "sRGB").args[0].splitlines()
    with OpenEXR.File(path) as file:
        assert file.channels()["RGB"].pixels.max() <= 1.001, "without the source there are no highlights"


if __name__ == "__main__":
    main(globals())
