"""What a run does to pixels, as plain values that two runs can be compared by."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

from .. import __version__
from ..pictures import PictureError
from ..untrusted import shown

# What changes time, memory or which files are read and replaced, but no pixel of a result.
NOT_PIXELS = {"tile_batch", "overwrite", "max_megapixels"}
SHOWN_DIFFERENCES = 5

Settings = dict[str, Any]
"""`{name: plain value}`."""


def describe_run(files: Mapping[str, Path | None], *parts: object, **more: object) -> Settings:
    """Return what a run is described by: this pack's version, digests of `files`, and every option that is set.

    `parts` are dataclasses of options, `more` are single ones. A folder's digest is that of all its files.
    Raises PictureError for a file that cannot be read.
    """
    found: Settings = {"pack version": __version__}
    for name, path in files.items():
        if path is not None:
            found[name] = _digest(path)
    for part in parts:
        found |= dict(_flat(dataclasses.asdict(part)))
    return json.loads(json.dumps(found | dict(_flat(more))))


def differences(old: Settings, new: Settings) -> str:
    """Return what differs, in words: `scale 4, now 2; window gaussian, now uniform`; "" for nothing."""
    names = [name for name in (*new, *(old.keys() - new.keys())) if old.get(name) != new.get(name)]
    said = [f"{shown(name)} {_short(old.get(name))}, now {_short(new.get(name))}" for name in names]
    rest = f"; and {len(said) - SHOWN_DIFFERENCES} more" if len(said) > SHOWN_DIFFERENCES else ""
    return "; ".join(said[:SHOWN_DIFFERENCES]) + rest


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _short(value: object) -> str:
    text = "not set" if value is None else shown(value if isinstance(value, str) else json.dumps(value))
    return f"{text[:19]}..." if text.startswith("sha256:") else text


def _flat(values: Mapping[str, object]) -> Iterator[tuple[str, object]]:
    """Yield the options that are set, of tables inside tables too; enumerations by their values."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        elif value is not None and name not in NOT_PIXELS and not isinstance(value, Path):
            yield name, value.value if isinstance(value, Enum) else value


def _digest(path: Path) -> str:
    try:
        if not path.is_dir():
            return f"sha256:{sha256_of(path)}"
        inside = [file for file in sorted(path.rglob("*")) if file.is_file() and not file.name.startswith(".")]
        lines = [f"{file.relative_to(path).as_posix()} {sha256_of(file)}" for file in inside]
    except OSError as error:
        raise PictureError(f"{path} cannot be read: {error.strerror}") from error
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode('utf-8', 'surrogateescape')).hexdigest()}"
