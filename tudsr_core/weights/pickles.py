"""Torch's zip pickles, looked at before they are loaded: what would run, hang or allocate is refused by name.

torch's own `weights_only` runs no code either, but lets a file ask for arrays of any size and for
hashes that never end.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from ..untrusted import UntrustedError, shown

MAX_STEPS = 2_000_000  # SD2.1 with its EMA weights takes 100,000
MAX_ENTRIES = 20_000
MAX_PICKLE_BYTES = 2**25

REBUILDERS = {f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")}
TABLE = "collections OrderedDict"
CALLED = {TABLE, "torch Size", "torch device", *REBUILDERS}
# Lightning's checkpoints have its class as the key to what its callback remembers.
CLASS_KEY = "pytorch_lightning.callbacks.model_checkpoint ModelCheckpoint"
# All that torch.save writes for tensors, and for tables, lists and plain values around them.
NAMES = {
    *CALLED,
    CLASS_KEY,
    "torch.storage UntypedStorage",
    *(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Short Char Byte Bool".split()),
    *(f"torch {kind}" for kind in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2".split()),
    *(f"torch {kind}" for kind in "int64 int32 int16 int8 uint8 bool".split()),
}
KEYS = {"BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2"}
PLAIN = {"NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT", "LONG1", "EMPTY_LIST", "EMPTY_DICT"}
_KEY, _MARK, _EMPTY, _OTHER = "key", "mark", "empty tuple", "other"


@contextmanager
def class_key_loads() -> Iterator[None]:
    """Let torch.load put an empty class in the place of CLASS_KEY meanwhile; Lightning is not imported."""
    module, _, name = CLASS_KEY.partition(" ")
    before = list(get_safe_globals())
    # torch 2.4 has no safe_globals(), which would do this.
    add_safe_globals([type(name, (), {"__module__": module})])
    try:
        yield
    finally:
        clear_safe_globals()
        add_safe_globals(before)


def check_archive(path: Path) -> None:
    """Raise UntrustedError unless `path` is an uncompressed archive of torch.save with a harmless index."""
    size = path.stat().st_size
    try:
        with _Careful(path) as file, zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
            if len(entries) > MAX_ENTRIES:
                raise UntrustedError(f"it has {len(entries):,} entries")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UntrustedError("its entries are compressed, which torch.save never does")
            if sum(entry.file_size for entry in entries) > size:
                raise UntrustedError("its entries claim more bytes than the file has")
            if len(pickles) != 1 or pickles[0].file_size > MAX_PICKLE_BYTES:
                raise UntrustedError("its index is not that of a model")
            data = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, NotImplementedError, RuntimeError) as problem:
        if isinstance(problem, UntrustedError):
            raise
        raise UntrustedError("it is no archive of torch.save, or only a part of one") from problem
    check_pickle(data)


class _Careful(io.FileIO):
    """A file that gives at most MAX_PICKLE_BYTES at once: zipfile reads the list of entries in one go."""

    def read(self, size: int = -1) -> bytes:
        if size > MAX_PICKLE_BYTES:
            raise UntrustedError("its list of entries is too long")
        return super().read(MAX_PICKLE_BYTES if size < 0 else size)


def check_pickle(data: bytes) -> None:
    """Raise UntrustedError unless loading `data` makes only tensors, tables, lists and plain values, and soon ends.

    Keys must be texts or small numbers: hashes of other values can be made to collide or to take for
    ever. Nothing is built here; each step is followed only for the kind of value it leaves behind.
    """
    stack: list[str] = []
    memo: dict[int, str] = {}
    try:
        for count, (step, value, _) in enumerate(pickletools.genops(data)):
            if count > MAX_STEPS:
                raise UntrustedError("its index is far longer than that of a model")
            _follow(step.name, value, stack, memo)
    except UntrustedError:
        raise
    except (ValueError, IndexError, KeyError, pickle.UnpicklingError) as problem:
        raise UntrustedError("its index is damaged") from problem


def _follow(step: str, value: Any, stack: list[str], memo: dict[int, str]) -> None:
    if step in ("BINPUT", "LONG_BINPUT"):
        memo[value] = stack[-1]
    elif step in ("BINGET", "LONG_BINGET"):
        stack.append(memo[value])
    elif step == "GLOBAL":
        if value not in NAMES:
            raise UntrustedError(f"it holds more than tensors and plain values ({shown(value.replace(' ', '.'))})")
        stack.append(value)
    elif step == "MARK":
        stack.append(_MARK)
    elif step in KEYS:
        stack.append(_KEY)
    elif step == "EMPTY_TUPLE":
        stack.append(_EMPTY)
    elif step in PLAIN:
        stack.append(_OTHER)
    elif step not in ("PROTO", "STOP"):
        _combine(step, stack)


def _combine(step: str, stack: list[str]) -> None:
    """Take what a step takes off the stack, and leave what it leaves."""
    if step == "TUPLE":
        _above_mark(stack)
        stack.append(_OTHER)
    elif step in ("TUPLE1", "TUPLE2", "TUPLE3"):
        stack[-int(step[-1]) :] = [_OTHER]
    elif step == "BINPERSID":
        stack[-1] = _OTHER
    elif step in ("APPEND", "BUILD"):
        stack.pop()
    elif step == "APPENDS":
        _above_mark(stack)
    elif step in ("SETITEM", "SETITEMS"):
        items = [stack.pop() for _ in range(2)] if step == "SETITEM" else _above_mark(stack)
        if any(key not in (_KEY, CLASS_KEY) for key in items[1::2]):
            raise UntrustedError("a key of its index is neither a text nor a small number")
    elif step == "REDUCE":
        given = stack.pop()
        if stack[-1] not in CALLED or (stack[-1] == TABLE and given != _EMPTY):
            raise UntrustedError("its index calls what torch.save never calls")
        stack[-1] = _OTHER
    else:
        raise UntrustedError(f"its index uses {step}, which torch.save never does")


def _above_mark(stack: list[str]) -> list[str]:
    """Take everything above the last mark off the stack, and the mark; returns it, last first."""
    taken = []
    while (top := stack.pop()) != _MARK:
        taken.append(top)
    return taken
