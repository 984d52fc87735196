"""Training pictures as numbered samples: what sample n is follows from the seed and n alone.

So workers, processes and restarts change nothing, and where a training stands in its data is one number.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..pictures import (
    RECIPES,
    PictureError,
    degrade,
    interpolate,
    pad_to,
    pictures_in,
    read_picture,
    resize,
    sample_degradation,
)
from .config import DataConfig
from .sections import ConfigError

T = TypeVar("T")

# What a random stream is for, so that none repeats another's draws.
ORDER, CROP, NETWORK, VALIDATION = range(4)


def rng_of(seed: int, purpose: int, *numbers: int) -> np.random.Generator:
    """Return the random stream of `purpose` for the given `numbers`, such as that of a sample."""
    return np.random.default_rng([seed, purpose, *numbers])


def torch_rng_of(seed: int, *numbers: int) -> torch.Generator:
    """Return what is drawn on the networks' side for `numbers`: of a sample, a chunk and a use."""
    state = np.random.SeedSequence([seed, NETWORK, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


@dataclass(frozen=True)
class Batch:
    """Samples `numbers`: crops `sharp`, `B 3 S S`, and the same made poor and enlarged again, `low`; all 0..1.

    `low` of stage two is as large as stage one's pictures, S / N.
    """

    numbers: tuple[int, ...]
    sharp: Tensor
    low: Tensor


class Numbered(Dataset):
    """Samples by number; `sample` is what a subclass makes one of."""

    def __getitem__(self, number: int) -> tuple | PictureError:
        """Return the sample; a picture's error as a value, which leaves a worker in one line."""
        try:
            return self.sample(number)
        except PictureError as error:
            return error


class Pictures(Numbered):
    """The sharp pictures of the folders; item n is one crop and its degraded twin."""

    def __init__(self, config: DataConfig, seed: int) -> None:
        self.config, self.seed = config, seed
        self.files = [file for folder in config.folders for file in find_pictures(folder)]

    def sample(self, number: int) -> tuple[int, Tensor, Tensor]:
        """Return number, crop and degraded twin."""
        epoch, place = divmod(number, len(self.files))
        order = rng_of(self.seed, ORDER, epoch).permutation(len(self.files))
        rng = rng_of(self.seed, CROP, number)
        picture = read_picture(self.files[order[place]]).pixels[:, :3]
        sharp = random_crop(picture, self.config.size * self.config.chunks, rng)
        if self.config.flip and rng.random() < 0.5:
            sharp = sharp.flip(-1)
        return number, sharp[0], make_low(sharp, self.config, rng)[0]


def find_pictures(folder: Path) -> list[Path]:
    """Return the pictures in `folder` and below, in name order; raises ConfigError if there is none."""
    if not folder.is_dir():
        raise ConfigError(f"folder {folder} of training pictures does not exist; check the path")
    below = sorted(path for path in folder.rglob("*") if path.is_dir())
    files = [file for one in (folder, *below) for file in pictures_in(one)]
    if not files:
        raise ConfigError(f"folder {folder} holds no pictures")
    return files


def random_crop(picture: Tensor, side: int, rng: np.random.Generator) -> Tensor:
    """Return a square of `side` of `1 3 H W`, mirrored at the borders where the picture is smaller."""
    picture = pad_to(picture, tuple(max(side, have) for have in picture.shape[-2:]))
    top, left = (int(rng.integers(have - side + 1)) for have in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side]


def make_low(sharp: Tensor, config: DataConfig, rng: np.random.Generator) -> Tensor:
    """Return `sharp`, `1 3 S S`, degraded and enlarged to the side that the first network sees, 0..1."""
    drawn = sample_degradation(rng, RECIPES[config.degradation], config.factor)
    small, size = degrade(sharp, drawn), (config.size, config.size)
    large = interpolate(small, size, drawn.enlarge_mode) if config.enlarge == "random" else resize(small, size)
    return large.clamp(0, 1)


class Numbers(Sampler):
    """Sample numbers of one process from picture batch `start` on, without end."""

    def __init__(self, start: int, batch: int, process: int, processes: int) -> None:
        self.start, self.batch, self.process, self.processes = start, batch, process, processes

    def __iter__(self) -> Iterator[list[int]]:
        place = self.start
        while True:
            first = (place * self.processes + self.process) * self.batch
            yield list(range(first, first + self.batch))
            place += 1


def batches(pictures: Pictures, start: int, process: int = 0, processes: int = 1) -> Iterator[Batch]:
    """Yield this process's batches from the one numbered `start` on.

    Batch k of all processes together holds the samples from k x processes x batch size on. Raises
    PictureError for a file that cannot be read.
    """
    return loaded(pictures, Numbers(start, pictures.config.batch, process, processes), _stack)


def loaded(pictures: Numbered, numbers: Numbers, stack: Callable[[Sequence[tuple]], T]) -> Iterator[T]:
    """Yield what `stack` makes of the samples of each batch of `numbers`; raises PictureError."""
    loader = DataLoader(
        pictures,
        batch_sampler=numbers,
        num_workers=pictures.config.workers,
        collate_fn=partial(_whole_or_error, stack),
        worker_init_fn=_leave_interrupts_to_the_first_process,
    )
    for batch in loader:
        if isinstance(batch, PictureError):
            raise batch
        yield batch


def _leave_interrupts_to_the_first_process(worker: int) -> None:
    # A terminal's Ctrl-C reaches the workers too; without them the step in work could not be finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _whole_or_error(stack: Callable[[Sequence[tuple]], T], items: Sequence[tuple | PictureError]) -> T | PictureError:
    errors = [item for item in items if isinstance(item, PictureError)]
    return errors[0] if errors else stack(items)


def _stack(items: Sequence[tuple[int, Tensor, Tensor]]) -> Batch:
    numbers, sharp, low = zip(*items, strict=True)
    return Batch(tuple(numbers), torch.stack(sharp), torch.stack(low))
