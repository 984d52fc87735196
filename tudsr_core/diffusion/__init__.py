"""Numbers of diffusion: the noise schedule, the one-step formulas, and respaced multi-step chains.

Must not know: networks, tiles, pictures. No loop over steps lives here.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    multi_step="ChainStep Respacing plan_steps respaced_timesteps",
    one_step="OneStep euler from_noise_level residual",
    residual_shift="ResidualShift shift_schedule",
    schedule="NoiseSchedule comfy_start_scale scaled_linear",
)
