"""The published systems as upscalers, each a plan and a run, and the protocols through which they see networks.

Must not know: where networks come from (diffusers, ComfyUI), weight files, ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    dial="NEUTRAL Dials branch_weights fusion_weight turned",
    networks="Encoded Networks NoisePredictor Predict Preview TextNetworks Tick",
    plan="MAX_FACTOR MAX_PIXELS StageLimits Target UpscalePlan",
    prompt_sources="PromptSource described fixed from_file saved",
    published="METHODS Method",
    sampling="SampleOptions",
    stablesr="NEGATIVE POSITIVE StableSROptions",
    stages="Stage TwoStageModel UpscaleOptions",
    two_stage="TwoStage plan_for upscale",
    upscaler="RunPlan Upscaler check_image",
    zoom="Zoom ZoomOptions",
)
