"""Where files of this pack lie: the folders, links and names that ComfyUI's own rules allow.

A link leads wherever whoever owns the folder made it lead; a name from a workflow cannot leave the folder.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import folder_paths

from ...tudsr_core.untrusted import shown
from ...tudsr_core.weights import SUFFIXES, CheckpointError

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
