"""Diffusion super-resolution without ComfyUI: the library behind the nodes and the `tudsr` command."""

from ._lazy import public_names

__version__ = "0.1.0"

__all__, __getattr__ = public_names(
    __name__,
    backends="AdapterOptions load_embedded load_sd2 load_sd21",
    methods="SampleOptions Target TwoStage UpscaleOptions Zoom ZoomOptions upscale",
    pictures="read_picture write_picture",
)
