"""Where files of this pack lie: the folders, links and names that ComfyUI's own rules allow.

A link leads wherever whoever owns the folder made it lead; a name from a workflow cannot leave the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import folder_paths

from ...tudsr_core.untrusted import shown
from ...tudsr_core.weights import SUFFIXES, CheckpointError, where_to_get

FOLDER = "tudsr"


def register_folder() -> None:
    """Make `models/tudsr` known to ComfyUI, keeping paths that extra_model_paths.yaml has added."""
    default = str(Path(folder_paths.models_dir) / FOLDER)
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | set(SUFFIXES))


register_folder()


def model_roots(*names: str) -> list[Path]:
    """Return the folders for models of this pack, then those of `names`, as ComfyUI knows them; some may not exist."""
    known, models = folder_paths.folder_names_and_paths, Path(folder_paths.models_dir)
    return [Path(path) for name in (FOLDER, *names) for path in (known[name][0] if name in known else [models / name])]


def list_below(root: Path) -> Iterator[Path]:
    """Yield every file below `root`, relative to it; links to folders are followed."""
    found, _ = folder_paths.recursive_search(str(root), excluded_dir_names=[".git"])
    return map(Path, found)


def find_below(roots: Sequence[Path], name: str, remedy: str = "put it there and press R to refresh") -> Path:
    """Return the first file or folder called `name` below `roots`; `..` in it does not lead out of them.

    Raises CheckpointError that says where it was looked for and `remedy`.
    """
    inside = os.path.relpath(os.path.join("/", name), "/")
    for root in roots:
        if os.path.exists(path := root / inside):
            return path
    raise CheckpointError(f"{shown(name)!r} was not found in {', '.join(map(str, roots))}; {remedy}")


def list_weights(*names: str) -> list[str]:
    """Return the files of weights in the folders of this pack and of `names`, as names for a chooser."""
    files = {file for root in model_roots(*names) for file in list_below(root) if file.suffix in SUFFIXES}
    return sorted(file.as_posix() for file in files)


def find_weights(name: str, *names: str) -> Path:
    """Return the path of a chosen file; raises CheckpointError that says where to get it and where to put it."""
    return find_below(model_roots(*names), name, f"{where_to_get(name)}put it there and press R to refresh")


def is_there(name: str, *names: str) -> bool | str:
    """Return what a node's `validate_inputs` does for a chosen file."""
    try:
        find_weights(name, *names)
    except CheckpointError as error:
        return str(error)
    return True


def fingerprint(path: Path) -> str:
    """Return what changes when the file does."""
    return f"{path}:{path.stat().st_mtime_ns}"
