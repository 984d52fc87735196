"""ComfyUI's folders, progress over many pictures, and what a MODEL is, for the folder nodes."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from torch import Tensor

from ...tudsr_core.batch import Job, OpenJob, Outcome, State, Summary
from ...tudsr_core.methods import Tick
from ...tudsr_core.pictures import FORMATS, pictures_in
from .networks import ProgressBar
from .stages import facts_of

Cancelled = comfy.model_management.InterruptProcessingException

PARTS = 1000  # of a picture on the progress bar
SAMPLES = 64  # numbers of a tensor that are looked at
MAX_DEPTH = 8


def source_folder(name: str) -> Path:
    """Return a folder to read: a path, or a name inside ComfyUI's input folder; raises ValueError without one."""
    if not name.strip():
        raise ValueError("no folder is given; write a path, or the name of a folder inside ComfyUI's input folder")
    folder = Path(folder_paths.get_input_directory(), name.strip())
    if not folder.is_dir():
        raise ValueError(f"folder {folder} does not exist; check the path")
    return folder


def input_pictures() -> list[str]:
    """Return the names of the pictures in ComfyUI's input folder, for a chooser."""
    folder = Path(folder_paths.get_input_directory())
    return [path.name for path in pictures_in(folder)] if folder.is_dir() else []


def source_picture(name: str) -> Path:
    """Return a picture inside ComfyUI's input folder; raises ValueError where it is not there, or outside."""
    root = os.path.realpath(folder_paths.get_input_directory())
    path = os.path.realpath(os.path.join(root, name))
    if os.path.commonpath((root, path)) != root or not os.path.isfile(path):
        raise ValueError(f"there is no picture {name} in ComfyUI's input folder {root}; put it there, then press R")
    return Path(path)


def free_name(name: str, suffix: str) -> Path:
    """Return a path in ComfyUI's output folder that nothing has: `name`, which may begin with folders, and a number.

    Raises ValueError for one outside, and for a name that is none.
    """
    place = Path(name)
    place = place.with_suffix("") if place.suffix.lower() in FORMATS else place
    if not place.stem or place.stem != place.stem.strip("."):
        raise ValueError(f"{name!r} is no name for a file; write one such as tudsr, or folder/tudsr")
    folder = result_folder(place.parent.as_posix())
    taken = {path.stem for path in folder.iterdir()}
    number = next(number for number in itertools.count(1) if f"{place.name}_{number:05}" not in taken)
    return folder / f"{place.name}_{number:05}{suffix}"


def result_folder(name: str) -> Path:
    """Return a folder inside ComfyUI's output folder, made where it is missing; raises ValueError for one outside.

    A workflow of someone else's could write anywhere otherwise; ComfyUI's own Save Image has the same limit.
    """
    root = os.path.realpath(folder_paths.get_output_directory())
    folder = os.path.realpath(os.path.join(root, name.strip()))
    if os.path.commonpath((root, folder)) != root:
        raise ValueError(
            f"{name} lies outside ComfyUI's output folder {root}; name a folder inside, or start ComfyUI with "
            "--output-directory"
        )
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


def fingerprint(*objects: Any) -> str:
    """Return a digest of MODELs, VAEs and CONDITIONINGs: weights as they are without patches, and all patches.

    Of every tensor SAMPLES numbers are looked at: two trainings of one network differ in all tensors that they
    trained, and SD2.1 takes a second.
    """
    digest = hashlib.sha256()
    for value in objects:
        for part in _facts(value, 0):
            digest.update(part)
    return f"sha256:{digest.hexdigest()}"


def _facts(value: Any, depth: int) -> Iterator[bytes]:
    """Yield what tells a value from others; objects that are no data count by their type."""
    if isinstance(value, Tensor):
        flat = value.detach().reshape(-1)
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield flat[:: max(1, len(flat) // SAMPLES)].double().cpu().numpy().tobytes()
        return
    yield type(value).__name__.encode()
    if depth > MAX_DEPTH:
        return
    if isinstance(value, str | int | float | bool | bytes | None):
        yield repr(value).encode()
        return
    for part in _inside(value):
        yield from _facts(part, depth + 1)


def _inside(value: Any) -> list:
    if isinstance(value, Mapping):
        return [part for key in sorted(value, key=str) for part in (str(key), value[key])]
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, field.name) for field in fields(value)]
    if hasattr(value, "patcher"):  # a VAE
        return [value.patcher]
    if hasattr(value, "patches") and hasattr(value, "backup"):  # a MODEL, whose weights another one's may have patched
        kept = {key: getattr(saved, "weight", saved) for key, saved in value.backup.items()}
        return [dict(value.model.state_dict()) | kept, value.patches, facts_of(value)]
    return [getattr(value, "weights", None)]  # an adapter among the patches


class FolderProgress:
    """ComfyUI's progress bar over pictures and their tiles, and the list of what failed: a `Listener`.

    `bar` counts, and raises when the run is cancelled.
    """

    def __init__(self, total: int, bar: ProgressBar) -> None:
        self.total, self.bar = total * PARTS, bar
        self.summary: Summary | None = None
        self.lines: list[str] = []

    def left(self, number: int, job: Job, state: State) -> None:
        """Count a picture that needs nothing."""
        self.bar(number * PARTS, self.total, None)

    def begins(self, number: int, opened: OpenJob) -> Tick:
        """Count tiles as parts of the picture."""

        def tick(done: int, total: int, preview: Any) -> None:
            self.bar(int((number - 1 + done / max(1, total)) * PARTS), self.total, preview)

        return tick

    def wrote(self, number: int, outcome: Outcome) -> None:
        """Its tiles have counted it."""

    def failed(self, number: int, job: Job, error: Exception) -> None:
        """Keep the error to be shown on the node."""
        self.lines.append(str(error))

    def ended(self, summary: Summary) -> None:
        """Keep the sums."""
        self.summary = summary
