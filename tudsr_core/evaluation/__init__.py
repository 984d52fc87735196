"""How good a picture or a model is: metrics, a closed-form rival, and the fixed measurement.

Must not know: how a model was trained, and on what.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    compare_page="Figure figures_of write_page",
    filter_bank="bank_path fit_bank",
    measurement="Result compare evaluate_model example_path read_folder summary_rows",
    metrics="SSIM_WINDOW psnr_y seam_score ssim_y",
    seams="Seam seams_of tiles_over",
    perceptual="PERCEPTUAL Perceptual perceptual_rows",
)
