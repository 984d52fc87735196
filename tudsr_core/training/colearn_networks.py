"""The networks of co-learning: student, downsampler, teacher and both critics, fresh from the seed or from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import from_noise_level
from ..models import (
    Discriminator,
    Downsampler,
    DownsamplerConfig,
    LearnedDamage,
    PatchCritic,
    SharedConfig,
    SharedDownsampler,
    SharedNetworks,
    load_downsampler,
    load_features,
)
from ..weights import ModelFile, embedded_path, read_model
from .colearn_config import ColearnConfig, CriticsConfig
from .config import EMBEDDED, ModelConfig
from .networks import Restorer, add_lora, is_model_file, load_base
from .sections import ConfigError
from .state import newest_part
from .teacher import ChainTeacher, Teacher, build_chain, build_method


@dataclass
class Networks:
    """All that a task needs; None where a term, and with it its network, has no weight.

    `down` is the downsampler, `high` is D_H (good pictures) and `low` is D_L (poor ones).
    """

    down: LearnedDamage
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
    student = build_student(config).to(device) if config.task == "colearn" else None
    networks = Networks(build_down(config, student, device).to(device), student)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed + 1)
        if config.downsampler.learns and config.weights.down_adversarial:
            networks.low = _low_critic(config.critics).to(device)
        if config.task == "colearn" and config.weights.adversarial:
            features = load_features(config.critics.features, config.critics.weights)
            networks.high = Discriminator(features, config.data.size).to(device)
    if config.task == "colearn":
        networks.teacher = build_teacher(config, student, device)
    return networks


def _low_critic(config: CriticsConfig) -> PatchCritic:
    critic = PatchCritic(config.width)
    if config.low is not None:
        heads = newest_part(config.low, "low")
        try:
            critic.heads.load_state_dict(heads)
        except RuntimeError:
            raise ConfigError(f"{config.low} has a D_L of another size; set [critics] width as it was there") from None
    return critic


def build_down(config: ColearnConfig, student: Restorer | None, device: torch.device) -> LearnedDamage:
    """Return the downsampler: that of `start`, or a fresh one.

    The encoder of a latent one is the base's own; a shared one is an adapter of the networks of the `student`,
    or of the base where there is none. Raises ConfigError and CheckpointError.
    """
    own = config.downsampler
    backbone = _backbone(config, student, device) if own.kind == "shared" else None
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        if own.start is not None:
            network = load_downsampler(own.start, backbone)
        elif backbone is not None:
            sizes = SharedConfig(rank=own.rank, code=own.code, timestep=config.model.timestep)
            network = SharedDownsampler(sizes, backbone)
        else:
            network = _alone(config)
    network.requires_grad_(own.learns)
    if getattr(network, "encoder", None) is not None:
        network.encoder.requires_grad_(False)
    return network.eval()


def _alone(config: ColearnConfig) -> Downsampler:
    own, model, file = config.downsampler, config.model, None
    if own.kind == "latent":
        if not is_model_file(model.base):
            raise ConfigError(
                f"a latent downsampler needs a tudsr-model file or 'embedded' as base, not {model.base}; "
                "use kind shared or pixel"
            )
        file = base_file(model)
    network = Downsampler(
        DownsamplerConfig(
            own.kind, own.width, own.blocks, own.code, own.maps, keeps=own.keeps, vae=file and file.vae_config
        )
    )
    if file is not None:
        part = "encoder."
        weights = {key.removeprefix(part): one.float() for key, one in file.vae.items() if key.startswith(part)}
        network.encoder.load_state_dict(weights)
    return network


def _backbone(config: ColearnConfig, student: Restorer | None, device: torch.device) -> SharedNetworks:
    if is_model_file(config.model.base):
        raise ConfigError("a shared downsampler is an adapter of SD2.1-base; with a tudsr-model file use kind latent")
    if student is None:
        student = _restorer(config, *load_base(config.model, config.run.base_precision)).requires_grad_(False)
    student.to(device)
    return SharedNetworks(student.unet, student.vae, student.text)


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
    return _restorer(config, vae, unet, text)


def _restorer(config: ColearnConfig, vae: nn.Module, unet: nn.Module, text: Tensor) -> Restorer:
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
    teacher = build_chain(own, student)
    teacher.network.to(device).requires_grad_(True)
    return teacher
