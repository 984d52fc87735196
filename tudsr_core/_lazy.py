"""A room's public names, imported from their modules when they are first used.

So `tudsr --help` needs no torch, and a room is one import line for those outside it.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def public_names(package: str, **modules: str) -> tuple[list[str], Callable[[str], Any]]:
    """Return `__all__` and `__getattr__` for a package: the names (parted by blanks) of each of its `modules`."""
    home = {name: module for module, names in modules.items() for name in names.split()}

    def __getattr__(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f".{home[name]}", package), name)

    return sorted(home), __getattr__
