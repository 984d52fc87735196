"""ComfyUI's MODEL, VAE and CONDITIONING seen through the core's `Networks` protocol.

Loading, offload, dtype, patches, wrappers and interrupts are ComfyUI's; only the translation is
here, and the progress bar.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from torch import Tensor

from ..tudsr_core.pipeline import Predict, Preview
from ..tudsr_core.plan import NetworkFacts
from ..tudsr_core.tiles import Tile
from ..tudsr_core.vae_tiling import TILE_PX, Reach, count_tiles, find_reaches, run_tiled
from .conds import crop_conds, is_spatial

PREVIEW_SECONDS = 0.5
MULTIPLE = 8


class ComfyNetworks:
    """One stage over MODEL, VAE and CONDITIONING."""

    def __init__(self, model: Any, vae: Any, conditioning: list) -> None:
        self.model, self.vae, self.conditioning = model, vae, conditioning
        self.latent_scale = vae.spacial_compression_encode()
        self._reaches: tuple[Reach | None, Reach | None] | None = None

    @property
    def facts(self) -> NetworkFacts:
        """Geometry, and ComfyUI's own estimate of memory."""
        channels = self.model.model.latent_format.latent_channels
        side = 64
        activations = self.model.model.memory_required([1, channels, side, side]) / (side * self.latent_scale) ** 2
        latent = (1, self.vae.latent_channels, side, side)
        vae_bytes = self.vae.memory_used_decode(latent, self.vae.vae_dtype) / (side * self.latent_scale) ** 2
        tiled = all(self.reaches)
        return NetworkFacts(
            latent_scale=self.latent_scale,
            multiple=max(MULTIPLE, self.latent_scale),
            weight_bytes=self.model.model_size() + self.vae.patcher.model_size(),
            tile_bytes_per_pixel=int(max(activations, vae_bytes if tiled else 0)),
            picture_bytes_per_pixel=0 if tiled else int(vae_bytes),
        )

    @property
    def reaches(self) -> tuple[Reach | None, Reach | None]:
        """`Reach` of encoder and decoder; None for autoencoders with global statistics."""
        if self._reaches is None:
            vae, like = self.vae, torch.zeros(1)
            self._reaches = find_reaches(
                vae.first_stage_model, self._encode, self._decode, self.latent_scale, vae.latent_channels, like
            )
        return self._reaches

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Ticks of one encode plus one decode."""
        tiles = count_tiles(size, TILE_PX)
        return sum(tiles if reach else 1 for reach in self.reaches)

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Tensor:
        """Return scaled latents of `B 3 H W` in 0..1; the posterior's mode, or a draw with `seed`."""
        network = self._encode
        if seed is not None and hasattr(self.vae.first_stage_model, "encoder"):
            network = self._sampler(seed)
        latents = run_tiled(network, pixels, self.reaches[0], TILE_PX, on_tile)
        return self.model.model.process_latent_in(latents)

    def decode(self, z: Tensor, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W` for scaled latents."""
        latents = self.model.model.process_latent_out(z)
        return run_tiled(self._decode, latents, self.reaches[1], TILE_PX // self.latent_scale, on_tile)

    def _encode(self, pixels: Tensor) -> Tensor:
        return self.vae.encode(pixels.movedim(1, -1)).float().cpu()

    def _decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).movedim(-1, 1).float().cpu()

    def _sampler(self, seed: int) -> Callable[[Tensor], Tensor]:
        """Return an encoder that draws from the posterior, which `VAE.encode` never does."""

        def encode(pixels: Tensor) -> Tensor:
            vae, network = self.vae, self.vae.first_stage_model
            memory = vae.memory_used_encode(pixels.shape, vae.vae_dtype)
            comfy.model_management.load_models_gpu([vae.patcher], memory_required=memory)
            moments = network.encoder(vae.process_input(pixels).to(vae.device, vae.vae_dtype))
            if hasattr(network, "quant_conv"):
                moments = network.quant_conv(moments)
            mean, log_variance = moments.float().cpu().chunk(2, 1)
            noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
            return mean + (log_variance.clamp(-30, 20) / 2).exp() * noise

        return encode

    def condition(self, text: str) -> list:
        """Return the CONDITIONING connected to the node; texts are encoded by the user's CLIP."""
        return self.conditioning

    def denoise(
        self, z: Tensor, t: int, condition: list, part: tuple[int, ...], body: Callable[[Predict], Tensor]
    ) -> Tensor:
        """Run `body(predict)` inside ComfyUI's sampling path, so that hooks, wrappers and offload act."""
        model = self.model.clone()
        estimate_memory_for(model, "tudsr_stage", part)
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": condition})
        guider.set_cfg(1.0)
        sampler = _OneStepSampler(body)
        sigma = float(model.get_model_object("model_sampling").sigma(torch.tensor([t])))
        empty = torch.zeros(z.shape)
        guider.sample(empty, empty, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True)
        return sampler.result

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` is the device's out-of-memory; frees the cache if so."""
        if isinstance(error, comfy.model_management.OOM_EXCEPTION):
            comfy.model_management.soft_empty_cache()
            return True
        return False


class _OneStepSampler(comfy.samplers.Sampler):
    """A ComfyUI sampler whose only step is the core's: it hands `predict` to `body`."""

    def __init__(self, body: Callable[[Predict], Tensor]) -> None:
        self.body = body
        self.result: Tensor | None = None

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        sigma = sigmas[0]
        whole, hints = guider.conds, {}
        scale = (1 + sigma**2) ** 0.5

        def eps(parts: Tensor) -> Tensor:
            x = parts.to(noise.device, torch.float32) * scale
            denoised = guider(x, sigma.expand(len(x)), **extra_args)
            return ((x - denoised) / sigma).cpu()

        def predict(parts: Tensor, tiles: Sequence[Tile]) -> Tensor:
            if not is_spatial(whole):
                return eps(parts)
            results = []
            for tile, one in zip(tiles, parts.chunk(len(tiles)), strict=True):
                guider.conds = {name: crop_conds(entries, tile, noise.shape, hints) for name, entries in whole.items()}
                results.append(eps(one))
            guider.conds = whole
            return torch.cat(results)

        self.result = self.body(predict)
        return noise


def estimate_memory_for(model: Any, key: str, part: tuple[int, ...]) -> None:
    """Make ComfyUI reserve memory for one call of shape `part` instead of the whole picture."""

    def prepare(executor, patcher, noise_shape, conds, *args, **kwargs):
        return executor(patcher, list(part), conds, *args, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, key, prepare)


class Progress:
    """The core's `tick` on ComfyUI's progress bar, with latent previews; raises when cancelled."""

    def __init__(self, model: Any) -> None:
        self.bar: comfy.utils.ProgressBar | None = None
        self.previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)
        self.shown = 0.0

    def __call__(self, done: int, total: int, preview: Preview | None) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar = self.bar or comfy.utils.ProgressBar(total)
        picture = None
        if self.previewer and preview and time.monotonic() - self.shown > PREVIEW_SECONDS:
            picture = self.previewer.decode_latent_to_preview_image("JPEG", preview())
            self.shown = time.monotonic()
        self.bar.update_absolute(done, total, picture)
