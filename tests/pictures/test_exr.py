"""OpenEXR and float TIFF: what goes in comes out to the bit, and light beyond white survives an enlargement."""

import dataclasses

import numpy as np
import OpenEXR
import pytest
import tifffile
import torch
from conftest import identity_model

from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.pictures.files import Picture, PictureError
from tudsr_core.pictures.reading import read_picture
from tudsr_core.pictures.scene_light import beyond, displayed, light_of
from tudsr_core.pictures.srgb import from_linear
from tudsr_core.pictures.writing import bits_for, writable, write_picture


def scene(channels, kind=np.float32, size=(9, 14)):
    """Light from -0.3 to 40, and alpha from 0 to 1."""
    light = np.random.default_rng(3).normal(0.6, 0.5, (*size, channels)).clip(-0.3, 2).astype(kind)
    light[2, 3] *= 20
    if channels in (2, 4):
        light[..., -1] = np.linspace(0, 1, light[..., 0].size).reshape(size)
    return light


def save(path, light, header=None, names=None):
    names = names or ({1: "Y", 2: "YA", 3: "RGB", 4: "RGBA"}[light.shape[-1]])
    channels = {name: np.ascontiguousarray(light[..., at]) for at, name in enumerate(names)}
    with OpenEXR.File(
        {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage} | (header or {}), channels
    ) as f:
        f.write(str(path))


def stored(path):
    """Planes of a file by the reference implementation alone."""
    with OpenEXR.File(str(path), separate_channels=True) as file:
        return {name: channel.pixels.copy() for name, channel in file.parts[0].channels.items()}


@pytest.mark.parametrize("kind", [np.float16, np.float32])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_what_is_read_is_written_to_the_bit(tmp_path, channels, kind):
    save(tmp_path / "in.exr", scene(channels, kind), {"xDensity": 240.0})
    picture = read_picture(tmp_path / "in.exr")
    assert (picture.is_grey, picture.has_alpha) == (channels < 3, channels in (2, 4))
    assert 0 <= picture.pixels.min() and picture.pixels.max() <= 1
    bits = bits_for(picture, tmp_path / "out.exr")
    write_picture(tmp_path / "out.exr", dataclasses.replace(picture, bits=bits))
    before, after = stored(tmp_path / "in.exr"), stored(tmp_path / "out.exr")
    assert before.keys() == after.keys()
    for name, plane in before.items():
        assert after[name].dtype == plane.dtype and np.array_equal(after[name], plane), name
    assert read_picture(tmp_path / "out.exr").dpi == pytest.approx((240, 240))


def test_networks_see_srgb_of_what_lies_between_black_and_white(tmp_path):
    save(tmp_path / "in.exr", scene(4))
    picture, light = read_picture(tmp_path / "in.exr"), scene(4)
    for y, x in ((0, 5), (2, 3), (8, 13)):
        *color, alpha = light[y, x].tolist()
        color = [min(1, max(0, value / alpha)) for value in color]
        wanted = [v * 12.92 if v <= 0.0031308 else 1.055 * v ** (1 / 2.4) - 0.055 for v in color]
        assert picture.pixels[0, :, y, x].tolist() == pytest.approx([*wanted, alpha], abs=1e-5)


def test_an_enlargement_keeps_highlights_and_treats_the_rest_as_its_srgb_version():
    light = torch.full((1, 3, 16, 16), 0.2)
    light[..., 4:8, 4:8] = 50
    light[:, 2, 12:, 12:] = -0.25
    pixels = displayed(light)
    model, options = identity_model(), UpscaleOptions(color_fix="none")
    made = upscale(pixels, model, Target(scale=2), options)
    big = light_of(made, light)
    assert big.shape[-2:] == (32, 32) and big[..., 11:13, 11:13].min() == pytest.approx(50, rel=1e-4)
    assert big[0, 2, 30, 30] == pytest.approx(-0.25, abs=1e-4)
    far = big[..., :4, 20:]
    assert (far - 0.2).abs().max() < 1e-4
    assert big[:, :2].min() > 0.1, "no dark ring around what is bright"
    # Energy of the highlights: four times as many pixels.
    assert float(beyond(big).clamp_min(0).sum() / beyond(light).clamp_min(0).sum()) == pytest.approx(4, rel=0.02)
    within = light.clamp(0, 1)
    assert beyond(within) is None
    assert torch.equal(light_of(made, within), light_of(made))


def test_light_without_coverage_is_carried(tmp_path):
    """A glow: colours under alpha 0 are added light in OpenEXR."""
    light = torch.zeros(1, 4, 8, 8)
    light[:, :3, 2:6, 2:6] = 0.3
    big = light_of(torch.nn.functional.interpolate(displayed(light), size=(16, 16)), light)
    assert float(big[0, 0, 8, 8]) == pytest.approx(0.3) and float(big[0, 3].max()) == 0


def test_srgb_files_become_light_and_light_becomes_srgb_with_a_word(tmp_path, noise):
    picture = Picture(noise(1, 3, 6, 7), bits=16, icc=b"profile")
    write_picture(tmp_path / "a.exr", dataclasses.replace(picture, bits=bits_for(picture, tmp_path / "a.exr")))
    again = read_picture(tmp_path / "a.exr")
    assert stored(tmp_path / "a.exr")["R"].dtype == np.float32
    assert (again.pixels - picture.pixels).abs().max() < 1e-6
    assert "its colour profile cannot be kept in OpenEXR; colours are taken for sRGB's" in (
        writable(picture, tmp_path / "a.exr", picture.size).notes
    )
    write_picture(tmp_path / "b.exr", dataclasses.replace(picture, bits=8))
    assert stored(tmp_path / "b.exr")["G"].dtype == np.float16
    save(tmp_path / "hot.exr", scene(3))
    hot = writable(read_picture(tmp_path / "hot.exr"), tmp_path / "hot.png", (9, 14))
    assert hot.light is None
    assert "light above 1 and below 0 is cut off, because PNG holds none; .exr keeps it" in hot.notes
    write_picture(tmp_path / "hot.png", hot)
    assert (read_picture(tmp_path / "hot.png").pixels - hot.pixels).abs().max() < 1e-4
    with pytest.raises(PictureError, match="JPEG cannot hold floats"):
        write_picture(tmp_path / "a.jpg", dataclasses.replace(picture, bits=32))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_float_tiff_of_light_round_trips_to_the_bit(tmp_path, channels):
    light = scene(channels)
    extra = {"extrasamples": ["assocalpha"]} if channels == 4 else {}
    array = light[..., 0] if channels == 1 else light
    tifffile.imwrite(tmp_path / "in.tif", array, photometric="rgb" if channels > 1 else "minisblack", **extra)
    picture = read_picture(tmp_path / "in.tif", floats_are_light=True)
    assert torch.equal(picture.light[0, 0], torch.from_numpy(light[..., 0]))
    write_picture(tmp_path / "out.tif", dataclasses.replace(picture, bits=32))
    assert np.array_equal(tifffile.imread(tmp_path / "out.tif"), array)
    again = read_picture(tmp_path / "out.tif", floats_are_light=True)
    assert torch.equal(again.light, picture.light) and torch.equal(again.pixels, picture.pixels)
    plain = read_picture(tmp_path / "in.tif")
    assert plain.light is None and plain.pixels.max() == 1, "without the switch: sRGB's own numbers, cut off"


def test_transparency_beside_float_colours_is_multiplied_in(tmp_path):
    light = scene(4)
    tifffile.imwrite(tmp_path / "in.tif", light, photometric="rgb", extrasamples=["unassalpha"])
    picture = read_picture(tmp_path / "in.tif", floats_are_light=True)
    assert torch.equal(picture.light[0, 0], torch.from_numpy(light[..., 0] * light[..., 3]))


def test_the_display_window_is_the_picture(tmp_path):
    light = scene(3, size=(6, 8))
    windows = {
        "dataWindow": (np.array([2, -1], np.int32), np.array([9, 4], np.int32)),
        "displayWindow": (np.array([0, 0], np.int32), np.array([7, 5], np.int32)),
    }
    save(tmp_path / "in.exr", light, windows)
    picture = read_picture(tmp_path / "in.exr")
    wanted = torch.zeros(3, 6, 8)
    wanted[:, :5, 2:] = torch.from_numpy(light).permute(2, 0, 1)[:, 1:, :6]
    assert torch.equal(picture.light[0], wanted)
    assert "its data window is cut, or filled with 0, to its display window" in picture.notes


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["R", "G", "B", "Z"], "1 other channel left out (Z)"),
        (["beauty.R", "beauty.G", "beauty.B"], "its layer beauty is used"),
        (["a.R", "a.G", "a.B", "b.R", "b.G", "b.B"], "several layers of colour"),
        (["Z"], "no channels R, G, B or Y"),
    ],
)
def test_the_picture_among_the_channels(tmp_path, names, says):
    save(tmp_path / "in.exr", scene(len(names)), names=names)
    try:
        said = " ".join(read_picture(tmp_path / "in.exr").notes)
    except PictureError as error:
        said = str(error)
    assert says in said


def test_damage_and_bombs_are_one_line(tmp_path):
    save(tmp_path / "in.exr", scene(3))
    data = (tmp_path / "in.exr").read_bytes()
    nan = scene(3)
    nan[1, 1] = np.nan
    save(tmp_path / "nan.exr", nan)
    whole = {"R": np.zeros((4, 4), np.uint32)}
    with OpenEXR.File({"type": OpenEXR.scanlineimage}, whole | {"G": whole["R"], "B": whole["R"]}) as file:
        file.write(str(tmp_path / "whole.exr"))
    (tmp_path / "short.exr").write_bytes(data[: len(data) // 2])
    (tmp_path / "head.exr").write_bytes(data[:60])
    # 14 x 9 pixels become 60,014 x 60,009 in both windows.
    corner = np.array([13, 8], np.int32).tobytes()
    assert data.count(corner) == 2
    (tmp_path / "bomb.exr").write_bytes(data.replace(corner, np.array([60013, 60008], np.int32).tobytes()))
    for name, says in (
        ("nan", "contains NaN or infinite values"),
        ("whole", "whole numbers, not light"),
        ("short", "damaged or incomplete"),
        ("head", "damaged or incomplete"),
        ("bomb", "60014 x 60009"),
    ):
        with pytest.raises(PictureError) as error:
            read_picture(tmp_path / f"{name}.exr")
        assert says in str(error.value) and "\n" not in str(error.value), error.value


def test_values_beyond_one_of_srgb_pictures_are_light_too():
    assert float(light_of(torch.full((1, 3, 2, 2), 1.5))[0, 0, 0, 0]) > 2
    assert float(from_linear(torch.tensor(2.0))) > 1
