"""Networks that no library has, in plain torch, and how their files fill them.

Must not know: diffusers, methods' steps, ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    cfw="FeatureWrapping load_wrapping",
    dape="RAM_FILE TAGGER_FORMAT load_tagger write_tagger",
    discriminator="Discriminator PatchCritic",
    downsampler="Downsampler DownsamplerConfig",
    downsampler_files="DOWNSAMPLER_FORMAT downsampler_path kind_of load_downsampler write_downsampler",
    embedded="AutoencoderDC UNet load_networks make_unet make_vae",
    features="EXTRACTORS Features load_features",
    invsr="build_predictor",
    learned_damage="LearnedDamage on_sphere shrink",
    shared_downsampler="SharedConfig SharedDownsampler SharedNetworks checkpoint_as_worn",
    stablesr="PLACES StableSR load_stablesr",
)
