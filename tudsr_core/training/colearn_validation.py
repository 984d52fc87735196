"""How far co-learning is: held-out sharp pictures made poor and restored, measured and shown."""

from __future__ import annotations

from pathlib import Path

import torch

from ..evaluation import psnr_y
from ..models import shrink
from .colearn import Colearner
from .samples import VALIDATION, rng_of
from .stages import enlarge
from .two_folders import FACTOR
from .validation import read_middles, write_panels


def read_held_out_middles(learner: Colearner) -> dict[str, torch.Tensor]:
    """Return `{name: 1 3 S S}` of the validation folder, {} without one. Raises ConfigError and PictureError."""
    return read_middles(learner.config.validation, learner.config.data.size)


@torch.no_grad()
def validate_colearn(learner: Colearner, pictures: dict[str, torch.Tensor], folder: Path) -> dict[str, float]:
    """Write every picture into `folder` as poor | restored | sharp, and return mean numbers of the luma in dB.

    `psnr` is of what the student makes of the fixed classical damage, which can be compared between steps, and
    `psnr_learned` of what it makes of the downsampler's, which is shown. `damage` is how far the downsampler's poor
    pictures are from the plain downscale: falling without end, it has learned to move content. Without a student the
    panels are downscale | poor | sharp, and `damage` is all there is.
    """
    networks, device, rows = learner.networks, learner.accelerator.device, []
    folder.mkdir(parents=True, exist_ok=True)
    with learner.averaged():
        for number, (name, sharp) in enumerate(pictures.items()):
            poor, base = networks.down.degrade(sharp, FACTOR, number), shrink(sharp, FACTOR)
            row = {"damage": psnr_y(poor, base)}
            panels = [enlarge(base, FACTOR), enlarge(poor, FACTOR), sharp]
            if networks.student is not None:
                classical = learner.pictures.damaged(sharp, rng_of(learner.config.seed, VALIDATION, number))
                made = {
                    "psnr": networks.student(enlarge(classical, FACTOR).to(device)).float().cpu(),
                    "psnr_learned": networks.student(enlarge(poor, FACTOR).to(device)).float().cpu(),
                }
                row |= {key: psnr_y(picture, sharp) for key, picture in made.items()}
                panels = [enlarge(poor, FACTOR), made["psnr_learned"], sharp]
            rows.append(row)
            write_panels(folder / f"{name}.png", *panels)
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
