"""Checkpoints of a training: one safetensors file each, whole or absent, with all that a restart needs.

There is no state of random numbers: every draw follows from the seed and the step (`samples.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ..untrusted import parse_json, shown
from ..weights import CheckpointError, read_file, write_file
from .colearn_config import ColearnConfig
from .config import TrainingConfig
from .sections import ConfigError

FORMAT = "tudsr-training/1"
# Settings that may change between a stop and a restart.
FREE_SECTIONS = ("output", "validation")
FREE = {
    ("optimizer", "steps"),
    ("phases", "real"),
    ("phases", "joint"),
    ("data", "workers"),
    *(("run", name) for name in ("gradient_checkpointing", "save_every", "keep", "patience", "tensorboard")),
}


def folder_of(output: Path) -> Path:
    """Return the folder of the checkpoints of a training whose output folder is `output`."""
    return output / "checkpoints"


def saved_steps(config: TrainingConfig | ColearnConfig) -> list[Path]:
    """Return the checkpoints there are, oldest first; unfinished ones have other names and do not count."""
    return _saved_in(config.output)


def _saved_in(output: Path) -> list[Path]:
    return sorted(folder_of(output).glob("step-*.safetensors"))


def newest_part(output: Path, part: str) -> dict[str, Tensor]:
    """Return a part of the newest checkpoint of another training, by name. Raises CheckpointError, ConfigError."""
    saved = _saved_in(output)
    tensors = read_file(saved[-1]).tensors if saved else {}
    found = {name.removeprefix(f"{part}/"): one for name, one in tensors.items() if name.startswith(f"{part}/")}
    if not found:
        raise ConfigError(f"{output} holds no checkpoint with a network {part!r}; name the folder of its training")
    return found


def save_state(config: TrainingConfig | ColearnConfig, step: int, parts: dict[str, dict[str, Tensor]]) -> Path:
    """Write `parts` (tensors by name) as the checkpoint of `step`, and remove all but the newest ones."""
    folder = folder_of(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}.safetensors"
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    about = {"format": FORMAT, "step": str(step), "config": json.dumps(config.said())}
    write_file(path, {name: value.detach().cpu() for name, value in tensors.items()}, about)
    for old in saved_steps(config)[: -config.run.keep]:
        old.unlink()
    for left in folder.glob(".step-*.part.safetensors"):  # of runs that were killed while they wrote
        left.unlink()
    return path


def load_state(config: TrainingConfig | ColearnConfig, path: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Return `(step, parts)` of a checkpoint. Raises CheckpointError, and ConfigError if settings have changed."""
    file = read_file(path)
    if file.metadata.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of a training")
    said = parse_json(file.metadata.get("config", "null"), f"the metadata of {path}", CheckpointError)
    step = parse_json(file.metadata.get("step", "null"), f"the metadata of {path}", CheckpointError)
    if not isinstance(said, dict) or not isinstance(step, int):
        raise CheckpointError(f"the metadata of {path} is damaged; go on from another checkpoint")
    if changed := sorted(_differences(said, config.said())):
        raise ConfigError(
            f"{', '.join(map(shown, changed))} changed since {path.name}; set it back, or begin anew in another output"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in file.tensors.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = value
    return step, parts


def _differences(before: dict, now: dict) -> Iterable[str]:
    for section in (before.keys() | now.keys()) - set(FREE_SECTIONS):
        old, new = before.get(section), now.get(section)
        if not (isinstance(old, dict) and isinstance(new, dict)):
            old, new = {"": old}, {"": new}
        for name in old.keys() | new.keys():
            if old.get(name) != new.get(name) and (section, name) not in FREE:
                yield f"[{section}] {name}" if name else section


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimiser's moments and step counts, by the place of their parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{place}.{name}": value for place, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Give an optimiser its moments back; its rates stay those of the configuration."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        place, _, name = key.partition(".")
        state.setdefault(int(place), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
