"""The exact tiled autoencoder: any size with the memory of one tile, and the result of the untiled network.

Must not know: diffusion, methods, pictures as files, whose modules (diffusers' or ComfyUI's) it reads.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    fusion="Features Fuse Fusions fused_levels wrapping",
    graph="Layer Local Side read_resnet",
    settings="ComputeTarget VAETiling",
    tiled="TiledVAE VAECallables",
)
