"""The embedded model as real ComfyUI objects: a MODEL and a VAE that ComfyUI loads and offloads.

Wraps the core's networks in ComfyUI's BaseModel and VAE. No maths and no files of its own.
"""

from __future__ import annotations

from functools import partial

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from torch import Tensor, nn

from ...tudsr_core.models import AutoencoderDC, UNet, load_networks
from ...tudsr_core.weights import ModelFile

UNET_PREFIX = "diffusion_model.unet."


class ComfyUNet(nn.Module):
    """The core's UNet behind the signature of ComfyUI's own."""

    def __init__(self, unet: UNet, device=None, operations=None) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = torch.float32

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **_) -> Tensor:
        return self.unet(x, timesteps, encoder_hidden_states=context).sample


class ComfyVAE(nn.Module):
    """The core's autoencoder behind the two methods ComfyUI calls."""

    def __init__(self, network: AutoencoderDC) -> None:
        super().__init__()
        self.network = network

    def encode(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latent

    def decode(self, z: Tensor, **_) -> Tensor:
        return self.network.decode(z).sample


def build(file: ModelFile) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.VAE]:
    """Return MODEL and VAE of `file`, in float32 (together 11 MB)."""
    vae, unet = load_networks(file.vae_config, file.vae, file.unet_config, file.unet, file.name)
    return _build_model(unet, vae), _build_vae(vae)


def _build_model(unet: UNet, vae: AutoencoderDC) -> comfy.model_patcher.ModelPatcher:
    factors, bias = _preview_colors(vae)

    class Latent(comfy.latent_formats.LatentFormat):
        latent_channels = vae.config.latent_channels
        scale_factor = vae.config.scaling_factor
        spacial_downscale_ratio = vae.latent_scale
        latent_rgb_factors, latent_rgb_factors_bias = factors, bias

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = Latent
        memory_usage_factor = 0.3  # about 10 kB per latent measured; no attention

        def inpaint_model(self) -> bool:
            return False

    make = partial(ComfyUNet, unet)
    base = comfy.model_base.BaseModel(Config({}), comfy.model_base.ModelType.EPS, unet_model=make)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        base, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


@torch.inference_mode()
def _preview_colors(vae: AutoencoderDC) -> tuple[list[list[float]], list[float]]:
    """Return how each latent channel colours the picture: ComfyUI's linear previews, from the decoder itself."""
    step, channels = 0.25, vae.config.latent_channels
    probes = torch.cat([torch.zeros(1, channels), step * torch.eye(channels)])
    colors = vae.decode(probes[:, :, None, None].expand(-1, -1, 8, 8)).sample.mean((2, 3))
    return ((colors[1:] - colors[0]) / step).tolist(), colors[0].tolist()


def _build_vae(network: AutoencoderDC) -> comfy.sd.VAE:
    # ComfyUI's constructor knows no foreign autoencoder; it builds its smallest one, whose network
    # is then replaced, so that every other attribute is what this version of ComfyUI expects.
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict(), dtype=torch.float32)
    vae.first_stage_model = ComfyVAE(network)
    scale = network.latent_scale
    vae.downscale_ratio = vae.upscale_ratio = scale
    vae.latent_channels = network.config.latent_channels
    vae.process_input = lambda image: image * 2 - 1
    # In place: newer ComfyUI (0.33) looks at the picture it gave, older at what comes back.
    vae.process_output = lambda image: image.div_(2).add_(0.5).clamp_(0, 1)
    bytes_per_pixel = 4 * 96  # the widest feature map, at half resolution, four of them alive
    vae.memory_used_encode = lambda shape, dtype: shape[2] * shape[3] * bytes_per_pixel
    vae.memory_used_decode = lambda shape, dtype: shape[2] * shape[3] * scale**2 * bytes_per_pixel
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae
