"""A training from its settings to its files: start or resume, logs, validation, export."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .colearn_config import ColearnConfig
from .config import TrainingConfig
from .export import export
from .networks import is_model_file
from .sections import ConfigError
from .state import saved_steps
from .trainer import Report, Trainer
from .validation import read_validation, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a training ended: at which step, whether that was the last, and the files that were written.

    `is_main` is true in one process of all.
    """

    step: int
    finished: bool
    files: tuple[Path, ...]
    is_main: bool


class Log:
    """Numbers by step: a line of JSON each in `log.jsonl`, and TensorBoard's files where it is installed."""

    def __init__(self, config: TrainingConfig | ColearnConfig) -> None:
        config.output.mkdir(parents=True, exist_ok=True)
        self.path = config.output / "log.jsonl"
        self.board = self._open_board(config.output / "tensorboard") if config.run.tensorboard else None

    def _open_board(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.info("tensorboard is not installed; numbers go to %s alone", self.path)
            return None
        return SummaryWriter(str(folder))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Add the numbers of one step; JSON has no infinity and no NaN, they are null there."""
        plain = {name: round(value, 6) if math.isfinite(value) else None for name, value in numbers.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | plain) + "\n")
        for name, value in numbers.items() if self.board else ():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what TensorBoard holds back."""
        if self.board:
            self.board.close()


def train(
    config: TrainingConfig,
    stage: int,
    resume: bool = False,
    report: Report = lambda step, numbers: None,
    started: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Train stage 1 or 2 and write its adapter, also when interrupted; `started` is told the step it begins at.

    Raises ConfigError for settings that cannot be used and for an output that holds a training already
    (with `resume`, one whose settings differ), CheckpointError for weights, PictureError for pictures,
    TrainingError when the loss stays without a number.
    """
    if stage == 1 and is_model_file(config.model.base):
        raise ConfigError("stage one of a tudsr-model file is its backbone, which has no adapter; use SD2.1-base")
    if saved_steps(config) and not resume:
        raise ConfigError(f"{config.output} holds a training already; add --resume, or choose another output")
    pictures = read_validation(config)
    trainer = Trainer(config, stage)
    started(trainer.resume() if resume else 0)
    journal = Log(config) if trainer.is_main else None

    def note(step: int, numbers: dict[str, float]) -> None:
        journal.write(step, numbers)
        report(step, numbers)

    def after_step(step: int) -> None:
        if not pictures or (step % config.validation.every and step != config.optimizer.steps):
            return
        if trainer.is_main:
            folder = config.output / "validation" / f"step-{step:07d}"
            journal.write(step, validate(trainer, pictures, folder))
        trainer.accelerator.wait_for_everyone()

    finished = trainer.run(note, after_step)
    files: list[Path] = []
    if trainer.is_main:
        journal.close()
        with trainer.averaged():
            files = export(trainer.network, config, stage, trainer.step)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    return Outcome(trainer.step, finished, tuple(files), trainer.is_main)
