"""The paper's downsampler over Stable Diffusion's own networks: the upsampler's frozen UNet with an adapter of its own.

A reconstruction, as `downsampler.py` is. SD's latents have 8 pixels a side and a poor picture at x4 has 4, so the poor
picture is unshuffled by 2 and both have one grid. Only the adapter, the first and the last convolution and the encoder
of styles belong to the downsampler; the backbone is looked at, never copied and never changed: hooks on its layers ask
which downsampler is worn, if any.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..pictures import pad_to_multiple
from .downsampler import PERIODS, StyleEncoder, block_waves
from .learned_damage import GRID, LearnedDamage

SHUFFLE = 2  # poor pixels a latent, a side
MULTIPLE = 16  # of a poor picture's sides: SD's UNet halves its latents three times

_WORN: ContextVar[SharedDownsampler | None] = ContextVar("worn downsampler", default=None)


@dataclass(frozen=True)
class SharedNetworks:
    """Stable Diffusion's networks, frozen: UNet (within peft's wrapper where it has an adapter), VAE, and the
    embedding of the prompt, `1 tokens width`.
    """

    unet: nn.Module
    vae: nn.Module
    text: Tensor

    @property
    def bare(self) -> nn.Module:
        """The UNet itself."""
        return self.unet.get_base_model() if hasattr(self.unet, "get_base_model") else self.unet

    @cached_property
    def adapted(self) -> list[nn.Module]:
        """The layers of the UNet to which peft's adapter is bound."""
        return [layer for layer in self.unet.modules() if hasattr(layer, "base_layer")]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Let the UNet run as if it had no adapter.

        As peft's `disable_adapter`, which looks through all modules every time: with gradient checkpointing that is
        for every block of every backward pass.
        """
        for layer in self.adapted:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self.adapted:
                layer.enable_adapters(True)


@dataclass(frozen=True)
class SharedConfig:
    """What an adapter is built from; raises ValueError for what it cannot be.

    `rank` of the adapter on every layer whose name ends with one of `targets`; `timestep` that the UNet is told;
    `kappa` and `root` as in `DownsamplerConfig`.
    """

    kind: str = "shared"
    rank: int = 16
    targets: tuple[str, ...] = ("conv1", "conv2", "conv", "conv_shortcut", "to_q", "to_k", "to_v", "to_out.0")
    code: int = 16
    timestep: int = 200
    kappa: float = 2.0
    root: float = 0.99

    def __post_init__(self) -> None:
        for name, most in (("rank", 512), ("code", 256), ("timestep", 999)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be from 1 to {most}")
        if self.kind != "shared" or not self.targets:
            raise ValueError("an adapter is of kind shared and has targets")


class SharedDownsampler(LearnedDamage):
    """One step of the backbone from noise and the downscale, beside the good picture's latent, to a poor picture.

    The code is one more token behind the prompt's. The UNet has norms over the whole picture and attention, so
    nothing is cut into tiles. Raises ValueError where no layer fits.
    """

    noise_channels = 3

    def __init__(self, config: SharedConfig, networks: SharedNetworks) -> None:
        super().__init__()
        self.config, self.networks = config, networks
        layers = _layers(networks.bare, config.targets)
        if not layers:
            raise ValueError(f"no layer of this UNet ends with one of the targets {', '.join(config.targets)}")
        first, last = (_own(layer) for layer in (networks.bare.conv_in, networks.bare.conv_out))
        latents = first.in_channels
        seen = latents + (3 + 4 * len(PERIODS)) * SHUFFLE**2
        self.conv_in = nn.Conv2d(seen, first.out_channels, 3, padding=1)
        self.conv_out = nn.Conv2d(last.in_channels, 3 * SHUFFLE**2, 3, padding=1)
        with torch.no_grad():  # it begins as the UNet that sees the good latent, and adds nothing
            self.conv_in.weight.zero_()
            self.conv_in.weight[:, :latents] = first.weight
            self.conv_in.bias.copy_(first.bias)
            nn.init.zeros_(self.conv_out.weight)
            nn.init.zeros_(self.conv_out.bias)
        self.down = nn.ModuleDict({_key(name): _first_half(layer, config.rank) for name, layer in layers.items()})
        self.up = nn.ModuleDict({_key(name): _second_half(layer, config.rank) for name, layer in layers.items()})
        self.register_buffer("text", networks.text.detach().float().clone())  # so that a file knows its prompt
        self.token = nn.Linear(config.code, networks.text.shape[-1])
        self.style = StyleEncoder(config.code)
        _install(networks.bare, layers)

    def __deepcopy__(self, memo: dict) -> SharedDownsampler:
        """Copy what is its own; the backbone stays the same one."""
        memo[id(self.networks)] = self.networks
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def added(self, name: str, x: Tensor) -> Tensor:
        """Return what the adapter adds to the output of the layer `name` at its input `x`."""
        return self.up[name](self.down[name](x.to(self.conv_in.weight.dtype))).to(x.dtype)

    def condition(self, sharp: Tensor) -> Tensor:
        """Return the good picture's latent of `B 3 4h 4w`, 0..1; the gradient passes through the frozen encoder."""
        vae = self.networks.vae
        padded, _ = pad_to_multiple(sharp * 2 - 1, GRID * MULTIPLE)
        padded = padded.to(next(vae.parameters()).dtype)
        mean = checkpoint(_mean_of, vae, padded, use_reentrant=False) if sharp.requires_grad else _mean_of(vae, padded)
        return mean.float() * vae.config.scaling_factor

    def forward(
        self, condition: Tensor, base: Tensor, noise: Tensor, code: Tensor, place: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Return what is added to the downscale `base`, `B 3 h w`, 0..1, at strength 1; see `Downsampler.forward`."""
        std, size = self.config.kappa * self.config.root, base.shape[-2:]
        start = (base * 2 - 1 + std * noise) * (std**2 + 1) ** -0.5
        waves = block_waves(tuple(size), place).to(base).expand(len(base), -1, -1, -1)
        poor, _ = pad_to_multiple(torch.cat([start, waves], 1), MULTIPLE)
        x = torch.cat([condition, F.pixel_unshuffle(poor, SHUFFLE)], 1)
        bare = self.networks.bare
        text = torch.cat([self.text.to(code).expand(len(code), -1, -1), self.token(code)[:, None]], 1)
        dtype = next(bare.parameters()).dtype
        with self.worn(), self._ends():
            made = bare(x.to(dtype), self.config.timestep, encoder_hidden_states=text.to(dtype)).sample
        return F.pixel_shuffle(made.float(), SHUFFLE)[..., : size[0], : size[1]]

    @contextmanager
    def worn(self) -> Iterator[None]:
        """Let the backbone's layers add this adapter in the block, and no other."""
        if _WORN.get() is self:
            yield
            return
        before = _WORN.set(self)
        try:
            with self.networks.without_adapter():
                yield
        finally:
            _WORN.reset(before)

    @contextmanager
    def _ends(self) -> Iterator[None]:
        bare = self.networks.bare
        kept = bare.conv_in, bare.conv_out
        bare.conv_in, bare.conv_out = self.conv_in, self.conv_out
        try:
            yield
        finally:
            bare.conv_in, bare.conv_out = kept


def checkpoint_as_worn(block: nn.Module, *args: Any) -> Any:
    """Checkpoint a block of a backbone, for diffusers' `enable_gradient_checkpointing`.

    The backward pass computes it again long after the block's network has been called: with what was worn then, and
    frozen if it was frozen then.
    """
    worn = _WORN.get()
    if worn is None:
        return checkpoint(block, *args, use_reentrant=False)
    learns = worn.conv_in.weight.requires_grad

    def again(*inputs: Any) -> Any:
        with _learning(worn, learns), worn.worn():
            return block(*inputs)

    return checkpoint(again, *args, use_reentrant=False)


@contextmanager
def _learning(worn: SharedDownsampler, learns: bool) -> Iterator[None]:
    """Let an adapter take gradients or not; a walk over its layers for every block is saved where it does already."""
    now = worn.conv_in.weight.requires_grad
    if now == learns:
        yield
        return
    worn.requires_grad_(learns)
    try:
        yield
    finally:
        worn.requires_grad_(now)


def _mean_of(vae: nn.Module, pictures: Tensor) -> Tensor:
    return vae.encode(pictures).latent_dist.mean


def _own(layer: nn.Module) -> nn.Module:
    """Return the layer within peft's wrapper."""
    return getattr(layer, "base_layer", layer)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name has no dots


def _layers(unet: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Module]:
    """Return `{name: layer}` of linear layers and convolutions that end with a target, the UNet's ends aside."""
    found = {}
    for name, module in unet.named_modules():
        fits = any(name == target or name.endswith(f".{target}") for target in targets)
        if fits and "." in name and isinstance(_own(module), nn.Linear | nn.Conv2d):
            found[name] = _own(module)
    return found


def _first_half(layer: nn.Module, rank: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        half = nn.Linear(layer.in_features, rank, bias=False)
    else:
        half = nn.Conv2d(layer.in_channels, rank, layer.kernel_size, layer.stride, layer.padding, bias=False)
    nn.init.normal_(half.weight, std=1 / rank)
    return half


def _second_half(layer: nn.Module, rank: int) -> nn.Module:
    if isinstance(layer, nn.Linear):
        half = nn.Linear(rank, layer.out_features, bias=False)
    else:
        half = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
    nn.init.zeros_(half.weight)
    return half


def _install(unet: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Give every layer its hook, once: a second downsampler over the same backbone finds them there."""
    hooked = unet.__dict__.setdefault("tudsr_hooked", set())
    for name, layer in layers.items():
        if name not in hooked:
            hooked.add(name)
            layer.register_forward_hook(_adding(_key(name)))


def _adding(name: str) -> Callable:
    def add(layer: nn.Module, inputs: tuple, output: Tensor) -> Tensor | None:
        worn = _WORN.get()
        return None if worn is None or name not in worn.up else output + worn.added(name, inputs[0])

    return add
