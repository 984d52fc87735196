"""What the numbers of a TIFF mean, and what is refused before a pixel is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
import tifffile
from fuzz.pictures import tiff
from PIL import Image, ImageCms

from tudsr_core.pictures.files import PictureError
from tudsr_core.pictures.reading import read_picture

RNG = np.random.default_rng(0)
RGBA = RNG.integers(0, 256, (6, 8, 4), np.uint8)
DEEP = RNG.integers(0, 2**16, (6, 8, 4), np.uint16)


def read(tmp_path, array, **options):
    """Write `array` with tifffile and read it back; returns the picture and its pixels as `H W C`."""
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(array, **options))
    picture = read_picture(path)
    return picture, picture.pixels[0].permute(1, 2, 0).numpy()


@pytest.mark.parametrize("bits", [2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_white_is_white_at_every_depth(tmp_path, bits, photometric):
    top = 2**bits - 1
    array = np.array([[0, top, top // 3, 1]] * 2, np.uint16 if bits > 8 else np.uint8)
    picture, pixels = read(tmp_path, array, photometric=photometric, bits=bits)
    wanted = array / top if photometric == "minisblack" else 1 - array / top
    assert np.abs(pixels[..., 0] - wanted).max() < 1e-6
    assert (picture.bits, picture.is_grey, picture.notes) == (8 if bits <= 8 else 16, True, ())


@pytest.mark.parametrize("kind", ["<u1", ">u2", "<u4", ">u4", ">f2", "<f4", ">f8"])
@pytest.mark.parametrize("layout", ["contig", "separate"])
def test_every_number_type_byte_order_and_layout_is_the_same_picture(tmp_path, kind, layout):
    values = RGBA / 255
    dtype = np.dtype(kind)
    top = 1 if dtype.kind == "f" else np.iinfo(dtype).max
    array = (values * top).round(0 if top > 1 else 9).astype(dtype.newbyteorder("="))
    array = np.moveaxis(array, -1, 0) if layout == "separate" else array
    _, pixels = read(
        tmp_path, array, photometric="rgb", planarconfig=layout, byteorder=kind[0], compression="zlib", rowsperstrip=4
    )
    assert np.abs(pixels - values).max() < (1e-3 if dtype.itemsize == 2 and top == 1 else 1e-6)


def test_tiles_predictor_and_big_tiff(tmp_path):
    array = RNG.integers(0, 2**16, (40, 50, 3), np.uint16)
    _, pixels = read(tmp_path, array, photometric="rgb", tile=(16, 32), predictor=True, compression="lzw", bigtiff=True)
    assert np.array_equal((pixels * 65535).round(), array)


@pytest.mark.parametrize("tag", [281, 341])
def test_a_declared_white_below_the_containers_is_used_and_said(tmp_path, tag):
    array = np.array([[0, 1023, 4095, 2048]], np.uint16)
    picture, pixels = read(tmp_path, array, photometric="minisblack", extratags=[(tag, "H", 1, 4095, True)])
    assert np.abs(pixels[..., 0] - array / 4095).max() < 1e-6
    assert picture.notes == ("its white is 4095, as the file declares",)
    # The largest value that occurs is no declared range.
    picture, pixels = read(tmp_path, array // 2, photometric="minisblack", extratags=[(tag, "H", 1, 2047 - 9, True)])
    assert np.abs(pixels[..., 0] - (array // 2) / 65535).max() < 1e-6


def declared(low, high):
    return [(340, "f", 1, low, True), (341, "f", 1, high, True)]


@pytest.mark.parametrize(
    ("array", "tags", "wanted", "says"),
    [
        ([0, 0.25, 1, 0.5], [], [0, 0.25, 1, 0.5], ""),
        ([0, 128, 255, 64], [], [0, 128 / 255, 1, 64 / 255], "255 is taken for white"),
        ([100, 4000, 4095, 2000], [], [100 / 4095, 4000 / 4095, 1, 2000 / 4095], "4095 is taken for white"),
        ([0.1, 0.2, 7.5, 0.3], [], [0.1, 0.2, 1, 0.3], "those above 1 are cut off"),
        (
            [0, 0.5, 1, 0.25],
            declared(0, 255),
            [0, 0.5 / 255, 1 / 255, 0.25 / 255],
            "from 0 to 255, as the file declares",
        ),
        ([-1, 0, 1, 0.5], declared(-1, 1), [0, 0.5, 1, 0.75], "from -1 to 1, as the file declares"),
        ([-1, 0, 1, 0.5], [], [0, 0, 1, 0.5], "begin at -1 and declare no range; those below 0 are cut off"),
        ([-0.0005, 0, 1, 0.5], [], [0, 0, 1, 0.5], ""),
        ([1.5, 0.5, 2.55, 1.25], [], [1, 0.5, 1, 1], "reach 2.55 and declare no range; those above 1 are cut off"),
        ([3, 30, 100, 20], [], [3 / 255, 30 / 255, 100 / 255, 20 / 255], "255 is taken for white"),
        ([0, 0.5, 1, 0.25], declared(0, 1), [0, 0.5, 1, 0.25], ""),
    ],
)
def test_the_range_of_float_numbers_is_declared_or_said(tmp_path, array, tags, wanted, says):
    picture, pixels = read(tmp_path, np.array([array], np.float32), photometric="minisblack", extratags=tags)
    assert np.abs(pixels[0, :, 0] - wanted).max() < 1e-6
    assert says in " ".join(picture.notes) and bool(says) == bool(picture.notes)


@pytest.mark.parametrize(
    ("color", "alpha", "tags", "wanted", "says"),
    [
        (1, 1, [], 0.5, ()),
        (255, 255, [], 0.5, ("255 is taken for white", "255 is taken for opaque")),
        (255, 1, [], 0.5, ("255 is taken for white", "1 is taken for opaque")),
        (1, 255, [], 0.5, ("255 is taken for opaque",)),
        (1, 1.2, [], 1, ("reaches 1.2 and declares no range; 1 is taken for opaque",)),
        (65535, 255, [], 0.5, ("65535 is taken for white", "255 is taken for opaque")),
        (255, 1, [(341, "f", 4, (255, 255, 255, 1), True)], 0.5, ("from 0 to 255, as the file declares",)),
    ],
)
def test_float_transparency_has_a_range_of_its_own(tmp_path, color, alpha, tags, wanted, says):
    array = np.concatenate([RGBA[..., :3] / 255 * color, np.full((6, 8, 1), wanted * alpha)], -1).astype(np.float32)
    array[0, 0, :3] = color
    picture, pixels = read(tmp_path, array, photometric="rgb", extrasamples=["unassalpha"], extratags=tags)
    assert np.abs(pixels[..., 3] - wanted).max() < 1e-6
    assert np.abs(pixels[..., :3] - array[..., :3] / color).max() < 1e-6
    assert len(picture.notes) == len(says) and all(a in b for a, b in zip(says, picture.notes, strict=True))


def test_signed_numbers_need_a_declared_range(tmp_path):
    array = np.array([[-1000, 0, 3000, 1000]], np.int16)
    with pytest.raises(PictureError, match="its pixels are int16, whose range is not declared"):
        read(tmp_path, array, photometric="minisblack")
    tags = [(340, "h", 1, -1000, True), (341, "h", 1, 3000, True)]
    picture, pixels = read(tmp_path, array, photometric="minisblack", extratags=tags)
    assert np.allclose(pixels[0, :, 0], [0, 0.25, 1, 0.5])
    assert "from -1000 to 3000" in picture.notes[0]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_premultiplied_colour_is_divided_by_its_alpha(tmp_path, dtype):
    color, alpha = RGBA[..., :3] / 255, np.maximum(RGBA[..., 3:], 60) / 255
    alpha[0, 0] = 0
    top = 1 if dtype == np.float32 else np.iinfo(dtype).max
    stored = np.concatenate([color * alpha, alpha], -1) * top
    stored = stored.astype(dtype) if top == 1 else stored.round().astype(dtype)
    _, pixels = read(tmp_path, stored, photometric="rgb", extrasamples=["assocalpha"])
    visible = alpha[..., 0] > 0
    assert np.abs(pixels[..., 3] - alpha[..., 0]).max() < 0.003
    assert np.abs(pixels[visible][:, :3] - color[visible]).max() < (0.01 if top == 255 else 1e-4)
    assert np.all(pixels[0, 0, :3] == 0)


def test_channels_beyond_alpha_and_unspecified_ones_are_left_out_and_said(tmp_path):
    five = np.concatenate([DEEP, DEEP[..., :1]], -1)
    picture, pixels = read(tmp_path, five, photometric="rgb", extrasamples=["unassalpha", "unspecified"])
    assert np.array_equal((pixels * 65535).round(), DEEP)
    assert picture.notes == ("1 extra channel beside colour and transparency left out",)
    picture, pixels = read(tmp_path, DEEP, photometric="rgb", extrasamples=["unspecified"])
    assert not picture.has_alpha and np.array_equal((pixels * 65535).round(), DEEP[..., :3])


@pytest.mark.parametrize("compression", [None, "group4"])
def test_one_bit(tmp_path, compression):
    black = np.tile(np.array([[True, False] * 8, [False] * 16]), (8, 1))
    Image.fromarray(~black).save(tmp_path / "a.tif", compression=compression)
    picture = read_picture(tmp_path / "a.tif")
    assert np.array_equal(picture.pixels[0, 0].numpy(), ~black)
    assert picture.is_grey


@pytest.mark.parametrize("deep", [True, False])
def test_palette(tmp_path, deep):
    table = (
        RNG.integers(0, 2**16, (3, 256), np.uint16) if deep else RNG.integers(0, 256, (3, 256)).astype(np.uint16) * 257
    )
    index = RGBA[..., 0]
    picture, pixels = read(tmp_path, index, photometric="palette", colormap=table)
    assert np.abs(pixels - np.moveaxis(table[:, index], 0, -1) / 65535).max() < 1e-6
    assert picture.bits == (16 if deep else 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_cmyk(tmp_path, dtype):
    inks = np.asarray(Image.fromarray(RGBA[..., :3]).convert("CMYK"))
    scale = np.iinfo(dtype).max // 255
    picture, pixels = read(tmp_path, inks.astype(dtype) * scale, photometric="separated")
    assert np.abs(pixels - RGBA[..., :3] / 255).max() < 0.01
    assert picture.notes == (("CMYK is converted to RGB at 8 bit",) if dtype == np.uint16 else ())


@pytest.mark.parametrize("kind", ["8", "16", "16 icclab"])
def test_cielab_becomes_srgb(tmp_path, kind):
    """The reference is LittleCMS: sRGB to its 8-bit Lab, whose steps are coarse in the dark."""
    rgb = np.stack(np.meshgrid(*[np.linspace(60, 230, 6)] * 3), -1).reshape(12, 18, 3).astype(np.uint8)
    lab_profile, srgb = ImageCms.createProfile("LAB", 5000), ImageCms.createProfile("sRGB")
    lab = np.asarray(ImageCms.profileToProfile(Image.fromarray(rgb), srgb, lab_profile, outputMode="LAB"))
    signed = lab.astype(np.int32)
    signed[..., 1:] = np.where(signed[..., 1:] > 127, signed[..., 1:] - 256, signed[..., 1:])
    if kind == "8":
        stored = lab
    else:
        chroma = signed[..., 1:] * 256 + (32768 if "icc" in kind else 0)
        stored = np.concatenate([lab[..., :1].astype(np.int32) * 257, chroma], -1).astype(np.uint16)
    picture, pixels = read(tmp_path, stored, photometric="icclab" if "icc" in kind else "cielab")
    assert np.abs(pixels - rgb / 255).max() < 0.025
    assert picture.notes == ("its CIELab colours are converted to sRGB",)
    assert picture.bits == (8 if kind == "8" else 16)


def test_jpeg_strips_and_ycbcr_are_read(tmp_path):
    smooth = np.stack([np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))] * 3, -1)
    for options in ({"compression": "jpeg"}, {"compression": "jpeg", "mode": "YCbCr"}):
        image = Image.fromarray(smooth).convert(options.pop("mode", "RGB"))
        image.save(tmp_path / "a.tif", **options)
        assert np.abs(read_picture(tmp_path / "a.tif").pixels[0].permute(1, 2, 0).numpy() - smooth / 255).max() < 0.05


def test_a_tag_that_is_there_twice_does_not_cost_the_picture(tmp_path):
    tags = grey(10, 10, 10, 134, 100)
    (tmp_path / "a.tif").write_bytes(directory([tags[0], *tags], bytes(100)))
    assert read_picture(tmp_path / "a.tif").size == (10, 10)


def test_pages_and_orientation(tmp_path):
    pages = np.stack([DEEP[..., 0], DEEP[..., 1]])
    picture, pixels = read(tmp_path, pages, photometric="minisblack", extratags=[(274, "H", 1, 6, True)])
    assert picture.notes == ("this file holds several pictures; only the first is used",)
    assert np.array_equal((pixels[..., 0] * 65535).round(), np.rot90(DEEP[..., 0], 3))
    assert picture.exif[274] == 1


@pytest.mark.parametrize(
    ("array", "options", "says"),
    [
        (DEEP.astype(np.complex64), {"photometric": "rgb"}, "of an unusual kind"),
        (
            np.zeros((16, 16, 16), np.uint8),
            {"photometric": "minisblack", "volumetric": True, "tile": (16, 16, 16)},
            "volume",
        ),
        (DEEP[..., 0], {"photometric": "cfa"}, r"colour model \(CFA\)"),
        (RGBA[..., :3], {"photometric": "rgb", "compression": "webp"}, "compression"),
        (np.zeros((4, 4, 70), np.uint8), {"photometric": "minisblack", "planarconfig": "contig"}, "70 channels"),
        (np.full((4, 4), 1e30, np.float32), {"photometric": "minisblack"}, "declare no range"),
        (np.full((4, 4), np.inf, np.float32), {"photometric": "minisblack"}, "NaN or infinite"),
        (
            np.full((4, 4, 3), 700, np.uint16),
            {"photometric": "cielab", "bits": 10},
            "CIELab samples are 10-bit; save it",
        ),
        (DEEP[..., :3], {"photometric": "ycbcr"}, "YCbCr samples are 16-bit; save it as RGB"),
        (np.full((4, 4, 4), 1e6, np.float32), {"photometric": "rgb"}, "reach 1e.06 and declare"),
        (DEEP, {"photometric": "rgb", "subfiletype": 1}, "a thumbnail of another"),
        (DEEP, {"photometric": "separated", "extratags": [(332, "H", 1, 2, True)]}, "inks are not CMYK"),
    ],
)
def test_what_has_no_one_meaning_is_refused_with_a_reason(tmp_path, array, options, says):
    with pytest.raises(PictureError, match=says) as caught:
        read(tmp_path, array, **options)
    assert str(tmp_path / "a.tif") in str(caught.value)


def directory(tags, tail=b""):
    """Return a little-endian TIFF of one directory; all values are 32-bit."""
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    return body + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4) + tail


def grey(width, height, rows, at, length, compression=1):
    values = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 273: at, 277: 1, 278: rows, 279: length}
    return [(tag, 4, 1, value) for tag, value in values.items()]


ZEROS = zlib.compress(bytes(2**20))
TILE = [(322, 4, 1, 2**20), (323, 4, 1, 2**20), (324, 4, 1, 8), (325, 4, 1, 99)]
SHARED = [(273, 4, 900, 122), (277, 4, 1, 1), (278, 4, 1, 1), (279, 4, 900, 3722)]
HOSTILE = {
    "tall": (directory(grey(17, 8_388_621, 1, 8, 99), bytes(2300)), "142.6 megapixels, 570 MB from a file of 0.002 MB"),
    "many strips": (directory(grey(17, 250_000, 1, 8, 99), bytes(2300)), "cut into 250,000 strips"),
    "too little data": (
        directory(grey(3000, 3000, 2**31, 8, 2300), bytes(2300)),
        "9,000,000 bytes of pixels",
    ),
    "unfolding": (directory(grey(17000, 17000, 2**31, 122, len(ZEROS), 8), ZEROS), "289.0 megapixels"),
    "unfolding less": (
        directory(grey(13000, 13000, 2**31, 122, len(ZEROS), 8), ZEROS),
        "676 MB from a file of 0.001 MB",
    ),
    "a huge tile": (directory([*grey(10, 10, 10, 8, 99), *TILE], bytes(99)), "with the rest of its tiles"),
    "shared strips": (
        directory([*grey(9, 900, 1, 8, 9)[:5], *SHARED], struct.pack("<900I", *[300] * 900) * 2),
        "overlap in the file",
    ),
    "channels of different kinds": (
        directory([*grey(10, 10, 10, 150, 100)[:6], (277, 3, 1, 3), *grey(10, 10, 10, 150, 100)[7:], (339, 3, 3, 134)])
        + struct.pack("<3H", 1, 3, 1)
        + bytes(99),
        "its channels are of different kinds",
    ),
    "two kinds": (directory([(339, 3, 2, 0x30001)], bytes(99)), "its channels are of different kinds"),
    "no rows": (directory(grey(10, 10, 0, 8, 100), bytes(99)), "damaged"),
    "repeated tags": (directory([(270, 2, 99, 8)] * 99), "its tags claim more bytes"),
    "many tags": (directory([(270 + i, 2, 1, 8) for i in range(1001)]), "1001 tags"),
    "tags that overlap": (
        directory([(270 + i, 2, 900, 8) for i in range(99)]),
        "more bytes than it holds",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path, name, monkeypatch):
    data, says = HOSTILE[name]
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    monkeypatch.setattr(tifffile.TiffPage, "asarray", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(PictureError, match=says):
        read_picture(path)


def test_a_directory_that_leads_to_itself_is_read_once(tmp_path):
    data = bytearray(directory(grey(10, 10, 10, 122, 100), bytes(100)))
    struct.pack_into("<I", data, 118, 8)
    (tmp_path / "a.tif").write_bytes(data)
    assert read_picture(tmp_path / "a.tif").size == (10, 10)


def test_whatever_tifffile_raises_is_one_line_with_the_name(tmp_path, monkeypatch):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, DEEP, photometric="rgb")
    (tmp_path / "a.tif").write_bytes(buffer.getvalue())
    for kind in (TypeError, ZeroDivisionError, OverflowError, AssertionError, KeyError, RecursionError):

        def fail(*_, kind=kind, **__):
            raise kind

        monkeypatch.setattr(tifffile.TiffPage, "asarray", fail)
        with pytest.raises(PictureError, match="a.tif is damaged or incomplete") as caught:
            read_picture(tmp_path / "a.tif")
        assert str(caught.value).isprintable()
