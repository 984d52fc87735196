"""What a training gives away: the published peft folder, and this pack's single file with all settings in it."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

from ..weights import UNET_FOLDER, embedded_path, read_adapter, read_model, write_adapter, write_model
from .colearn_config import ColearnConfig
from .config import EMBEDDED, TrainingConfig
from .networks import Restorer, is_model_file


def export(network: Restorer, config: TrainingConfig | ColearnConfig, stage: int, steps: int) -> list[Path]:
    """Write the adapter of `network` into the output folder and return what was written.

    Always a folder `adapter` in OMGSR's and TUDSR's layout. Behind SD2.1-base a file
    `tudsr-stage-<n>.safetensors` beside it, which also knows its timestep; behind a tudsr-model file
    a whole `model.safetensors` with this adapter as its stage two.
    """
    folder = _write_folder(network, config.output)
    adapter = read_adapter(folder, "tudsr", stage)
    if is_model_file(config.model.base):
        base = embedded_path() if config.model.base == EMBEDDED else Path(config.model.base)
        second = replace(adapter, name="stage two", steps=(network.step,))
        written = config.output / "model.safetensors"
        write_model(written, replace(read_model(base), second=second))
    else:
        adapter = replace(adapter, name=f"tudsr-stage-{stage}", steps=(network.step,))
        written = config.output / f"{adapter.name}.safetensors"
        write_adapter(written, adapter, notes={"training": json.dumps(config.said() | {"trained_steps": steps})})
    return [folder, written]


def _write_folder(network: Restorer, output: Path) -> Path:
    folder, fresh, old = (output / name for name in ("adapter", ".adapter.part", ".adapter.old"))
    for left in (fresh, old):
        shutil.rmtree(left, ignore_errors=True)
    network.unet.save_pretrained(fresh / UNET_FOLDER)
    (fresh / UNET_FOLDER / "README.md").unlink(missing_ok=True)  # peft's empty model card
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder
