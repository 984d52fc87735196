"""Weight files: recognise, read safely, validate, and bring into one form.

Knows file formats and key names; builds no networks and runs none. Only safetensors and peft
folders are read here, nothing is unpickled.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import temporary_beside
from .plan import StageLimits
from .schedule import OneStep, from_noise_level

EMBEDDED_NAME = "embedded"
MODEL_FORMAT = "tudsr-model/1"
ADAPTER_FORMAT = "tudsr-adapter/1"
PEFT_PREFIX = "base_model.model."


class CheckpointError(ValueError):
    """A weight file that cannot be used; the message names the file, what is wrong and what to do."""


@dataclass(frozen=True)
class Low:
    """One low-rank update: delta = (alpha / rank) up @ down, reshaped to the weight."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update for `weight` in float32; raises ValueError if the shapes do not fit."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        if product.numel() != weight.numel():
            raise ValueError(f"update {tuple(product.shape)} does not fit weight {tuple(weight.shape)}")
        return (product * (self.alpha / self.rank)).view(weight.shape)


@dataclass(frozen=True)
class Adapter:
    """A stage adapter: updates per diffusers module path, and what the stage needs to know.

    `stage` is 1, 2, or None when the file does not say; `step` likewise.
    """

    name: str
    unet: dict[str, Low]
    encoder: dict[str, Low] = field(default_factory=dict)
    stage: int | None = None
    step: OneStep | None = None


@dataclass(frozen=True)
class ModelFile:
    """A whole small model in one file: configs, weights, the stage-two adapter and the stages' facts."""

    name: str
    vae_config: dict
    unet_config: dict
    vae: dict[str, Tensor]
    unet: dict[str, Tensor]
    first_step: OneStep
    second: Adapter
    limits: StageLimits


def embedded_path() -> Path:
    """Return the path of the model shipped inside this package."""
    return Path(str(resources.files(__package__) / "assets" / "embedded.safetensors"))


def read_model(path: Path) -> ModelFile:
    """Read a `tudsr-model` safetensors file. Raises CheckpointError."""
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != MODEL_FORMAT:
        raise CheckpointError(f"{path} is not a tudsr model file (its metadata says {metadata.get('format')!r})")
    parts: dict[str, dict[str, Tensor]] = {"vae": {}, "unet": {}, "stage_two": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise CheckpointError(f"{path} has an unknown tensor {key}; it was made by another version")
        parts[part][name] = tensor
    facts = json.loads(metadata["model"])
    alpha = {path_: facts["stage_two_alpha"] for path_ in _paths(parts["stage_two"], ".lora_down.weight")}
    lows = _pair(parts["stage_two"], ".lora_down.weight", ".lora_up.weight", alpha, path)
    second = Adapter("stage two", lows, {}, 2, from_noise_level(facts["stage_two_timestep"]))
    return ModelFile(
        name=metadata.get("name", path.stem),
        vae_config=facts["vae_config"],
        unet_config=facts["unet_config"],
        vae=parts["vae"],
        unet=parts["unet"],
        first_step=from_noise_level(facts["stage_one_timestep"]),
        second=second,
        limits=StageLimits(**facts["limits"]),
    )


def write_model(path: Path, model: ModelFile) -> None:
    """Write `model` as float16 safetensors, atomically."""
    tensors = {f"vae.{key}": value for key, value in model.vae.items()}
    tensors |= {f"unet.{key}": value for key, value in model.unet.items()}
    for name, low in model.second.unet.items():
        tensors[f"stage_two.{name}.lora_down.weight"] = low.down
        tensors[f"stage_two.{name}.lora_up.weight"] = low.up
    alphas = {low.alpha for low in model.second.unet.values()}
    facts = {
        "vae_config": model.vae_config,
        "unet_config": model.unet_config,
        "stage_one_timestep": model.first_step.t,
        "stage_two_timestep": model.second.step.t,
        "stage_two_alpha": alphas.pop(),
        "limits": vars(model.limits),
    }
    metadata = {"format": MODEL_FORMAT, "name": model.name, "model": json.dumps(facts)}
    _write(path, {key: value.half() for key, value in tensors.items()}, metadata)


def read_adapter(path: Path) -> Adapter:
    """Read a stage adapter: our own `.safetensors`, or a peft folder as OMGSR and TUDSR save it.

    A folder is either one peft adapter (`adapter_config.json` + `adapter_model.safetensors`) or
    holds `unet_lora_adapter/` and optionally `vae_encoder_lora_adapter/`. Raises CheckpointError.
    """
    if not path.exists():
        raise CheckpointError(f"adapter {path} does not exist; check the path")
    if path.is_dir():
        return _read_peft_folder(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(f"adapter {path} is not a .safetensors file or a peft folder; convert it first")
    return _read_adapter_file(path)


def write_adapter(path: Path, adapter: Adapter) -> None:
    """Write `adapter` as one safetensors file with its metadata, atomically."""
    tensors = {}
    for part, lows in (("unet", adapter.unet), ("encoder", adapter.encoder)):
        for name, low in lows.items():
            tensors[f"{part}.{name}.lora_down.weight"] = low.down
            tensors[f"{part}.{name}.lora_up.weight"] = low.up
            tensors[f"{part}.{name}.alpha"] = torch.tensor(float(low.alpha))
    step = {} if adapter.step is None else {"step": json.dumps(vars(adapter.step))}
    stage = {} if adapter.stage is None else {"stage": str(adapter.stage)}
    _write(path, tensors, {"format": ADAPTER_FORMAT, "name": adapter.name, **step, **stage})


def _read_adapter_file(path: Path) -> Adapter:
    tensors, metadata = _read_safetensors(path)
    if metadata.get("format") != ADAPTER_FORMAT:
        raise CheckpointError(
            f"{path} is not a stage adapter of this pack (its metadata says {metadata.get('format')!r}); "
            "give the peft folder it came from"
        )
    parts = {}
    for part in ("unet", "encoder"):
        own = {key.removeprefix(part + "."): value for key, value in tensors.items() if key.startswith(part + ".")}
        alphas = {key.removesuffix(".alpha"): float(own.pop(key)) for key in [k for k in own if k.endswith(".alpha")]}
        parts[part] = _pair(own, ".lora_down.weight", ".lora_up.weight", alphas, path)
    foreign = [key for key in tensors if key.split(".")[0] not in parts]
    if foreign or not parts["unet"]:
        raise CheckpointError(f"{path} has {'unknown keys: ' + _some(foreign) if foreign else 'no UNet updates'}")
    step = OneStep(**json.loads(metadata["step"])) if "step" in metadata else None
    stage = int(metadata["stage"]) if "stage" in metadata else None
    return Adapter(metadata.get("name", path.stem), parts["unet"], parts["encoder"], stage, step)


def _read_peft_folder(path: Path) -> Adapter:
    if (path / "adapter_config.json").is_file():
        return Adapter(path.name, _read_peft(path))
    unet = path / "unet_lora_adapter"
    if not unet.is_dir():
        raise CheckpointError(
            f"folder {path} holds neither adapter_config.json nor unet_lora_adapter/; give the adapter's own folder"
        )
    encoder = path / "vae_encoder_lora_adapter"
    return Adapter(path.name, _read_peft(unet), _read_peft(encoder) if encoder.is_dir() else {})


def _read_peft(folder: Path) -> dict[str, Low]:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}/adapter_config.json cannot be read: {error}") from error
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise CheckpointError(f"{folder} uses {key}, which this pack does not support")
    tensors, _ = _read_safetensors(folder / "adapter_model.safetensors")
    foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if foreign:
        raise CheckpointError(f"{folder} has keys that are no peft LoRA: {_some(foreign)}")
    own = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    alphas = {name: float(config["lora_alpha"]) for name in _paths(own, ".lora_A.weight")}
    lows = _pair(own, ".lora_A.weight", ".lora_B.weight", alphas, folder)
    wrong = [name for name, low in lows.items() if low.rank != config["r"]]
    if wrong:
        raise CheckpointError(f"{folder} says rank {config['r']}, but these differ: {_some(wrong)}")
    return lows


def _paths(tensors: Iterable[str], suffix: str) -> list[str]:
    return [key.removesuffix(suffix) for key in tensors if key.endswith(suffix)]


def _pair(tensors: dict[str, Tensor], down: str, up: str, alphas: dict[str, float], path: Path) -> dict[str, Low]:
    downs, ups = set(_paths(tensors, down)), set(_paths(tensors, up))
    leftover = [key for key in tensors if not key.endswith((down, up))]
    halves = sorted(downs ^ ups)
    if leftover or halves or set(alphas) - downs:
        problem = f"keys that fit nothing: {_some(leftover)}" if leftover else f"half an update: {_some(halves)}"
        raise CheckpointError(f"{path} has {problem}; the file is damaged or of another kind")
    lows = {name: Low(tensors[name + down], tensors[name + up], alphas.get(name, 0.0)) for name in sorted(downs)}
    for name, low in lows.items():
        if low.rank != low.up.shape[1] or low.alpha <= 0:
            raise CheckpointError(f"{path}: ranks of {name} do not agree or alpha is missing")
        if not (torch.isfinite(low.down).all() and torch.isfinite(low.up).all()):
            raise CheckpointError(f"{path}: {name} contains NaN or infinite weights; download the file again")
    return lows


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a `.safetensors` file, or of a pickle with `weights_only=True`.

    Raises CheckpointError; a pickle that holds anything but tensors and plain values is refused.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)[0]
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path")
    try:
        # Mapped, because files with an optimizer's state are several times what is needed of them.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read safely ({reason}); use its .safetensors version") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path} holds no table of tensors; it is another kind of file")
    return loaded.get("state_dict", loaded)


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); download it again") from error


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    with temporary_beside(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)
