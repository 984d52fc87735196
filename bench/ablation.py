"""The ablation of TUDSR's paper on the embedded model: each stage alone and both, at x4 and x8.

    python bench/ablation.py [FOLDER]        sharp pictures; default: the five public test pictures

M is stage one, N stage two, the digit the factor that each enlarges by before it restores. Prints a table of means over
the pictures, PSNR of the luma in dB and SSIM, for clean and mildly degraded input.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tudsr_core.backends.local import load_embedded
from tudsr_core.evaluation.measurement import CROP, lanczos, read_folder
from tudsr_core.evaluation.metrics import psnr_y, ssim_y
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.two_stage import TwoStageModel, UpscaleOptions, upscale
from tudsr_core.pictures.degradations import clean, mild
from tudsr_core.pictures.tensors import resize
from tudsr_core.training.data import read_held_out


def methods(factor: int) -> dict:
    """Return `{name: enlarge(small, size)}` for x4 or x8."""
    model = load_embedded("cpu")
    alone = StageLimits(first_max=factor, single_up_to=factor)
    both = StageLimits(first_max=factor // 2, single_up_to=1)
    models = {
        f"M{factor}": TwoStageModel(model.first, None, alone),
        f"N{factor}": TwoStageModel(model.second, None, alone),
        f"M{factor // 2}N2": TwoStageModel(model.first, model.second, both),
    }

    def runner(one: TwoStageModel, total: int = factor):
        return lambda small, size: upscale(small, one, Target(scale=total), UpscaleOptions(color_fix="none"))

    found = {"lanczos": lanczos} | {name: runner(one) for name, one in models.items()}
    half = TwoStageModel(model.first, None, StageLimits(first_max=factor // 2, single_up_to=factor // 2))
    found[f"M{factor // 2}, bicubic x2"] = lambda small, size: resize(runner(half, factor // 2)(small, size), size)
    return found


def main() -> None:
    """Print the table."""
    pictures = read_folder(Path(sys.argv[1])) if len(sys.argv) > 1 else read_held_out()
    sys.stdout.write(
        "| factor | method | clean PSNR | clean SSIM | mild PSNR | mild SSIM |\n|---|---|---|---|---|---|\n"
    )
    for factor in (4, 8):
        for name, enlarge in methods(factor).items():
            cells = []
            for recipe in (clean, mild):
                rows = []
                for picture in pictures.values():
                    height, width = (side // CROP * CROP for side in picture.shape[-2:])
                    sharp = picture[None, :, :height, :width]
                    made = enlarge(recipe(sharp, factor), (height, width)).clamp(0, 1)
                    made = (made * 255).round() / 255
                    rows.append((psnr_y(made, sharp), ssim_y(made, sharp)))
                psnr, ssim = (sum(column) / len(rows) for column in zip(*rows, strict=True))
                cells.append(f"{psnr:.2f} | {ssim:.4f}")
            sys.stdout.write(f"| x{factor} | {name} | {' | '.join(cells)} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
