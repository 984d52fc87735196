"""Stages made of ComfyUI's objects, and what an adapter says of itself, carried on the MODEL."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import comfy.model_sampling
import torch

from ..tudsr_core.pipeline import Model, Stage
from ..tudsr_core.plan import StageLimits
from ..tudsr_core.schedule import OneStep, from_noise_level, scaled_linear
from .backend import ComfyNetworks

STAGE_KEY = "tudsr_stage"


@dataclass(frozen=True)
class StageFacts:
    """What an adapter says of itself; travels on the MODEL as an attachment."""

    name: str
    stage: int | None = None
    step: OneStep | None = None
    limits: StageLimits = field(default_factory=StageLimits)


def attach(model: Any, facts: StageFacts) -> Any:
    """Return a clone of `model` that carries `facts`."""
    clone = model.clone()
    clone.set_attachments(STAGE_KEY, facts)
    return clone


def facts_of(model: Any) -> StageFacts | None:
    """Return what `attach` put on `model`, or None."""
    return model.get_attachment(STAGE_KEY)


def build_stage(model: Any, vae: Any, conditioning: list, number: int, timestep: int) -> Stage:
    """Return stage `number` over ComfyUI's objects; `timestep` 0 takes the adapter's own (or 200 / 50).

    Raises ValueError for an adapter of the other stage, for models that do not predict eps on
    Stable Diffusion's schedule, and for a VAE or CONDITIONING of another model.
    """
    facts = facts_of(model)
    if facts and facts.stage not in (None, number):
        raise ValueError(
            f"{facts.name!r} is a stage-{_word(facts.stage)} adapter, but it is connected as stage {_word(number)}; "
            "swap the two MODEL inputs"
        )
    if timestep:
        step = from_noise_level(timestep)
    else:
        step = (facts.step if facts else None) or from_noise_level(200 if number == 1 else 50)
    _check_model(model, step)
    _check_companions(model, vae, conditioning)
    return Stage(ComfyNetworks(model, vae, conditioning), step, f"stage {_word(number)}")


def _word(number: int) -> str:
    return {1: "one", 2: "two"}[number]


def _check_model(model: Any, step: OneStep) -> None:
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        raise ValueError(
            "this MODEL does not predict noise (eps), so a one-step adapter cannot work on it; "
            "load SD2.1-base (512 px, v2-1_512-ema-pruned), not SD2.1 768-v"
        )
    theirs = float(sampling.sigma(torch.tensor([step.t])))
    ours = scaled_linear().sigma_at(step.t)
    if abs(theirs / ours - 1) > 1e-3:
        raise ValueError(
            f"this MODEL has sigma {theirs:.4f} at timestep {step.t}, not Stable Diffusion's {ours:.4f}; "
            "remove nodes that change its noise schedule, or load SD2.1-base"
        )


def _check_companions(model: Any, vae: Any, conditioning: list) -> None:
    wanted = model.model.latent_format.latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"this VAE makes {vae.latent_channels} latent channels, but the MODEL works on {wanted}; "
            "connect the VAE that came with the model"
        )
    width = model.model.model_config.unet_config.get("context_dim")
    for tensor, _ in conditioning:
        if width and tensor.shape[-1] != width:
            raise ValueError(
                f"this CONDITIONING is {tensor.shape[-1]} wide, but the MODEL wants {width}; "
                "encode the prompt with the CLIP of the same checkpoint"
            )


def combine(first: Stage, second: Stage | None, limits: StageLimits | None = None) -> Model:
    """Return the core's model; limits come from stage one's adapter unless given."""
    if limits is None:
        facts = facts_of(first.networks.model)
        limits = facts.limits if facts else StageLimits()
    return Model(first, second, limits)
