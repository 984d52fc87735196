"""The exact tiled autoencoder: any size with the memory of one tile, and the result of the untiled network.

Must not know: diffusion, methods, pictures as files, whose modules (diffusers' or ComfyUI's) it reads.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    graph="Side",
    settings="ComputeTarget VAETiling",
    tiled="TiledVAE VAECallables",
)
