"""A downsampler and the safetensors file that it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from ..assets import asset_path
from ..untrusted import Fields, parse_json, shown
from ..weights import CheckpointError, open_safetensors, read_file, write_file
from .downsampler import Downsampler, DownsamplerConfig
from .fill_weights import fill
from .learned_damage import LearnedDamage
from .shared_downsampler import SharedConfig, SharedDownsampler, SharedNetworks

DOWNSAMPLER_FORMAT = "tudsr-downsampler/1"


def write_downsampler(path: Path, network: LearnedDamage, notes: Mapping[str, str] | None = None) -> None:
    """Write one float16 safetensors file, atomically; `notes` are metadata for people, such as how it was trained."""
    tensors = {key: value.detach().half().cpu() for key, value in network.state_dict().items()}
    write_file(
        path,
        tensors,
        {**(notes or {}), "format": DOWNSAMPLER_FORMAT, "downsampler": json.dumps(asdict(network.config))},
    )


def downsampler_path() -> Path:
    """Return the shipped file; `assets/README.md` says which damage it has learned."""
    return asset_path("downsampler.safetensors")


def load_downsampler(path: Path, networks: SharedNetworks | None = None) -> LearnedDamage:
    """Return the network of a file, float32 on the CPU, frozen.

    One of kind "shared" needs the `networks` that it is an adapter of, and is on its device. Raises CheckpointError
    that says what is wrong.
    """
    file, where = read_file(path), f"the metadata of {path}"
    fields = _fields_of(file.metadata, path)
    shared = fields.values.get("kind") == "shared"
    if shared and networks is None:
        raise CheckpointError(
            f"{path} is an adapter of SD2.1-base; tudsr degrade --base takes its folder, other ways need kind pixel"
        )
    try:
        network = _shared(fields, networks) if shared else _alone(fields)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}; get the file again, or update this pack") from error
    return fill(network, file.tensors, path, "the downsampler of its config", "get the file again")


def kind_of(path: Path) -> str:
    """Return which kind of downsampler a file says it is, from its header. Raises CheckpointError."""
    return _fields_of(open_safetensors(path).metadata() or {}, path).text("kind")


def _fields_of(metadata: Mapping[str, str], path: Path) -> Fields:
    if metadata.get("format") != DOWNSAMPLER_FORMAT:
        said = shown(metadata.get("format", "nothing"))
        raise CheckpointError(
            f"{path} is no downsampler (its metadata says {said}); choose a file that tudsr train has written as one"
        )
    where = f"the metadata of {path}"
    return Fields(parse_json(metadata.get("downsampler", "null"), where, CheckpointError), where, CheckpointError)


def _alone(fields: Fields) -> Downsampler:
    fields.only(*DownsamplerConfig.__dataclass_fields__)
    config = DownsamplerConfig(
        fields.text("kind"),
        *(fields.whole(name) for name in ("width", "blocks", "code", "maps")),
        fields.number("kappa", least=0, most=100),
        fields.number("root", least=0, most=1),
        fields.values.get("keeps", False),
        fields.values.get("vae"),
    )
    with torch.device("meta"):
        return Downsampler(config)


def _shared(fields: Fields, networks: SharedNetworks) -> SharedDownsampler:
    fields.only(*SharedConfig.__dataclass_fields__)
    config = SharedConfig(
        rank=fields.whole("rank"),
        targets=tuple(fields.texts("targets")),
        code=fields.whole("code"),
        timestep=fields.whole("timestep"),
        kappa=fields.number("kappa", least=0, most=100),
        root=fields.number("root", least=0, most=1),
    )
    return SharedDownsampler(config, networks)
