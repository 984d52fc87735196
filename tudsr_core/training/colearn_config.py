"""What a training of co-learning is asked to do, from TOML.

No code or loss of the paper (Kim and Kim 2024, arXiv 2410.07663) is public: wherever a default below is not said to be
somebody's, it is our reconstruction, with its reason.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ..pictures import RECIPES
from .config import LoraConfig, ModelConfig, RunConfig, ValidationConfig, found_base, plain_values
from .sections import ConfigError, parse_toml, read_sections

PAIRS = ("clean", *RECIPES)


def _check(right: bool, says: str) -> None:
    if not right:
        raise ValueError(says)


@dataclass(frozen=True)
class PairsConfig:
    """Two folders: `good` pictures, and `poor` ones of the damage that is to be learned.

    With `paired` a poor picture is a quarter of the good one of the same name, else they need not show the same.
    `size` is the side of good crops; poor ones are a quarter. `classical` is how many of the student's pairs
    are made by `degradation` and not by the downsampler: half, so that it never sees its own errors alone.
    `any_size` allows good pictures that are smaller than the poor ones, which mostly are swapped folders.
    """

    good: tuple[Path, ...] = ()
    poor: tuple[Path, ...] = ()
    paired: bool = False
    size: int = 256
    degradation: Literal[PAIRS] = "real-esrgan"
    classical: float = 0.5
    any_size: bool = False
    flip: bool = True
    batch: int = 4
    workers: int = 4

    def __post_init__(self) -> None:
        _check(bool(self.good), "good is missing; name the folders that hold the good pictures")
        _check(self.size >= 64 and self.size % 64 == 0, f"size {self.size} must be a multiple of 64")
        _check(0 <= self.classical <= 1, f"classical {self.classical:g} must be from 0 to 1")
        _check(self.batch >= 1, f"batch {self.batch} must be 1 or more")
        _check(0 <= self.workers <= 256, f"workers {self.workers} must be from 0 to 256")


@dataclass(frozen=True)
class DownConfig:
    """The downsampler: "latent" is the paper's single diffusion step, "pixel" the control without diffusion.

    "shared" is the paper's over SD2.1: the student's frozen UNet with an adapter of `rank` of its own.
    `keeps` (not of "shared"): nothing is added that a blur of sigma 2 leaves, safeguard c as a construction. The loss
    `low_frequency` alone leaves shifts of some steps of 8 bit, which a student then learns to undo; off for
    damage that is one of colours.
    `start` is a file to go on from, such as the one that `tudsr train downsampler` has written; its own sizes
    then count. `learns` off keeps it as it is while the student learns from it. Half of the codes are drawn
    (`drop`), so that it works with and without a style.
    """

    kind: Literal["latent", "pixel", "shared"] = "latent"
    width: int = 48
    blocks: int = 6
    code: int = 16
    maps: int = 4
    rank: int = 16
    keeps: bool = True
    start: Path | None = None
    learns: bool = True
    drop: float = 0.5

    def __post_init__(self) -> None:
        _check(0 <= self.drop <= 1, f"drop {self.drop:g} must be from 0 to 1")
        _check(
            self.width > 0 and self.blocks > 0 and self.code > 0 and self.maps > 0 and self.rank > 0,
            "sizes must be above 0",
        )


@dataclass(frozen=True)
class TeacherConfig:
    """Who makes the targets of distillation.

    "residual-shift": a small ResShift on the latents of the base, trained here (`chain` steps, with `least`,
    `kappa` and `power` of its journal's schedule, `rate` its learning rate). "zoom" and "stablesr": this pack's
    multi-step ways over the SD2.1 of `base`, with `sampling` steps; StableSR's file is `file`. `noise` is what the
    student's start is given, in kappa sqrt(eta_T): 0, since the pack's one-step students begin without noise.
    """

    kind: Literal["none", "residual-shift", "zoom", "stablesr"] = "residual-shift"
    chain: int = 4
    least: float = 0.2
    kappa: float = 2.0
    power: float = 0.3
    rate: float = 2e-4
    base: Path | None = None
    file: Path | None = None
    sampling: int = 20
    noise: float = 0.0

    def __post_init__(self) -> None:
        _check(self.chain >= 2 and self.sampling >= 1, "chain must be 2 or more, sampling 1 or more")
        _check(self.kind not in ("zoom", "stablesr") or self.base is not None, f"teacher {self.kind} needs base")
        _check(self.kind != "stablesr" or self.file is not None, "teacher stablesr needs file")
        _check(self.rate > 0 and self.noise >= 0, "rate must be above 0, noise not below")


@dataclass(frozen=True)
class WeightsConfig:
    """Weights of all terms; 0 leaves a term out, with what it needs.

    Of the student: `pixel` (mean squared error), `adversarial` (D_H; the paper's weight is unknown, this keeps
    PSNR), `distill`, `inverse`, `consistency` (SinSR: 1 each; 0.1 here, where `pixel` knows the truth), `cycle`
    (half of the downsampler's, and only after `cycle_after` steps: safeguard b, since a cycle first teaches how to
    hide).
    Of the downsampler: `down_adversarial` (D_L; its main term, so 1), `low_frequency` (L1 of what is left by a
    blur of sigma 2: safeguard c, against moved content and colour), `paired` (L1 where the truth is known; small,
    since noise cannot be guessed), `down_cycle`, `diversity` (mode seeking, safeguard d; small, since it has no
    upper end), `recode` (the code found again in the result, so that codes and styles mean something without pairs).
    """

    pixel: float = 1.0
    adversarial: float = 0.02
    distill: float = 0.1
    inverse: float = 0.1
    consistency: float = 0.1
    cycle: float = 0.5
    cycle_after: int = 500
    down_adversarial: float = 1.0
    low_frequency: float = 10.0
    paired: float = 0.5
    down_cycle: float = 1.0
    diversity: float = 0.05
    recode: float = 0.1

    def __post_init__(self) -> None:
        _check(min(asdict(self).values()) >= 0, "no weight may be below 0")


@dataclass(frozen=True)
class CriticsConfig:
    """D_H sees by `features` (with `weights`), as in the training of adapters; D_L is a PatchGAN of `width`.

    Both have spectral norms and hinge losses, as adversarial distillation has; `r1` is a gradient penalty on
    real pictures beside them (safeguard f), off since the norms mostly suffice. `dequantise` adds noise of half a
    step of 8 bit to what D_L sees, so that it cannot tell files from floats. `low` is the output folder of the
    downsampler's training whose D_L goes on: beside a fresh one, which knows nothing yet, a trained downsampler soon
    gives up its noise to the terms that ask for less of it.
    """

    features: str = "scratch"
    weights: Path | None = None
    width: int = 32
    r1: float = 0.0
    dequantise: bool = True
    low: Path | None = None

    def __post_init__(self) -> None:
        _check(1 <= self.width <= 512 and self.r1 >= 0, "width must be from 1 to 512, r1 not below 0")


@dataclass(frozen=True)
class SafeguardsConfig:
    """Against hidden messages from student to downsampler (a): noise, a shift and JPEG before the cycle closes.

    `noise` in steps of 8 bit, `shift` in pixels, `quality` is the lowest of JPEG (100: none). Replay (e): the
    student's pairs come from the last `snapshots` copies of the downsampler, taken every `every` steps.
    `blur`: the cycle compares what a blur of so many poor pixels (sigma) leaves. Without one (0) it asks the student to
    keep the noise of the poor picture, and the downsampler to add none.
    """

    noise: float = 0.5
    shift: float = 0.5
    quality: float = 80.0
    snapshots: int = 3
    every: int = 200
    blur: float = 2.0

    def __post_init__(self) -> None:
        _check(0 <= self.noise <= 64 and 0 <= self.shift <= 1, "noise must be from 0 to 64, shift from 0 to 1")
        _check(1 <= self.quality <= 100, f"quality {self.quality:g} must be from 1 to 100")
        _check(1 <= self.snapshots <= 64 and self.every >= 1, "snapshots must be from 1 to 64, every 1 or more")
        _check(0 <= self.blur <= 16, f"blur {self.blur:g} must be from 0 to 16")


@dataclass(frozen=True)
class PhasesConfig:
    """Steps of each phase, one after the other.

    Of `tudsr train downsampler`: `warm` on classical damage, so that it begins as something plausible, then `real` on
    the poor folder. Of `tudsr train colearn`: `teacher`, then `joint`, in which with `order` "alternating" student and
    downsampler take turns, each with the other frozen, and with "joint" both step on one loss (the paper: end to end).
    """

    warm: int = 1000
    real: int = 4000
    teacher: int = 4000
    joint: int = 10000
    order: Literal["joint", "alternating"] = "alternating"

    def __post_init__(self) -> None:
        _check(min(self.warm, self.real, self.teacher, self.joint) >= 0, "no number of steps may be below 0")


@dataclass(frozen=True)
class RatesConfig:
    """AdamW: the student's `rate` is SinSR's, critics learn twice as fast, as is usual with spectral norms."""

    rate: float = 5e-5
    down_rate: float = 1e-4
    critic_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    critic_betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        _check(min(self.rate, self.down_rate, self.critic_rate) > 0, "rates must be above 0")
        _check(all(0 <= beta < 1 for beta in (*self.betas, *self.critic_betas)), "betas must be from 0 to below 1")
        _check(self.eps > 0 and self.weight_decay >= 0 and self.clip > 0, "eps and clip must be above 0")


@dataclass(frozen=True)
class ColearnConfig:
    """One run; `task` says which of the two commands it is for."""

    output: Path
    model: ModelConfig
    data: PairsConfig
    seed: int = 123
    task: Literal["downsampler", "colearn"] = "colearn"
    lora: LoraConfig = field(default_factory=LoraConfig)
    downsampler: DownConfig = field(default_factory=DownConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    critics: CriticsConfig = field(default_factory=CriticsConfig)
    safeguards: SafeguardsConfig = field(default_factory=SafeguardsConfig)
    phases: PhasesConfig = field(default_factory=PhasesConfig)
    optimizer: RatesConfig = field(default_factory=RatesConfig)
    run: RunConfig = field(default_factory=RunConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    @property
    def needs_poor(self) -> bool:
        """Whether the task looks at poor pictures at all."""
        if self.task == "downsampler":
            return self.phases.real > 0
        learns = self.downsampler.learns and max(self.weights.down_adversarial, self.weights.down_cycle)
        return self.phases.joint > 0 and bool(learns or self.weights.cycle or self.data.paired)

    @property
    def plan(self) -> tuple[tuple[str, int], ...]:
        """Phases of the task with their steps, those of none left out."""
        names = ("warm", "real") if self.task == "downsampler" else ("teacher", "joint")
        counts = tuple((name, getattr(self.phases, name)) for name in names)
        without = "teacher" if self.teacher.kind != "residual-shift" else ""
        return tuple((name, count) for name, count in counts if count and name != without)

    @property
    def steps(self) -> int:
        """How many steps there are in all."""
        return sum(count for _, count in self.plan)

    def phase_at(self, step: int) -> tuple[str, int]:
        """Return the phase that `step` (from 0) is in, and how many of its steps were before."""
        for name, count in self.plan:
            if step < count:
                return name, step
            step -= count
        raise ValueError("there is no step after the last one")

    def said(self) -> dict[str, Any]:
        """Return all settings as plain values, paths by their last name, for checkpoints and exports."""
        return plain_values(asdict(replace(self, model=replace(self.model, base=Path(self.model.base).name))))


def read_colearn(path: Path, task: Literal["downsampler", "colearn"]) -> ColearnConfig:
    """Read a TOML file for one of the two commands; relative paths are taken from the file's own folder.

    Raises ConfigError for anything unknown, missing, of another kind or out of range.
    """
    if "task" in parse_toml(path):
        raise ConfigError(f"{path} has task, which the command says; leave it out")
    config = read_sections(ColearnConfig, path, {})
    return replace(config, task=task, model=found_base(config.model, path.parent))
