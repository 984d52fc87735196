"""The weighted terms of every network in co-learning, each computed so that it leaves the other networks alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import LearnedDamage, shrink
from .colearn_config import ColearnConfig
from .colearn_losses import (
    diversity,
    gradient_penalty,
    hinge_of_critic,
    hinge_of_maker,
    jitter,
    low_frequency,
    scale_gradient,
)
from .colearn_networks import Networks
from .distillation import Predict, distillation_terms
from .networks import Restorer, frozen
from .samples import torch_rng_of
from .stages import enlarge
from .teacher import drawn_like
from .two_folders import FACTOR, Sample

Terms = dict[str, Tensor]

# Uses of a sample's own random numbers.
PAIR, DOWN, AGAIN, CYCLE, JITTER, TEACH, START, FAKE, REAL = range(10, 19)


@dataclass
class Made:
    """What the makers have made in a step, for the critics: good pictures, and poor ones; both without gradient."""

    good: list[Tensor]
    poor: list[Tensor]


class Judge:
    """Computes terms for `networks`; pictures are 0..1, good ones `B 3 S S`, poor ones `B 3 s s`."""

    def __init__(self, config: ColearnConfig, networks: Networks) -> None:
        self.config, self.networks, self.weights = config, networks, config.weights

    def draws(self, sample: Sample, use: int) -> list[torch.Generator]:
        """Return a random stream for every picture."""
        return [torch_rng_of(self.config.seed, number, use) for number in sample.numbers]

    def drawn(self, sample: Sample, use: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return noise and codes for poor pictures of the size of `like`."""
        seeds = (int(torch.randint(2**31 - 1, (), generator=rng)) for rng in self.draws(sample, use))
        each = [self.networks.down.draw(tuple(like.shape[-2:]), seed) for seed in seeds]
        noise, code = (torch.cat(parts).to(like) for parts in zip(*each, strict=True))
        return noise, code

    def pairs(self, sample: Sample, from_down: LearnedDamage) -> Tensor:
        """Return the student's inputs, without gradient: classical, else real pairs, else what `from_down` makes."""
        if sample.classical.all():
            return sample.damaged
        other = sample.poor
        if not self.config.data.paired:
            with torch.no_grad():
                other = make_poor(from_down, sample.good, *self.drawn(sample, PAIR, sample.damaged))
        return torch.where(sample.classical.to(other.device)[:, None, None, None], sample.damaged, other)

    def of_teacher(self, sample: Sample, poor: Tensor) -> Terms:
        """Return ResShift's loss of the chain teacher."""
        student = self.networks.student
        x0, z = student.encode(sample.good), student.encode(enlarge(poor, FACTOR))
        return {"teacher": self.networks.teacher.loss(x0, z, self.draws(sample, TEACH))}

    def of_student(self, sample: Sample, poor: Tensor, made: Made) -> Terms:
        """Return the student's terms on pairs of good pictures and `poor` ones."""
        low, weights, terms = enlarge(poor, FACTOR), self.weights, {}
        restored = self.networks.student(low)
        made.good.append(restored.detach())
        if weights.pixel:
            terms["pixel"] = weights.pixel * F.mse_loss(restored, sample.good)
        if self.networks.high is not None:
            terms["adversarial"] = weights.adversarial * self._opinion(self.networks.high, restored * 2 - 1)
        return terms | (self._distilled(sample, poor, low) if self.networks.teacher is not None else {})

    def _distilled(self, sample: Sample, poor: Tensor, low: Tensor) -> Terms:
        student, noise, weights = self.networks.student, self.config.teacher.noise, self.weights
        x0, z = student.encode(sample.good), student.encode(low)
        start = z + noise * drawn_like(z, self.draws(sample, START)) if noise else z
        taught = self.networks.teacher.latents(poor, z, self.draws(sample, TEACH))
        scale = (noise**2 + 1) ** -0.5
        terms = distillation_terms(predict_of(student), taught, x0, start, scale, 1)
        return {name: getattr(weights, name) * value for name, value in terms.items() if getattr(weights, name)}

    def of_down(self, sample: Sample, target: Tensor | None, made: Made) -> Terms:
        """Return the downsampler's terms on good pictures; `target` are the poor ones of the same, where known."""
        down, good, weights = self.networks.down, sample.good, self.weights
        base, terms = shrink(good, FACTOR), {}
        noise, code = self.drawn(sample, DOWN, base)
        fake = make_poor(down, good, noise, code)
        made.poor.append(fake.detach())
        if self.networks.low is not None:
            terms["down_adversarial"] = weights.down_adversarial * self._opinion(
                self.networks.low, self.seen(fake, sample, FAKE)
            )
        if weights.low_frequency:
            terms["low_frequency"] = weights.low_frequency * low_frequency(fake, base)
        if weights.recode:
            terms["recode"] = weights.recode * F.mse_loss(down.style(fake), code)
        if weights.diversity:
            others, _ = self.drawn(sample, AGAIN, base)
            second = make_poor(down, good, others, code)
            terms["diversity"] = weights.diversity * diversity(fake, second, (noise, others))
        if target is not None and weights.paired:
            known = make_poor(down, good, noise, self._code_of(target, code, sample))
            terms["paired"] = weights.paired * F.l1_loss(known, target)
        return terms

    def of_cycle(self, sample: Sample, made: Made, student_share: float | None, down_learns: bool) -> Terms:
        """Return what a blur leaves of the way LR -> HR -> LR against what it leaves of the poor picture.

        `student_share` is the student's weight; None leaves it without a gradient. Where the downsampler
        learns, its own weight counts, and only its share of the gradient passes on to the student.
        """
        student, down, weights = self.networks.student, self.networks.down, self.weights
        with torch.no_grad() if student_share is None else nullcontext():
            good = student(enlarge(sample.poor, FACTOR))
        made.good.append(good.detach())
        shaken = jitter(good, self.config.safeguards, self.draws(sample, JITTER))
        if down_learns:
            shaken = scale_gradient(shaken, (student_share or 0.0) / weights.down_cycle)
        noise, code = self.drawn(sample, CYCLE, sample.poor)
        with nullcontext() if down_learns else frozen(down):
            back = make_poor(down, shaken, noise, self._code_of(sample.poor, code, sample))
        made.poor.append(back.detach())
        apart = low_frequency(back, sample.poor, self.config.safeguards.blur)
        return {"cycle": (weights.down_cycle if down_learns else student_share) * apart}

    def of_high(self, sample: Sample, made: Made) -> Terms:
        """Return D_H's terms: real good pictures against all that the student has made."""
        return self._of_critic("high", [one * 2 - 1 for one in made.good], sample.good * 2 - 1)

    def of_low(self, sample: Sample, real: Tensor, made: Made) -> Terms:
        """Return D_L's terms: `real` poor pictures against all that the downsampler has made."""
        return self._of_critic(
            "low", [self.seen(one, sample, FAKE) for one in made.poor], self.seen(real, sample, REAL)
        )

    def _of_critic(self, name: str, fakes: list[Tensor], real: Tensor) -> Terms:
        critic: nn.Module = getattr(self.networks, name)
        each = [hinge_of_critic(critic(fake.detach()), critic(real)) for fake in fakes]
        terms = {f"{name}_{key}": sum(one[key] for one in each) / len(each) for key in each[0]}
        if self.config.critics.r1:
            terms[f"{name}_r1"] = self.config.critics.r1 / 2 * gradient_penalty(critic, real)
        return terms

    def seen(self, poor: Tensor, sample: Sample, use: int) -> Tensor:
        """Return poor pictures as D_L sees them: -1..1, with the noise that hides steps of 8 bit."""
        if not self.config.critics.dequantise:
            return poor * 2 - 1
        noise = [torch.rand(poor.shape[1:], generator=rng) for rng in self.draws(sample, use)]
        return (poor + (torch.stack(noise).to(poor) - 0.5) / 255) * 2 - 1

    def _opinion(self, critic: nn.Module, pictures: Tensor) -> Tensor:
        with frozen(critic):
            return hinge_of_maker(critic(pictures))

    def _code_of(self, poor: Tensor, drawn: Tensor, sample: Sample) -> Tensor:
        """Return the codes of `poor` pictures, some of them dropped for drawn ones."""
        drop = self.config.downsampler.drop
        dropped = [float(torch.rand((), generator=rng)) < drop for rng in self.draws(sample, CYCLE)]
        return torch.where(torch.tensor(dropped).to(poor.device)[:, None], drawn, self.networks.down.style(poor))


def make_poor(down: LearnedDamage, good: Tensor, noise: Tensor, code: Tensor) -> Tensor:
    """Return what `down` makes of good pictures at strength 1, with a gradient, 0..1."""
    base = shrink(good, FACTOR)
    return (base + down(down.condition(good), base, noise, code)).clamp(0, 1)


def predict_of(student: Restorer) -> Predict:
    """Return the student as `distillation_terms` calls it: index 1 is its own timestep, 0 asks for the inverse."""

    def predict(x: Tensor, index: int) -> Tensor:
        text = student.text.to(x).expand(len(x), -1, -1)
        eps = student.unet(x, student.step.t if index else 0, encoder_hidden_states=text).sample
        return student.step.finish(x, eps)

    return predict
