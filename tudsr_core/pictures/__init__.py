"""Pictures as tensors and as files: resizing, colour, degradations, and reading and writing every format.

Must not know: tiles, networks, methods.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    big_tiff="write_big_tiff",
    color="COLOR_FIXES ColorFix WHOLE_PICTURE match_color",
    degradations="clean gaussian_blur mild random_mild",
    files="FORMATS MAX_MEGAPIXELS NoRoomError Picture PictureError pictures_in",
    reading="read_picture read_size",
    scene_light="displayed light_of",
    real_esrgan="RECIPES Degradation Recipe degrade interpolate sample_degradation",
    regions="RowReader",
    soft_jpeg="jpeg_with_gradient",
    tensors="join_alpha luma pad_to pad_to_multiple resize split_alpha",
    writing="bits_for check_free check_output encode_picture refusal writable write_picture",
)
