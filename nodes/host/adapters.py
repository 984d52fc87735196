"""The core's patches as ComfyUI weight patches, on MODEL and VAE, and InvSR's predictor as a managed model."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import comfy.diffusers_convert
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import comfy.weight_adapter
import torch
from torch import Tensor

from ...tudsr_core.models import build_predictor
from ...tudsr_core.untrusted import some
from ...tudsr_core.weights import Adapter, CheckpointError, WeightDelta

ADVICE = "it was made for another base model, use SD2.1-base (SD-Turbo for InvSR)"
# Growth of memory per pixel of the predictor's input, measured at 128 x 128 in float32.
PREDICTOR_BYTES = 24_000
# Every convolution and linear that diffusers' KL encoders can have: what an adapter may say it changes.
BLOCKS = range(8)
ENCODER_MODULES = [
    "encoder.conv_in",
    "encoder.conv_out",
    *(f"encoder.mid_block.attentions.0.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"encoder.mid_block.resnets.{i}.{name}" for i in (0, 1) for name in ("conv1", "conv2")),
    *(f"encoder.down_blocks.{i}.downsamplers.0.conv" for i in BLOCKS),
    *(
        f"encoder.down_blocks.{i}.resnets.{j}.{name}"
        for i in BLOCKS
        for j in BLOCKS
        for name in ("conv1", "conv2", "conv_shortcut")
    ),
]


def apply(
    patcher: Any, patch: WeightDelta, keys: dict[str, str], name: str, network: str, strength: float = 1.0
) -> Any:
    """Return a clone of `patcher` that carries `patch`; `keys` maps diffusers parameter paths to weight keys.

    Raises CheckpointError that lists what has no place or another shape: a half-applied adapter is
    worse than none.
    """
    wanted = [*patch.weights, *(f"{path}.weight" for path in patch.updates)]
    unmatched = [path for path in wanted if path not in keys]
    if unmatched:
        raise CheckpointError(
            f"adapter {name!r} does not fit this {network}: {len(unmatched)} of {len(wanted)} changes have no place "
            f"({some(unmatched)}); {ADVICE}"
        )
    weights = {path: comfy.utils.get_attr(patcher.model, keys[path]) for path in wanted}
    if wrong := patch.misfits(weights):
        raise CheckpointError(f"adapter {name!r} has other shapes than this {network} at {some(wrong)}; {ADVICE}")
    parameters = dict(patcher.model.named_parameters())
    modules = (p.removesuffix(".weight") for p, key in keys.items() if key in parameters and parameters[key].ndim > 1)
    if missing := patch.missing(modules):
        raise CheckpointError(
            f"adapter {name!r} lacks {len(missing)} of the {network}'s modules that it says it changes: "
            f"{some(missing)}; it is damaged, get it again"
        )
    clone = patcher.clone()
    for part in (_weight_patches(patcher, patch, keys), lora_patches(patch, keys)):
        clone.add_patches(part, strength)
    return clone


def lora_patches(patch: WeightDelta, keys: dict[str, str]) -> dict[str, Any]:
    """Return the low-rank updates by weight key."""
    return {
        keys[f"{path}.weight"]: comfy.weight_adapter.LoRAAdapter(
            set(), (update.up.float(), update.down.float(), float(update.alpha), None, None, None)
        )
        for path, update in patch.updates.items()
    }


def _weight_patches(patcher: Any, patch: WeightDelta, keys: dict[str, str]) -> dict[str, Any]:
    """Return trained weights as differences to the base's, so that other packs' LoRAs stay in effect."""
    patches = {}
    for path, value in patch.weights.items():
        key = keys[path]
        base = patcher.get_key_patches(key)[key][0][0]
        patches[key] = ("diff", (value.float() - base.detach().cpu().float().view(value.shape),))
    return patches


def apply_to_unet(model: Any, adapter: Adapter, name: str, strength: float) -> Any:
    """Return `model` with all of the adapter's UNet changes, PiSA-SR's detail among them."""
    keys = unet_keys(model)
    model = apply(model, adapter.unet, keys, name, "UNet", strength)
    return apply(model, adapter.detail, keys, name, "UNet", strength)


VAE_KEY = "tudsr_vae"


@dataclass(frozen=True)
class VAEChange:
    """What an adapter changes in the VAE; its MODEL carries it, and a VAE says which one it has."""

    name: str
    strength: float
    patch: WeightDelta = field(compare=False)


def with_change(vae: Any, change: VAEChange | None) -> Any:
    """Return `vae` with `change` instead of the change it has; both may be None.

    So one VAE serves stages whose adapters change it differently: its weights are shared, ComfyUI
    switches the patches. Raises CheckpointError for a change that does not fit.
    """
    present, plain = vae.patcher.get_attachment(VAE_KEY) or (None, vae)
    if change == present:
        return vae
    if change is None:
        return plain
    paths = [*change.patch.weights, *(f"{path}.weight" for path in {*change.patch.updates, *ENCODER_MODULES})]
    result = copy.copy(plain)
    result.patcher = apply(plain.patcher, change.patch, vae_keys(plain, paths), change.name, "VAE", change.strength)
    result.patcher.set_attachments(VAE_KEY, (change, plain))
    return result


def unet_keys(model: Any) -> dict[str, str]:
    """Return `{diffusers parameter path: weight key}` for a ComfyUI UNet."""
    config = model.model.model_config.unet_config
    pairs = comfy.utils.unet_to_diffusers(config) if "model_channels" in config else {}
    return {theirs: f"diffusion_model.{ours}" for theirs, ours in pairs.items()}


def vae_keys(vae: Any, paths: list[str]) -> dict[str, str]:
    """Return `{diffusers parameter path: weight key}` for those of `paths` that `vae` has.

    ComfyUI's own renaming is asked: each name goes in with its number and comes out as a key.
    """
    numbered = {path: torch.tensor([float(i)]) for i, path in enumerate(paths)}
    present = vae.first_stage_model.state_dict()
    renamed = comfy.diffusers_convert.convert_vae_state_dict(numbered)
    return {paths[int(number.flatten()[0])]: key for key, number in renamed.items() if key in present}


class ManagedPredictor:
    """InvSR's noise predictor, loaded and offloaded by ComfyUI."""

    def __init__(self, adapter: Adapter) -> None:
        network = build_predictor(adapter.predictor, adapter.name).to(torch.float32)
        self.patcher = comfy.model_patcher.ModelPatcher(
            network,
            load_device=comfy.model_management.get_torch_device(),
            offload_device=comfy.model_management.unet_offload_device(),
        )

    def __call__(self, pixels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        memory = pixels.shape[0] * pixels.shape[-2] * pixels.shape[-1] * PREDICTOR_BYTES
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        mean, deviation = self.patcher.model(pixels.to(self.patcher.load_device), t)
        return mean.cpu(), deviation.cpu()
