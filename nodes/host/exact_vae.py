"""ComfyUI's VAE through the core's exact tiling: loading and memory are ComfyUI's, tiles are the core's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import Tensor, nn

from ...tudsr_core.vae import ComputeTarget, Features, TiledVAE, VAECallables, VAETiling, wrapping


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is the device's out-of-memory; frees the cache if so."""
    if isinstance(error, comfy.model_management.OOM_EXCEPTION):
        comfy.model_management.soft_empty_cache()
        return True
    return False


class ManagedWrapping:
    """CFW, loaded and offloaded by ComfyUI together with the VAE that it is used with."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self._patchers: dict[torch.dtype, Any] = {}

    def patcher_for(self, vae: Any) -> Any:
        """Return a ModelPatcher of CFW in the VAE's dtype, which goes where the VAE goes."""
        if vae.vae_dtype not in self._patchers:
            network = self.network
            if vae.vae_dtype != torch.float32:
                network = copy.deepcopy(network).to(vae.patcher.offload_device, vae.vae_dtype)
            self._patchers[vae.vae_dtype] = comfy.model_patcher.ModelPatcher(
                network, load_device=vae.device, offload_device=vae.patcher.offload_device
            )
        return self._patchers[vae.vae_dtype]


class ExactVAE:
    """A VAE whose encode and decode give the untiled result with the memory of a tile.

    `cfw` of a `weight` other than 0: what `decode` fuses with the activations that `features` returns.
    Kinds of VAE that the core cannot tile run on whole pictures, never in ComfyUI's own tiles, which
    change the picture. Raises ValueError for VAEs of video or sound, and of none.
    """

    def __init__(self, vae: Any, cfw: ManagedWrapping | None = None, weight: float = 0.0) -> None:
        if vae.first_stage_model is None:
            raise ValueError("this VAE is empty: its checkpoint holds none; load one with Load VAE")
        sound = getattr(vae, "extra_1d_channel", None) is not None
        if getattr(vae, "latent_dim", 2) != 2 or sound or getattr(vae, "output_channels", 3) != 3:
            raise ValueError(
                "this VAE is made for video or sound, not for pictures; use ComfyUI's own VAE nodes for it"
            )
        self.vae = vae
        self.cfw = cfw.patcher_for(vae) if cfw and weight else None
        self.fuse = wrapping(self.cfw.model, weight) if self.cfw else {}
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

    def features(self, pixels: Tensor, on_tile: Callable[[], None], tiling: VAETiling | None = None) -> Features:
        """Return the activations of `B 3 H W` that CFW fuses. Sides and errors as in `encode`."""
        return self.tiled.features(pixels, self.fuse, on_tile, tiling)

    def decode(
        self,
        z: Tensor,
        on_tile: Callable[[], None],
        tiling: VAETiling | None = None,
        features: Features | None = None,
    ) -> Tensor:
        """Return pixels `B 3 H W` in 0..1 of unscaled latents, with CFW fused with `features`.

        Raises MemoryError as `encode` does, ValueError for features of other sizes, and for CFW of other widths.
        """
        return self.tiled.decode(z, on_tile, tiling, self.fuse, features)

    def bytes_per_pixel(self) -> tuple[int, int, int]:
        """Return device memory per pixel of tile and per pixel of picture, and what waits per pixel of picture."""
        side = 64
        shape = 1, self.vae.latent_channels, side, side
        whole = int(self.vae.memory_used_decode(shape, self.vae.vae_dtype) / (side * self.scale) ** 2)
        if self.tiled.layers:
            tile = self.tiled.tile_bytes(fuse=self.fuse) // self.tiled.tiling.tile_px**2
            return tile, 0, self.tiled.feature_map_bytes(1, fuse=self.fuse)
        return (whole, 0, 0) if self.tiled.is_tiled else (0, whole, 0)

    def _load(self, needed: int) -> None:
        models = [self.vae.patcher, self.cfw] if self.cfw else [self.vae.patcher]
        comfy.model_management.load_models_gpu(models, memory_required=needed)

    def _free_bytes(self) -> int:
        return int(comfy.model_management.get_free_memory(self.vae.device))


def _without_tiles(vae: Any) -> Any:
    """Return the same VAE, but with an encode and decode that let out-of-memory out instead of tiling after it."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise comfy.model_management.OOM_EXCEPTION("out of memory")

    own = copy.copy(vae)
    own.encode_tiled_ = own.decode_tiled_ = refuse
    return own
