"""The fixed measurement: how far a model is above bicubic, Lanczos and a filter bank at x4 and x8."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..assets import asset_path
from ..methods import Target, TwoStageModel, UpscaleOptions, plan_for, upscale
from ..pictures import PictureError, clean, mild, pictures_in, read_picture, resize
from . import filter_bank
from .metrics import psnr_y, seam_score, ssim_y

CROP = 16  # sides are cut to a multiple of it, so that x8 of the shrunk picture is the same size
Scores = dict[tuple[str, str], dict[str, tuple[float, float, float | None]]]
"""`{(case, method): {picture: (PSNR-Y, SSIM, seams)}}`; seams is None where our picture has no tile borders."""

Watch = Callable[["Result"], None]


@dataclass(frozen=True)
class Result:
    """One picture, `made` by `method` of `small` in a `case` such as "clean x4".

    `small` is `1 3 h w`; `made` and the truth `sharp` are `1 3 H W`, all 0..1.
    """

    case: str
    method: str
    name: str
    small: Tensor
    made: Tensor
    sharp: Tensor


def example_path() -> Path:
    """Return the photo shipped for the demonstration."""
    return asset_path("example.png")


def read_folder(folder: Path) -> dict[str, Tensor]:
    """Return `{name: 3 H W}` of the pictures in `folder`; raises PictureError if there are none."""
    found = {p.stem: read_picture(p).pixels[0, :3] for p in pictures_in(folder)}
    if not found:
        raise PictureError(f"folder {folder} holds no pictures to measure on")
    return found


def lanczos(small: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge `1 C h w` with Pillow's Lanczos in float."""
    planes = [
        np.array(Image.fromarray(plane.numpy()).resize(size[::-1], Image.Resampling.LANCZOS)) for plane in small[0]
    ]
    return torch.from_numpy(np.stack(planes))[None].clamp(0, 1)


def evaluate_model(
    model: TwoStageModel,
    pictures: dict[str, Tensor],
    cases: tuple[str, ...] = ("clean", "mild"),
    watch: Watch = lambda result: None,
    methods: Collection[str] | None = None,
) -> Scores:
    """Measure `model` on sharp `pictures` shrunk by 4 and by 8, clean and mildly degraded.

    Seams are measured where our own tiles begin and end, in the pictures of all methods: what a picture
    itself has there can be told from what tiling added. `watch` sees every result. `methods` leaves out all others.
    """
    scores: Scores = {}
    for kind in cases:
        for factor in (4, 8):
            for name, picture in pictures.items():
                sharp = picture[None, :, : picture.shape[-2] // CROP * CROP, : picture.shape[-1] // CROP * CROP]
                small = {"clean": clean, "mild": mild}[kind](sharp, factor)
                borders = tile_borders(model, tuple(small.shape[-2:]), factor)
                for method, enlarge in _methods(model, factor).items():
                    if methods is not None and method not in methods:
                        continue
                    made = enlarge(small, tuple(sharp.shape[-2:])).clamp(0, 1)
                    made = (made * 255).round() / 255
                    seams = seam_score(made, *borders) if any(borders) else None
                    case = scores.setdefault((f"{kind} x{factor}", method), {})
                    case[name] = psnr_y(made, sharp), ssim_y(made, sharp), seams
                    watch(Result(f"{kind} x{factor}", method, name, small, made, sharp))
    return scores


def tile_borders(model: TwoStageModel, source: tuple[int, int], factor: float) -> tuple[list[int], list[int]]:
    """Return the rows and columns of the result at which a tile of the last stage begins or ends."""
    stage = plan_for(model, source, Target(scale=factor), UpscaleOptions()).stages[-1]
    return stage.tiles.borders(stage.size, (model.second or model.first).networks.facts.latent_scale)


def _methods(model: TwoStageModel, factor: int) -> dict[str, Callable[[Tensor, tuple[int, int]], Tensor]]:
    def ours(small: Tensor, size: tuple[int, int], color: str = "none", total: float = factor) -> Tensor:
        return upscale(small, model, Target(scale=total), UpscaleOptions(color_fix=color))

    methods = {
        "bicubic": resize,
        "lanczos": lanczos,
        "filter bank": filter_bank.enlarge,
        "ours": ours,
        "ours + wavelet": lambda small, size: ours(small, size, "wavelet"),
    }
    if factor == 8:
        methods["stage one, bicubic x2"] = lambda small, size: resize(ours(small, size, total=4), size)
    return methods


def compare(small: Tensor, ours: Tensor, crop: int = 480) -> Tensor:
    """Return nearest | bicubic | ours side by side, `1 3 crop 3*crop+gaps`: the liveliest square of `ours`.

    `small` is `1 3 h w`, `ours` its enlargement `1 3 H W`; the square is the one of largest variance.
    """
    size = tuple(ours.shape[-2:])
    crop = min(crop, *size)
    panels = [F.interpolate(small, size, mode="nearest-exact"), resize(small, size).clamp(0, 1), ours]
    energy = F.avg_pool2d((ours - F.avg_pool2d(ours, 9, 1, 4)).square().mean(1, keepdim=True), crop, max(1, crop // 8))
    place = int(energy.flatten().argmax())
    top, left = (place // energy.shape[-1], place % energy.shape[-1])
    step = max(1, crop // 8)
    box = (..., slice(top * step, top * step + crop), slice(left * step, left * step + crop))
    gap = ours.new_ones(1, 3, crop, 8)
    return torch.cat([panels[0][box], gap, panels[1][box], gap, panels[2][box]], -1)


def summary_rows(scores: Scores) -> list[list[str]]:
    """Return table rows: case, method, one cell per picture, mean, mean and worst gain over Lanczos, mean seams."""
    rows = []
    for (case, method), cells in scores.items():
        reference = scores[case, "lanczos"]
        gains = [cells[name][0] - reference[name][0] for name in cells]
        psnr, ssim = (sum(cell[i] for cell in cells.values()) / len(cells) for i in (0, 1))
        shown = [f"{value:.2f}/{similarity:.3f}" for value, similarity, _ in cells.values()]
        gain = f"{sum(gains) / len(gains):+.2f}"
        seams = [seam for _, _, seam in cells.values() if seam is not None]
        seen = f"{sum(seams) / len(seams):.3f}" if seams else "-"
        rows.append([case, method, *shown, f"{psnr:.2f}/{ssim:.4f}", gain, f"{min(gains):+.2f}", seen])
    return rows
