"""The loop of co-learning: downsampler alone, or teacher and then student and downsampler together, with both critics.

A reconstruction of Kim and Kim 2024 (arXiv 2410.07663), see `colearn_config.py`. One process. What a step draws follows
from the seed and the numbers of its samples, so that a restart changes nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .colearn_config import ColearnConfig
from .colearn_networks import build_networks
from .colearn_terms import Judge, Made, Terms
from .samples import rng_of
from .sections import ConfigError
from .state import load_optimizer, load_state, optimizer_tensors, save_state, saved_steps
from .trainer import Patience, Report, interrupts, is_number
from .two_folders import Sample, TwoFolders, samples

REPLAY = 20  # purpose of the random numbers that choose a snapshot
CRITICS = ("high", "low")
AVERAGED = ("student", "down")


class Colearner:
    """One training of either task. Raises ConfigError, CheckpointError and PictureError for what cannot be used."""

    def __init__(self, config: ColearnConfig) -> None:
        from accelerate import Accelerator

        self.config = config
        precision = {"fp32": "no"}.get(config.run.precision, config.run.precision)
        self.accelerator = Accelerator(mixed_precision=precision)
        if self.accelerator.num_processes > 1:
            raise ConfigError("co-learning runs in one process; start it without accelerate launch")
        if config.needs_poor and not config.data.poor:
            raise ConfigError("[data] poor is missing; name the folders that hold the poor pictures")
        self.pictures = TwoFolders(config.data, config.seed)
        self.networks = build_networks(config, self.accelerator.device)
        self.judge = Judge(config, self.networks)
        self.parameters = self.networks.trained()
        self.optimizers = {name: self._adamw(name, own) for name, own in self.parameters.items()}
        kept = AVERAGED if config.run.ema else ()
        self.average = {name: _copies(self.parameters[name]) for name in kept if name in self.parameters}
        self.replayed = copy.deepcopy(self.networks.down).requires_grad_(False)
        self.snapshots: list[dict[str, Tensor]] = []
        self.step, self.interrupted = 0, False
        self.patience = Patience(config.run.patience)

    def _adamw(self, name: str, own: dict[str, nn.Parameter]) -> torch.optim.AdamW:
        o, rates = self.config.optimizer, {"down": "down_rate", "high": "critic_rate", "low": "critic_rate"}
        rate = self.config.teacher.rate if name == "teacher" else getattr(o, rates.get(name, "rate"))
        betas = o.critic_betas if name in CRITICS else o.betas
        return torch.optim.AdamW(own.values(), lr=rate, betas=betas, eps=o.eps, weight_decay=o.weight_decay)

    def run(self, report: Report, after_step: Callable[[int], None] = lambda step: None) -> bool:
        """Train to the last step, or until interrupted; return whether it was reached.

        A checkpoint is written every `save_every` steps, at the end and when interrupted. Raises TrainingError when
        the loss stays without a number; the last checkpoint is then as it was.
        """
        with interrupts(self._interrupt):
            stream = samples(self.pictures, self.step)
            while self.step < self.config.steps and not self.interrupted:
                report(self.step + 1, self.take_step(next(stream)))
                after_step(self.step)
                last = self.step == self.config.steps or self.interrupted
                if last or self.step % self.config.run.save_every == 0:
                    save_state(self.config, self.step, self.parts())
        return self.step == self.config.steps

    def _interrupt(self) -> None:
        self.interrupted = True

    def take_step(self, sample: Sample) -> dict[str, float]:
        """Compute the terms of one step's networks, and step these; return every term."""
        sample = sample.to(self.accelerator.device)
        for name in CRITICS:
            if (critic := getattr(self.networks, name)) is not None:
                critic.refresh()
        phase, done = self.config.phase_at(self.step)
        passes = {"teacher": self._teacher, "joint": self._joint}.get(phase, self._down_alone)
        sums: Terms = {}
        turn: set[str] = set()
        for names, compute in passes(sample, phase, done):
            with self.accelerator.autocast():
                terms = compute()
            if terms:
                sum(terms.values()).backward()
                sums |= {name: value.detach().float() for name, value in terms.items()}
                turn |= names
        return self._finish({name: float(value) for name, value in sums.items()}, turn & self.parameters.keys())

    def _finish(self, numbers: dict[str, float], turn: set[str]) -> dict[str, float]:
        self.step += 1
        stepped = all(map(is_number, numbers.values())) and self._step_optimizers(turn, numbers)
        if not stepped:
            self._zero()
        return self.patience.after(self.step, numbers, stepped)

    def _step_optimizers(self, turn: set[str], numbers: dict[str, float]) -> bool:
        """Clip and step; return False, with nothing changed, if a gradient is not finite."""
        for name in sorted(turn):
            own = self.parameters[name].values()
            numbers[f"{name}_norm"] = float(nn.utils.clip_grad_norm_(list(own), self.config.optimizer.clip))
        if not all(is_number(numbers[f"{name}_norm"]) for name in turn):
            return False
        for name in sorted(turn):
            self.optimizers[name].step()
        self._zero()
        for name in turn & self.average.keys():
            for key, value in self.parameters[name].items():
                self.average[name][key].lerp_(value.detach(), 1 - self.config.run.ema)
        return True

    def _zero(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _down_alone(self, sample: Sample, phase: str, done: int) -> Iterator[tuple[set[str], Callable[[], Terms]]]:
        """Yield, one after the other, whose gradients come and how: the downsampler, then its critic."""
        real = sample.damaged if phase == "warm" else sample.poor
        target, made = real if phase == "warm" or self.config.data.paired else None, Made([], [])
        yield {"down"}, lambda: self.judge.of_down(sample, target, made)
        if self.networks.low is not None:
            yield {"low"}, lambda: self.judge.of_low(sample, real, made)

    def _teacher(self, sample: Sample, phase: str, done: int) -> Iterator[tuple[set[str], Callable[[], Terms]]]:
        poor = self.judge.pairs(sample, self.networks.down)
        yield {"teacher"}, lambda: self.judge.of_teacher(sample, poor)

    def _joint(self, sample: Sample, phase: str, done: int) -> Iterator[tuple[set[str], Callable[[], Terms]]]:
        """Yield the passes of student, downsampler, or both, then those of the critics that saw something new."""
        if done % self.config.safeguards.every == 0 or not self.snapshots:
            self._take_snapshot()
        learns, weights = self.config.downsampler.learns, self.config.weights
        both = learns and self.config.phases.order == "joint"
        student = both or not learns or done % 2 == 0
        down = both or not student
        made, judge = Made([], []), self.judge
        if student:
            poor = judge.pairs(sample, self._replay())
            yield {"student"}, lambda: judge.of_student(sample, poor, made)
        if down:
            target = sample.poor if self.config.data.paired else None
            yield {"down"}, lambda: judge.of_down(sample, target, made)
        share = weights.cycle if student and weights.cycle and done >= weights.cycle_after else None
        closes = down and weights.down_cycle > 0
        if sample.poor is not None and (share or closes):
            names = ({"student"} if share else set()) | ({"down"} if closes else set())
            yield names, lambda: judge.of_cycle(sample, made, share, closes)
        if self.networks.high is not None and student:
            yield {"high"}, lambda: judge.of_high(sample, made)
        if self.networks.low is not None and down:
            yield {"low"}, lambda: judge.of_low(sample, sample.poor, made)

    def _take_snapshot(self) -> None:
        own = self.parameters.get("down", {})
        self.snapshots = [*self.snapshots, _copies(own)][-self.config.safeguards.snapshots :]

    def _replay(self):
        """Return the downsampler of one of the last snapshots, drawn for this step."""
        choice = rng_of(self.config.seed, REPLAY, self.step).integers(len(self.snapshots))
        self.replayed.load_state_dict(self.snapshots[choice], strict=False)
        return self.replayed

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that a restart needs, by part and name."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, own in self.parameters.items():
            # Critics have buffers too, their estimates of norms.
            found[name] = getattr(self.networks, name).heads.state_dict() if name in CRITICS else dict(own)
            found[f"{name}_optimizer"] = optimizer_tensors(self.optimizers[name])
            if name in self.average:
                found[f"{name}_average"] = self.average[name]
        found["replay"] = {f"{n}/{key}": one for n, own in enumerate(self.snapshots) for key, one in own.items()}
        return found

    @torch.no_grad()
    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; return the step that it was taken at."""
        if not (saved := saved_steps(self.config)):
            return 0
        self.step, parts = load_state(self.config, saved[-1])
        for name, own in self.parameters.items():
            if name in CRITICS:
                getattr(self.networks, name).heads.load_state_dict(parts[name])
            else:
                for key, parameter in own.items():
                    parameter.copy_(parts[name][key])
            load_optimizer(self.optimizers[name], parts.get(f"{name}_optimizer", {}))
            for key, value in self.average.get(name, {}).items():
                value.copy_(parts[f"{name}_average"][key])
        self.snapshots = []
        for key, value in sorted(parts.get("replay", {}).items(), key=lambda item: int(item[0].partition("/")[0])):
            number, _, name = key.partition("/")
            if int(number) == len(self.snapshots):
                self.snapshots.append({})
            self.snapshots[-1][name] = value.to(self.accelerator.device)
        return self.step

    @contextmanager
    @torch.no_grad()
    def averaged(self) -> Iterator[None]:
        """Put the moving averages in their networks' place for the block, where they are kept."""
        before = {name: _copies(self.parameters[name]) for name in self.average}
        for name, own in self.average.items():
            for key, value in own.items():
                self.parameters[name][key].copy_(value)
        try:
            yield
        finally:
            for name, own in before.items():
                for key, value in own.items():
                    self.parameters[name][key].copy_(value)


def _copies(own: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in own.items()}
