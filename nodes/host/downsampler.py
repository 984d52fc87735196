"""A learned downsampler that ComfyUI loads and offloads as it does its own models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.utils
from torch import Tensor

from ...tudsr_core.models import Downsampler


class ManagedDownsampler:
    """The network behind ComfyUI's memory management, with its progress bar and its cancel button."""

    def __init__(self, network: Downsampler) -> None:
        self.patcher = comfy.model_patcher.ModelPatcher(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def degrade(
        self, sharp: Tensor, factor: float, seed: int, strength: float, style: Tensor | None, tile: int
    ) -> Tensor:
        """Return what the network makes of `B 3 H W`, as `Downsampler.degrade` does; raises when the user cancels."""
        network = self.patcher.model
        if strength:
            comfy.model_management.load_models_gpu([self.patcher], memory_required=network.tile_bytes(tile))
        return network.degrade(sharp, factor, seed, strength, style, tile, _ticker())


def _ticker() -> Callable[[int, int, Any], None]:
    bar = None

    def tick(done: int, total: int, preview: Any) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return tick
