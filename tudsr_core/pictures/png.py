"""PNG files: their chunks, and 16 bits, which Pillow neither reads nor writes in colour."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, field

from .files import Unsuitable
from .metadata import MAX_ICC_BYTES

MAGIC = b"\x89PNG\r\n\x1a\n"
HEADER_END = 8 + 25
MAX_CHUNKS = 200_000
PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
LEGACY_EXIF = (b"Raw profile type exif", b"Raw profile type APP1")
TEXTS = (b"tEXt", b"zTXt", b"iTXt")


@dataclass
class Chunks:
    """A PNG file taken apart: `pixels` is a PNG of the picture alone, the rest travels beside it.

    `beside` are the kinds of texts in it, which do not.
    """

    pixels: bytes
    exif: bytes | None = None
    icc: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)
    beside: set[str] = field(default_factory=set)


def split(data: bytes) -> Chunks:
    """Take the chunks of a PNG file apart, so that no damaged metadata can cost the picture.

    Raises Unsuitable for more chunks than a picture has.
    """
    found, kept, at, count = Chunks(b""), [data[:8]], 8, 0
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if kind in PIXELS:
            kept.append(data[at:end])
        elif end <= len(data):
            try:
                _keep(found, kind, data[at + 8 : end - 4], data[end - 4 : end])
            except (ValueError, zlib.error, struct.error):
                found.notes.append(f"its {kind.decode('latin-1')} chunk is broken and left out")
        at, count = end, count + 1
        if count > MAX_CHUNKS:
            raise Unsuitable(f"it has more than {MAX_CHUNKS:,} chunks; save it again")
        if kind == b"IEND":
            break
    found.pixels = b"".join(kept)
    return found


def _keep(found: Chunks, kind: bytes, body: bytes, checksum: bytes) -> None:
    if kind == b"acTL":
        found.notes.append("this file is animated; only its first picture is used")
    if kind not in (b"eXIf", b"iCCP", b"pHYs", *TEXTS):
        return
    if zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
        raise ValueError
    if kind == b"eXIf":
        found.exif = body
    elif kind == b"pHYs":
        x, y, unit = struct.unpack(">IIB", body)
        found.dpi = (x * 0.0254, y * 0.0254) if unit == 1 else None
    else:
        name, _, rest = body.partition(b"\0")
        if kind == b"iCCP":
            found.icc = _inflate(rest[1:])
        elif name not in LEGACY_EXIF or kind == b"iTXt":
            kinds = {b"XML:com.adobe.xmp": "XMP", b"Raw profile type xmp": "XMP", b"Raw profile type iptc": "IPTC"}
            found.beside.add(kinds.get(name, "texts"))
        elif found.exif is None:
            # ImageMagick's way before eXIf: a line with the name, one with the length, then hexadecimal
            text = (_inflate(rest[1:]) if kind == b"zTXt" else rest).decode("ascii")
            found.exif = bytes.fromhex("".join(text.split()[2:]))


def _inflate(data: bytes) -> bytes:
    worker = zlib.decompressobj()
    whole = worker.decompress(data, MAX_ICC_BYTES)
    if not worker.eof:
        raise ValueError
    return whole


def decode16(data: bytes):
    """Return the `H W` or `H W C` uint16 pixels of a PNG file of 16 bits."""
    import imagecodecs

    return imagecodecs.png_decode(data)


def encode16(array, exif: bytes | None, icc: bytes | None, dpi: tuple[float, float] | None) -> bytes:
    """Return a PNG file of `H W` or `H W C` uint16 pixels; its metadata goes in after the header."""
    import imagecodecs

    data = imagecodecs.png_encode(array, level=4)
    chunks = b""
    if icc:
        chunks += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc))
    if dpi:
        chunks += _chunk(b"pHYs", struct.pack(">IIB", *(round(value / 0.0254) for value in dpi), 1))
    if exif:
        chunks += _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    return data[:HEADER_END] + chunks + data[HEADER_END:]


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
