"""EXIF, ICC profile and resolution never cost a picture: read with distrust, left out with a word."""

import io
import struct
import zlib

import imagecodecs
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from tudsr_core.pictures.files import Picture, PictureError
from tudsr_core.pictures.reading import read_picture
from tudsr_core.pictures.writing import writable, write_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SMALL = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2
PIXELS = torch.linspace(0, 1, 3 * 5 * 7).view(1, 3, 5, 7)
SUFFIXES = (".png", ".jpg", ".webp", ".tif")


def exif_of(main, details=None):
    exif = Image.Exif()
    exif.update(main)
    exif.get_ifd(0x8769).update(details or {})
    return exif


def through(tmp_path, picture, suffix):
    """Return what `writable` notes about `picture` in a format, and the file written and read back."""
    path = tmp_path / f"out{suffix}"
    notes = writable(picture, path, picture.size).notes
    write_picture(path, picture, overwrite=True)
    return notes, read_picture(path)


HARD = {
    "odd dates": ({"exif": exif_of({0x0132: "yesterday", 0x010F: "Camera"}, {0x9003: "0000:00:00 99:99:99"})}, {}),
    "umlauts": ({"exif": exif_of({0x013B: "Jörg Müller", 0x8298: "© 日本"})}, {}),
    "a date of numbers": ({"exif": exif_of({0x0132: 5.5, 0x010F: "Camera"})}, {}),
    "wrong types": ({"exif": exif_of({0x010F: "Camera"}, {0x829A: 2**70})}, {"all": "left out: ExposureTime"}),
    "large": ({"exif": exif_of({0x010F: "Camera"}, {0x927C: bytes(70_000)})}, {".jpg": "MakerNote"}),
    "large text": ({"exif": exif_of({0x010F: "Camera", 0x010E: "x" * 70_000})}, {".jpg": "ImageDescription"}),
    "huge resolution": ({"dpi": (1e12, 1e12)}, {"all": "resolution"}),
    "no resolution": ({"dpi": (0, 0)}, {"all": "resolution"}),
    "negative resolution": ({"dpi": (-72, 72)}, {"all": "resolution"}),
    "NaN resolution": ({"dpi": (float("nan"), 72)}, {"all": "resolution"}),
    "a quarter over JPEG's profiles": ({"icc": bytes(17 * 2**20)}, {"all": "colour profile"}),
    "no profile": ({"icc": b"not a profile"}, {}),
}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("name", HARD)
def test_odd_metadata_never_costs_the_picture(tmp_path, name, suffix):
    values, expected = HARD[name]
    notes, back = through(tmp_path, Picture(PIXELS, **values), suffix)
    assert (back.pixels - PIXELS).abs().max() < 0.2
    says = expected.get(suffix) or expected.get("all")
    assert says is None or any(says in note for note in notes), notes
    assert all(note.isprintable() for note in notes)
    if "exif" in values and name != "umlauts":
        assert back.exif[0x010F] == "Camera"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_texts_keep_their_letters(tmp_path, suffix):
    artist = "Jörg Müller 日本"
    path = tmp_path / f"a{suffix}"
    write_picture(path, Picture(PIXELS, exif=exif_of({0x013B: artist})))
    again = tmp_path / f"b{suffix}"
    write_picture(again, read_picture(path))
    stored = read_picture(again).exif[0x013B]
    assert artist in (stored, stored.encode("latin-1", "ignore").decode("utf-8", "ignore"))


def test_a_fraction_over_zero_is_no_resolution(tmp_path):
    exif = exif_of({282: TiffImagePlugin.IFDRational(300, 0), 283: TiffImagePlugin.IFDRational(0, 0), 296: 2})
    exif[0x010F] = "Camera"
    for suffix in (".png", ".webp", ".jpg"):
        Image.fromarray(SMALL).save(tmp_path / f"a{suffix}", exif=exif)
        picture = read_picture(tmp_path / f"a{suffix}")
        assert (picture.dpi, picture.exif[0x010F]) in (((None, "Camera")), ((72.0, 72.0), "Camera"))
        through(tmp_path, picture, ".tif")


@pytest.mark.parametrize(("suffix", "bits"), [(".png", 8), (".png", 16), (".jpg", 8), (".webp", 8)])
def test_fields_that_are_all_in_directories_below_are_carried_too(tmp_path, suffix, bits):
    exif = exif_of({}, {0x829A: 0.5, 0x927C: bytes(70_000)})
    notes, back = through(tmp_path, Picture(PIXELS, exif=exif, bits=bits), suffix)
    details = back.exif.get_ifd(0x8769)
    assert details[0x829A] == 0.5
    assert (0x927C in details) == (suffix != ".jpg") == (not notes)


def test_resolution_comes_from_exif_and_goes_into_webp(tmp_path):
    exif = exif_of({282: 118.0, 283: 118.0, 296: 3})
    Image.fromarray(SMALL).save(tmp_path / "a.png", exif=exif)
    picture = read_picture(tmp_path / "a.png")
    assert picture.dpi == pytest.approx((299.72, 299.72))
    assert through(tmp_path, picture, ".webp")[1].dpi == pytest.approx((299.72, 299.72), abs=0.01)


def test_fields_about_the_old_files_storage_are_not_carried(tmp_path):
    Image.fromarray(SMALL).save(tmp_path / "a.tif", compression="tiff_lzw", tiffinfo={315: "me"}, dpi=(100, 100))
    picture = read_picture(tmp_path / "a.tif")
    assert dict(picture.exif) == {315: "me"} and picture.dpi == (100, 100)
    assert 256 not in through(tmp_path, picture, ".jpg")[1].exif


def test_every_text_goes_into_a_tiff(tmp_path):
    texts = {0x010E: "Ein Möbel", 0x010F: "Camera", 0x0131: "Prögram", 0x0132: "2024:01:02 03:04:05", 0x8298: "me"}
    notes, back = through(tmp_path, Picture(PIXELS, exif=exif_of(texts)), ".tif")
    assert notes == ()
    stored = {tag: str(back.exif[tag]).encode("latin-1").decode("utf-8") for tag in texts}
    assert stored == texts


def test_a_place_that_leads_nowhere_is_left_out_by_its_name(tmp_path):
    exif = exif_of({0x010F: "Camera"})
    exif.get_ifd(0x8825)[30] = 2**70
    notes, back = through(tmp_path, Picture(PIXELS, exif=exif), ".png")
    assert notes == ("EXIF fields that PNG cannot hold are left out: GPSDifferential",)


def test_tiff_says_which_fields_it_leaves_out(tmp_path):
    notes, back = through(tmp_path, Picture(PIXELS, exif=exif_of({0x010F: "Camera"}, {0x829A: 0.5})), ".tif")
    assert notes == ("EXIF fields that TIFF cannot hold are left out: ExposureTime",)
    assert back.exif[0x010F] == "Camera"


def test_a_grey_profile_does_not_go_with_colours(tmp_path):
    grey = SRGB[:16] + b"GRAY" + SRGB[20:]
    picture = Picture(PIXELS.mean(1, keepdim=True).expand(1, 3, 5, 7), is_grey=True, icc=grey)
    notes, back = through(tmp_path, picture, ".webp")
    assert "grey colour profile" in notes[0] and back.icc is None
    assert through(tmp_path, picture, ".jpg")[1].icc == grey


def test_a_profile_of_other_colours_is_left_out(tmp_path):
    cmyk = SRGB[:16] + b"CMYK" + SRGB[20:]
    Image.fromarray(SMALL).save(tmp_path / "a.png", icc_profile=cmyk)
    picture = read_picture(tmp_path / "a.png")
    assert picture.icc is None
    assert picture.notes == ("its colour profile is one of CMYK, which does not fit its pixels, and is left out",)
    notes, back = through(tmp_path, Picture(PIXELS, icc=cmyk), ".jpg")
    assert back.icc is None and any("one of CMYK" in note for note in notes)
    Image.fromarray(SMALL).save(tmp_path / "a.png", icc_profile=SRGB)
    assert read_picture(tmp_path / "a.png").icc == SRGB


def test_what_is_not_carried_along_is_said(tmp_path):
    """XMP, IPTC, comments and texts, each kind once and in one line."""
    block = b"8BIM" + struct.pack(">HxxI", 0x0404, 4) + b"\x1c\x02\0\0"
    photoshop = b"Photoshop 3.0\0" + block
    app13 = b"\xff\xed" + struct.pack(">H", len(photoshop) + 2) + photoshop
    image = Image.fromarray(SMALL)
    image.save(tmp_path / "a.jpg", xmp=b"<x:xmpmeta/>", comment=b"hello")
    data = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(data[:2] + app13 + data[2:])
    image.save(tmp_path / "a.webp", xmp=b"<x:xmpmeta/>")
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", "<x:xmpmeta/>")
    texts.add_text("Comment", "hello")
    texts.add_text("Software", "x", zip=True)
    image.save(tmp_path / "a.png", pnginfo=texts)
    tifffile.imwrite(tmp_path / "a.tif", SMALL, photometric="rgb", extratags=[(700, "B", 6, b"<xmp/>", True)])
    said = {".jpg": "IPTC, XMP, comment", ".webp": "XMP", ".png": "XMP, texts", ".tif": "XMP"}
    for suffix, names in said.items():
        assert read_picture(tmp_path / f"a{suffix}").notes == (f"what is not carried along: {names}",)
        image.save(tmp_path / f"b{suffix}")
        assert read_picture(tmp_path / f"b{suffix}").notes == ()


def png_with(kind, body, deep=False, crc=None):
    array = SMALL.astype(np.uint16) * 257 if deep else SMALL
    data = imagecodecs.png_encode(array)
    check = zlib.crc32(kind + body) if crc is None else crc
    return data[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check) + data[33:]


LOOP = b"MM\0*\0\0\0\x08" + b"\0\x01" + struct.pack(">HHII", 0x8769, 4, 1, 8) + bytes(4)
BROKEN = {
    "profile": (b"iCCP", b"x\0\0garbage", None, "iCCP chunk is broken"),
    "profile bomb": (b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26)), None, "iCCP chunk is broken"),
    "exif": (b"eXIf", b"garbage", None, "EXIF is broken"),
    "exif loop": (b"eXIf", LOOP, None, ""),
    "exif beyond its end": (b"eXIf", LOOP[:-8] + b"\xff\xff\xff\xf0" + bytes(4), None, ""),
    "legacy exif": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzz", None, "tEXt chunk is broken"),
    "resolution": (b"pHYs", b"\0", None, "pHYs chunk is broken"),
    "checksum": (b"tEXt", b"a\0b", 1, "tEXt chunk is broken"),
    "text bomb": (b"zTXt", b"a\0\0" + zlib.compress(bytes(2**26)), None, "not carried along: texts"),
    "animation": (b"acTL", b"\0", None, "animated"),
}


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", BROKEN)
def test_broken_metadata_in_a_png_leaves_the_picture(tmp_path, name, deep):
    kind, body, crc, says = BROKEN[name]
    (tmp_path / "a.png").write_bytes(png_with(kind, body, deep, crc))
    picture = read_picture(tmp_path / "a.png")
    assert np.array_equal((picture.pixels[0].permute(1, 2, 0) * 255).round(), SMALL)
    assert says in " ".join(picture.notes) and bool(says) == bool(picture.notes)
    through(tmp_path, picture, ".png")


def test_a_profile_of_a_megabyte_and_imagemagicks_exif_are_read(tmp_path):
    profile = np.random.default_rng(0).bytes(3 * 2**20)
    (tmp_path / "a.png").write_bytes(png_with(b"iCCP", b"x\0\0" + zlib.compress(profile)))
    assert read_picture(tmp_path / "a.png").icc == profile
    block = exif_of({0x0112: 3, 0x010F: "Camera"}).tobytes()
    text = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    (tmp_path / "b.png").write_bytes(png_with(b"tEXt", b"Raw profile type exif\0" + text))
    picture = read_picture(tmp_path / "b.png")
    assert np.array_equal((picture.pixels[0].permute(1, 2, 0) * 255).round(), SMALL[::-1, ::-1])
    assert picture.exif[0x010F] == "Camera"


@pytest.mark.parametrize("block", [b"garbage", b"II*\0\xff\xff\xff\xff", LOOP, b"", b"II*\0\x08\0\0\0\xff\xff"])
def test_broken_exif_in_a_jpeg_or_webp_leaves_the_picture(tmp_path, block):
    for kind, suffix in (("JPEG", ".jpg"), ("WEBP", ".webp")):
        buffer = io.BytesIO()
        Image.fromarray(SMALL).save(buffer, kind, exif=b"Exif\0\0" + block)
        (tmp_path / f"a{suffix}").write_bytes(buffer.getvalue())
        assert read_picture(tmp_path / f"a{suffix}").size == (5, 7)


def test_what_is_left_out_is_known_before_anything_is_computed(tmp_path):
    from conftest import identity_model

    from tudsr_core.batch import Job, Output, open_job
    from tudsr_core.methods.plan import Target
    from tudsr_core.methods.two_stage import TwoStage

    exif = exif_of({0x010F: "Camera"}, {0x927C: bytes(70_000)})
    Image.fromarray(SMALL).save(tmp_path / "a.png", exif=exif)
    how = TwoStage(identity_model()), Target(scale=2), Output()
    opened = open_job(Job(tmp_path / "a.png", tmp_path / "b.jpg"), *how)
    assert opened.describe()[-1] == "EXIF fields that JPEG cannot hold are left out: MakerNote"
    assert 0x927C not in opened.picture.exif.get_ifd(0x8769)
    (tmp_path / "b.jpg").touch()
    with pytest.raises(PictureError, match="already exists"):
        open_job(Job(tmp_path / "none.png", tmp_path / "b.jpg"), *how)
