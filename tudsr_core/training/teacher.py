"""Teachers: any multi-step way to a good picture, as targets in the student's latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..backends import load_sd2, load_stablesr_networks
from ..diffusion import OneStep, ResidualShift, shift_schedule
from ..methods import SampleOptions, StableSROptions, Target, Upscaler, Zoom, ZoomOptions
from ..models import make_unet
from .colearn_config import TeacherConfig
from .distillation import Predict, chain_loss, run_chain
from .networks import Restorer

FACTOR = 4.0


class Teacher(Protocol):
    """Makes targets; nothing of it has a gradient in them."""

    def latents(self, small: Tensor, z: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Return latents like `z`, those of the enlarged poor pictures `small`, `B 3 h w`, 0..1."""
        ...


class ChainTeacher:
    """A small ResShift on latents: a UNet that sees x_i and the condition z, and the chain over it.

    What the UNet says is read as the student's is, an eps of z: so a copy of the student begins as good as it is.
    """

    def __init__(self, network: nn.Module, text: Tensor, step: OneStep, shift: ResidualShift) -> None:
        self.network, self.text, self.step, self.shift = network, text, step, shift

    def predict(self, z: Tensor) -> Predict:
        """Return the network as it sees the poor latents `z`."""
        text = self.text.expand(len(z), -1, -1)

        def at(x: Tensor, index: int) -> Tensor:
            # Near the one timestep that the copied weights know, and yet another for each index.
            eps = self.network(torch.cat([x, z], 1), self.step.t + index, encoder_hidden_states=text).sample
            return self.step.finish(z, eps.float())

        return at

    def loss(self, x0: Tensor, z: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Return what it is trained on: ResShift's loss, an index drawn for each picture."""
        noise, each = drawn_like(z, draws), []
        for number, rng in enumerate(draws):
            one = slice(number, number + 1)
            index = int(torch.randint(len(self.shift.eta), (), generator=rng))
            each.append(chain_loss(self.predict(z[one]), x0[one], z[one], noise[one], index, self.shift))
        return torch.stack(each).mean()

    def latents(self, small: Tensor, z: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Run the whole chain."""
        return run_chain(self.predict(z), z, drawn_like(z, draws), self.shift)


class MethodTeacher:
    """Any upscaler of this pack; its pictures are encoded by the student's own autoencoder."""

    def __init__(self, upscaler_for: Callable[[int], Upscaler], student: Restorer) -> None:
        self.upscaler_for, self.student = upscaler_for, student

    @torch.no_grad()
    def latents(self, small: Tensor, z: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
        """Enlarge every picture, with a seed of its own, and encode what comes out."""
        made = []
        for one, rng in zip(small.split(1), draws, strict=True):
            upscaler = self.upscaler_for(int(torch.randint(2**31 - 1, (), generator=rng)))
            plan = upscaler.plan(tuple(one.shape[-2:]), Target(scale=FACTOR))
            made.append(upscaler.run(one.float().cpu(), plan))
        return self.student.encode(torch.cat(made).to(z), draws).to(z)


def drawn_like(z: Tensor, draws: Sequence[torch.Generator]) -> Tensor:
    """Return normal noise like `z`, each picture's from its own stream, drawn on the CPU."""
    return torch.stack([torch.randn(one.shape, generator=rng) for one, rng in zip(z, draws, strict=True)]).to(z)


def build_chain(config: TeacherConfig, student: Restorer) -> ChainTeacher:
    """Return a chain on the latents of the embedded model that begins as the student, blind for x_i.

    (SinSR copies the teacher into the student; here the student is what has been trained already.)
    """
    settings = vars(student.unet.config)
    latents = settings["in_channels"]
    levels = len(settings["block_out_channels"])
    own = {
        **{name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()},
        "in_channels": 2 * latents,
        "sample_size": 32,
        "down_block_types": ["DownBlock2D"] * levels,
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["UpBlock2D"] * levels,
    }
    network = make_unet(own, "the teacher")
    weights = {name: one.detach().clone() for name, one in student.unet.state_dict().items()}
    seen = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([torch.zeros_like(seen), seen], 1)
    network.load_state_dict(weights)
    shift = shift_schedule(config.chain, config.least, config.kappa, config.power)
    return ChainTeacher(network, student.text, student.step, shift)


def build_method(config: TeacherConfig, student: Restorer, device: str) -> MethodTeacher:
    """Return MultiDiffusion sampling or StableSR over SD2.1 as a teacher. Raises CheckpointError."""
    if config.kind == "stablesr":
        networks, options = load_stablesr_networks(config.base, config.file, device=device), StableSROptions()
    else:
        networks, options = load_sd2(config.base, device), ZoomOptions(sample=SampleOptions())
    options = replace(options, sample=replace(options.sample, steps=config.sampling))
    return MethodTeacher(lambda seed: Zoom(networks, replace(options, seed=seed), _no_words), student)


def _no_words(image: Tensor, plan: Any, tick: Any) -> list[tuple[str, str]]:
    """Return the empty prompt, and no negative one, for every tile: training pictures come without words."""
    return [("", "")] * len(plan.tiles)
