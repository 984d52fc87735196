"""Good and poor pictures, paired or not, as numbered samples: what sample n is follows from the seed and n alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import RECIPES, clean, degrade, read_picture, sample_degradation
from .colearn_config import PairsConfig
from .samples import CROP, ORDER, Numbered, Numbers, find_pictures, loaded, random_crop, rng_of
from .sections import ConfigError

FACTOR = 4  # the grid that downsamplers work on
ORIENTATION = 0x0112  # of EXIF
ALIGN = 16  # poor crops begin at whole blocks of JPEG, which a downsampler knows by their place


@dataclass(frozen=True)
class Sample:
    """Sample `numbers`: good crops `B 3 S S`, the same made poor by the classical damage, `B 3 s s`, and crops of poor
    pictures, `B 3 s s` (of the same things where the folders are paired); all 0..1. `poor` is None without a folder.

    `classical` says for which pictures the classical damage is the student's pair.
    """

    numbers: tuple[int, ...]
    good: Tensor
    damaged: Tensor
    poor: Tensor | None
    classical: Tensor

    def to(self, device: torch.device) -> Sample:
        """Return the sample on `device`; `classical` stays."""
        poor = None if self.poor is None else self.poor.to(device)
        return replace(self, good=self.good.to(device), damaged=self.damaged.to(device), poor=poor)


class TwoFolders(Numbered):
    """The pictures of both kinds of folders; raises ConfigError for such that cannot be what was meant."""

    def __init__(self, config: PairsConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.good = [file for folder in config.good for file in find_pictures(folder)]
        self.poor = [file for folder in config.poor for file in find_pictures(folder)]
        self._check_sizes()
        self.partners = self._partners() if config.paired else {}

    def _check_sizes(self) -> None:
        least = self.config.size // FACTOR
        good, poor = ({file: size_of(file) for file in files} for files in (self.good, self.poor))
        for sizes, side in ((good, self.config.size), (poor, least)):
            for file, size in sizes.items():
                if min(size) < side:
                    raise ConfigError(
                        f"{file} is {size[1]} x {size[0]}, smaller than a crop of {side}; leave it out, or lower size"
                    )
        if not poor or self.config.any_size:
            return
        large, small = (statistics.median(min(size) for size in sizes.values()) for sizes in (good, poor))
        if large < small:
            raise ConfigError(
                f"good pictures are smaller ({large:g} px) than poor ones ({small:g} px): swap good and poor, "
                "or set any_size to true if that is meant"
            )

    def _partners(self) -> dict[Path, Path]:
        """Return the poor picture of each good one, by name; raises ConfigError for one without, or of another size."""
        named = {file.stem: file for file in self.poor}
        found = {}
        for file in self.good:
            if file.stem not in named:
                raise ConfigError(f"{file} has no poor picture of its name; add one, or set paired to false")
            found[file] = named[file.stem]
            wanted = tuple(side // FACTOR for side in size_of(file))
            if size_of(found[file]) != wanted:
                raise ConfigError(
                    f"{found[file]} is not a quarter of {file}, {wanted[1]} x {wanted[0]}; resize it, or set paired "
                    "to false"
                )
        return found

    def sample(self, number: int) -> tuple[int, Tensor, Tensor, Tensor | None, bool]:
        """Return number, good crop, its classical damage, the poor crop, and whether the damage is the pair."""
        file, rng = self._chosen(self.good, number), rng_of(self.seed, CROP, number)
        picture = read_picture(file).pixels[:, :3]
        poor = None
        if self.partners:
            good, poor = self._crop_pair(picture, read_picture(self.partners[file]).pixels[:, :3], rng)
        else:
            good = random_crop(picture, self.config.size, rng)
            if self.poor:
                other = read_picture(self._chosen(self.poor, number, 1)).pixels[:, :3]
                poor = aligned_crop(other, self.config.size // FACTOR, rng)
        if self.config.flip and not self.partners and rng.random() < 0.5:
            good = good.flip(-1)
        classical = bool(rng.random() < self.config.classical)
        return number, good[0], self.damaged(good, rng)[0], None if poor is None else poor[0], classical

    def _chosen(self, files: Sequence[Path], number: int, kind: int = 0) -> Path:
        epoch, place = divmod(number, len(files))
        return files[rng_of(self.seed, ORDER, epoch, kind).permutation(len(files))[place]]

    def _crop_pair(self, good: Tensor, poor: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        side = self.config.size // FACTOR
        top, left = aligned_place(tuple(poor.shape[-2:]), side, rng)
        cut = (..., slice(top * FACTOR, (top + side) * FACTOR), slice(left * FACTOR, (left + side) * FACTOR))
        return good[cut], poor[..., top : top + side, left : left + side]

    def damaged(self, good: Tensor, rng: np.random.Generator) -> Tensor:
        """Return the classical damage of `1 3 S S`, drawn from `rng`."""
        if self.config.degradation == "clean":
            return clean(good, FACTOR)
        return degrade(good, sample_degradation(rng, RECIPES[self.config.degradation], FACTOR))


def size_of(file: Path) -> tuple[int, int]:
    """Return height and width of an upright picture, from its header where Pillow reads it. Raises PictureError."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
            return image.size if turned else image.size[::-1]
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return read_picture(file).size


def aligned_place(size: tuple[int, int], side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Return top and left of a crop that begins at whole blocks of JPEG."""
    return tuple(int(rng.integers((have - side) // ALIGN + 1)) * ALIGN for have in size)


def aligned_crop(picture: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """Return a square of `side` of `1 3 H W` that begins at whole blocks of JPEG."""
    top, left = aligned_place(tuple(picture.shape[-2:]), side, rng)
    return picture[..., top : top + side, left : left + side]


def samples(pictures: TwoFolders, start: int) -> Iterator[Sample]:
    """Yield batches without end, from the one numbered `start` on. Raises PictureError for an unreadable file."""
    return loaded(pictures, Numbers(start, pictures.config.batch, 0, 1), _stack)


def _stack(items: Sequence[tuple]) -> Sample:
    numbers, good, damaged, poor, classical = zip(*items, strict=True)
    together = None if poor[0] is None else torch.stack(poor)
    return Sample(tuple(numbers), torch.stack(good), torch.stack(damaged), together, torch.tensor(classical))
