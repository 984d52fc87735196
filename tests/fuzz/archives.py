"""Archives of torch.save and safetensors files put together by hand, with what their writers would never write."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch


class Evil:
    """A pickle that would leave a file behind if it were run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (eval, (f"open({str(self.mark)!r}, 'w')",))


def good(path: Path) -> Path:
    """Write a small archive in which nothing is wrong."""
    torch.save({"state_dict": {"w": torch.arange(6.0), "half": torch.ones(2).half()}, "step": 3}, path)
    return path


def rezip(
    source: Path,
    target: Path,
    change: Callable[[str, bytes], bytes] = lambda name, data: data,
    compression: int = zipfile.ZIP_STORED,
    extra: Iterable[tuple[str, bytes]] = (),
) -> None:
    """Copy an archive, every entry changed by `change(name, data)`, and `extra` ones added; no entry has a date."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        entries = [(entry.filename, change(entry.filename, old.read(entry))) for entry in old.infolist()]
        for name, data in (*entries, *extra):
            new.writestr(zipfile.ZipInfo(name), data, compression)


def index(path: Path, data: bytes) -> None:
    """Write an archive of torch.save whose index is `data`."""
    whole = good(path.with_suffix(".tmp"))
    rezip(whole, path, lambda name, old: data if name.endswith("data.pkl") else old)
    whole.unlink()


def header(path: Path, entries: object, data: bytes = b"") -> None:
    """Write a safetensors file of any header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
