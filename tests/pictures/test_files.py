import io
import os
import stat
import struct
import subprocess
import sys
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, ImageFile

from tudsr_core.atomic_write import temporary_beside
from tudsr_core.pictures.files import Picture, PictureError
from tudsr_core.pictures.reading import read_picture
from tudsr_core.pictures.writing import check_output, write_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GRID = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2


def pixels_of(array):
    array = array if array.ndim == 3 else np.stack([array] * 3, -1)
    return (
        torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)).astype(np.float32))[None]
        / np.iinfo(array.dtype).max
    )


def assert_same(path, array):
    assert torch.equal(read_picture(path).pixels, pixels_of(array))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".PNG"])
def test_8_bit_colour_round_trip_is_exact(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    write_picture(path, Picture(pixels_of(GRID), icc=SRGB, dpi=(300, 300)))
    assert_same(path, GRID)
    back = read_picture(path)
    assert (back.bits, back.icc, back.has_alpha) == (8, SRGB, False)
    assert back.dpi == pytest.approx((300, 300), abs=0.1)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bit_round_trip_is_exact(tmp_path, suffix, channels):
    array = (np.arange(6 * 5 * channels, dtype=np.uint16) * 517).reshape(6, 5, channels)
    source = pixels_of(array[..., [0, 0, 0, *range(1, channels)]] if channels < 3 else array)
    path = tmp_path / f"a{suffix}"
    write_picture(path, Picture(source, bits=16, is_grey=channels < 3, icc=SRGB, dpi=(72, 72)))
    back = read_picture(path)
    assert torch.equal(back.pixels, source)
    assert (back.bits, back.is_grey, back.icc) == (16, channels < 3, SRGB)
    assert back.dpi == pytest.approx((72, 72), abs=0.1)


def test_16_bit_png_is_read_by_other_programs(tmp_path):
    array = (np.arange(30, dtype=np.uint16) * 2000).reshape(2, 5, 3)
    write_picture(tmp_path / "a.png", Picture(pixels_of(array), bits=16, icc=SRGB))
    assert np.array_equal(imagecodecs.png_decode((tmp_path / "a.png").read_bytes()), array)
    with Image.open(tmp_path / "a.png") as image:
        image.load()
        assert image.info["icc_profile"] == SRGB


@pytest.mark.parametrize(("suffix", "tolerance"), [(".jpg", 12), (".webp", 16)])
def test_lossy_formats_are_close_and_keep_what_travels(tmp_path, suffix, tolerance):
    ramp = np.stack([np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))] * 3, -1)
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    write_picture(tmp_path / f"a{suffix}", Picture(pixels_of(ramp), exif=exif, icc=SRGB))
    back = read_picture(tmp_path / f"a{suffix}")
    assert (back.pixels - pixels_of(ramp)).abs().max() * 255 <= tolerance
    assert (back.exif[0x010F], back.icc) == ("Camera", SRGB)


def test_grey_stays_grey(tmp_path):
    array = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
    for suffix in (".png", ".jpg", ".tif"):
        Image.fromarray(array).save(tmp_path / f"in{suffix}")
        picture = read_picture(tmp_path / f"in{suffix}")
        write_picture(tmp_path / f"out{suffix}", picture)
        with Image.open(tmp_path / f"out{suffix}") as image:
            assert (picture.is_grey, image.mode) == (True, "L")


def test_palette_and_alpha_variants_become_rgba(tmp_path):
    rgba = np.dstack([GRID, np.full((5, 7), 128, np.uint8)])
    rgba[0, 0] = 0
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    assert_same(tmp_path / "rgba.png", rgba)
    Image.fromarray(rgba[..., [0, 3]], "LA").save(tmp_path / "la.png")
    assert_same(tmp_path / "la.png", rgba[..., [0, 0, 0, 3]])
    palette = Image.fromarray(GRID).quantize(8)
    palette.save(tmp_path / "p.png")
    assert_same(tmp_path / "p.png", np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "p.gif", transparency=0)
    assert read_picture(tmp_path / "p.gif").has_alpha


def test_cmyk_becomes_rgb(tmp_path):
    Image.fromarray(GRID).convert("CMYK").save(tmp_path / "a.tif")
    assert (read_picture(tmp_path / "a.tif").pixels - pixels_of(GRID)).abs().max() < 0.01
    assert read_picture(tmp_path / "a.tif").icc is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_exif_orientation_is_applied_once(tmp_path, orientation, deep):
    exif = Image.Exif()
    exif[0x0112] = orientation
    if deep:
        array = GRID.astype(np.uint16) * 257
        data = imagecodecs.png_encode(array)
        body = exif.tobytes().removeprefix(b"Exif\0\0")
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body + struct.pack(">I", zlib.crc32(b"eXIf" + body))
        (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    else:
        Image.fromarray(GRID).save(tmp_path / "a.png", exif=exif)
    from PIL import ImageOps

    upright = Image.fromarray(GRID)
    upright.getexif()[0x0112] = orientation
    wanted = np.asarray(ImageOps.exif_transpose(upright))
    picture = read_picture(tmp_path / "a.png")
    assert torch.allclose(picture.pixels, pixels_of(wanted))
    write_picture(tmp_path / "b.png", picture)
    assert torch.allclose(read_picture(tmp_path / "b.png").pixels, pixels_of(wanted))


def test_exif_size_tags_follow_the_picture(tmp_path):
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    exif.get_ifd(0x8769).update({0xA002: 7, 0xA003: 5, 0x829A: 0.5})
    Image.fromarray(GRID).save(tmp_path / "a.jpg", exif=exif)
    picture = read_picture(tmp_path / "a.jpg")
    large = Picture(torch.zeros(1, 3, 40, 56), exif=picture.exif)
    write_picture(tmp_path / "b.jpg", large)
    details = read_picture(tmp_path / "b.jpg").exif.get_ifd(0x8769)
    assert (details[0xA002], details[0xA003], details[0x829A]) == (56, 40, 0.5)


def test_float_tiff_is_read_and_nan_refused(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", GRID.astype(np.float32) / 255, photometric="rgb")
    assert (read_picture(tmp_path / "a.tif").pixels - pixels_of(GRID)).abs().max() < 1e-6
    broken = GRID.astype(np.float32)
    broken[2, 3, 1] = np.nan
    tifffile.imwrite(tmp_path / "nan.tif", broken, photometric="rgb")
    with pytest.raises(PictureError, match="nan.tif: it contains NaN"):
        read_picture(tmp_path / "nan.tif")
    tifffile.imwrite(tmp_path / "deep.tif", GRID.astype(np.int32), photometric="rgb")
    with pytest.raises(PictureError, match="deep.tif: its pixels are int32"):
        read_picture(tmp_path / "deep.tif")


def damaged(kind):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.png", b"", r"^\S+a\.png is empty"),
        ("a.png", b"hello, I am no picture", "not a picture"),
        ("a.png", damaged("PNG")[:900], "damaged"),
        ("a.jpg", damaged("JPEG")[:900], "damaged"),
        ("a.webp", damaged("WEBP")[:900], "damaged|not a picture"),
        ("a.tif", damaged("TIFF")[:900], "damaged"),
        ("a.tif", b"II*\0" + bytes(40), "damaged"),
    ],
)
def test_broken_files_name_the_file_and_the_remedy(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(PictureError, match=says) as caught:
        read_picture(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(PictureError, match="does not exist"):
        read_picture(tmp_path / "none.png")
    with pytest.raises(PictureError, match="cannot be read"):
        read_picture(tmp_path)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("a.bmp", {}, "unknown file type"),
        ("a.jpg", {"has_alpha": True}, "transparency"),
        ("a.jpg", {"bits": 16}, "16 bit"),
        ("a.webp", {"size": (10, 20000)}, "at most 16383"),
        ("no/a.png", {}, "does not exist"),
    ],
)
def test_outputs_that_cannot_work_are_refused_beforehand(tmp_path, name, options, says):
    wanted = {"size": (8, 8), "has_alpha": False, "bits": 8, "overwrite": False} | options
    with pytest.raises(PictureError, match=says):
        check_output(tmp_path / name, **wanted)


def test_existing_files_are_kept_unless_told(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(PictureError, match="--force"):
        write_picture(path, Picture(pixels_of(GRID)))
    assert path.read_bytes() == b"mine"
    write_picture(path, Picture(pixels_of(GRID)), overwrite=True)
    assert_same(path, GRID)


def test_an_interrupt_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(KeyboardInterrupt), temporary_beside(path) as temporary:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert path.read_bytes() == b"mine"


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    """A file size limit stands in for a full disk: the kernel refuses the write half way."""
    script = f"""
import resource, signal, torch
from pathlib import Path
from tudsr_core.pictures.files import Picture, PictureError
from tudsr_core.pictures.writing import write_picture
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    write_picture(Path({str(tmp_path)!r}) / "a.png", Picture(torch.rand(1, 3, 200, 200)))
except PictureError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=os.getcwd(), encoding="utf-8"
    )
    assert "no room left" in done.stdout, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_written_files_have_the_users_permissions(tmp_path):
    write_picture(tmp_path / "a.png", Picture(pixels_of(GRID)))
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "a.png").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def png_of(width, height, bits=8, body=b""):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


def headers(width, height):
    """Return files of every format whose headers claim a size."""
    small = Image.fromarray(GRID)
    made = {}
    for kind in ("JPEG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        small.save(buffer, kind, **({"lossless": True, "icc_profile": bytes(99)} if kind == "WEBP" else {}))
        made[kind] = bytearray(buffer.getvalue())
    struct.pack_into(">HH", made["JPEG"], made["JPEG"].index(b"\xff\xc0") + 5, height, width)
    made["WEBP"][24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    struct.pack_into("<HH", made["GIF"], 6, width, height)
    struct.pack_into("<ii", made["BMP"], 18, width, height)
    return {name: bytes(data) for name, data in made.items()} | {
        "PNG": png_of(width, height),
        "PNG 16": png_of(width, height, 16),
    }


@pytest.mark.parametrize("kind", headers(2, 2))
def test_the_size_limit_is_ours_in_every_format_and_an_option_moves_it(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(imagecodecs, "png_decode", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    path = tmp_path / "a"
    path.write_bytes(headers(40_000, 30_000)[kind])
    with pytest.raises(PictureError, match="1,200.0 megapixels; tudsr reads up to 179: .* raise --max-megapixels"):
        read_picture(path)
    # Below the limit, a file of some hundred bytes does not get hundreds of megabytes either.
    path.write_bytes(headers(16_000, 10_000)[kind])
    with pytest.raises(PictureError, match="160.0 megapixels, .* MB from a file of .* say --max-megapixels"):
        read_picture(path)
    path.write_bytes(headers(7, 5)[kind])
    with pytest.raises(PictureError, match="tudsr reads up to 3e-05"):
        read_picture(path, max_megapixels=0.00003)


def test_the_limit_can_be_raised(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png_of(30_000, 7_000))
    with pytest.raises(PictureError, match="tudsr reads up to 179"):
        read_picture(path)
    with pytest.raises(PictureError, match="damaged"):  # no data in this file, but the header may pass
        read_picture(path, max_megapixels=211)


@pytest.mark.parametrize("kind", ["PNG", "PNG 16", "JPEG", "WEBP", "GIF", "BMP"])
def test_a_file_longer_than_any_picture_is_not_read(tmp_path, kind, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(headers(7, 5)[kind])
    os.truncate(path, 3 * 10**9)  # sparse: takes no room on the disk
    monkeypatch.setattr(type(path), "read_bytes", lambda _: pytest.fail("read"))
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(PictureError, match=r"3,000 MB is longer than any .* \(1,432 MB\); .* --max-megapixels"):
        read_picture(path)


def test_a_named_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(PictureError, match=r"^\S+a\.png is empty \(0 bytes\)"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize("kind", [TypeError, ZeroDivisionError, OverflowError, MemoryError, RecursionError, KeyError])
def test_whatever_a_decoder_raises_is_one_line_with_the_name(tmp_path, kind, monkeypatch):
    def fail(*_, **__):
        raise kind("\x1b[31mred\nline")

    monkeypatch.setattr(Image.Image, "getchannel", fail)
    Image.fromarray(GRID).save(tmp_path / "a.png")
    with pytest.raises(PictureError, match="a.png") as caught:
        read_picture(tmp_path / "a.png")
    assert str(caught.value).isprintable()


def test_the_scans_of_a_jpeg_are_weighed_by_its_size(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (7000, 7000)).save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    assert data.count(b"\xff\xda") == 10
    (tmp_path / "a.jpg").write_bytes(data[:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 90 + b"\xff\xd9")
    with pytest.raises(PictureError, match="has 100 scans, of which 7000 x 7000 pixels may have 81; save it again"):
        read_picture(tmp_path / "a.jpg")
    Image.new("RGB", (70, 70)).save(tmp_path / "a.jpg", progressive=True)
    monkeypatch.setattr("tudsr_core.pictures.reading.MAX_SCANNED_PIXELS", 1)
    assert read_picture(tmp_path / "a.jpg").size == (70, 70)


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(GRID).save(buffer, "JPEG", progressive=True)
    scan = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0"
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue()[:-2] + scan * 1000 + b"\xff\xd9")
    with pytest.raises(PictureError, match="scans, of which .* pixels may have 200; save it again"):
        read_picture(tmp_path / "a.jpg")


@pytest.mark.parametrize(("kind", "suffix"), [("PNG", ".png"), ("WEBP", ".webp"), ("GIF", ".gif")])
def test_of_an_animation_the_first_picture_is_used_and_that_is_said(tmp_path, kind, suffix):
    frames = [Image.fromarray(np.full((5, 7, 3), value, np.uint8)) for value in (10, 200)]
    path = tmp_path / f"a{suffix}"
    frames[0].save(
        path, kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    picture = read_picture(path)
    assert torch.equal((picture.pixels[0, :3] * 255).round(), torch.full((3, 5, 7), 10.0))
    assert "only" in picture.notes[0] and "first" in picture.notes[0]


@pytest.mark.parametrize("grey", [True, False])
def test_16_bit_png_with_a_transparent_colour(tmp_path, grey):
    array = (np.arange(20, dtype=np.uint16) * 3000).reshape(4, 5)
    array = array if grey else np.dstack([array] * 3)
    data = imagecodecs.png_encode(array)
    body = struct.pack(">H", 3000) * (1 if grey else 3)
    chunk = struct.pack(">I", len(body)) + b"tRNS" + body + struct.pack(">I", zlib.crc32(b"tRNS" + body))
    (tmp_path / "a.png").write_bytes(data[:33] + chunk + data[33:])
    picture = read_picture(tmp_path / "a.png")
    plane = array if grey else array[..., 0]
    assert torch.equal((picture.pixels[0, 0] * 65535).round(), torch.from_numpy(plane.astype(np.float32)))
    assert torch.equal(picture.pixels[0, 3], torch.from_numpy((plane != 3000).astype(np.float32)))
    assert (picture.bits, picture.is_grey) == (16, grey)


def test_a_long_name_can_be_written(tmp_path):
    path = tmp_path / f"{'ü' * 120}.png"
    write_picture(path, Picture(pixels_of(GRID)))
    assert_same(path, GRID)
