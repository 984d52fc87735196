"""The networks of a training: base model, adapter and one-step formula as one module, and stage one frozen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..backends import load_embedded, load_sd2
from ..diffusion import OneStep, from_noise_level
from ..models import checkpoint_as_worn
from ..weights import MODEL_FORMAT, Adapter, LoRAMerger, open_safetensors, read_adapter
from .config import EMBEDDED, LoraConfig, ModelConfig, TrainingConfig
from .sections import ConfigError


class Restorer(nn.Module):
    """Encode, one step of the UNet, decode: pictures `B 3 H W` in 0..1 to pictures in 0..1.

    All of it is one module, so that the wrapper of several processes sees every forward pass of what is
    trained. The encoder has no gradient: nothing before the UNet is trained. `text` is `1 tokens width`.
    """

    def __init__(self, vae: nn.Module, unet: nn.Module, text: Tensor, step: OneStep, posterior: str = "mode") -> None:
        super().__init__()
        self.vae, self.unet, self.step, self.posterior = vae, unet, step, posterior
        self.register_buffer("text", text, persistent=False)
        self.scale = vae.config.scaling_factor
        self.checkpointing = False

    @torch.no_grad()
    def encode(self, pictures: Tensor, draws: list[torch.Generator] | None = None) -> Tensor:
        """Return scaled latents; `draws`, one per picture, are needed to draw from the posterior."""
        output = self.vae.encode((pictures * 2 - 1).to(next(self.vae.parameters()).dtype))
        if not hasattr(output, "latent_dist"):
            return output.latent.float() * self.scale
        mean, std = output.latent_dist.mean.float(), output.latent_dist.std.float()
        if self.posterior == "mode":
            return mean * self.scale
        noise = torch.stack([torch.randn(one.shape, generator=rng) for one, rng in zip(mean, draws, strict=True)])
        return (mean + std * noise.to(mean)) * self.scale

    def predict(self, z: Tensor) -> Tensor:
        """Return eps of scaled latents."""
        z = z.to(next(self.unet.parameters()).dtype)
        text = self.text.to(z).expand(len(z), -1, -1)
        return self.unet(z, self.step.t, encoder_hidden_states=text).sample

    def decode(self, z: Tensor) -> Tensor:
        """Return pictures, nominally 0..1, of scaled latents."""
        dtype = next(self.vae.parameters()).dtype
        return self.vae.decode((z / self.scale).to(dtype)).sample.float() / 2 + 0.5

    def forward(self, pictures: Tensor, draws: list[torch.Generator] | None = None) -> Tensor:
        """Return the restored pictures, clamped to 0..1 as the published training does."""
        z = self.encode(pictures, draws)
        eps = self._kept_small(self.predict, z)
        return self._kept_small(self.decode, self.step.finish(z, eps)).clamp(0, 1)

    def _kept_small(self, part, x: Tensor) -> Tensor:
        return checkpoint(part, x, use_reentrant=False) if self.checkpointing else part(x)

    def save_memory(self) -> None:
        """Keep no activations of UNet and decoder, but compute them again in the backward pass.

        diffusers' networks do it block by block; the embedded ones, which cannot, as a whole.
        """
        networks = [self.unet.get_base_model() if hasattr(self.unet, "get_base_model") else self.unet, self.vae]
        if not all(hasattr(network, "enable_gradient_checkpointing") for network in networks):
            self.checkpointing = True
            return
        for network in networks:
            network.enable_gradient_checkpointing(checkpoint_as_worn)


def is_model_file(base: str) -> bool:
    """Return whether `base` is the shipped model or another tudsr-model file; raises CheckpointError."""
    path = Path(base)
    if base == EMBEDDED or path.suffix != ".safetensors":
        return base == EMBEDDED
    return (open_safetensors(path).metadata() or {}).get("format") == MODEL_FORMAT


def load_base(config: ModelConfig, precision: str = "fp32") -> tuple[nn.Module, nn.Module, Tensor]:
    """Return `(vae, unet, text)` on the CPU, frozen. Raises CheckpointError, and ConfigError for v prediction."""
    if is_model_file(config.base):
        path = None if config.base == EMBEDDED else Path(config.base)
        networks = load_embedded("cpu", precision, path).first.networks
    else:
        networks = load_sd2(Path(config.base), "cpu", precision, config.tokenizer)
        if networks.backbone.prediction != "epsilon":
            raise ConfigError(f"{config.base} predicts v, but one-step adapters need an epsilon model: SD2.1-base")
    # Cloned, since tensors made in inference mode cannot enter a graph.
    text = networks.condition(config.prompt).float().clone()
    return networks.backbone.vae, networks.backbone.unet, text


def add_lora(unet: nn.Module, config: LoraConfig) -> nn.Module:
    """Return `unet` with a fresh adapter of peft, alone trainable and in float32; raises ConfigError if none fits."""
    import peft

    wanted = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        init_lora_weights="gaussian",
        bias="none",
    )
    try:
        adapted = peft.get_peft_model(unet, wanted)
    except ValueError as error:
        raise ConfigError(f"no module of this UNet ends with one of the targets {', '.join(config.targets)}") from error
    return adapted


def build_trained(config: TrainingConfig) -> Restorer:
    """Return the restorer whose adapter is to be trained, fresh from the seed."""
    vae, unet, text = load_base(config.model, config.run.base_precision)
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        unet = add_lora(unet, config.lora)
    network = Restorer(vae, unet, text, from_noise_level(config.model.timestep), config.model.posterior)
    if config.run.gradient_checkpointing:
        network.save_memory()
    return network


def build_stage_one(config: TrainingConfig, trained: Restorer) -> Restorer:
    """Return stage one, frozen and with its adapter merged: a UNet of its own, so that nothing is switched.

    Of a tudsr-model file, whose backbone is stage one, the weights as they are. Raises ConfigError.
    """
    model = config.model
    if is_model_file(model.base):
        if model.stage_one:
            raise ConfigError(f"the backbone of {model.base} is its stage one; leave stage_one empty")
        first = load_embedded("cpu", config.run.base_precision, None if model.base == EMBEDDED else Path(model.base))
        return Restorer(trained.vae, first.first.networks.backbone.unet, trained.text, first.first.steps[0])
    if model.stage_one is None:
        raise ConfigError("stage two needs stage_one: the adapter that was trained first")
    adapter = read_adapter(model.stage_one, stage=1)
    _check_simple(adapter, model.stage_one)
    vae, unet, text = load_base(model, config.run.base_precision)
    for network, name, delta in ((unet, "UNet", adapter.unet), (vae, "VAE", adapter.vae)):
        merger = LoRAMerger(network, name)
        merger.keep = False
        merger.check(delta, adapter.name)
        merger.use(delta)
    own_vae = vae if adapter.vae else trained.vae
    return Restorer(own_vae, unet, text, adapter.steps_for(1)[0]).requires_grad_(False).eval()


def _check_simple(adapter: Adapter, path: Path) -> None:
    steps = adapter.steps_for(1)
    if adapter.predictor or adapter.detail or len(steps) != 1 or steps[0].b:
        raise ConfigError(f"{path} is an adapter of {adapter.about.title}; stage one must be one step of one adapter")


def trained_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trained, by name."""
    return {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """Let gradients pass through `network` in the block without leaving any on it."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
