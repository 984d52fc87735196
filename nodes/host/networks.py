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

from ...tudsr_core.methods import Encoded, Predict, Preview
from ...tudsr_core.tiling import NetworkFacts, Tile
from .conditions import crop_conds, is_spatial
from .exact_vae import ExactVAE, is_out_of_memory
from .settings import PREVIEWS, setting
from .tile_texts import TileTexts

PREVIEW_SECONDS = 0.5
MULTIPLE = 8
# Pixels along one side of a latent, of ComfyUI's formats whose own are not 8; they do not say it themselves.
LATENT_PX = {"ChromaRadiance": 1, "SC_B": 4, "SD_X4": 4, "Flux2": 16, "HunyuanImage21Refiner": 16}
LATENT_PX |= {"HunyuanVideo15": 16, "Wan22": 16, "HunyuanImage21": 32, "LTXAV": 32, "LTXV": 32}


class ComfyNetworks:
    """One stage over MODEL, VAE and CONDITIONING, or the texts of the tiles in its place."""

    def __init__(self, model: Any, vae: Any, conditioning: list, texts: TileTexts | None = None) -> None:
        self.model, self.vae, self.conditioning, self.texts = model, vae, conditioning, texts
        self.latent_scale = vae.spacial_compression_encode()
        self.exact_vae = ExactVAE(vae)

    @property
    def device(self) -> torch.device:
        """Where ComfyUI lets the MODEL compute."""
        return self.model.load_device

    @property
    def facts(self) -> NetworkFacts:
        """Geometry, and ComfyUI's own estimate of memory."""
        channels = self.model.model.latent_format.latent_channels
        side = 64
        activations = self.model.model.memory_required([1, channels, side, side]) / (side * self.latent_scale) ** 2
        tile, picture, planes = self.exact_vae.bytes_per_pixel()
        return NetworkFacts(
            latent_scale=self.latent_scale,
            multiple=max(MULTIPLE, self.latent_scale),
            weight_bytes=self.model.model_size() + self.vae.patcher.model_size(),
            tile_bytes_per_pixel=int(max(activations, tile)),
            picture_bytes_per_pixel=picture,
            plane_bytes_per_pixel=planes,
            free_bytes=self._free_bytes(),
        )

    def _free_bytes(self) -> int:
        """Free memory of the device once the MODEL is there; 0 on a CPU."""
        device = self.model.load_device
        if comfy.model_management.is_device_cpu(device):
            return 0
        waiting = self.model.model_size() - self.model.loaded_size()
        return max(0, int(comfy.model_management.get_free_memory(device)) - waiting)

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Ticks of one encode plus one decode."""
        return sum(self.exact_vae.tiled.count(side, size) for side in ("encoder", "decoder"))

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Encoded:
        """Return scaled latents of `B 3 H W` in 0..1; the posterior's mode, or a draw with `seed`."""
        return Encoded(self.model.model.process_latent_in(self.exact_vae.encode(pixels, on_tile, seed=seed)))

    def decode(self, encoded: Encoded, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W`."""
        return self.exact_vae.decode(self.model.model.process_latent_out(encoded.z), on_tile)

    def condition(self, text: str) -> list:
        """Return the CONDITIONING connected to the node; texts are encoded by the user's CLIP."""
        return self.conditioning

    def denoise(
        self, z: Tensor, t: int, condition: list, part: tuple[int, ...], body: Callable[[Predict], Tensor]
    ) -> Tensor:
        """Run `body(predict)` inside ComfyUI's sampling path, so that hooks, wrappers and offload act."""
        model = self.model.clone()
        estimate_memory_for(model, "tudsr_stage", part[0] // len(z), part[-2:])
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": condition})
        guider.set_cfg(1.0)
        if self.texts:
            guider.original_conds = self.texts.expand(guider.original_conds)
        sampler = _OneStepSampler(body, self.texts)
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "tudsr_stage", sampler.count)
        sigma = float(model.get_model_object("model_sampling").sigma(torch.tensor([t])))
        empty = torch.zeros(z.shape)
        guider.sample(empty, empty, sampler, torch.tensor([sigma, 0.0]), disable_pbar=True)
        return sampler.result

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` is the device's out-of-memory; frees the cache if so."""
        return is_out_of_memory(error)


class _OneStepSampler(comfy.samplers.Sampler):
    """A ComfyUI sampler whose only step is the core's: it hands `predict` to `body`."""

    def __init__(self, body: Callable[[Predict], Tensor], texts: TileTexts | None = None) -> None:
        self.body, self.texts = body, texts
        self.result: Tensor | None = None
        self.calls = 0

    def count(self, executor, *args, **kwargs):
        """APPLY_MODEL wrapper: ComfyUI leaves a network out in silence when no condition is in effect."""
        self.calls += 1
        return executor(*args, **kwargs)

    def sample(
        self, guider, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ):
        sigma = sigmas[0]
        whole, hints = guider.conds, {}
        spatial = is_spatial(whole, noise.shape)
        scale = (1 + sigma**2) ** 0.5

        def eps(parts: Tensor) -> Tensor:
            x, before = parts.to(noise.device, torch.float32) * scale, self.calls
            denoised = guider(x, sigma.expand(len(x)), **extra_args)
            if self.calls == before:
                raise ValueError(
                    "no part of this CONDITIONING is in effect for one of the tiles (its area or its timestep range "
                    "leaves it out); connect one without an area or a range"
                )
            return ((x - denoised) / sigma).cpu()

        def conds_for(tile: Tile) -> dict[str, list]:
            own = whole
            if self.texts:
                planned = self.texts.planned(tile, noise.shape[-2:])
                own = {name: self.texts.pick(entries, planned) for name, entries in whole.items()}
            if not spatial:
                return own
            return {name: crop_conds(entries, tile, noise, hints) for name, entries in own.items()}

        def predict(parts: Tensor, tiles: Sequence[Tile]) -> Tensor:
            if batches_tiles(noise) and not (self.texts or spatial):
                return eps(parts)
            results = []
            for tile, one in zip(tiles, parts.chunk(len(tiles)), strict=True):
                guider.conds = conds_for(tile)
                results.append(eps(one))
            guider.conds = whole
            return torch.cat(results)

        self.result = self.body(predict)
        return noise


def pixels_per_latent(model: Any | None) -> int:
    """Return how many pixels one latent of a MODEL is wide; of none: 8, as Stable Diffusion's."""
    if model is None:
        return 8
    latents = model.model.latent_format
    return getattr(latents, "spacial_downscale_ratio", LATENT_PX.get(type(latents).__name__, 8))


def estimate_memory_for(model: Any, key: str, tiles: int, size: Sequence[int]) -> None:
    """Make ComfyUI reserve memory for `tiles` of `size` (height, width) at once instead of the whole latent."""

    def prepare(executor, patcher, noise_shape, conds, *args, **kwargs):
        sides = map(min, noise_shape[-2:], size)
        return executor(patcher, [noise_shape[0] * tiles, *noise_shape[1:-2], *sides], conds, *args, **kwargs)

    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING, key, prepare)


def batches_tiles(x: Tensor) -> bool:
    """Return whether tiles of `x` are computed together: a CPU gains nothing by it, and its sums would change."""
    return x.device.type != "cpu"


class ProgressBar:
    """The core's `tick` on ComfyUI's progress bar, with latent previews; raises when cancelled."""

    def __init__(self, model: Any) -> None:
        self.bar: comfy.utils.ProgressBar | None = None
        self.previewer = None
        if setting(PREVIEWS, True):
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
