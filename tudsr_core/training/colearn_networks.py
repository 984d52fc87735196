"""The networks of co-learning: student, downsampler, teacher and both critics, fresh from the seed or from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..diffusion import from_noise_level
from ..models import Discriminator, Downsampler, DownsamplerConfig, PatchCritic, load_downsampler, load_features
from ..weights import ModelFile, embedded_path, read_model
from .colearn_config import ColearnConfig
from .config import EMBEDDED, ConfigError, ModelConfig
from .networks import Restorer, add_lora, is_model_file, load_base
from .teacher import ChainTeacher, Teacher, build_chain, build_method


@dataclass
class Networks:
    """All that a task needs; None where a term, and with it its network, has no weight.

    `down` is the downsampler, `high` is D_H (good pictures) and `low` is D_L (poor ones).
    """

    down: Downsampler
    student: Restorer | None = None
    teacher: Teacher | None = None
    high: Discriminator | None = None
    low: PatchCritic | None = None

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return what can be trained, by network and name."""
        found = {"student": self.student, "down": self.down, "low": self.low, "high": self.high}
        found["teacher"] = self.teacher.network if isinstance(self.teacher, ChainTeacher) else None
        parameters = {
            name: {key: one for key, one in network.named_parameters() if one.requires_grad}
            for name, network in found.items()
            if network is not None
        }
        return {name: own for name, own in parameters.items() if own}


def base_file(model: ModelConfig) -> ModelFile:
    """Return the tudsr-model file that is the base. Raises CheckpointError."""
    return read_model(embedded_path() if model.base == EMBEDDED else Path(model.base))


def build_networks(config: ColearnConfig, device: torch.device) -> Networks:
    """Return the networks of the task, on `device`. Raises ConfigError and CheckpointError."""
    networks = Networks(build_down(config).to(device))
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        if config.downsampler.learns and config.weights.down_adversarial:
            networks.low = PatchCritic(config.critics.width).to(device)
        if config.task == "colearn" and config.weights.adversarial:
            features = load_features(config.critics.features, config.critics.weights)
            networks.high = Discriminator(features, config.data.size).to(device)
    if config.task == "colearn":
        networks.student = build_student(config).to(device)
        networks.teacher = build_teacher(config, networks.student, device)
    return networks


def build_down(config: ColearnConfig) -> Downsampler:
    """Return the downsampler: that of `start`, or a fresh one, whose encoder is the base's own."""
    own, model = config.downsampler, config.model
    if own.start is not None:
        network = load_downsampler(own.start)
    else:
        file = None
        if own.kind == "latent":
            if not is_model_file(model.base):
                raise ConfigError(
                    f"a latent downsampler needs a tudsr-model file or 'embedded' as base, not {model.base}; "
                    "use kind pixel"
                )
            file = base_file(model)
        sizes = DownsamplerConfig(own.kind, own.width, own.blocks, own.code, own.maps, vae=file and file.vae_config)
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            network = Downsampler(sizes)
        if file is not None:
            part = "encoder."
            weights = {key.removeprefix(part): one.float() for key, one in file.vae.items() if key.startswith(part)}
            network.encoder.load_state_dict(weights)
    network.requires_grad_(own.learns)
    if network.encoder is not None:
        network.encoder.requires_grad_(False)
    return network.eval()


def build_student(config: ColearnConfig) -> Restorer:
    """Return the one-step upsampler: a tudsr-model's whole UNet is trained, that of SD2.1 by an adapter."""
    vae, unet, text = load_base(config.model, config.run.base_precision)
    vae.requires_grad_(False)
    if is_model_file(config.model.base):
        unet = unet.float().requires_grad_(True)
    else:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            unet = add_lora(unet, config.lora)
    network = Restorer(vae, unet, text, from_noise_level(config.model.timestep), config.model.posterior)
    if config.run.gradient_checkpointing:
        network.save_memory()
    return network


def build_teacher(config: ColearnConfig, student: Restorer, device: torch.device) -> Teacher | None:
    """Return the teacher that is asked for, None for none or where none of its terms has a weight."""
    own, weights = config.teacher, config.weights
    if own.kind == "none" or not max(weights.distill, weights.inverse, weights.consistency):
        return None
    if own.kind != "residual-shift":
        return build_method(own, student, device.type)
    if not is_model_file(config.model.base):
        raise ConfigError(
            "a residual-shift teacher needs a tudsr-model file or 'embedded' as base; use teacher zoom or stablesr"
        )
    teacher = build_chain(own, student, config.seed + 2)
    teacher.network.to(device).requires_grad_(True)
    return teacher
