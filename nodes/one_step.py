"""The parts that let stock SamplerCustom do a TUDSR stage: its sigmas and its latent."""

from __future__ import annotations

import torch
from comfy_api.latest import io

from ..tudsr_core.diffusion import comfy_start_scale, from_noise_level, scaled_linear
from ..tudsr_core.methods import METHODS
from .host.stages import trained_facts
from .inputs import CATEGORY, timestep_input


class OneStepSigmas(io.ComfyNode):
    """SIGMAS of a one-step stage for SamplerCustom."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSROneStepSigmas",
            display_name="One-Step Sigmas",
            category=CATEGORY,
            description="Sigmas for one step from a timestep to zero. With One-Step Latent, the euler sampler and "
            "no added noise, stock SamplerCustom does a TUDSR stage.",
            inputs=[
                io.Model.Input("model", tooltip="The stage's MODEL; its adapter may carry the timestep."),
                timestep_input(200),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="The timestep's sigma and 0, for SamplerCustom.")],
        )

    @classmethod
    def execute(cls, model, timestep) -> io.NodeOutput:
        return io.NodeOutput(torch.tensor([scaled_linear().sigma_at(_timestep(model, timestep)), 0.0]))


class OneStepLatent(io.ComfyNode):
    """Scale a latent so that stock samplers treat it as already noisy."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSROneStepLatent",
            display_name="One-Step Latent",
            category=CATEGORY,
            description="Multiplies an encoded latent by sqrt(1 + sigma^2), so that a stock sampler started at "
            "One-Step Sigmas gives the network the latent itself.",
            inputs=[
                io.Latent.Input("latent", tooltip="From VAE Encode of the enlarged picture."),
                io.Model.Input("model", tooltip="The stage's MODEL; its adapter may carry the timestep."),
                timestep_input(200),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="For SamplerCustom, without added noise.")],
        )

    @classmethod
    def execute(cls, latent, model, timestep) -> io.NodeOutput:
        factor = comfy_start_scale(_timestep(model, timestep))
        return io.NodeOutput({**latent, "samples": latent["samples"] * factor})


def _timestep(model, timestep: int) -> int:
    facts = trained_facts(model, timestep)
    steps = facts.steps_for(facts.stage or 1, timestep)
    if len(steps) > 1 or facts.semantic or steps[0] != from_noise_level(steps[0].t):
        raise ValueError(
            f"{facts.name!r} ({METHODS[facts.method].title}) does not take its step from a noise level, which is all a "
            "stock sampler can do; use TUDSR Stage One"
        )
    return steps[0].t
