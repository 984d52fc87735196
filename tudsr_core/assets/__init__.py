"""The files that ship with the library: the embedded model, its rival, the example photo, a list of tags, a view."""

from __future__ import annotations

from pathlib import Path


def asset_path(name: str) -> Path:
    """Return the path of a shipped file."""
    return Path(__file__).parent / name
