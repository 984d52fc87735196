"""Weight files made by hand: what once hung, grew or ended in a traceback, and its relatives."""

from __future__ import annotations

import copy
import functools
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from .archives import Evil, good, header, index, rezip
from .base_folders import WRONG
from .weight_files import QUERY, Tree, write

Make = Callable[[Path], object]
BOMB = 2**28
DEEP = json.loads("[" * 90 + "]" * 90)
KEY = f"{QUERY}.lora_A.default_encoder.weight"  # of an OSEDiff file


def handmade(whole: dict[str, Tree], mark: Path) -> dict[str, tuple[str, Make]]:
    """Return `(suffix, make(path))` by name; a pickle that is run leaves the file `mark` behind."""
    groups = {
        ".pkl": tensors(whole) | values(whole) | loading(mark) | archives(),
        ".safetensors": kinds_of_numbers() | headers() | facts(whole) | models(whole) | taggers(whole) | names(whole),
        ".pth": predictors(whole),
        "": folders(whole),
        ".base": bases(whole["base"]),
    }
    made = {name: (suffix, make) for suffix, group in groups.items() for name, make in group.items()}
    return made | foreign()


def pickled(value: object) -> Make:
    """Return what saves `value` with torch.save."""
    return lambda path: torch.save(value, path)


def changed(tree: Tree, place: str, value: object = None, gone: bool = False) -> Make:
    """Return what writes `tree` with one value, at keys joined by `/`, replaced or left out."""

    def make(path: Path) -> None:
        new = copy.deepcopy(tree)
        *way, last = place.split("/")
        node = functools.reduce(lambda node, key: node[key], way, new)
        if gone:
            del node[last]
        else:
            node[last] = value
        write(path, new)

    return make


def tensors(whole: dict[str, Tree]) -> dict[str, Make]:
    """Tensors of every kind where an adapter has plain ones."""
    plain = whole["osediff"]["state_dict_unet"][KEY]
    made = {
        "meta": lambda: plain.to("meta"),
        "nested": lambda: torch.nested.nested_tensor([plain, plain[:2]]),
        "quantised": lambda: torch.quantize_per_tensor(plain, 0.1, 0, torch.qint8),
        "quantised by channel": lambda: torch.quantize_per_channel(
            plain, torch.ones(4), torch.zeros(4), 0, torch.quint8
        ),
        "sparse": plain.to_sparse,
        "sparse rows": plain.to_sparse_csr,
        "complex": lambda: plain.to(torch.complex64),
        "conjugate": lambda: plain.to(torch.complex128).conj(),
        "fp8": lambda: plain.to(torch.float8_e4m3fn),
        "fp8 wide": lambda: plain.to(torch.float8_e5m2),
        "fp8 of another kind": lambda: plain.to(torch.float8_e4m3fnuz),
        "bfloat16": plain.bfloat16,
        "double": plain.double,
        "int64": plain.long,
        "int8": lambda: plain.to(torch.int8),
        "uint16": lambda: plain.abs().to(torch.uint16),
        "bool": plain.bool,
        "empty": lambda: plain[:0],
        "no axis": lambda: torch.tensor(1.0),
        "one axis": plain.flatten,
        "many axes": lambda: plain.reshape(4, *[1] * 30, 8),
        "NaN": lambda: plain * float("nan"),
        "infinite": lambda: plain / 0,
        "expanded": lambda: torch.zeros(1).expand(4, 2**36),
        "overlapping": lambda: torch.zeros(9).as_strided((4, 2**20), (0, 0)),
        "a parameter": lambda: torch.nn.Parameter(plain),
        "a view": lambda: torch.zeros(10**6)[5:37].view(4, 8),
        "transposed": lambda: plain.T.contiguous().T,
    }
    tree = whole["osediff"]
    return {
        f"tensor {name}": (lambda path, new=new: changed(tree, f"state_dict_unet/{KEY}", new())(path))
        for name, new in made.items()
    }


def values(whole: dict[str, Tree]) -> dict[str, Make]:
    """Lists, ranks and tables of wrong types in pickles, and the same tensors under many names."""
    tree, large = whole["osediff"], torch.ones(100_000)
    wrong: dict[str, Any] = {
        "unet_lora_encoder_modules": 3,
        "unet_lora_decoder_modules": "conv_in",
        "unet_lora_others_modules": [["conv_in"], 1],
        "vae_lora_encoder_modules": {"conv_in": 1},
        "rank_unet": "4",
        "rank_vae": 4.5,
        "state_dict_unet": [1],
        "state_dict_vae": None,
        "state_dict": 3,
        "model": {"a": {"b": torch.ones(1)}},
        "more": DEEP,
        "\x1b[2J": {"\x07": torch.ones(1)},
    }
    made = {
        f"value {name.encode('unicode_escape').decode()}": changed(tree, name, value) for name, value in wrong.items()
    }
    loop: dict[str, Any] = {}
    loop["self"] = loop
    return made | {
        "value rank 10**400": changed(tree, "rank_unet", 10**400),
        "10,000 aliased tensors": pickled({f"w{i}": large for i in range(10_000)}),
        "10,000 aliased updates": pickled(
            {"state_dict_unet": {f"m{i}.lora_{h}.default_others.weight": large for i in range(5_000) for h in "AB"}}
        ),
        "a table in itself": pickled(loop),
        "a list": pickled([torch.ones(1)]),
        "a tensor alone": pickled(torch.ones(1)),
        "nothing": pickled({}),
        "numbers as keys": pickled({1: torch.ones(1), 2: {3: torch.ones(1)}}),
        "25,000 tensors": pickled({f"w{i}": torch.ones(1) for i in range(25_000)}),
        "PiSA-SR in two lists": changed(
            whole["pisa"], f"state_dict_unet/{QUERY}.lora_A.default_others_pix.weight", torch.ones(4, 8)
        ),
    }


def loading(mark: Path) -> dict[str, Make]:
    """Pickles that would execute something, allocate or never end."""
    command = f"open({str(mark)!r}, 'w')".encode()
    call = b"\x80\x02cbuiltins\neval\nX" + struct.pack("<I", len(command)) + command + b"\x85R."
    old = b"(S'" + command.replace(b"'", b'"') + b"'\nibuiltins\neval\n."
    steps = {
        "eval": call,
        "an instance": old,
        "an object": b"\x80\x02(cbuiltins\neval\nX" + struct.pack("<I", len(command)) + command + b"o.",
        "a name on the stack": call.replace(b"cbuiltins\neval\n", b"X\x08\0\0\0builtinsX\x04\0\0\0eval\x93"),
        "a new object": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85\x81.",
        "os.system": b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.",
        "torch.load": b"\x80\x02ctorch\nload\nX\x01\0\0\0/\x85R.",
        "a storage of 2 GB": b"\x80\x02ctorch\nFloatStorage\nJ\x00\x00\x00\x7f\x85R.",
        "a state": b"\x80\x02ccollections\nOrderedDict\n)R}X\x01\0\0\0ab.",
        "an extension": b"\x80\x02\x82\x01.",
        "an endless memo": b"\x80\x02}K\x01\x85q\x00" + b"h\x00h\x00\x86q\x00" * 60 + b"K\x01s.",
        "three million lists": b"\x80\x02" + b"]" * 3_000_000 + b".",
        "no end": b"\x80\x02}",
        "nothing": b"",
        "a missing storage": b"\x80\x02}X\x01\0\0\0wX\x01\0\0\0xs.",
    }
    colliding = b"".join(pickle.dumps((2**61 - 1) << i, 2)[2:-1] + b"K\x01" for i in range(1000))
    steps["colliding numbers"] = b"\x80\x02}(" + colliding + b"u."
    return {f"pickle of {name}": partial(index, data=data) for name, data in steps.items()} | {
        "pickle of an evil value": pickled({"state_dict": {"w": torch.ones(2)}, "more": Evil(mark)}),
        "an old pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": Evil(mark)})),
        "a pickle of torch before 1.6": lambda path: torch.save(
            {"w": Evil(mark)}, path, _use_new_zipfile_serialization=False
        ),
        "a whole module": pickled(torch.nn.Linear(2, 2)),
        "a numpy array": pickled({"w": np.ones(3)}),
        "a set": pickled({"w": {1, 2}}),
        "a table of another class": pickled(OrderedDict(w=torch.ones(1), more=functools.partial(print))),
    }


def archives() -> dict[str, Make]:
    """Archives that are none, are cut, or unpack to more than they are."""

    def repacked(change: Callable[[str, bytes], bytes] = lambda name, data: data, **more) -> Make:
        def make(path: Path) -> None:
            whole = good(path.with_suffix(".tmp"))
            rezip(whole, path, change, **more)
            whole.unlink()

        return make

    def overlapping(path: Path) -> None:
        good(path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("data/big", b"x" * 100_000)
            archive.filelist += [archive.getinfo("data/big")] * 5
            archive._didModify = True

    def cut(keep: Callable[[bytes], bytes]) -> Make:
        return lambda path: path.write_bytes(keep(good(path).read_bytes()))

    zeros = lambda name, data: bytes(BOMB) if name.endswith("/0") else data  # noqa: E731
    return {
        "archive of zeros": repacked(zeros, compression=zipfile.ZIP_DEFLATED),
        "archive with lzma": repacked(compression=zipfile.ZIP_LZMA),
        "archive of 20,001 entries": repacked(extra=[(f"data/{i}", b"") for i in range(20_001)]),
        "archive of two indexes": repacked(extra=[("other/data.pkl", b"")]),
        "archive of no index": repacked(lambda name, data: b"" if name.endswith(".pkl") else data),
        "archive with ways out": repacked(extra=[("../../out", b"x"), ("/etc/out", b"x")]),
        "archive with a long name": repacked(extra=[("x" * 60_000, b"")]),
        "archive with short storage": repacked(lambda name, data: data[:3] if name.endswith("/0") else data),
        "archive of another byte order": repacked(lambda name, data: b"big" if name.endswith("byteorder") else data),
        "archive whose entries overlap": overlapping,
        "archive without its end": cut(lambda data: data[:-200]),
        "archive without its start": cut(lambda data: data[40:]),
        "archive that says it is encrypted": cut(lambda data: data.replace(b"PK\1\2\0\0\0\0\0", b"PK\1\2\0\0\0\0\1")),
        "archive of a huge directory": cut(lambda data: data[:-10] + struct.pack("<II", 2**31, 0) + data[-2:]),
    }


def kinds_of_numbers() -> dict[str, Make]:
    """One safetensors file for each kind of number that its format knows, and for one that it does not."""
    sizes = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1) | {"F4": 0.5, "F6_E2M3": 0.75}
    sizes |= {"U16": 2, "I16": 2, "BF16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8, "X9": 1}

    def make(path: Path, kind: str, size: float) -> None:
        names = [f"unet.conv_in.lora_{half}.weight" for half in "AB"]
        count = int(16 * size)
        places = {name: [i * count, (i + 1) * count] for i, name in enumerate(names)}
        entries = {name: {"dtype": kind, "shape": [4, 4], "data_offsets": place} for name, place in places.items()}
        header(path, entries, bytes([1]) * 2 * count)

    return {f"numbers {kind}": partial(make, kind=kind, size=size) for kind, size in sizes.items()}


def headers() -> dict[str, Make]:
    """Safetensors files whose header lies."""

    def one(shape: list, place: list, name: str = "w", **more: object) -> dict:
        return {name: {"dtype": "F32", "shape": shape, "data_offsets": place, **more}}

    few = json.dumps(one([1], [0, 4])).encode()
    made: dict[str, tuple[object, bytes]] = {
        "a terabyte": (one([2**38], [0, 2**40]), b""),
        "a product of sides that overflows": (one([2**62, 8], [0, 4]), b"0000"),
        "a negative side": (one([-1], [0, 4]), b"0000"),
        "a text as a side": (one(["1"], [0, 4]), b"0000"),
        "offsets that fall": (one([1], [4, 0]), b"0000"),
        "offsets that overlap": (one([1], [0, 4]) | one([1], [2, 6], "v"), b"000000"),
        "offsets with a hole": (one([1], [0, 4]) | one([1], [8, 12], "v"), bytes(12)),
        "less data than it says": (one([99], [0, 396]), b"0000"),
        "more data than it says": (one([1], [0, 4]), bytes(400)),
        "no JSON": (b"{" * 50, b""),
        "no table": (b"[1]", b""),
        "the same key twice": (few[:-1] + b", " + few[1:], b"0000"),
        "deep metadata": ({"__metadata__": DEEP}, b""),
        "metadata of numbers": ({"__metadata__": {"format": 3}}, b""),
        "metadata of 33 MB": ({"__metadata__": {"x": "y" * 2**25}}, b""),
        "100,000 tensors": (
            {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)},
            b"",
        ),
        "a long name": (one([1], [0, 4], "w" * 5000), b"0000"),
        "control codes in a name": (one([1], [0, 4], "\x1b]0;owned\x07\n\x1b[2J"), b"0000"),
        "half a character in a name": (one([1], [0, 4], "\ud800"), b"0000"),
        "no tensors": ({}, b""),
    }
    return {
        f"header of {name}": partial(header, entries=entries, data=data) for name, (entries, data) in made.items()
    } | {
        "header of endless length": lambda path: path.write_bytes(struct.pack("<Q", 2**62) + b"{}"),
        "header of no length": lambda path: path.write_bytes(bytes(8)),
    }


def facts(whole: dict[str, Tree]) -> dict[str, Make]:
    """What adapters and LoRA files say of themselves, of wrong types."""
    step = {"t": 200, "p": 1.0, "q": -1.0}
    said = {
        "stage": ("3", "[1]", "1e9", "{", '"one"'),
        "method": ("\x1b[1m", "__class__"),
        "format": ("tudsr-adapter/9", "tudsr-adapter/\x1b"),
        "name": ("x" * 10_000, "\x1b[2J\n"),
        "steps": (
            "3",
            "[]",
            json.dumps([step] * 101),
            "[" * 99 + "]" * 99,
            *(json.dumps([step | wrong]) for wrong in ({"t": 1000}, {"t": 0.5}, {"p": "1"}, {"q": None}, {"a": 1e300})),
        ),
    }
    made = {
        f"adapter says {name} {number}": changed(whole["own"], f"metadata/{name}", text)
        for name, texts in said.items()
        for number, text in enumerate(texts)
    }
    for number, text in enumerate(("[]", "[" * 10**5, '{"unet.r": "4"}', '{"unet.lora_alpha": [4]}', '"owner/name"')):
        made[f"LoRA says {number}"] = changed(whole["diffusers"], "metadata/lora_adapter_metadata", text)
    return made


def models(whole: dict[str, Tree]) -> dict[str, Make]:
    """Whole models with facts, configurations or weights that cannot be."""
    tree = whole["model"]
    told = json.loads(tree["metadata"]["model"])
    unet, vae = told["unet_config"], told["vae_config"]
    wrong: dict[str, dict[str, Any]] = {
        "first_max 0": {"limits": {"first_max": 0}},
        "first_max 1": {"limits": {"first_max": 1, "second": 1}},
        "single_up_to 0": {"limits": {"single_up_to": 0}},
        "second 1": {"limits": {"second": 1}},
        "a factor of 1.0000001": {"limits": {"second": 1.0000001}},
        "a text as limit": {"limits": {"second": "2"}},
        "limits of another type": {"limits": [4, 2]},
        "a timestep of 1000": {"stage_one_timestep": 1000},
        "half a timestep": {"stage_two_timestep": 0.5},
        "an alpha of nothing": {"stage_two_alpha": 0},
        "an alpha that is too large": {"stage_two_alpha": 1e11},
        "layers_per_block 100000": {"unet_config": unet | {"layers_per_block": 100_000}},
        "10,000 levels": {"unet_config": unet | {"block_out_channels": [8] * 10_000}},
        "levels of no channels": {"unet_config": unet | {"block_out_channels": [0, 0]}},
        "groups that do not divide": {"unet_config": unet | {"norm_num_groups": 3}},
        "a repository": {"unet_config": "owner/name"},
        "a repository in it": {"vae_config": vae | {"_name_or_path": "owner/name"}},
        "other layers": {"vae_config": vae | {"encoder_layers_per_block": [0, 10**9, 1]}},
        "a deep list": {"vae_config": vae | {"encoder_qkv_multiscales": DEEP}},
        "an infinite factor": {"vae_config": vae | {"scaling_factor": 1e400}},
    }
    made = {
        f"model with {name}": changed(tree, "metadata/model", json.dumps(told | change))
        for name, change in wrong.items()
    }
    for field in ("vae_config", "unet_config", "limits", "stage_two_alpha", "stage_one_timestep"):
        rest = {name: value for name, value in told.items() if name != field}
        made[f"model without {field}"] = changed(tree, "metadata/model", json.dumps(rest))
    key = "unet.conv_in.weight"
    return made | {
        "model without facts": changed(tree, "metadata/model", gone=True),
        "model without a weight": changed(tree, f"tensors/{key}", gone=True),
        "model with a weight too many": changed(tree, "tensors/unet.more", torch.ones(1)),
        "model with a part too many": changed(tree, "tensors/\x1b[1m", torch.ones(1)),
        "model with a NaN weight": changed(tree, f"tensors/{key}", tree["tensors"][key] * float("nan")),
        "model with a weight of another shape": changed(tree, f"tensors/{key}", torch.ones(8, 4, 1, 1)),
    }


def taggers(whole: dict[str, Tree]) -> dict[str, Make]:
    """Converted taggers whose sizes or lists cannot be."""
    tree = whole["tagger"]
    told = json.loads(tree["metadata"]["tagger"])
    wrong = {
        "depths": told | {"swin": told["swin"] | {"depths": [10**6]}},
        "heads": told | {"swin": told["swin"] | {"heads": [0]}},
        "sides": told | {"swin": told["swin"] | {"image_px": 10**6}},
        "labels": told | {"head": told["head"] | {"labels": 2**40}},
        "tags": told | {"tags": [1, 2, 3]},
        "thresholds": told | {"thresholds": ["a"] * 3},
        "tables": [told],
    }
    return {f"tagger of wrong {name}": changed(tree, "metadata/tagger", json.dumps(new)) for name, new in wrong.items()}


def names(whole: dict[str, Tree]) -> dict[str, Make]:
    """Keys crafted for the patterns that names are told by."""
    crafted = {
        "kohya words": "lora_unet_" + "to_q_" * 60 + "!.alpha",
        "kohya letters": "lora_unet_" + "a_" * 180 + "!.alpha",
        "kohya underscores": "lora_unet_" + "_" * 350 + ".alpha",
        "kohya digits": "lora_unet_" + "1" * 350 + "².alpha",
        "kohya nothing": "lora_unet_.alpha",
        "diffusers processors": "unet." + ".processor.to_q_lora" * 18 + ".lora.up.weight",
        "OSEDiff halves": "state_dict_unet." + ".lora_A.default_encoder" * 16 + ".weight",
        "PiSA-SR halves": "state_dict_unet." + "_pix" * 90 + ".weight_pix.weight",
        "InvSR prefixes": "module._orig_mod." * 20 + "encoder.time_embedding.",
        "peft prefixes": "base_model.model." * 20 + ".lora_A.weight",
        "own prefixes": "unet." * 70 + ".lora_down.weight",
    }
    return {
        f"name of {name}": changed(whole["kohya"], f"tensors/{key}", torch.ones(())) for name, key in crafted.items()
    }


def predictors(whole: dict[str, Tree]) -> dict[str, Make]:
    """InvSR predictors of sizes that cannot be."""
    state: dict[str, Tensor] = whole["invsr"]["state_dict"]
    prefix = "module._orig_mod.encoder."
    layers = {f"{prefix}down_blocks.0.resnets.{i}.conv1.bias": torch.zeros(64) for i in range(5000)}
    narrow = {key: value[:1] if value.ndim else value for key, value in state.items()}
    return {
        "predictor of 5,000 layers": pickled({"state_dict": state | layers}),
        "predictor of one channel": pickled({"state_dict": narrow}),
        "predictor without a block": pickled(
            {"state_dict": {k: v for k, v in state.items() if "down_blocks.1" not in k}}
        ),
        "predictor of flat weights": pickled({"state_dict": {key: value.flatten() for key, value in state.items()}}),
    }


def folders(whole: dict[str, Tree]) -> dict[str, Make]:
    """peft folders with configurations of wrong types, or with other things in the place of files."""
    config, tree = "adapter_config.json", whole["peft"]
    wrong: dict[str, Any] = {
        "r": "four", "r ": [4], "lora_alpha": {"a": 1}, "lora_alpha ": True, "rank_pattern": {"a": 1},
        "use_dora": "yes", "use_rslora": "no", "target_modules": 10**400, "more": DEEP, "many": ["x"] * 300_000,
        "\x1b[1m": "\x1b[1m",
    }  # fmt: skip
    made = {
        f"peft {name.encode('unicode_escape').decode()}": changed(tree, f"{config}/{name.strip()}", value)
        for name, value in wrong.items()
    }
    texts = ("[]", "null", "[" * 10**5, "{", "\ufeff", '{"r": 4, "r": "x"}', '{"r": NaN}')
    made |= {f"peft says {number}": changed(tree, config, text) for number, text in enumerate(texts)}

    def instead(name: str, put: Callable[[Path], object]) -> Make:
        def make(path: Path) -> None:
            write(path, {key: value for key, value in tree.items() if key != name})
            put(path / name)

        return make

    return made | {
        "peft with a folder as configuration": instead(config, Path.mkdir),
        "peft with a pipe as configuration": instead(config, os.mkfifo),
        "peft with a pipe as weights": instead("adapter_model.safetensors", os.mkfifo),
        "peft without weights": instead("adapter_model.safetensors", lambda path: None),
        "peft linked to nowhere": instead("adapter_model.safetensors", lambda path: path.symlink_to("nowhere")),
        "an empty folder": Path.mkdir,
    }


def bases(tree: Tree) -> dict[str, Make]:
    """Folders of base models with one thing wrong."""
    return {f"base {number} {place}": changed(tree, place, value) for number, (place, value) in enumerate(WRONG)}


def foreign() -> dict[str, tuple[str, Make]]:
    """Files that are something else, under names of weight files."""

    def packed(path: Path) -> None:
        buffer = io.BytesIO()
        with tarfile.TarFile(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("model.safetensors"), io.BytesIO())
        path.write_bytes(gzip.compress(buffer.getvalue()))

    contents = {
        "an empty file": b"",
        "one byte": b"\0",
        "a web page": b"\n<!DOCTYPE html><html>sign in",
        "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "a picture": b"\x89PNG\r\n\x1a\n" + bytes(99),
        "a GGUF": b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60),
        "zeros": bytes(10**6),
        "noise": bytes(range(256)) * 40,
    }
    made: dict[str, tuple[str, Make]] = {}
    for name, data in contents.items():
        for suffix in (".safetensors", ".pkl"):
            made[f"{name} as {suffix}"] = suffix, lambda path, data=data: path.write_bytes(data)
    return made | {
        "a tar as .pth": (".pth", packed),
        "a gzip as .ckpt": (".ckpt", lambda path: path.write_bytes(gzip.compress(bytes(10**6)))),
        "a pipe as .safetensors": (".safetensors", os.mkfifo),
        "a folder as .pkl": (".pkl", Path.mkdir),
        "a link to zeros as .pt": (".pt", lambda path: path.symlink_to("/dev/zero")),
        "a link to itself as .bin": (".bin", lambda path: path.symlink_to(path.name)),
        "a safetensors as .pkl": (".pkl", lambda path: save_file({"w": torch.ones(1)}, path)),
        "a pickle as .safetensors": (".safetensors", pickled({"w": torch.ones(1)})),
    }
