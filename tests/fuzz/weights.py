"""Weight files made by hand, then mutants of whole ones of every kind, read as nodes and command line read them."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tudsr_core.weights.tensor_files import CheckpointError

from .archives import rezip
from .case import Case
from .damage import EXTREME, damage_head, flip_bits, grow, truncate
from .weight_bombs import handmade
from .weight_files import SUFFIXES, Tree, read_all_the_way, whole_files, write

CLEAR = (CheckpointError,)
PLAIN = (
    None,
    True,
    -1,
    0,
    1,
    5,
    2**31,
    10**30,
    0.5,
    1e300,
    float("nan"),
    "",
    "x",
    "\x1b[2J",
    "9" * 400,
    [],
    {},
    [[[[]]]],
)
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.int64, torch.bool)


def cases(rng: random.Random, folder: Path, count: int) -> Iterator[Case]:
    """Yield `count` cases: handmade files, at most half of them, then mutants; a file is deleted after its case."""
    scratch, mark = folder / "scratch", folder / "was-run"
    scratch.mkdir()
    whole = whole_files(scratch)
    fixed = list(handmade(whole, mark).items())
    rng.shuffle(fixed)
    for number in range(count):
        if number < min(len(fixed), count // 2):
            name, (suffix, make) = fixed[number]
            path = folder / f"file-{number}{suffix}"
            make(path)
        else:
            kind, mutate = rng.choice(sorted(whole)), rng.choice(MUTATIONS)
            path, name = folder / f"file-{number}{SUFFIXES[kind]}", f"{kind} {mutate.__name__}"
            mutate(rng, path, whole[kind])
        yield Case(f"{number} {name}", partial(read, path, mark))
        for left in folder.glob(f"file-{number}*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink()


def read(path: Path, mark: Path) -> None:
    """Read a file all the way; raises AssertionError if something in it was run."""
    try:
        read_all_the_way(path)
    finally:
        assert not mark.exists(), "a pickle was run"


def change_content(rng: random.Random, path: Path, tree: Tree) -> None:
    """Write a file whose tensors, values, names or configuration are changed."""
    for _ in range(20):
        new = copy.deepcopy(tree)
        for _ in range(rng.choice((1, 1, 2, 5))):
            change_something(rng, new)
        try:
            write(path, new)
        except (SafetensorError, ValueError, TypeError, AttributeError, KeyError, RuntimeError):
            # What no library writes; the handmade files have some of it.
            shutil.rmtree(path, ignore_errors=True)
        else:
            return
    write(path, tree)


def change_something(rng: random.Random, tree: Any) -> None:
    """Change one thing in a table or list, at any depth, in place."""
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    if not keys:
        return
    key = rng.choice(keys)
    value = tree[key]
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        return change_something(rng, value)
    if isinstance(tree, dict) and rng.random() < 0.3:
        return change_name(rng, tree, key)
    if isinstance(value, str) and value[:1] in ("{", "["):
        inner = json.loads(value)
        change_something(rng, inner)
        tree[key] = json.dumps(inner)
    elif isinstance(value, Tensor):
        tree[key] = changed_tensor(rng, value)
    else:
        tree[key] = copy.deepcopy(rng.choice(PLAIN))


def change_name(rng: random.Random, tree: Tree, key: Any) -> None:
    """Drop, repeat or rename one entry of a table."""
    match rng.randrange(3):
        case 0:
            del tree[key]
        case 1:
            tree[f"{key}{rng.choice(('x', '.', '.alpha', '.weight', '_', chr(27)))}"] = copy.deepcopy(tree[key])
        case _:
            parts = str(key).split(".")
            rng.shuffle(parts)
            tree[".".join(parts)] = tree.pop(key)


def changed_tensor(rng: random.Random, tensor: Tensor) -> Tensor:
    """Return a tensor of another kind, shape or content."""
    match rng.randrange(7):
        case 0:
            return tensor.to(rng.choice(DTYPES))
        case 1:
            return tensor.flatten()
        case 2:
            return tensor[None]
        case 3 if tensor.ndim:
            return tensor[: rng.randrange(len(tensor) + 1)].clone()
        case 4:
            return torch.cat([tensor.flatten()] * 2)
        case 5:
            return tensor * rng.choice((float("nan"), float("inf"), 0, -1, 1e30))
        case _:
            return tensor.movedim(0, -1).clone() if tensor.ndim else torch.zeros(0)


def damage_bytes(rng: random.Random, path: Path, tree: Tree) -> None:
    """Write a whole file, or folder, and damage the bytes of one file."""
    file = one_file(rng, write(path, tree))
    way = rng.choice((flip_bits, damage_head, truncate, grow, extreme_number))
    file.write_bytes(way(rng, bytearray(file.read_bytes())))


def damage_index(rng: random.Random, path: Path, tree: Tree) -> None:
    """Write a whole file and damage what says what is in it; checksums and lengths stay right."""
    file = one_file(rng, write(path, tree))
    way = rng.choice((flip_bits, truncate, grow))
    if file.suffix in (".pkl", ".pth", ".pt"):
        whole = file.rename(file.with_suffix(".tmp"))
        rezip(whole, file, lambda name, data: bytes(way(rng, bytearray(data))) if name.endswith(".pkl") else data)
    elif file.suffix == ".safetensors":
        data = file.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = way(rng, bytearray(data[8:end]))
        file.write_bytes(struct.pack("<Q", len(header)) + header + data[end:])
    else:
        file.write_bytes(way(rng, bytearray(file.read_bytes())))


def extreme_number(rng: random.Random, data: bytearray) -> bytearray:
    """Put an extreme number somewhere: of 32 or 64 bits, or in place of digits."""
    places = [at for at, byte in enumerate(data[:20_000]) if chr(byte).isdigit()]
    value = rng.choice(EXTREME)
    if places and rng.random() < 0.5:
        at = rng.choice(places)
        return data[:at] + str(value).encode() + data[at + 1 :]
    at = rng.randrange(len(data) - 8)
    struct.pack_into(*rng.choice((("<I", data, at, value), ("<Q", data, at, value << 20))))
    return data


def one_file(rng: random.Random, path: Path) -> Path:
    """Return the file, or one of those in the folder."""
    return path if path.is_file() else rng.choice(sorted(file for file in path.rglob("*") if file.is_file()))


MUTATIONS = (change_content, change_content, damage_bytes, damage_index)
