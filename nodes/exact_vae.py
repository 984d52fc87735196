"""ComfyUI's VAE through the core's exact tiling: loading and memory are ComfyUI's, tiles are the core's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
from torch import Tensor

from ..tudsr_core.vae_tiling import Doors, Place, TiledVAE, Tiling


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the device's out-of-memory; frees the cache if so."""
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        comfy.model_management.soft_empty_cache()
        return True
    return False


class ExactVAE:
    """A VAE whose encode and decode give the untiled result with the memory of a tile.

    ComfyUI's own encode and decode are used only for kinds of VAE that the core cannot tile: they
    answer out-of-memory with tiles of their own, which change the picture. Raises ValueError for
    VAEs of video or sound.
    """

    def __init__(self, vae: Any) -> None:
        if getattr(vae, "latent_dim", 2) != 2:
            raise ValueError(
                "this VAE is made for video or sound, not for pictures; use ComfyUI's own VAE nodes for it"
            )
        self.vae = vae
        self.scale = vae.spacial_compression_encode()
        doors = Doors(
            encode=lambda pixels: vae.encode(pixels.movedim(1, -1)).float().cpu(),
            decode=lambda z: vae.decode(z).movedim(-1, 1).float().cpu(),
            prepare=lambda pixels: vae.process_input(pixels),
            finish=lambda pixels: vae.process_output(pixels),
        )
        place = Place(vae.device, vae.vae_dtype, is_out_of_memory)
        self.tiled = TiledVAE(vae.first_stage_model, doors, self.scale, vae.latent_channels, place, self._free_bytes)

    def encode(self, pixels: Tensor, on_tile: Callable[[], None], tiling: Tiling | None = None) -> Tensor:
        """Return moments (or plain latents) of `B 3 H W` in 0..1; sides must be multiples of the VAE's scale."""
        self._load(tiling)
        return self.tiled.encode(pixels, on_tile, tiling)

    def decode(self, z: Tensor, on_tile: Callable[[], None], tiling: Tiling | None = None) -> Tensor:
        """Return pixels `B 3 H W` in 0..1 of unscaled latents."""
        self._load(tiling)
        return self.tiled.decode(z, on_tile, tiling)

    def bytes_per_pixel(self) -> tuple[int, int, int]:
        """Return device memory per pixel of tile and per pixel of picture, and what waits per pixel of picture."""
        side = 64
        shape = 1, self.vae.latent_channels, side, side
        whole = int(self.vae.memory_used_decode(shape, self.vae.vae_dtype) / (side * self.scale) ** 2)
        if self.tiled.steps:
            return self.tiled.tile_bytes() // self.tiled.tiling.tile_px**2, 0, self.tiled.plane_bytes(1)
        return (whole, 0, 0) if self.tiled.is_tiled else (0, whole, 0)

    def _load(self, tiling: Tiling | None) -> None:
        """Ask ComfyUI for the weights and for a tile's memory; other kinds ask for themselves in `VAE.encode`."""
        if self.tiled.steps:
            needed = 2 * self.tiled.tile_bytes(tiling)
            comfy.model_management.load_models_gpu([self.vae.patcher], memory_required=needed)

    def _free_bytes(self) -> int:
        return int(comfy.model_management.get_free_memory(self.vae.device))
