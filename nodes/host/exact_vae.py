"""ComfyUI's VAE through the core's exact tiling: loading and memory are ComfyUI's, tiles are the core's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
from torch import Tensor

from ...tudsr_core.vae import ComputeTarget, TiledVAE, VAECallables, VAETiling


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the device's out-of-memory; frees the cache if so."""
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        comfy.model_management.soft_empty_cache()
        return True
    return False


class ExactVAE:
    """A VAE whose encode and decode give the untiled result with the memory of a tile.

    Kinds of VAE that the core cannot tile run on whole pictures, never in ComfyUI's own tiles, which
    change the picture. Raises ValueError for VAEs of video or sound, and of none.
    """

    def __init__(self, vae: Any) -> None:
        if vae.first_stage_model is None:
            raise ValueError("this VAE is empty: its checkpoint holds none; load one with Load VAE")
        sound = getattr(vae, "extra_1d_channel", None) is not None
        if getattr(vae, "latent_dim", 2) != 2 or sound or getattr(vae, "output_channels", 3) != 3:
            raise ValueError(
                "this VAE is made for video or sound, not for pictures; use ComfyUI's own VAE nodes for it"
            )
        self.vae = vae
        self.scale = vae.spacial_compression_encode()
        own = _without_tiles(vae)
        callables = VAECallables(
            encode=lambda pixels: own.encode(pixels.movedim(1, -1)).float().cpu(),
            decode=lambda z: own.decode(z).movedim(-1, 1).float().cpu(),
            encode_with=lambda network, pixels: network.encode(vae.process_input(pixels)),
            decode_with=lambda network, z: vae.process_output(network.decode(z)),
            load=self._load,
        )
        target = ComputeTarget(vae.device, vae.vae_dtype, is_out_of_memory)
        self.tiled = TiledVAE(
            vae.first_stage_model, callables, self.scale, vae.latent_channels, target, self._free_bytes
        )

    def encode(
        self, pixels: Tensor, on_tile: Callable[[], None], tiling: VAETiling | None = None, seed: int | None = None
    ) -> Tensor:
        """Return latents (the posterior's mode, or a draw with `seed`) of `B 3 H W` in 0..1.

        Sides must be multiples of the VAE's scale. Raises MemoryError when the smallest tiles are too large.
        """
        return self.tiled.encode(pixels, on_tile, tiling, seed)

    def decode(self, z: Tensor, on_tile: Callable[[], None], tiling: VAETiling | None = None) -> Tensor:
        """Return pixels `B 3 H W` in 0..1 of unscaled latents. Raises MemoryError as `encode` does."""
        return self.tiled.decode(z, on_tile, tiling)

    def bytes_per_pixel(self) -> tuple[int, int, int]:
        """Return device memory per pixel of tile and per pixel of picture, and what waits per pixel of picture."""
        side = 64
        shape = 1, self.vae.latent_channels, side, side
        whole = int(self.vae.memory_used_decode(shape, self.vae.vae_dtype) / (side * self.scale) ** 2)
        if self.tiled.steps:
            return self.tiled.tile_bytes() // self.tiled.tiling.tile_px**2, 0, self.tiled.plane_bytes(1)
        return (whole, 0, 0) if self.tiled.is_tiled else (0, whole, 0)

    def _load(self, needed: int) -> None:
        comfy.model_management.load_models_gpu([self.vae.patcher], memory_required=needed)

    def _free_bytes(self) -> int:
        return int(comfy.model_management.get_free_memory(self.vae.device))


def _without_tiles(vae: Any) -> Any:
    """Return the same VAE, but with an encode and decode that let out-of-memory out instead of tiling after it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    own = copy.copy(vae)
    own.encode_tiled_ = own.decode_tiled_ = refuse
    return own
