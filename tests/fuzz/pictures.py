"""Damaged and hostile pictures, read as the command line reads them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import imagecodecs
import numpy as np
import OpenEXR
import tifffile
from PIL import Image

from tudsr_core.batch import Output, plan_jobs
from tudsr_core.batch import open_job as open_picture
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import TwoStage
from tudsr_core.pictures.files import PictureError
from tudsr_core.pictures.reading import read_picture

from .case import Case
from .damage import EXTREME, damage_head, flip_bits, grow, truncate

CLEAR = (PictureError,)
TAGS = (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 338, 339, 340, 341, 530, 34675)
FOLDER_EVERY = 25  # every so many cases, the damaged file lies in a folder between two whole ones


def cases(rng: random.Random, folder: Path, count: int) -> Iterator[Case]:
    """Yield `count` cases: every kind of valid picture as it is, handmade bombs, then mutants of all."""
    valid = whole_pictures(rng)
    fixed = [(f"valid {name}", data) for name, data in valid.items()] + list(handmade(valid).items())
    rng.shuffle(fixed)
    for number in range(count):
        if number < min(len(fixed), count // 3):
            name, data = fixed[number]
        else:
            kind = rng.choice(sorted(valid))
            way = rng.choice(MUTATIONS)
            name, data = f"{kind} {way.__name__}", bytes(way(rng, bytearray(valid[kind])))
        path = folder / f"{number}{suffix_of(data)}"
        path.write_bytes(data)
        if name.startswith("valid"):
            yield Case(f"{number} {name}", partial(read_whole, path))
        elif number % FOLDER_EVERY:
            yield Case(f"{number} {name}", partial(read_picture, path))
        else:
            yield Case(f"{number} {name}, in a folder", partial(read_folder, path, valid["png RGB"]))


def suffix_of(data: bytes) -> str:
    """Return the suffix of the format that the file was, whatever is left of it."""
    return {b"v/": ".exr", b"\x89P": ".png", b"\xff\xd8": ".jpg", b"RI": ".webp", b"II": ".tif", b"MM": ".tif"}.get(
        data[:2], ".png"
    )


def read_whole(path: Path) -> None:
    """Read a file that nothing is wrong with; raises AssertionError if it is refused."""
    try:
        read_picture(path)
    except PictureError as error:
        raise AssertionError("a valid file was refused") from error


def read_folder(path: Path, whole: bytes) -> None:
    """Open every picture of a folder as `tudsr upscale` does: the whole ones must be read whatever the third is."""
    from conftest import identity_model

    folder = path.with_suffix(".folder")
    folder.mkdir(exist_ok=True)
    (folder / f"b{path.suffix}").write_bytes(path.read_bytes())
    for name in ("a.png", "c.png"):
        (folder / name).write_bytes(whole)
    refused = []
    for job in plan_jobs([folder], folder / "out"):
        try:
            open_picture(job, TwoStage(identity_model()), Target(scale=2), Output(), dry_run=True)
        except PictureError as error:
            if job.source.stem != "b":
                raise AssertionError(f"{job.source.name} was not read: {error}") from error
            refused.append(error)
    if refused:
        raise refused[0]


def whole_pictures(rng: random.Random) -> dict[str, bytes]:
    """Return valid files of every format, depth and colour model that is read."""
    noise = np.random.default_rng(rng.getrandbits(32))
    rgba = noise.integers(0, 256, (24, 20, 4), np.uint8)
    made: dict[str, bytes] = {}
    exif = Image.Exif()
    exif.update({0x010F: "Camera", 0x0112: 6, 0x0132: "2024:01:02 03:04:05"})
    exif.get_ifd(0x8769).update({0x829A: 0.5, 0xA002: 20, 0x927C: bytes(40)})
    travels = {"exif": exif, "icc_profile": bytes(200), "dpi": (300, 300)}
    image = Image.fromarray(rgba)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA"):
        made[f"png {mode}"] = saved(image.convert(mode), "PNG", **travels)
    made["png interlaced"] = interlaced_png(rgba)
    for channels in (1, 2, 3, 4):
        made[f"png 16 x {channels}"] = imagecodecs.png_encode(noise.integers(0, 2**16, (9, 8, channels), np.uint16))
    made["apng"] = saved(image, "PNG", save_all=True, append_images=[image.rotate(90)])
    for mode in ("L", "RGB", "CMYK"):
        made[f"jpeg {mode}"] = saved(image.convert(mode), "JPEG", **travels)
    made["jpeg progressive"] = saved(image.convert("RGB"), "JPEG", progressive=True, quality=60)
    for lossless in (False, True):
        made[f"webp {lossless}"] = saved(image, "WEBP", lossless=lossless, exif=exif)
    made["webp animated"] = saved(image, "WEBP", save_all=True, append_images=[image.rotate(90)])
    made["gif"] = saved(image.convert("RGB"), "GIF", save_all=True, append_images=[image.convert("L")])
    made["bmp"] = saved(image.convert("RGB"), "BMP")
    return made | whole_tiffs(rgba, image) | whole_exrs(rgba)


def whole_exrs(rgba: np.ndarray) -> dict[str, bytes]:
    """Return OpenEXR files of every compression."""
    made = {}
    for name in ("NO", "RLE", "ZIPS", "ZIP", "PIZ", "PXR24", "B44", "DWAA"):
        header = {"compression": getattr(OpenEXR, f"{name}_COMPRESSION"), "type": OpenEXR.scanlineimage}
        for kind in (np.float16, np.float32):
            file = io.BytesIO()
            with OpenEXR.File(header, {"RGBA": np.ascontiguousarray(rgba / 64, kind)}) as picture:
                picture.write(file)
            made[f"exr {name} {kind.__name__}"] = file.getvalue()
    return made


def whole_tiffs(rgba: np.ndarray, image: Image.Image) -> dict[str, bytes]:
    """Return TIFF files of many kinds."""
    made = {}
    for order in "<>":
        for dtype in (np.uint8, np.uint16, np.uint32, np.float16, np.float32, np.float64):
            array = (rgba / 255 if np.dtype(dtype).kind == "f" else rgba).astype(dtype)
            made[f"tiff {order}{np.dtype(dtype)}"] = tiff(array, byteorder=order, photometric="rgb", compression="zlib")
    deep = rgba.astype(np.uint16) * 257
    for name in ("zlib", "lzw", "packbits", "lzma", "zstd", None):
        made[f"tiff {name}"] = tiff(deep, photometric="rgb", compression=name, extrasamples=["assocalpha"])
    made["tiff tiles"] = tiff(deep, photometric="rgb", compression="zlib", tile=(16, 16), predictor=True)
    made["tiff planes"] = tiff(np.moveaxis(deep, -1, 0), photometric="rgb", planarconfig="separate", rowsperstrip=5)
    made["tiff pages"] = tiff(np.stack([deep[..., 0]] * 4), photometric="minisblack")
    made["tiff big"] = tiff(deep, photometric="rgb", bigtiff=True)
    made["tiff lab"] = tiff(deep[..., :3], photometric="cielab")
    made["tiff cmyk"] = tiff(deep, photometric="separated")
    made["tiff white"] = tiff(deep[..., 0], photometric="miniswhite")
    made["tiff 12 bit"] = tiff(deep[..., 0] >> 4, photometric="minisblack", bits=12)
    made["tiff palette"] = tiff(
        rgba[..., 0], photometric="palette", colormap=np.arange(768, dtype=np.uint16).reshape(3, 256)
    )
    for name, mode in (("jpeg", "RGB"), ("group4", "1"), ("tiff_lzw", "P"), ("jpeg", "YCbCr"), (None, "LAB")):
        made[f"tiff pillow {name} {mode}"] = saved(image.convert("RGB").convert(mode), "TIFF", compression=name)
    return made


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """Return what Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(array: np.ndarray, bits: int | None = None, **options) -> bytes:
    """Return what tifffile writes; samples of `bits` are packed here, which imagecodecs does not do before 2026."""
    buffer = io.BytesIO()
    if bits and bits != 8 * array.itemsize:
        options |= {"shape": array.shape, "dtype": array.dtype, "bitspersample": bits}
        single = (array[..., None] >> np.arange(bits)[::-1].astype(array.dtype)) & 1
        array = iter([np.packbits(single.reshape(len(array), -1).astype(np.uint8), axis=1).tobytes()])
    tifffile.imwrite(buffer, array, metadata=None, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """Return one PNG chunk."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, bits: int = 8, color: int = 2, extra: bytes = b"", interlace=0) -> bytes:
    """Return a PNG file of any header and data."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, interlace))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def interlaced_png(rgba: np.ndarray) -> bytes:
    """Return an Adam7 PNG of 8 x 8 pixels."""
    rows = b""
    for x, y, across, down in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        for row in rgba[y:8:down, x:8:across]:
            rows += b"\0" + row.tobytes()
    return png(8, 8, zlib.compress(rows), 8, 6, interlace=1)


def directory(tags: list[tuple[int, int, int, int]], following: int = 0, tail: bytes = b"") -> bytes:
    """Return a little-endian TIFF of one directory of `(tag, type, count, value)`."""
    body = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    body += b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return body + struct.pack("<I", following) + tail


def grey(width: int, height: int, rows: int, at: int, length: int, **changes: int) -> list[tuple[int, int, int, int]]:
    """Return the tags of a grey picture in one strip."""
    values = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: at, 277: 1, 278: rows, 279: length}
    values |= {int(name[1:]): value for name, value in changes.items()}
    return [(tag, 4, 1, value) for tag, value in sorted(values.items())]


def handmade(valid: dict[str, bytes]) -> dict[str, bytes]:
    """Return files that are made to hurt: bombs, loops and overlaps."""
    tiny = zlib.compress(bytes(52))  # 4 x 4 RGB
    animation = chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    tile = [(322, 4, 1, 2**31), (323, 4, 1, 2**31), (324, 4, 1, 8), (325, 4, 1, 100)]
    shared = [(273, 4, 2000, 522), (277, 4, 1, 1), (278, 4, 1, 1), (279, 4, 2000, 8522)]
    zeros = zlib.compress(bytes(2**22), 9)
    flat = zlib.compressobj(9)
    long = b"".join([*(flat.compress(bytes(2**20)) for _ in range(300)), flat.flush()])
    lying = struct.pack("<2000I", *[300] * 2000)
    made = {
        "png bomb": png(10_000, 9_999, long),
        "png flat, just allowed": png(8_000, 7_999, long),
        "png larger than its data": png(13_000, 13_000, zeros),
        "png of 2^31": png(2**31 - 1, 2**31 - 1, zeros),
        "png 16 bit bomb": png(9_000, 9_000, long, 16),
        "png text bomb": png(4, 4, tiny, extra=chunk(b"zTXt", b"a\0\0" + long)),
        "png profile bomb": png(4, 4, tiny, extra=chunk(b"iCCP", b"a\0\0" + long)),
        "png of chunks": png(4, 4, tiny, extra=chunk(b"tEXt", b"") * 300_000),
        "png animation bomb": png(4, 4, tiny, extra=animation),
        "tiff tall": directory(grey(17, 8_388_621, 1, 8, 100), tail=bytes(2200)),
        "tiff tall in one strip": directory(grey(17, 8_388_621, 8_388_621, 8, 2300), tail=bytes(2200)),
        "tiff tall of zlib": directory(grey(17, 8_388_621, 2**31, 122, len(zeros), t259=8), tail=zeros),
        "tiff of one strip of zlib": directory(grey(10_000, 9_999, 9_999, 122, len(long), t259=8), tail=long),
        "tiff without rows": directory(grey(100, 100, 0, 8, 100), tail=bytes(100)),
        "tiff without width": directory(grey(0, 100, 1, 8, 100), tail=bytes(100)),
        "tiff loop": directory(grey(10, 10, 10, 8, 100), following=8, tail=bytes(100)),
        "tiff of a huge tile": directory([*grey(10, 10, 10, 8, 100), *tile], tail=bytes(90)),
        "tiff of repeated tags": directory([(270, 2, 5000, 300)] * 900, tail=bytes(6000)),
        "tiff of 65535 tags": directory([(270 + i % 9000, 2, 600_000, 300) for i in range(65535)]),
        "tiff of many channels": directory(grey(100, 100, 100, 8, 100, t277=65535), tail=bytes(100)),
        "tiff of shared strips": directory(
            [*grey(100, 2000, 1, 8, 100)[:5], *shared],
            tail=bytes(400) + lying * 2 + bytes(300),
        ),
        "jpeg of scans": valid["jpeg progressive"][:-2] + b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" * 5000 + b"\xff\xd9",
        "jpeg of 65500": sized_jpeg(valid["jpeg RGB"], 65500, 65500),
        "jpeg wide": sized_jpeg(valid["jpeg RGB"], 65500, 2700),
        "webp large": valid["webp True"][:24] + b"\xff" * 6 + valid["webp True"][30:],
        "bmp runs": run_length_bmp(),
        "gif large": valid["gif"][:6] + b"\xff" * 4 + valid["gif"][10:],
    }
    return made


def sized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """Return `data` with another size in its header."""
    at = data.index(b"\xff\xc0")
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def run_length_bmp() -> bytes:
    """Return a run-length coded BMP whose skips cover gigabytes."""
    header = struct.pack("<IiiHHIIiiII", 40, 40_000_000, 2, 1, 8, 1, 400, 0, 0, 0, 0)
    return struct.pack("<2sIHHI", b"BM", 2000, 0, 0, 14 + 40 + 1024) + header + bytes(1024) + b"\0\x02\xff\xff" * 100


def extreme_number(rng: random.Random, data: bytearray) -> bytearray:
    """Put an extreme 16- or 32-bit number somewhere, in either byte order, near the front or near the end."""
    size, sign = rng.choice(((2, "H"), (4, "I")))
    value = rng.choice(EXTREME) % 2 ** (8 * size)
    near = rng.randrange(4, min(len(data) - size, 400))
    at = near if rng.random() < 0.6 else len(data) - size - near
    struct.pack_into(rng.choice("<>") + sign, data, max(at, 2), value)
    return data


def chunks_of(data: bytes) -> list[bytes]:
    """Return the chunks of a PNG, or the like of other files: pieces between runs of the same byte."""
    if data[:4] != b"\x89PNG":
        return [bytes(data[at : at + 40]) for at in range(8, len(data), 40)]
    found, at = [], 8
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        found.append(bytes(data[at:end]))
        at = end
    return found


def splice(rng: random.Random, data: bytearray) -> bytearray:
    """Drop, repeat or swap the chunks of a file."""
    parts = chunks_of(data)
    for _ in range(rng.randint(1, 3)):
        one, two = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(3):
            case 0 if len(parts) > 1:
                parts.pop(one)
                continue
            case 1:
                parts.insert(one, parts[two])
            case _:
                parts[one], parts[two] = parts[two], parts[one]
    return data[:8] + b"".join(parts)


def damage_chunk(rng: random.Random, data: bytearray) -> bytearray:
    """Change a chunk of a PNG and make its checksum right again; other files get a bit flipped."""
    parts = chunks_of(data)
    if data[:4] != b"\x89PNG":
        return flip_bits(rng, data)
    at = rng.randrange(len(parts))
    body = bytearray(parts[at][8:-4])
    if body:
        body = rng.choice((flip_bits, truncate) if len(body) > 1 else (flip_bits,))(rng, body)
    parts[at] = chunk(parts[at][4:8], bytes(body))
    return data[:8] + b"".join(parts)


def damage_tag(rng: random.Random, data: bytearray) -> bytearray:
    """Give a tag of a TIFF another number, type, count or value; other files get an extreme number."""
    if data[:2] not in (b"II", b"MM") or data[2:4] not in (b"*\0", b"\0*"):
        return extreme_number(rng, data)
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(order + "I", data, 4)
    (count,) = struct.unpack_from(order + "H", data, start)
    for _ in range(rng.randint(1, 3)):
        at = start + 2 + 12 * rng.randrange(count)
        code, kind, number, value = struct.unpack_from(order + "HHII", data, at)
        match rng.randrange(4):
            case 0:
                code = rng.choice(
                    (256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 320, 322, 323, 338, 339, 34675)
                )
            case 1:
                kind = rng.randrange(20)
            case 2:
                number = rng.choice(EXTREME)
            case _:
                value = rng.choice((*EXTREME, 5, 6, 7, 8, 32773, 34712, 34887, 50000, 50001, 50002))
        struct.pack_into(order + "HHII", data, at, code, kind, number, value % 2**32)
    return data


MUTATIONS: tuple[Callable[[random.Random, bytearray], bytearray], ...] = (
    flip_bits,
    damage_head,
    truncate,
    grow,
    extreme_number,
    splice,
    damage_chunk,
    damage_tag,
    damage_tag,
)
