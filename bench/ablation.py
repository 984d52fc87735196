"""The ablation of TUDSR's paper on the embedded model: each stage alone and both, at x4 and x8.

    python bench/ablation.py [FOLDER] [--perceptual gmsd,fsim,vif,nlpd]

FOLDER holds sharp pictures; default: the five public test pictures. M is stage one, N stage two, the digit the factor
that each enlarges by before it restores. Prints tables of means over the pictures for clean and mildly degraded input:
PSNR of the luma in dB and SSIM, and the metrics of pyiqa that are asked for (these four need no download).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tudsr_core.backends.local import load_embedded
from tudsr_core.evaluation.measurement import CROP, Result, lanczos, read_folder
from tudsr_core.evaluation.metrics import psnr_y, ssim_y
from tudsr_core.evaluation.perceptual import Perceptual, perceptual_rows
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


def measure(pictures: dict, factor: int, watch: Callable[[Result], None]) -> Iterator[list[str]]:
    """Yield a row of the table for every method at `factor`."""
    for name, enlarge in methods(factor).items():
        cells = []
        for recipe in (clean, mild):
            rows = []
            for title, picture in pictures.items():
                height, width = (side // CROP * CROP for side in picture.shape[-2:])
                sharp = picture[None, :, :height, :width]
                small = recipe(sharp, factor)
                made = (enlarge(small, (height, width)).clamp(0, 1) * 255).round() / 255
                rows.append((psnr_y(made, sharp), ssim_y(made, sharp)))
                watch(Result(f"{recipe.__name__} x{factor}", name, title, small, made, sharp))
            psnr, ssim = (sum(column) / len(rows) for column in zip(*rows, strict=True))
            cells += [f"{psnr:.2f}", f"{ssim:.4f}"]
        yield [f"x{factor}", name, *cells]


def show(cells: list[str]) -> None:
    """Print one row."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--perceptual", help="metrics of pyiqa, joined by commas")
    args = parser.parse_args()
    pictures = read_folder(args.folder) if args.folder else read_held_out()
    measured = Perceptual(args.perceptual) if args.perceptual else None
    heads = ["factor", "method", "clean PSNR", "clean SSIM", "mild PSNR", "mild SSIM"]
    show(heads)
    show(["---"] * len(heads))
    for factor in (4, 8):
        for row in measure(pictures, factor, measured.add if measured else lambda result: None):
            show(row)
    if measured:
        heads, rows = perceptual_rows(measured)
        for row in (heads, ["---"] * len(heads), *rows):
            show(row)


if __name__ == "__main__":
    main()
