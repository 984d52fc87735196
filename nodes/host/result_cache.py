"""The last result of each picture, for runs in which only a seed has changed that draws nothing.

ComfyUI's own cache takes every widget for part of what is computed, and a node cannot take one out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def _hold(value: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(value)
    except TypeError:  # None, and CONDITIONING, which is a list
        return lambda: value


class ResultCache:
    """One result per picture, which lives as long as ComfyUI keeps that picture; nothing else is kept alive."""

    def __init__(self) -> None:
        self._by_image = WeakTensorKeyDictionary()

    def find(self, image: Tensor, objects: Sequence[Any], values: Any) -> Any:
        """Return the result made of `image`, the very same `objects` and equal `values`, or None."""
        held, known, result = self._by_image.get(image, ((), None, None))
        # A picture that is gone must not be taken for an input that is not connected.
        absent = [one is None for one in objects]
        same = known == (values, absent) and all(hold() is one for hold, one in zip(held, objects, strict=True))
        return result if same else None

    def keep(self, image: Tensor, objects: Sequence[Any], values: Any, result: Any) -> None:
        """Keep `result`, which must not hold `image`, in place of that picture's last one."""
        absent = [one is None for one in objects]
        self._by_image[image] = [_hold(one) for one in objects], (values, absent), result
