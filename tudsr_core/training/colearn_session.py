"""A training of co-learning from its settings to its files: start or resume, logs, exports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..diffusion import from_noise_level
from ..models import write_downsampler
from ..weights import write_model
from .colearn import Colearner
from .colearn_config import ColearnConfig
from .colearn_networks import base_file
from .colearn_validation import read_held_out_middles, validate_colearn
from .export import export
from .networks import is_model_file
from .sections import ConfigError
from .session import Log, Outcome
from .state import saved_steps
from .trainer import Report


def train_colearn(
    config: ColearnConfig,
    resume: bool = False,
    report: Report = lambda step, numbers: None,
    started: Callable[[int], None] = lambda step: None,
) -> Outcome:
    """Train either task and write its files, also when interrupted; `started` is told the step it begins at.

    Raises ConfigError for settings that cannot be used and for an output that holds a training already (with
    `resume`, one whose settings differ), CheckpointError for weights, PictureError for pictures, TrainingError when
    the loss stays without a number.
    """
    if not config.steps:
        raise ConfigError("all phases have 0 steps; give one of them some")
    if saved_steps(config) and not resume:
        raise ConfigError(f"{config.output} holds a training already; add --resume, or choose another output")
    learner = Colearner(config)
    pictures = read_held_out_middles(learner)
    started(learner.resume() if resume else 0)
    journal = Log(config)

    def note(step: int, numbers: dict[str, float]) -> None:
        journal.write(step, numbers)
        report(step, numbers)

    def after_step(step: int) -> None:
        if pictures and (step % config.validation.every == 0 or step == config.steps):
            folder = config.output / "validation" / f"step-{step:07d}"
            journal.write(step, validate_colearn(learner, pictures, folder))

    finished = learner.run(note, after_step)
    journal.close()
    with learner.averaged():
        files = write_results(learner)
    return Outcome(learner.step, finished, tuple(files), True)


def write_results(learner: Colearner) -> list[Path]:
    """Write the downsampler, and of co-learning the student, into the output folder; return what was written.

    The student is a tudsr-model file where the base is one (its stage two stays, made for the base), else an
    adapter as of stage one.
    """
    config, student = learner.config, learner.networks.student
    training = json.dumps(config.said() | {"trained_steps": learner.step})
    written = config.output / "downsampler.safetensors"
    write_downsampler(written, learner.networks.down, {"training": training})
    if student is None:
        return [written]
    if not is_model_file(config.model.base):
        return [written, *export(student, config, 1, learner.step)]
    model = config.output / "model.safetensors"
    step = from_noise_level(config.model.timestep)
    write_model(model, replace(base_file(config.model), unet=student.unet.state_dict(), first_step=step))
    return [written, model]
