"""Writes adapter files exactly as their authors' code does, on small random networks, with peft's own outputs.

Every B matrix is random: zero-initialised ones would hide every mistake in the mapping.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from plain_stablesr import random_tensors, steer_diffusers
from safetensors.torch import save_file
from sd_layout import to_ldm
from sd_stand_in import UNET
from torch import Tensor, nn

VAE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
    scaling_factor=0.18215,
)
OMGSR_TARGETS = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0"]
# OSEDiff and PiSA-SR collect modules whose parameter names contain one of these.
LISTS = ("encoder", "decoder", "others")
LISTED = ("to_k", "to_q", "to_v", "to_out.0", "conv", "proj_out", "proj_in", "ff.net.2", "ff.net.0.proj")


@dataclass
class Published:
    """A written file, and what its authors' networks give for `inputs()`."""

    path: Path
    eps: dict[str, Tensor] = field(default_factory=dict)
    latent: Tensor | None = None
    unet: nn.Module | None = None
    vae: nn.Module | None = None


def networks() -> tuple[nn.Module, nn.Module]:
    """Return `(unet, vae)`, the same random ones every time."""
    return deepcopy(_drawn())


@cache
def _drawn() -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet, vae = UNet2DConditionModel(**UNET), AutoencoderKL(**VAE)
    return unet.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def inputs() -> dict[str, Tensor]:
    """Return a latent, a text embedding and pixels in -1..1."""
    generator = torch.Generator().manual_seed(7)
    return {
        "z": torch.randn(2, 4, 16, 24, generator=generator),
        "text": torch.randn(2, 77, 32, generator=generator),
        "pixels": torch.rand(1, 3, 32, 48, generator=generator) * 2 - 1,
    }


@torch.no_grad()
def eps_of(unet: nn.Module, t: int) -> Tensor:
    """Return what a diffusers UNet predicts for `inputs`."""
    given = inputs()
    return unet(given["z"], t, encoder_hidden_states=given["text"]).sample


@torch.no_grad()
def latent_of(vae: nn.Module) -> Tensor:
    """Return the mean latent of a diffusers VAE for `inputs`."""
    return vae.encode(inputs()["pixels"]).latent_dist.mean


def randomise(network: nn.Module, seed: int) -> None:
    """Fill all low-rank matrices with noise of a size that changes outputs visibly."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(network.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * (0.05 if "lora_B" in name else 0.2)


def omgsr(folder: Path, seed: int = 1) -> Published:
    """OMGSR and TUDSR: two peft folders, UNet and VAE encoder, alpha = rank."""
    unet, vae = networks()
    adapted = get_peft_model(unet, LoraConfig(r=6, lora_alpha=6, target_modules=OMGSR_TARGETS))
    randomise(adapted, seed)
    adapted.save_pretrained(folder / "unet_lora_adapter")
    encoder = get_peft_model(vae.encoder, LoraConfig(r=3, lora_alpha=3, target_modules=OMGSR_TARGETS))
    randomise(encoder, seed + 1)
    encoder.save_pretrained(folder / "vae_encoder_lora_adapter")
    return Published(folder, {"eps": eps_of(adapted, 273)}, latent_of(vae), adapted, vae)


def split_modules(unet: nn.Module) -> dict[str, list[str]]:
    """Return the three lists of OSEDiff's initialize_unet."""
    lists: dict[str, list[str]] = {which: [] for which in LISTS}
    for name, _ in unet.named_parameters():
        if "bias" in name or "norm" in name or not any(word in name for word in LISTED):
            continue
        which = "encoder" if "down_blocks" in name or "conv_in" in name else "decoder"
        which = which if which == "encoder" or "up_blocks" in name or "conv_out" in name else "others"
        lists[which].append(name.removesuffix(".weight"))
    return lists


def vae_modules(vae: nn.Module) -> list[str]:
    """Return the list of OSEDiff's initialize_vae, with its repetitions."""
    found = []
    for name, _ in vae.named_parameters():
        if "bias" in name or "norm" in name:
            continue
        for word in OMGSR_TARGETS:
            if word in name and "encoder" in name or "quant_conv" in name and "post_quant_conv" not in name:
                found.append(name.removesuffix(".weight"))
    return found


def osediff(path: Path) -> Published:
    """OSEDiff.save_model: a pickle with three UNet adapters at peft's default alpha, conv_in, and the VAE's."""
    unet, vae = networks()
    lists, vae_list = split_modules(unet), vae_modules(vae)
    for which, modules in lists.items():
        unet.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=modules), f"default_{which}")
    vae.add_adapter(LoraConfig(r=4, init_lora_weights="gaussian", target_modules=vae_list), "default_encoder")
    unet.set_adapter([f"default_{which}" for which in lists])
    randomise(unet, 3)
    randomise(vae, 4)
    unet.conv_in.base_layer.weight.data += 0.05 * torch.randn(unet.conv_in.base_layer.weight.shape)
    unet.conv_in.base_layer.bias.data += 0.1
    saved = {f"unet_lora_{which}_modules": modules for which, modules in lists.items()}
    saved |= {"vae_lora_encoder_modules": vae_list, "rank_unet": 4, "rank_vae": 4}
    saved["state_dict_unet"] = {k: v for k, v in unet.state_dict().items() if "lora" in k or "conv_in" in k}
    saved["state_dict_vae"] = {k: v for k, v in vae.state_dict().items() if "lora" in k}
    torch.save(saved, path)
    return Published(path, {"eps": eps_of(unet, 999)}, latent_of(vae), unet, vae)


def pisa(path: Path) -> Published:
    """PiSA-SR's save_model: pixel-level and semantic adapters, each in three lists."""
    unet, vae = networks()
    lists = split_modules(unet)
    saved: dict = {"lora_rank_unet_pix": 4, "lora_rank_unet_sem": 4}
    for kind in ("pix", "sem"):
        for which, modules in lists.items():
            config = LoraConfig(r=4, init_lora_weights="gaussian", target_modules=modules)
            unet.add_adapter(config, f"default_{which}_{kind}")
            saved[f"unet_lora_{which}_modules_{kind}"] = modules
    randomise(unet, 5)
    names = {kind: [f"default_{which}_{kind}" for which in lists] for kind in ("pix", "sem")}
    unet.set_adapter(names["pix"])
    pixel = eps_of(unet, 1)
    unet.set_adapter(names["pix"] + names["sem"])
    saved["state_dict_unet"] = {k: v for k, v in unet.state_dict().items() if "lora" in k}
    torch.save(saved, path)
    return Published(path, {"pix": pixel, "eps": eps_of(unet, 1)}, None, unet, vae)


HYPIR_TARGETS = ["to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out"]
HYPIR_TARGETS += ["proj_in", "proj_out", "ff.net.2", "ff.net.0.proj"]


def hypir(path: Path) -> Published:
    """HYPIR: a flat pickle of the UNet's own low-rank keys, alpha = rank, nothing else."""
    unet, vae = networks()
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=HYPIR_TARGETS))
    randomise(unet, 9)
    torch.save({key: value for key, value in unet.state_dict().items() if "lora" in key}, path)
    return Published(path, {"eps": eps_of(unet, 200)}, None, unet, vae)


def plain_lora(path: Path, style: str) -> Published:
    """A LoRA of SD2.x with alpha 2 at rank 4, as `diffusers`, `old diffusers` or `kohya` would save it."""
    unet, _ = networks()
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj"]
    adapted = get_peft_model(unet, LoraConfig(r=4, lora_alpha=2, target_modules=targets))
    randomise(adapted, 6)
    tensors, metadata = {}, {}
    for key, value in get_peft_model_state_dict(adapted).items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        old = {"lora_A": "down", "lora_B": "up"}[half]
        if style == "kohya":
            name = "lora_unet_" + module.replace(".", "_")
            tensors |= {f"{name}.lora_{old}.weight": value, f"{name}.alpha": torch.tensor(2.0)}
        elif style == "old diffusers":
            tensors |= {f"unet.{module}.lora.{old}.weight": value, f"unet.{module}.alpha": torch.tensor(2.0)}
        else:
            tensors[f"unet.{module}.{half}.weight"] = value
            metadata = {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2}'}
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return Published(path, {"eps": eps_of(adapted, 200)})


def peft_file(path: Path) -> Published:
    """One peft file without its configuration: alpha is the rank, as OMGSR has it."""
    made = omgsr(path.parent / "whole")
    (path.parent / "whole" / "unet_lora_adapter" / "adapter_model.safetensors").rename(path)
    return Published(path, made.eps)


def invsr(path: Path) -> Published:
    """A noise predictor in the layout of InvSR's training checkpoints."""
    from tudsr_core.models.invsr import NoisePredictor

    torch.manual_seed(8)
    network = NoisePredictor((64, 128), 2, 96)
    torch.save({"state_dict": {f"module._orig_mod.{k}": v for k, v in network.state_dict().items()}}, path)
    return Published(path)


def write_all(folder: Path) -> dict[str, Published]:
    """Write every format into `folder`."""
    return {
        "omgsr": omgsr(folder / "omgsr"),
        "hypir": hypir(folder / "hypir_sd2.pth"),
        "osediff": osediff(folder / "osediff.pkl"),
        "pisa": pisa(folder / "pisa_sr.pkl"),
        "diffusers": plain_lora(folder / "diffusers.safetensors", "diffusers"),
        "old diffusers": plain_lora(folder / "old.safetensors", "old diffusers"),
        "kohya": plain_lora(folder / "kohya.safetensors", "kohya"),
        "peft file": peft_file(folder / "alone.safetensors"),
        "invsr": invsr(folder / "noise_predictor.pth"),
    }


@torch.no_grad()
def invsr_picture(unet: nn.Module, path: Path, timesteps: tuple[int, ...], image: Tensor, seed: int) -> Tensor:
    """InvSR at x4 written out: sigma-space Euler steps from the predicted noise, with latents that are plain averages.

    `image` is `1 3 h w` in 0..1; the "VAE" averages 8 x 8 pixels and repeats them.
    """
    from diffusers import EulerDiscreteScheduler

    from tudsr_core.models.invsr import build_predictor
    from tudsr_core.pictures.tensors import resize
    from tudsr_core.weights.checkpoints import read_adapter

    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    sigmas = EulerDiscreteScheduler(**betas).sigmas.flip(0)[1:]
    large = resize(image, (4 * image.shape[-2], 4 * image.shape[-1])).clamp(0, 1)
    small = nn.functional.avg_pool2d(large, 8)
    z = torch.cat([small, small[:, :1]], 1) * 0.18215
    mean, deviation = build_predictor(read_adapter(path).predictor, "test")(image, timesteps[0])
    noise = mean + deviation * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
    x = z + sigmas[timesteps[0]] * noise
    for t, after in zip(timesteps, (*timesteps[1:], None), strict=True):
        sigma, next_sigma = sigmas[t], 0.0 if after is None else sigmas[after]
        eps = unet(x / (1 + sigma**2) ** 0.5, t, encoder_hidden_states=inputs()["text"][:1]).sample
        x = x + (next_sigma - sigma) * eps
    pixels = (x / 0.18215)[:, :3].clamp(0, 1)
    return pixels.repeat_interleave(8, -1).repeat_interleave(8, -2)


def waves(height: int, width: int) -> Tensor:
    """Return a smooth picture `1 3 h w`."""
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(x * y / (i + 1)).sin() * 0.4 + 0.5 for i in range(3)])[None]


def two_stages(one: Path, two: Path, image: Tensor) -> Tensor:
    """Return the command line's picture of `image` `1 3 h w` at x4: two adapters on one base."""
    from tudsr_core.backends.local import AdapterOptions, Backbone, adapted_stage
    from tudsr_core.methods.plan import StageLimits, Target
    from tudsr_core.methods.two_stage import TwoStageModel, UpscaleOptions, upscale
    from tudsr_core.weights.checkpoints import read_adapter

    unet, vae = networks()
    backbone = Backbone(vae, unet, lambda *texts: inputs()["text"][:1], torch.device("cpu"), torch.float32)
    stages = [
        adapted_stage(backbone, read_adapter(path, None, i), AdapterOptions()) for i, path in ((1, one), (2, two))
    ]
    return upscale(
        image,
        TwoStageModel(*stages, StageLimits()),
        Target(scale=4),
        UpscaleOptions(color_fix="none", native_size=False),
    )


def trained(folder: Path, image: Tensor) -> tuple[Path, Tensor]:
    """Train stage one for a few steps, export it, and return the single file and the trainer's own picture at x4."""
    import shutil

    from tudsr_core.diffusion.one_step import from_noise_level
    from tudsr_core.pictures.tensors import resize
    from tudsr_core.training.config import DataConfig, LoraConfig, ModelConfig, TrainingConfig
    from tudsr_core.training.export import export
    from tudsr_core.training.networks import Restorer, add_lora

    unet, vae = networks()
    torch.manual_seed(3)
    network = Restorer(vae, add_lora(unet, LoraConfig(4, 4.0)), inputs()["text"][:1], from_noise_level(200))
    large = resize(image, (4 * image.shape[-2], 4 * image.shape[-1])).clamp(0, 1)
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(3):
        (network(large) - large.flip(1)).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    config = TrainingConfig(folder / "run", ModelConfig("sd21"), DataConfig((folder,)))
    _, file = export(network, config, 1, 3)
    moved = shutil.move(file, folder / "trained.safetensors")
    shutil.move(folder / "run" / "adapter", folder / "trained-folder")
    with torch.no_grad():
        return moved, network(large)


def write_for_comfyui(folder: Path) -> Path:
    """Write every format, the base in the original checkpoints' layout, the inputs and the wanted outputs."""
    made, (unet, vae) = write_all(folder), networks()
    save_file({key: value.contiguous() for key, value in to_ldm(unet, vae).items()}, folder / "base.safetensors")
    save_file(inputs(), folder / "inputs.safetensors")
    wanted = {"plain.eps": eps_of(unet, 999)}
    for one in made.values():
        wanted |= {f"{one.path.stem}.{kind}": value for kind, value in one.eps.items()}
        wanted |= {f"{one.path.stem}.latent": one.latent} if one.latent is not None else {}
    for timesteps in ((199,), (199, 99, 49)):
        picture = invsr_picture(unet, made["invsr"].path, timesteps, waves(24, 32), 5)
        wanted[f"invsr.{len(timesteps)}"] = picture
    wanted["trained"] = trained(folder, waves(24, 32))[1]
    second = omgsr(folder / "second", seed=11).path
    wanted["two stages"] = two_stages(made["omgsr"].path, second, waves(24, 32))
    write_stablesr(folder / "stablesr.safetensors", unet, wanted)
    save_file({key: value.contiguous() for key, value in wanted.items()}, folder / "wanted.safetensors")
    return folder


def write_stablesr(path: Path, unet: nn.Module, wanted: dict[str, Tensor]) -> None:
    """Write StableSR's tensors for `unet`, and add its eps under them at three timesteps to `wanted`."""
    tensors, given = random_tensors("stand-in"), inputs()
    save_file(tensors, path)
    for t in (0, 333, 999):
        steer_diffusers(unet, tensors, given["z"].flip(0), t)
        wanted[f"stablesr.{t}"] = unet(given["z"], t, encoder_hidden_states=given["text"]).sample
