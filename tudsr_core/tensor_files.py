"""Files of tensors: read without running anything they contain, written whole or not at all.

Knows safetensors and torch's zip pickles; knows nothing of networks or key names.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import temporary_beside

# The largest published file this pack reads (SD2.1 with EMA weights) has 3,000 tensors, and its
# pickle 300 kB; files far beyond are attacks or accidents.
MAX_TENSORS = 20_000
MAX_PICKLE_BYTES = 2**25
STREAM_BYTES = 2**28

SUFFIXES = (".safetensors", ".pkl", ".pth", ".pt", ".ckpt", ".bin")


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class TensorFile:
    """What a file holds: tensors by key, the other values of a pickle, the metadata of a safetensors."""

    path: Path
    tensors: dict[str, Tensor]
    values: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def read_file(path: Path) -> TensorFile:
    """Read a `.safetensors`, or a pickle written by torch.save, whose code is never run.

    A pickle's outer dict may hold dicts of tensors; their keys are joined with dots, except that
    a sole `state_dict` is entered without a prefix. Raises CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path")
    if path.suffix == ".safetensors":
        with open_safetensors(path) as file:
            return TensorFile(path, {key: file.get_tensor(key) for key in file.keys()}, {}, file.metadata() or {})
    tensors, values = _split(_unpickle(path), path)
    return TensorFile(path, tensors, values)


def stream(path: Path, prefixes: tuple[str, ...] = ("",)) -> Iterator[tuple[str, Tensor]]:
    """Yield `(key, tensor)` of the keys with one of `prefixes`; the caller keeps copies, not the tensors.

    Safetensors are mapped a part at a time, so that reading a large file does not count twice in
    memory. Raises CheckpointError.
    """
    if path.suffix != ".safetensors":
        yield from ((key, value) for key, value in read_file(path).tensors.items() if key.startswith(prefixes))
        return
    with open_safetensors(path) as file:
        keys = [key for key in file.keys() if key.startswith(prefixes)]
    while keys:
        with open_safetensors(path) as file:
            mapped = 0
            while keys and mapped < STREAM_BYTES:
                tensor = file.get_tensor(keys[0])
                mapped += tensor.nbytes
                yield keys.pop(0), tensor
                del tensor


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file for reading single tensors; raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path")
    try:
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({_kind(path) or error}); download it again"
        ) from error
    if len(file.keys()) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(file.keys()):,} tensors; no model of this kind has that many")
    return file


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it."""
    with temporary_beside(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)


def check_finite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError that names the first tensor with NaN or infinite values."""
    for key, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {key} contains NaN or infinite weights; download the file again")


def some(names: Iterable[str]) -> str:
    """Return the first three names and how many more there are, for messages."""
    names = list(names)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _unpickle(path: Path) -> Any:
    _check_archive(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        # torch's first line ends before its advice to load unsafely, which must not be passed on.
        reason = str(error).splitlines()[-1][:200]
        raise CheckpointError(
            f"{path} cannot be read safely: it holds more than tensors and plain values ({reason}). Nothing in it "
            "was run. If you trust its source, load it there and save only its tensors, best as .safetensors"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read safely ({reason}); download it again") from error


def _check_archive(path: Path) -> None:
    """Refuse what torch would allocate or unpack before it looks: only plain, uncompressed archives pass."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError) as error:
        kind = _kind(path) or "it is no archive of torch.save, or only a part of one"
        raise CheckpointError(
            f"{path} cannot be read safely: {kind}; download it again, best as .safetensors"
        ) from error
    size = path.stat().st_size
    pickles = [entry.file_size for entry in entries if entry.filename.endswith(".pkl")]
    reason = None
    if len(entries) > MAX_TENSORS:
        reason = f"it has {len(entries):,} entries"
    elif any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        reason = "its entries are compressed, which torch.save never does"
    elif sum(entry.file_size for entry in entries) > size:
        reason = "its entries claim more bytes than the file has"
    elif len(pickles) != 1 or pickles[0] > MAX_PICKLE_BYTES:
        reason = "its index is not that of a model"
    if reason:
        raise CheckpointError(f"{path} cannot be read safely: {reason}; get the file from its authors")


def _kind(path: Path) -> str | None:
    """Return what a file that is no weight file looks like, for the message."""
    with path.open("rb") as file:
        head = file.read(200)
    if not head:
        return "it is empty"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    if head.lstrip()[:1] == b"<":
        return "it is a web page"
    if head[:1] == b"\x80":
        return "it is a pickle of the format torch used before version 1.6"
    return None


def _split(loaded: Any, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dict of tensors; get another file")
    if isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        if isinstance(value, dict) and all(isinstance(inner, Tensor) for inner in value.values()):
            tensors |= {f"{key}.{name}": inner for name, inner in value.items()}
        elif isinstance(value, Tensor):
            tensors[str(key)] = value
        else:
            values[str(key)] = value
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise CheckpointError(
                f"{path}: {name} claims more values than the file holds; get the file from its authors"
            )
    return tensors, values
