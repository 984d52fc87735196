"""What an adapter is, whichever file it came from: changes to weights, and how the method uses them.

The one internal form of every published format; no file is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..diffusion import OneStep
from ..methods import METHODS, Method, branch_weights
from ..untrusted import some
from .tensor_files import CheckpointError


@dataclass(frozen=True)
class LoRAWeights:
    """One low-rank update: delta = (alpha / rank) up @ down, reshaped to the weight.

    `down` is `r in ...`, `up` is `out r ...`; a convolution's kernel belongs to `down`.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight that the update is made for (a linear's may be a 1 x 1 convolution's)."""
        return self.up.shape[0], *self.down.shape[1:]

    def fits(self, weight: Tensor) -> bool:
        """Whether the update has the shape of `weight`; a linear layer's fits a 1 x 1 convolution, and the reverse."""
        own, theirs = (
            tuple(shape[:2]) if set(shape[2:]) <= {1} else tuple(shape) for shape in (self.shape, weight.shape)
        )
        return own == theirs and set(self.up.shape[2:]) <= {1}

    def delta(self, weight: Tensor) -> Tensor:
        """Return the update for `weight` in float32, reshaped (a linear's fits a 1 x 1 convolution)."""
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return (product * (self.alpha / self.rank)).view(weight.shape)

    def plus(self, other: LoRAWeights) -> LoRAWeights:
        """Return one update of the summed rank whose delta is the sum of both."""
        ups = [update.up.float() * (update.alpha / update.rank) for update in (self, other)]
        rank = self.rank + other.rank
        return LoRAWeights(torch.cat([self.down.float(), other.down.float()]), torch.cat(ups, 1), float(rank))


@dataclass(frozen=True)
class WeightDelta:
    """Changes to one network, by its diffusers paths.

    `updates`: low-rank updates by module path. `weights`: trained values by parameter path that take
    the place of the base model's (OSEDiff trains conv_in) before the updates are added. `targets`: how
    the names of all updated modules end, where the file says so; they lie under `within`.
    """

    updates: dict[str, LoRAWeights] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    within: str = ""

    def __bool__(self) -> bool:
        return bool(self.updates or self.weights)

    def missing(self, modules: Iterable[str]) -> list[str]:
        """Return those of a network's linear and convolution `modules` that the file says it updates, and does not."""
        ends = tuple(f".{target}" for target in self.targets)
        own = (name for name in modules if name.startswith(self.within) and name not in self.updates)
        return [name for name in own if f".{name.removeprefix(self.within)}".endswith(ends)] if ends else []

    def misfits(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Return every change whose shape is another than its weight's, with both; `weights` by parameter path."""
        pairs = [(path, update.shape, weights[f"{path}.weight"], update.fits) for path, update in self.updates.items()]
        pairs += [
            (path, value.shape, weights[path], lambda weight, value=value: weight.shape == value.shape)
            for path, value in self.weights.items()
        ]
        return [
            f"{path} (expected {sides(weight.shape)}, found {sides(shape)})"
            for path, shape, weight, fits in pairs
            if not fits(weight)
        ]

    def plus(self, other: WeightDelta) -> WeightDelta:
        """Return both changes together."""
        updates = dict(self.updates)
        for path, update in other.updates.items():
            updates[path] = updates[path].plus(update) if path in updates else update
        return WeightDelta(updates, self.weights | other.weights)


@dataclass(frozen=True)
class Adapter:
    """A method's trained part: what it changes in UNet and VAE, and what a stage must know.

    `detail`: PiSA-SR's semantic updates, which come on top of `unet`. `predictor`: InvSR's noise
    predictor, a network of its own. `stage`: 1, 2, or None when the file does not say. `steps`: only
    where the file carries its own formula; otherwise the method's.
    """

    name: str
    unet: WeightDelta = WeightDelta()
    vae: WeightDelta = WeightDelta()
    detail: WeightDelta = WeightDelta()
    predictor: dict[str, Tensor] = field(default_factory=dict)
    method: str = "tudsr"
    stage: int | None = None
    steps: tuple[OneStep, ...] | None = None

    @property
    def about(self) -> Method:
        """The row of the method table."""
        return METHODS[self.method]

    def steps_for(self, stage: int = 1, count: int = 1, timestep: int = 0) -> tuple[OneStep, ...]:
        """Return the steps of a run: the file's own, unless `count` or `timestep` ask for others."""
        if self.steps and count == len(self.steps) and not timestep:
            return self.steps
        return self.about.steps(stage, count, timestep)

    def dials(self, fidelity: float = 1.0, detail: float = 1.0) -> list[tuple[float, bool]]:
        """Return `branch_weights` of PiSA-SR's dials; one branch for all others.

        Raises ValueError when the dials of another method are turned.
        """
        if not self.detail:
            if (fidelity, detail) != (1.0, 1.0):
                raise ValueError(f"{self.name} has no dials for fidelity and detail (PiSA-SR has); leave both at 1")
            return [(1.0, False)]
        return branch_weights(fidelity, detail)

    def branches(self, fidelity: float = 1.0, detail: float = 1.0) -> list[tuple[float, WeightDelta]]:
        """Return `(w_j, UNet patch of branch j)` for PiSA-SR's `dials`; one branch for all others."""
        return [
            (weight, self.unet.plus(self.detail) if full else self.unet)
            for weight, full in self.dials(fidelity, detail)
        ]


def sides(shape: Iterable[int]) -> str:
    """Return a shape in words, such as `64 x 32 x 3 x 3`."""
    return " x ".join(map(str, shape)) or "one number"


def map_updates(updates: dict[str, LoRAWeights], change: Callable[[Tensor], Tensor]) -> dict[str, LoRAWeights]:
    """Return `updates` with `change` applied to their tensors."""
    return {path: replace(update, down=change(update.down), up=change(update.up)) for path, update in updates.items()}


class LoRAMerger:
    """A network whose weights can carry one `WeightDelta` at a time.

    Patches are merged into the weights; the originals of what was touched are kept, so that going
    back is bit-exact and base weights exist once. With `keep` off nothing is kept: for a network
    that will never carry another patch.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network, self.name = network, name
        self.keep = True
        self.active: WeightDelta | None = None
        self._originals: dict[str, Tensor] = {}

    def check(self, patch: WeightDelta, source: str) -> None:
        """Raise CheckpointError that lists every change without a weight it fits."""
        weights = dict(self.network.named_parameters())
        unmatched = [path for path in patch.updates if f"{path}.weight" not in weights]
        unmatched += [path for path in patch.weights if path not in weights]
        if unmatched:
            raise CheckpointError(
                f"adapter {source} changes what this {self.name} does not have: {some(unmatched)}; it was made for "
                "another base model"
            )
        if wrong := patch.misfits(weights):
            raise CheckpointError(
                f"adapter {source} does not fit the shapes of this {self.name} at {some(wrong)}; it is damaged, or was "
                "made for another base model"
            )
        modules = (path.removesuffix(".weight") for path, weight in weights.items() if weight.ndim > 1)
        if missing := patch.missing(modules):
            raise CheckpointError(
                f"adapter {source} lacks {len(missing)} of the {self.name}'s modules that it says it changes: "
                f"{some(missing)}; it is damaged, get it again"
            )

    @torch.no_grad()
    def use(self, patch: WeightDelta | None) -> None:
        """Make `patch` the merged one; None or an empty patch restores the base weights."""
        patch = patch or None
        if patch is self.active:
            return
        if self.active and not self.keep:
            raise RuntimeError(f"the base weights of this {self.name} were not kept, so its adapter cannot change")
        weights = dict(self.network.named_parameters())
        for path, original in self._originals.items():
            weights[path].copy_(original)
        self._originals.clear()
        for path, value in (patch.weights if patch else {}).items():
            self._keep(path, weights[path])
            weights[path].copy_(value)
        for path, update in (patch.updates if patch else {}).items():
            weight = weights[f"{path}.weight"]
            self._keep(f"{path}.weight", weight)
            update = replace(update, down=update.down.to(weight.device), up=update.up.to(weight.device))
            # Added in float32 and rounded once, as ComfyUI does it.
            weight.copy_(weight.float() + update.delta(weight))
        self.active = patch

    def _keep(self, path: str, weight: Tensor) -> None:
        if self.keep and path not in self._originals:
            self._originals[path] = weight.detach().clone()
