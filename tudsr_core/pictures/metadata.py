"""What travels with the pixels: EXIF, ICC profile and resolution; read with distrust, fitted to a format.

Nothing here may cost a picture: what cannot be read or carried is left out, and a note says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import BinaryIO

from PIL import ExifTags, Image

from ..untrusted import shown
from .files import Picture

ORIENTATION, PIXEL_WIDTH, PIXEL_HEIGHT = 0x0112, 0xA002, 0xA003
X_RESOLUTION, Y_RESOLUTION, RESOLUTION_UNIT = 282, 283, 296
DETAILS, GPS = 0x8769, 0x8825
# Fields of TIFF's first directory that say how the old file stored its pixels, and what is carried otherwise.
STORAGE = {
    *range(254, 267), *range(273, 274), *range(277, 285), *range(288, 294), RESOLUTION_UNIT, 297, 301, *range(317, 349),
    *range(512, 533), 700, 32997, 32998, 33628, 33723, 34377, 34675, 37724, 50838, 50839, DETAILS, GPS,
}  # fmt: skip
# What a directory holds that is left out whole: XMP and IPTC may speak of the old file's size and orientation.
BESIDE = {700: "XMP", 33723: "IPTC"}
MAX_ICC_BYTES = 16 * 2**20
MAX_JPEG_EXIF_BYTES = 65533
DPI_RANGE = (1, 65535)  # what JPEG holds; a resolution outside is a mistake

Fields = dict[int | None, dict[int, object]]
"""`{directory: {tag: value}}`; the first directory is None."""
Tags = set[tuple[int | None, int]]
"""Pairs of a directory and a tag in it."""


def read_exif(source: bytes | BinaryIO) -> tuple[Image.Exif | None, tuple[float, float] | None, list[str]]:
    """Read an EXIF block, or the first directory of an open TIFF file.

    Returns EXIF without the fields that describe the old file's storage, the resolution in dots
    per inch, and notes about what could not be read. Never raises.
    """
    if not source:
        return None, None, []
    raw = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            raw.load(source) if isinstance(source, bytes) else raw.load_from_fp(source)
            found, lost = _readable(raw)
    except Exception:  # whatever a broken block makes the parser raise
        return None, None, ["its EXIF is broken and left out"]
    fields = {group: _storable(values, group, lost) for group, values in found.items()}
    dpi = _resolution(found[None])
    lost -= {(None, tag) for tag in STORAGE - {DETAILS, GPS}}
    notes = [f"EXIF fields that cannot be carried are left out: {_names(lost)}"] if lost else []
    notes += not_carried({name for tag, name in BESIDE.items() if tag in found[None]})
    return (_exif_of(fields) if any(fields.values()) else None), dpi, notes


def not_carried(names: set[str]) -> list[str]:
    """Return a note that what a file holds beside EXIF, by kind, does not travel along; none for nothing."""
    return [f"what is not carried along: {', '.join(sorted(names))}"] if names else []


def _readable(raw: Image.Exif) -> tuple[Fields, Tags]:
    found: Fields = {None: {}}
    lost: Tags = set()
    for tag in list(raw):
        try:
            found[None][tag] = raw[tag]
        except Exception:  # one bad value
            lost.add((None, tag))
    for group in (DETAILS, GPS):
        try:
            found[group] = dict(raw.get_ifd(group)) if group in raw else {}
        except Exception:  # a directory that leads nowhere
            found[group] = {}
            lost.add((None, group))
    return found, lost


def _storable(values: Mapping[int, object], group: int | None, lost: Tags) -> dict[int, object]:
    """Return the fields that can be written again; the tags of the others go into `lost`."""
    kept = {}
    for tag, value in values.items():
        if group is None and tag in STORAGE:
            continue
        if _stored_bytes(tag, value, group) is None:
            lost.add((group, tag))
        else:
            kept[tag] = value
    return kept


def _stored_bytes(tag: int, value: object, group: int | None) -> int | None:
    try:
        return len(_exif_of({group: {tag: value}}).tobytes())
    except Exception:  # Pillow's writers raise whatever a value of the wrong type leads to
        return None


def _exif_of(fields: Fields) -> Image.Exif:
    exif = Image.Exif()
    for group, values in fields.items():
        if values:
            (exif if group is None else exif.get_ifd(group)).update(values)
    return exif


def _resolution(fields: Mapping[int, object]) -> tuple[float, float] | None:
    per_inch = {3: 2.54}.get(fields.get(RESOLUTION_UNIT, 2), 1)
    if X_RESOLUTION not in fields or fields.get(RESOLUTION_UNIT) == 1:
        return None
    values = (fields[X_RESOLUTION], fields.get(Y_RESOLUTION, fields[X_RESOLUTION]))
    try:
        return tuple(float(value) * per_inch for value in values)
    except (TypeError, ValueError, ArithmeticError):
        return math.nan, math.nan


def usable_dpi(dpi: object) -> tuple[tuple[float, float] | None, list[str]]:
    """Return `dpi` as two floats if it is one, and a note if it had to be left out."""
    if dpi is None:
        return None, []
    try:
        x, y = (float(value) for value in dpi)
    except (TypeError, ValueError, ArithmeticError):
        x = y = math.nan
    if all(DPI_RANGE[0] <= value <= DPI_RANGE[1] for value in (x, y)):
        return (x, y), []
    return None, [f"its resolution of {x:g} x {y:g} dpi is no possible one and left out"]


def usable_icc(icc: object) -> tuple[bytes | None, list[str]]:
    """Return an ICC profile of a possible size that fits grey or RGB, and a note if it had to be left out."""
    if not icc or not isinstance(icc, bytes):
        return None, ["its colour profile is broken and left out"] if icc else []
    if len(icc) > MAX_ICC_BYTES:
        return None, [f"its colour profile of {len(icc) / 2**20:.0f} MB is left out"]
    if icc[36:40] == b"acsp" and icc[16:20] not in (b"RGB ", b"GRAY"):  # pixels are grey or RGB by now
        kind = shown(icc[16:20].decode("latin-1").strip())
        return None, [f"its colour profile is one of {kind}, which does not fit its pixels, and is left out"]
    return icc, []


def exif_for(picture: Picture, kind: str, size: tuple[int, int]) -> Image.Exif | None:
    """Return the EXIF of `picture`, with its resolution, for a file of `kind` whose pixels are of `size`."""
    fields = fields_of(picture.exif)
    height, width = size
    for tag, value in ((PIXEL_WIDTH, width), (PIXEL_HEIGHT, height)):
        if tag in fields[DETAILS]:
            fields[DETAILS][tag] = value
    if picture.dpi and (kind == "WEBP" or picture.exif is not None):
        fields[None] |= {X_RESOLUTION: picture.dpi[0], Y_RESOLUTION: picture.dpi[1], RESOLUTION_UNIT: 2}
    fields = {group: {tag: _as_stored(value) for tag, value in values.items()} for group, values in fields.items()}
    return _exif_of(fields) if any(fields.values()) else None


def fields_of(exif: Image.Exif | None) -> Fields:
    """Return a copy of the fields of `exif`, by directory."""
    if exif is None:
        return {None: {}, DETAILS: {}, GPS: {}}
    main = {tag: exif[tag] for tag in exif if tag not in (DETAILS, GPS)}
    return {None: main, DETAILS: dict(exif.get_ifd(DETAILS)), GPS: dict(exif.get_ifd(GPS))}


def _as_stored(value: object) -> object:
    return text_bytes(value) if isinstance(value, str) and not value.isascii() else value


def text_bytes(text: str) -> bytes:
    """Return the UTF-8 bytes of an EXIF text; one that Pillow read as Latin-1 but is UTF-8 gets its bytes back."""
    try:
        raw = text.encode("latin-1")
        raw.decode("utf-8")
    except UnicodeError:
        return text.encode("utf-8", "replace")
    return raw


def fitted(picture: Picture, kind: str, channels: int) -> tuple[Picture, list[str]]:
    """Return `picture` with only the metadata that a file of `kind` with `channels` holds, and notes about the rest."""
    dpi, notes = usable_dpi(picture.dpi)
    icc, more = usable_icc(picture.icc)
    notes += more
    if icc and icc[16:20] == b"GRAY" and channels > 2:
        icc = None
        notes.append(f"its grey colour profile does not fit the colours of {kind} and is left out")
    if icc and kind == "OpenEXR":
        icc = None
        notes.append("its colour profile cannot be kept in OpenEXR; colours are taken for sRGB's")
    picture = replace(picture, dpi=dpi, icc=icc)
    lost: Tags = set()
    fields = {group: _storable(values, group, lost) for group, values in fields_of(picture.exif).items()}
    if kind == "JPEG":
        lost |= set(_too_large(replace(picture, exif=_exif_of(fields)), kind))
    if kind == "OpenEXR":
        lost |= {(group, tag) for group, values in fields.items() for tag in values}
    if kind == "TIFF":
        lost |= {
            (group, tag) for group, values in fields.items() for tag in values if not _fits_tiff(group, values[tag])
        }
    kept = {
        group: {tag: value for tag, value in values.items() if (group, tag) not in lost}
        for group, values in fields.items()
    }
    if said := lost - {(None, ORIENTATION)}:
        notes.append(f"EXIF fields that {kind} cannot hold are left out: {_names(said)}")
    return replace(picture, exif=_exif_of(kept) if any(kept.values()) else None), notes


def _names(tags: Tags) -> str:
    known = {None: ExifTags.TAGS, DETAILS: ExifTags.TAGS, GPS: ExifTags.GPSTAGS}
    return ", ".join(sorted({known[group].get(tag, hex(tag)) for group, tag in tags}))


def _fits_tiff(group: int | None, value: object) -> bool:
    """Whether `writing` can put the field into a TIFF: texts of the first directory."""
    return group is None and isinstance(value, str)


def _too_large(picture: Picture, kind: str) -> Iterator[tuple[int | None, int]]:
    """Yield the tags, largest first, without which the EXIF of `picture` is small enough for JPEG."""
    exif = exif_for(picture, kind, (2**32 - 1, 2**32 - 1))  # sizes at their longest
    excess = 0 if exif is None else len(exif.tobytes()) - MAX_JPEG_EXIF_BYTES
    sizes = [
        (_stored_bytes(tag, _as_stored(value), group) or 0, group or 0, tag)
        for group, values in fields_of(picture.exif).items()
        for tag, value in values.items()
    ]
    overhead = len(_exif_of({None: {ORIENTATION: 1}}).tobytes())
    for size, group, tag in sorted(sizes, reverse=True):
        if excess <= 0:
            return
        excess -= size - overhead
        yield group or None, tag
