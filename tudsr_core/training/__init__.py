"""Training: data, losses, the loops of both stages with their checkpoints and exports, and the embedded model's own.

Must not know: the command line, ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    colearn_config="ColearnConfig read_colearn",
    colearn_session="train_colearn",
    config="DataConfig ModelConfig RunConfig TrainingConfig read_config",
    data="read_held_out",
    session="Outcome train",
    timestep="estimate_timestep",
    trainer="TrainingError",
)
