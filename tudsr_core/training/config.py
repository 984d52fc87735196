"""What a training run is asked to do: a TOML file of sections, each a frozen dataclass with the paper's defaults.

Where neither TUDSR nor the code it is built on says a number, the default is OMGSR's; the file that the
adapter is exported to carries all of them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..pictures import RECIPES
from .losses import EdgeColors
from .sections import ConfigError, read_sections

# OMGSR's list: every attention projection and convolution of SD2.1's UNet, 194 modules.
TARGETS = ("conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out", "to_k", "to_q", "to_v", "to_out.0")
EMBEDDED = "embedded"  # the base that is shipped
Precision = Literal["fp32", "bf16"]  # fp16 needs loss scaling, which two optimisers would have to share


def _check(right: bool, says: str) -> None:
    if not right:
        raise ValueError(says)


@dataclass(frozen=True)
class ModelConfig:
    """The networks. `base`: a folder or checkpoint of SD2.1-base, a tudsr-model file, or "embedded".

    `stage_one` is the adapter that stage two is trained behind. `posterior`: latents are the mode of the
    encoder's distribution, or drawn from it (OMGSR's training).
    """

    base: str = ""
    stage_one: Path | None = None
    timestep: int = 200
    posterior: Literal["mode", "sample"] = "mode"
    prompt: str = ""
    tokenizer: Path | None = None

    def __post_init__(self) -> None:
        _check(bool(self.base), "base is missing; give a folder or checkpoint of SD2.1-base, or 'embedded'")
        _check(0 < self.timestep < 1000, f"timestep {self.timestep} must be from 1 to 999")


@dataclass(frozen=True)
class LoraConfig:
    """The adapter: `targets` are ends of module names."""

    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        _check(0 < self.rank <= 1024, f"rank {self.rank} must be from 1 to 1024")
        _check(self.alpha > 0, f"alpha {self.alpha:g} must be above 0")
        _check(bool(self.targets), "targets is empty")


@dataclass(frozen=True)
class DataConfig:
    """The pictures. `folders` of sharp ones are searched with all that lies in them.

    `size` is the side R that the networks see; stage two cuts `chunks` x `chunks` of it from one crop.
    Low-quality pictures are `factor` times smaller than the crop and made by a published set of parameters
    (`degradation`); `enlarge` is how they become large again: as at inference, or by a random mode (OMGSR).
    """

    folders: tuple[Path, ...] = ()
    size: int = 512
    chunks: int = 1
    factor: int = 4
    degradation: Literal[tuple(RECIPES)] = "omgsr"
    enlarge: Literal["bicubic", "random"] = "bicubic"
    flip: bool = True
    batch: int = 1
    workers: int = 4

    def __post_init__(self) -> None:
        _check(bool(self.folders), "folders is missing; name the folders that hold the training pictures")
        _check(self.size >= 16 and self.size % 8 == 0, f"size {self.size} must be a multiple of 8, 16 or more")
        _check(1 <= self.chunks <= 8, f"chunks {self.chunks} must be from 1 to 8")
        _check(1 <= self.factor <= 64, f"factor {self.factor} must be from 1 to 64")
        _check(self.size * self.chunks % self.factor == 0, f"size x chunks is no multiple of factor {self.factor}")
        _check(self.batch >= 1, f"batch {self.batch} must be 1 or more")
        _check(0 <= self.workers <= 256, f"workers {self.workers} must be from 0 to 256")


@dataclass(frozen=True)
class LossConfig:
    """Weights of the generator's loss (TUDSR: 5 edge-aware DISTS + 0.5 adversarial + 0.5 MAE) and what DISTS sees by.

    `dists_features` is an extractor with its weights in `dists_weights`; `dists_balance` the published alpha
    and beta of VGG16's channels, without which all weigh the same.
    """

    dists: float = 5.0
    adversarial: float = 0.5
    mae: float = 0.5
    dists_features: str = "vgg16"
    dists_weights: Path | None = None
    dists_balance: Path | None = None
    edge_colors: EdgeColors = "grey"

    def __post_init__(self) -> None:
        _check(min(self.dists, self.adversarial, self.mae) >= 0, "no weight may be below 0")
        _check(self.dists + self.adversarial + self.mae > 0, "all weights are 0")


@dataclass(frozen=True)
class DiscriminatorConfig:
    """The critic: an extractor with its weights, and the labels of fakes and of real pictures.

    `real_label` is also what the generator wants its pictures to be taken for.
    """

    features: str = "dinov3-vit-b16"
    weights: Path | None = None
    augment: bool = True
    real_label: float = 0.8
    fake_label: float = 0.0

    def __post_init__(self) -> None:
        _check(0 <= self.fake_label < self.real_label <= 1, "labels must be 0 <= fake_label < real_label <= 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for the adapter and, with `critic_rate`, for the critic's heads; the rates stay constant.

    `accumulation` pictures (of each process) make one step. With `step_per_chunk` as many chunks do:
    the other reading of TUDSR's stage two.
    """

    steps: int = 5100
    rate: float = 5e-5
    critic_rate: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip: float = 1.0
    accumulation: int = 4
    step_per_chunk: bool = False

    def __post_init__(self) -> None:
        _check(self.steps >= 1, f"steps {self.steps} must be 1 or more")
        _check(self.rate > 0 and self.critic_rate > 0, "rates must be above 0")
        _check(all(0 <= beta < 1 for beta in self.betas), "betas must be from 0 to below 1")
        _check(self.eps > 0 and self.weight_decay >= 0, "eps must be above 0, weight_decay not below")
        _check(self.clip > 0, f"clip {self.clip:g} must be above 0")
        _check(self.accumulation >= 1, f"accumulation {self.accumulation} must be 1 or more")


@dataclass(frozen=True)
class RunConfig:
    """How it runs. `precision` is that of the computation, `base_precision` that of the frozen weights.

    `ema` is the decay of a moving average of the adapter, which is then what is exported; 0 keeps none.
    `patience`: steps without a finite loss in a row after which training gives up.
    """

    precision: Precision = "bf16"
    base_precision: Precision = "fp32"
    gradient_checkpointing: bool = True
    ema: float = 0.0
    save_every: int = 500
    keep: int = 3
    patience: int = 10
    tensorboard: bool = True

    def __post_init__(self) -> None:
        _check(0 <= self.ema < 1, f"ema {self.ema:g} must be from 0 to below 1")
        _check(min(self.save_every, self.keep, self.patience) >= 1, "save_every, keep and patience must be 1 or more")


@dataclass(frozen=True)
class ValidationConfig:
    """Sharp pictures to try the adapter on now and then: the first `count` of `folder`; none without a folder."""

    folder: Path | None = None
    every: int = 500
    count: int = 4

    def __post_init__(self) -> None:
        _check(min(self.every, self.count) >= 1, "every and count must be 1 or more")


@dataclass(frozen=True)
class TrainingConfig:
    """One run: where it goes, and its sections."""

    output: Path
    model: ModelConfig
    data: DataConfig
    seed: int = 123
    lora: LoraConfig = field(default_factory=LoraConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    discriminator: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def chunks_per_picture(self) -> int:
        """N^2 in stage two, 1 in stage one."""
        return self.data.chunks**2

    @property
    def chunks_per_step(self) -> int:
        """Chunks that each process sees before the optimisers step."""
        return self.optimizer.accumulation * (1 if self.optimizer.step_per_chunk else self.chunks_per_picture)

    def said(self) -> dict[str, Any]:
        """Return all settings as plain values, paths by their last name, for the exported adapter."""
        return plain_values(asdict(replace(self, model=replace(self.model, base=Path(self.model.base).name))))


# What differs from the defaults above in stage two (TUDSR sec. 4.1: t = 50, N = 2, 3500 steps; x8 = 4 x 2).
STAGE_DEFAULTS: dict[int, dict[str, dict[str, Any]]] = {
    1: {},
    2: {"model": {"timestep": 50}, "data": {"chunks": 2, "factor": 8}, "optimizer": {"steps": 3500}},
}


def read_config(path: Path, stage: int) -> TrainingConfig:
    """Read a TOML file for stage 1 or 2; relative paths are taken from the file's own folder.

    Raises ConfigError for anything unknown, missing, of another kind or out of range.
    """
    return _of_stage(read_sections(TrainingConfig, path, STAGE_DEFAULTS[stage]), stage, path)


def _of_stage(config: TrainingConfig, stage: int, path: Path) -> TrainingConfig:
    if stage == 1 and (config.data.chunks != 1 or config.model.stage_one):
        raise ConfigError(f"{path}: chunks and stage_one belong to stage two")
    if stage == 2 and config.data.chunks < 2:
        raise ConfigError(f"{path}: stage two needs chunks of 2 or more")
    return replace(config, model=found_base(config.model, path.parent))


def found_base(model: ModelConfig, folder: Path) -> ModelConfig:
    """Return `model` with its base below `folder`, unless it is the shipped one."""
    return model if model.base == EMBEDDED else replace(model, base=str(folder / model.base))


def plain_values(value: Any) -> Any:
    """Return settings as JSON has them, paths by their last name."""
    if isinstance(value, dict):
        return {name: plain_values(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner) for inner in value]
    return value.name if isinstance(value, Path) else value
