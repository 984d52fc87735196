"""Stages made of ComfyUI's objects, and what an adapter says of itself, carried on the MODEL."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import Any

import comfy.model_sampling
import torch

from ...tudsr_core.diffusion import OneStep, scaled_linear
from ...tudsr_core.methods import (
    METHODS,
    NEUTRAL,
    Dials,
    Method,
    NoisePredictor,
    Stage,
    StageLimits,
    TwoStageModel,
    branch_weights,
    turned,
)
from .adapters import VAEChange, with_change
from .networks import ComfyNetworks
from .tile_texts import TileTexts

log = logging.getLogger(__name__)

STAGE_KEY = "tudsr_stage"


@dataclass(frozen=True)
class StageFacts:
    """What an adapter says of itself; travels on the MODEL as an attachment.

    `method`: None for a model of no published method, which then has `steps`. `steps`: the file's own
    formula, None for the method's, in `count` evaluations. `fidelity` and `detail`: PiSA-SR's dials; `semantic`:
    its detail patches and the strength at which they are on MODEL.
    `vae`: the adapter's own changes of the VAE.
    """

    name: str
    stage: int | None = None
    method: str | None = "tudsr"
    steps: tuple[OneStep, ...] | None = None
    count: int = 1
    limits: StageLimits = field(default_factory=StageLimits)
    fidelity: float = 1.0
    detail: float = 1.0
    semantic: tuple[dict[str, Any], float] | None = None
    predictor: NoisePredictor | None = None
    vae: VAEChange | None = None

    @property
    def about(self) -> Method | None:
        """The row of the method table."""
        return METHODS[self.method] if self.method else None

    def steps_for(self, number: int, timestep: int = 0) -> tuple[OneStep, ...]:
        """Return the steps as stage `number`; `timestep` above 0 replaces the trained one."""
        if self.steps and not timestep:
            return self.steps
        return (self.about or METHODS["tudsr"]).steps(number, self.count, timestep)

    def turned(self, inventive: float) -> tuple[StageFacts, Dials]:
        """Return these facts with the dial from faithful to inventive turned, and what it set; raises ValueError."""
        dials = turned(inventive, self.about, self.count, self.fidelity, self.detail)
        steps = self.steps if dials.count == self.count else None
        changes = dict(steps=steps, count=dials.count, fidelity=dials.fidelity, detail=dials.detail)
        return replace(self, **changes), dials

    def branches(self) -> list[tuple[float, dict[str, Any], float]]:
        """Return `(w_j, patches, strength)` per branch of eps = sum of w_j B_j, the patches to add to MODEL for it."""
        if self.semantic is None:
            return [(1.0, {}, 0.0)]
        patches, strength = self.semantic
        weights = branch_weights(self.fidelity, self.detail)
        return [(weight, {} if full else patches, -strength) for weight, full in weights]


def attach(model: Any, facts: StageFacts) -> Any:
    """Return a clone of `model` that carries `facts`."""
    clone = model.clone()
    clone.set_attachments(STAGE_KEY, facts)
    return clone


def facts_of(model: Any) -> StageFacts | None:
    """Return what `attach` put on `model`, or None."""
    return model.get_attachment(STAGE_KEY)


def trained_facts(model: Any, timestep: int) -> StageFacts:
    """Return what the adapter on `model` says of itself.

    Without one, a `timestep` above 0 says that an adapter of TUDSR's kind is merged into the weights and
    was trained there. Raises ValueError for a MODEL with neither: one step of a plain one gives no picture.
    """
    facts = facts_of(model)
    if facts is None and not timestep:
        raise ValueError(
            "this MODEL has no one-step adapter, so one step of it gives no picture; put Load TUDSR Adapter between "
            "SD2.1-base and this node. If an adapter is merged into the checkpoint, use TUDSR Stage One (and Two) "
            "with the timestep it was trained at"
        )
    return facts or StageFacts("this MODEL")


def build_stage(
    model: Any,
    vae: Any,
    conditioning: list | None,
    number: int,
    timestep: int,
    tile_prompts: Any = None,
    clip: Any = None,
    inventive: float = NEUTRAL,
) -> Stage:
    """Return stage `number` over ComfyUI's objects; `timestep` 0 takes the adapter's own (or 200 / 50).

    `conditioning` is None for a stage that is only planned.
    `tile_prompts` (TilePrompts), encoded by `clip`, take the place of `conditioning` where the method
    was trained with a text per picture, and are ignored with a word where it was not.
    `vae` may be the checkpoint's or that of any adapter's loader: this stage gets it with the changes of its
    own adapter and no other's. `inventive` is the core's dial.

    Raises ValueError for a MODEL without an adapter or with one of the other stage, for models that do
    not predict eps on Stable Diffusion's schedule, for a VAE or CONDITIONING of another model, and for
    an empty CONDITIONING.
    """
    facts = trained_facts(model, timestep)
    if facts.stage not in (None, number):
        raise ValueError(
            f"{facts.name!r} is a stage-{_word(facts.stage)} adapter, but it is connected as stage {_word(number)}; "
            "swap the two MODEL inputs"
        )
    facts, dials = facts.turned(inventive)
    steps = facts.steps_for(number, timestep)
    _check_model(model, steps)
    check_companions(model, vae, conditioning)
    vae = with_change(vae, facts.vae) if facts_of(model) else vae
    texts = _texts(facts, tile_prompts, clip)
    networks = [
        (weight, ComfyNetworks(_with(model, patches, strength), vae, conditioning, texts))
        for weight, patches, strength in facts.branches()
    ]
    alone = len(networks) == 1 and networks[0][0] == 1
    return Stage(
        networks[0][1],
        steps,
        f"stage {_word(number)}",
        branches=() if alone else tuple(networks),
        predictor=facts.predictor,
        about=facts.about,
        strength=dials.strength,
        dial=dials.words,
    )


def _texts(facts: StageFacts, tile_prompts: Any, clip: Any) -> TileTexts | None:
    if tile_prompts is None:
        return None
    if facts.about is None or facts.about.prompt is not None:
        title = f" ({facts.about.title})" if facts.about else ""
        log.warning("tile prompts are ignored: %s%s was trained with one fixed text", facts.name, title)
        return None
    return TileTexts(clip, tile_prompts)


def _with(model: Any, patches: dict[str, Any], strength: float) -> Any:
    if not patches:
        return model
    clone = model.clone()
    clone.add_patches(patches, strength)
    return clone


def _word(number: int) -> str:
    return {1: "one", 2: "two"}[number]


def _check_model(model: Any, steps: tuple[OneStep, ...]) -> None:
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.V_PREDICTION):
        raise ValueError(
            "this MODEL does not predict noise (eps), so a one-step adapter cannot work on it; "
            "load SD2.1-base (512 px, v2-1_512-ema-pruned), not SD2.1 768-v"
        )
    for step in steps:
        theirs = float(sampling.sigma(torch.tensor([step.t])))
        ours = scaled_linear().sigma_at(step.t)
        if abs(theirs / ours - 1) > 1e-3:
            raise ValueError(
                f"this MODEL has sigma {theirs:.4f} at timestep {step.t}, not Stable Diffusion's {ours:.4f}; "
                "remove nodes that change its noise schedule, or load SD2.1-base"
            )


def check_companions(model: Any, vae: Any, conditioning: list | None) -> None:
    """Raise ValueError for a VAE or CONDITIONING (None: not looked at) that are not of the MODEL's kind, or empty."""
    wanted = model.model.latent_format.latent_channels
    if vae.latent_channels != wanted:
        raise ValueError(
            f"this VAE makes {vae.latent_channels} latent channels, but the MODEL works on {wanted}; "
            "connect the VAE that came with the model"
        )
    if conditioning is None:
        return
    if not conditioning:
        raise ValueError(
            "this CONDITIONING is empty, so the network would not run; connect the loader's conditioning output, or "
            "CLIP Text Encode"
        )
    width = model.model.model_config.unet_config.get("context_dim")
    for tensor, _ in conditioning:
        if width and tensor.shape[-1] != width:
            raise ValueError(
                f"this CONDITIONING is {tensor.shape[-1]} wide, but the MODEL wants {width}; "
                "encode the prompt with the CLIP of the same checkpoint"
            )


def combine(first: Stage, second: Stage | None, limits: StageLimits | None = None) -> TwoStageModel:
    """Return the core's model; limits come from stage one's adapter unless given.

    Without a second stage, the first one goes as far as it was trained for.
    """
    if limits is None:
        limits = facts_of(first.networks.model).limits
        if second is None:
            limits = replace(limits, single_up_to=limits.first_max)
    return TwoStageModel(first, second, limits)
