"""Diffusion super-resolution without ComfyUI: the library behind the nodes and the `tudsr` command."""

__version__ = "0.1.0"
