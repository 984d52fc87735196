"""Networks that take a file's tensors as their weights, or a list of what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..untrusted import some
from ..weights import CheckpointError, check_finite


def fill(network: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, title: str, remedy: str) -> nn.Module:
    """Give `network`, built on the meta device, float32 copies of `tensors`; return it ready to be used.

    Raises CheckpointError that names `source`, `title` (what it does not fit) and `remedy` unless
    every key and shape is right and every value finite.
    """
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    problems = mismatches(wanted, tensors)
    if problems:
        raise CheckpointError(f"{source} does not fit {title}: {problems}; {remedy}")
    if whole := [key for key in wanted if not tensors[key].is_floating_point()]:
        raise CheckpointError(f"{source}: {some(whole)} of {title} stored in whole numbers; get the unquantised file")
    weights = {key: tensors[key].to(torch.float32, copy=True) for key in wanted}
    check_finite(source, weights.items())
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def mismatches(wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> str:
    """Return what is missing, unknown or of another shape, "" if all is well."""
    missing = [key for key in wanted if key not in tensors]
    unknown = [key for key in tensors if key not in wanted]
    wrong = [
        f"{key} ({tuple(value.shape)}, not {wanted[key]})"
        for key, value in tensors.items()
        if key in wanted and tuple(value.shape) != wanted[key]
    ]
    parts = (("missing", missing), ("unknown", unknown), ("wrong shape", wrong))
    return "; ".join(f"{what} {some(names)}" for what, names in parts if names)
