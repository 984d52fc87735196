"""Files of tensors: read without running anything they contain, written whole or not at all.

Knows safetensors and torch's zip pickles; knows nothing of networks or key names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..atomic_write import temporary_beside
from ..untrusted import MAX_BYTES, MAX_NAME, UntrustedError, shown
from .pickles import check_archive, class_key_loads

# The largest published file this pack reads (SD2.1 with EMA weights) has 3,000 tensors; files far
# beyond are attacks or accidents.
MAX_TENSORS = 20_000
STREAM_BYTES = 2**28
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
DTYPES_READ = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

SUFFIXES = (".safetensors", ".pkl", ".pth", ".pt", ".ckpt", ".bin")


class CheckpointError(UntrustedError):
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
            tensors = {key: _tensor(path, file, key) for key in file.keys()}
            return TensorFile(path, tensors, {}, file.metadata() or {})
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
                tensor = _tensor(path, file, keys[0])
                mapped += tensor.nbytes
                yield keys.pop(0), tensor
                del tensor


def open_safetensors(path: Path) -> safe_open:
    """Open a safetensors file for reading single tensors; raises CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path")
    try:
        with path.open("rb") as raw:
            header = int.from_bytes(raw.read(8), "little")
        if MAX_BYTES < header < path.stat().st_size:
            raise CheckpointError(f"{path} has a header of {header:,} bytes; no model of this kind has that much")
        file = safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = _kind(path) or _reason(error)
        raise CheckpointError(f"{path} is not a whole safetensors file ({reason}); download it again") from error
    if len(file.keys()) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(file.keys()):,} tensors; no model of this kind has that many")
    return file


def _tensor(path: Path, file: safe_open, key: str) -> Tensor:
    try:
        tensor = file.get_tensor(key)
    except Exception as error:  # kinds of numbers that this torch does not have, each with its own error
        raise CheckpointError(f"{path}: {shown(key)} cannot be read ({_reason(error)})") from error
    _check_tensor(path, key, tensor)
    return tensor


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file under a temporary name and rename it; raises CheckpointError if the disk refuses."""
    taken: set[int] = set()
    own = {}
    for key, value in tensors.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        own[key] = value.clone() if place in taken else value  # the format has no tensors that share memory
        taken.add(place)
    with _full_disk_named(path), temporary_beside(path) as temporary:
        save_file(own, temporary, metadata)


@contextmanager
def _full_disk_named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} was not written: {_reason(error)}; free some space, then run again") from error


def check_finite(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise CheckpointError that names the first tensor with NaN or infinite values."""
    for key, tensor in tensors:
        # torch has no isfinite for fp8, which float16 holds.
        wide = tensor.half() if tensor.element_size() == 1 and tensor.is_floating_point() else tensor
        if not wide.is_floating_point() or not wide.numel():
            continue
        # The extremes are NaN if anything is, at a twentieth of the time that isfinite takes of every value.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(wide)):
            raise CheckpointError(f"{path}: {shown(key)} contains NaN or infinite weights; download the file again")


def _unpickle(path: Path) -> Any:
    try:
        check_archive(path)
    except UntrustedError as error:
        raise CheckpointError(
            f"{path} cannot be read safely: {_kind(path) or error}. Nothing in it was run; download it again, or, if "
            "you trust its source, load it there and save only its tensors, best as .safetensors"
        ) from error
    try:
        with class_key_loads():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever torch makes of a damaged index, from AssertionError to SystemError
        raise CheckpointError(f"{path} cannot be read safely ({_reason(error)}); download it again") from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


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
            tensors |= {f"{key}.{name}": inner.detach() for name, inner in value.items()}
        elif isinstance(value, Tensor):
            tensors[str(key)] = value.detach()
        else:
            values[str(key)] = value
    check_tensors(path, tensors)
    return tensors, values


def check_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless `tensors` are few, plainly named and stored, and no more bytes than their file."""
    total = 0
    for name, tensor in tensors.items():
        total += _check_tensor(path, name, tensor)
    if len(tensors) > MAX_TENSORS:
        raise CheckpointError(f"{path} has {len(tensors):,} tensors; no model of this kind has that many")
    # Weights that a network shares between layers may be named twice; the same ones a thousand times are an attack.
    if total > 2 * path.stat().st_size:
        raise CheckpointError(f"{path}: its tensors claim more values than the file holds; get it from its authors")


def _check_tensor(path: Path, name: str, tensor: Tensor) -> int:
    """Return the tensor's bytes; raises CheckpointError if it cannot be computed with."""
    if len(name) > MAX_NAME:
        raise CheckpointError(f"{path}: the name {shown(name)} is too long; the file is damaged or of another kind")
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized or tensor.dtype not in DTYPES_READ:
        kind = tensor.dtype if tensor.layout == torch.strided and not tensor.is_meta else tensor.layout
        raise CheckpointError(
            f"{path}: {shown(name)} is stored as {kind}, which this pack does not read; save it as fp16"
        )
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        raise CheckpointError(
            f"{path}: {shown(name)} claims more values than the file holds; get the file from its authors"
        )
    return tensor.nbytes
