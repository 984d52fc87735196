"""The networks protocol over torch and diffusers, for the command line, batch work, training and tests.

Must not know: ComfyUI, whose own models are wrapped in `nodes/`; the command line.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    local="AdapterOptions load_embedded load_sd2 load_sd21 load_shared_networks pick_device",
    stablesr="StableSRNetworks load_stablesr_networks",
    sd21="TEXT_PREFIXES UNET_PREFIX VAE_PREFIX",
)
