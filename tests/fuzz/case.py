"""One fuzz case: something untrusted, and the call that meets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """`name` tells cases of one module apart; `run` returns, or raises one of the module's `CLEAR` errors."""

    name: str
    run: Callable[[], object]
