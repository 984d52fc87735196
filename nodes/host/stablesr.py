"""StableSR's networks in ComfyUI: loaded and offloaded with the MODEL, steering it for as long as one call takes.

Nothing of a MODEL's own modules is replaced or left hooked. The latent of the low-resolution picture travels in the
CONDITIONING as one more condition that lies over the latent, so that whatever cuts conditions to tiles cuts it too.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import comfy.conds
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.patcher_extension
import torch
from comfy_api.latest import io
from torch import Tensor, nn

from ...tudsr_core.models import PLACES, load_stablesr
from ...tudsr_core.weights import CheckpointError

StableSRType = io.Custom("STABLESR")
KEY = "tudsr_stablesr"
CONDITION = "tudsr_low_resolution"
PARAMETERS = 105_500_000


class ManagedStableSR:
    """The networks of one file, as a model that ComfyUI counts, loads and offloads."""

    def __init__(self, path: Path) -> None:
        device = comfy.model_management.get_torch_device()
        self.name, network = path.name, load_stablesr(path)
        stored = comfy.model_management.unet_dtype(device, PARAMETERS)
        computed = comfy.model_management.unet_manual_cast(stored, device) or stored
        self.patcher = comfy.model_patcher.ModelPatcher(
            network.to(computed), device, comfy.model_management.unet_offload_device()
        )

    def apply(self, model: Any) -> Any:
        """Return a clone of MODEL that is steered; raises CheckpointError for one it was not trained with."""
        self._check(model)
        clone, steering = model.clone(), Steering(self)
        wrappers = comfy.patcher_extension.WrappersMP
        for kind, wrapper in ((wrappers.DIFFUSION_MODEL, steering), (wrappers.OUTER_SAMPLE, steering.run)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        clone.set_additional_models(KEY, [self.patcher])
        return clone

    def _check(self, model: Any) -> None:
        network = self.patcher.model
        if model.model.model_config.unet_config.get("context_dim") == 768:
            raise CheckpointError(
                f"{self.name} was trained with Stable Diffusion 2.1, but this MODEL is 1.x; load SD2.1-base"
            )
        v = isinstance(model.get_model_object("model_sampling"), comfy.model_sampling.V_PREDICTION)
        prediction = "v_prediction" if v else "epsilon"
        if reason := network.misfit(blocks_of(model.model.diffusion_model), prediction):
            raise CheckpointError(f"{self.name} does not fit this MODEL: {reason}; load SD2.1-base (SD2.1 for 768v)")


class Steering:
    """The wrappers of one steered MODEL."""

    def __init__(self, managed: ManagedStableSR) -> None:
        self.network = managed.patcher.model

    def run(self, executor, noise: Tensor, latent_image: Tensor, sampler, sigmas: Tensor, *args, **kwargs) -> Tensor:
        """OUTER_SAMPLE: start from sqrt(abar) z + sqrt(1 - abar) n exactly, and keep nothing after the run.

        From the largest sigma ComfyUI adds sqrt(1 + sigma^2) n to the latent, as if that were not there; StableSR
        was trained with sigma n.
        """
        largest = float(executor.class_obj.model_patcher.get_model_object("model_sampling").sigma_max)
        first = float(sigmas[0])
        if first > largest or math.isclose(first, largest, rel_tol=1e-5):
            noise = noise * (first / (1 + first**2) ** 0.5)
        try:
            return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
        finally:
            self.network.forget()

    def __call__(self, executor, x: Tensor, timesteps: Tensor, *args, **kwargs) -> Tensor:
        """DIFFUSION_MODEL: steer this call by the low-resolution latents that came with its rows."""
        low = kwargs.pop(CONDITION, None)
        if low is None:
            raise ValueError(
                "this MODEL comes from Apply StableSR, but one of the sampler's CONDITIONINGs does not; connect both "
                "its positive and its negative output"
            )
        if low.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"StableSR's picture is {low.shape[-1]} x {low.shape[-2]} latents, but the sampler works on "
                f"{x.shape[-1]} x {x.shape[-2]}; connect Apply StableSR's latent to the sampler, and for tiles use "
                "MultiDiffusion (Tiled)"
            )
        with self.network.steering(blocks_of(executor.class_obj), low, timesteps):
            return executor(x, timesteps, *args, **kwargs)


def blocks_of(unet: nn.Module) -> dict[str, nn.Module]:
    """Return what StableSR steers in ComfyUI's UNet: the last convolution of every residual block, by its place."""
    found = {}
    for place in PLACES:
        try:
            found[place] = unet.get_submodule(place).out_layers[-1]
        except AttributeError:  # a MODEL of another kind
            return {}
    return found


def with_picture(conditioning: list, low: Tensor) -> list:
    """Return CONDITIONING that carries the scaled latents `low` of the low-resolution pictures, `B 4 h w`."""
    condition = comfy.conds.CONDNoiseShape(low)
    return [
        [tensor, options | {"model_conds": options.get("model_conds", {}) | {CONDITION: condition}}]
        for tensor, options in conditioning
    ]


def steered_sigmas(model: Any, timesteps: list[int]) -> Tensor:
    """Return MODEL's own sigmas at falling timesteps, and 0."""
    sampling = model.get_model_object("model_sampling")
    return torch.cat([sampling.sigma(torch.tensor(timesteps)).float().cpu(), torch.zeros(1)])
