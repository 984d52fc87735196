"""How good the adapter is so far: held-out pictures restored, measured and shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..evaluation import psnr_y, seam_score
from ..pictures import Picture, pad_to, read_picture, write_picture
from .config import TrainingConfig, ValidationConfig
from .samples import VALIDATION, find_pictures, make_low, rng_of
from .sections import ConfigError
from .stages import enlarge, join, split
from .trainer import Trainer

GAP = 4  # pixels between the panels


def read_validation(config: TrainingConfig) -> dict[str, Tensor]:
    """Return `{name: 1 3 S S}`: the middles of the first pictures of the validation folder; {} without one."""
    return read_middles(config.validation, config.data.size * config.data.chunks)


def read_middles(config: ValidationConfig, side: int) -> dict[str, Tensor]:
    """Return `{name: 1 3 side side}`: the middles of the first pictures of the folder; {} without one."""
    if config.folder is None:
        return {}
    files = find_pictures(config.folder)[: config.count]
    if len({file.stem for file in files}) < len(files):
        raise ConfigError(f"pictures of {config.folder} have the same name; rename one")
    return {file.stem: _middle(read_picture(file).pixels[:, :3], side) for file in files}


def _middle(picture: Tensor, side: int) -> Tensor:
    picture = pad_to(picture, tuple(max(side, have) for have in picture.shape[-2:]))
    top, left = ((have - side) // 2 for have in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side]


@torch.no_grad()
def validate(trainer: Trainer, pictures: dict[str, Tensor], folder: Path) -> dict[str, float]:
    """Restore every picture, write it into `folder` as start | restored | sharp, and return the mean numbers.

    `psnr` is of the luma in dB, `psnr_start` that of what the trained network was given, `seams` how
    strong edges are between chunks (about 1: none). The damage to a picture is always the same.
    """
    data, count = replace(trainer.config.data, enlarge="bicubic"), trainer.config.data.chunks
    rows: list[tuple[float, float, float]] = []
    folder.mkdir(parents=True, exist_ok=True)
    with trainer.averaged():
        for number, (name, sharp) in enumerate(pictures.items()):
            low = make_low(sharp, data, rng_of(trainer.config.seed, VALIDATION, number)).to(trainer.device)
            start = low if trainer.first is None else enlarge(trainer.restore_first(low), count)
            draws = [torch.Generator().manual_seed(number)]
            made = join([trainer.network(chunk, draws).float() for chunk in split(start, count)], count).cpu()
            start = start.float().cpu()
            borders = range(data.size, data.size * count, data.size)
            seams = seam_score(made, borders, borders) if count > 1 else 1.0
            rows.append((psnr_y(made, sharp), psnr_y(start, sharp), seams))
            write_panels(folder / f"{name}.png", start, made, sharp)
    names = ("psnr", "psnr_start", "seams") if count > 1 else ("psnr", "psnr_start")
    means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
    return dict(zip(names, means, strict=False))


def write_panels(path: Path, *panels: Tensor) -> None:
    """Write pictures of one height, `1 3 H W`, beside each other, over what `path` holds."""
    gap = torch.ones(1, 3, panels[0].shape[-2], GAP)
    row = [part for panel in panels for part in (gap, panel)][1:]
    write_picture(path, Picture(torch.cat(row, -1)), overwrite=True)
