"""The embedded model as real ComfyUI objects: a MODEL and a VAE that ComfyUI loads and offloads.

Wraps diffusers networks in ComfyUI's BaseModel and VAE. No maths and no files of its own.
"""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models_base
import comfy.taesd.taesd
import torch
from torch import Tensor, nn

from ..tudsr_core.checkpoints import ModelFile

UNET_PREFIX = "diffusion_model.unet."


class DiffusersUNet(nn.Module):
    """A diffusers UNet behind the signature of ComfyUI's own."""

    def __init__(self, config: dict, device=None, operations=None) -> None:
        super().__init__()
        from diffusers import UNet2DConditionModel

        self.unet = UNet2DConditionModel.from_config(config).eval().requires_grad_(False)
        self.dtype = torch.float32

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **_) -> Tensor:
        return self.unet(x, timesteps, encoder_hidden_states=context).sample


class DiffusersVAE(nn.Module):
    """A diffusers autoencoder without a posterior behind the two methods ComfyUI calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)

    def encode(self, x: Tensor) -> Tensor:
        return self.network.encode(x).latent

    def decode(self, z: Tensor, **_) -> Tensor:
        return self.network.decode(z).sample


def build_model(file: ModelFile) -> comfy.model_patcher.ModelPatcher:
    """Return a ModelPatcher around the UNet of `file`, in float32 (it is 9 MB)."""

    class Latent(comfy.latent_formats.LatentFormat):
        latent_channels = file.unet_config["in_channels"]
        scale_factor = file.vae_config["scaling_factor"]

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = Latent
        memory_usage_factor = 1.0

        def inpaint_model(self) -> bool:
            return False

    config = Config({"config": file.unet_config})
    base = comfy.model_base.BaseModel(config, comfy.model_base.ModelType.EPS, unet_model=DiffusersUNet)
    base.diffusion_model.unet.load_state_dict(file.unet)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(
        base, load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )


def build_vae(file: ModelFile) -> comfy.sd.VAE:
    """Return a ComfyUI VAE around the autoencoder of `file`.

    ComfyUI's constructor knows no foreign autoencoder; it builds its smallest one, whose network
    is then replaced, so that every other attribute is what this version of ComfyUI expects.
    """
    from diffusers import AutoencoderDC

    network = AutoencoderDC.from_config(file.vae_config)
    network.load_state_dict(file.vae)
    vae = comfy.sd.VAE(sd=comfy.taesd.taesd.TAESD().state_dict(), dtype=torch.float32)
    vae.first_stage_model = DiffusersVAE(network).to(torch.float32)
    scale = network.spatial_compression_ratio
    vae.downscale_ratio = vae.upscale_ratio = scale
    vae.latent_channels = file.vae_config["latent_channels"]
    vae.process_input = lambda image: image * 2 - 1
    vae.process_output = lambda image: (image / 2 + 0.5).clamp(0, 1)
    bytes_per_pixel = 4 * 96  # the widest feature map, at half resolution, four of them alive
    vae.memory_used_encode = lambda shape, dtype: shape[2] * shape[3] * bytes_per_pixel
    vae.memory_used_decode = lambda shape, dtype: shape[2] * shape[3] * scale**2 * bytes_per_pixel
    vae.patcher = comfy.model_patcher.ModelPatcher(
        vae.first_stage_model,
        load_device=vae.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return vae
