"""The loop of both stages: passes, steps, restarts; several processes through accelerate.

Within a step neither network changes: gradients of all chunks are added up, each weighted so that the step
follows their mean, and only the last pass of a step exchanges gradients between processes.
"""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from .config import TrainingConfig
from .networks import build_stage_one, build_trained, trained_parameters
from .objectives import Objectives, build_critic, build_dists
from .samples import Pictures, batches
from .stages import POSTERIOR, Chunk, Cut, chunks_of, looped, whole
from .state import load_optimizer, load_state, optimizer_tensors, save_state, saved_steps

log = logging.getLogger(__name__)

Report = Callable[[int, dict[str, float]], None]
"""`report(step, numbers)` after every step, on the first process: losses, and `skipped` where there was no step."""


class TrainingError(RuntimeError):
    """A training that cannot go on; the message says what to change."""


class Patience:
    """Counts steps in a row that had no number, and loses itself after `most` of them."""

    def __init__(self, most: int) -> None:
        self.most, self.skipped = most, 0

    def after(self, step: int, numbers: dict[str, float], stepped: bool) -> dict[str, float]:
        """Return what to report of a step, "skipped" with it if it was not taken; raises TrainingError at the end."""
        if stepped:
            self.skipped = 0
            return numbers
        self.skipped += 1
        if self.skipped >= self.most:
            raise TrainingError(
                f"no finite loss in {self.skipped} steps up to step {step}; lower the rates, or compute in fp32"
            )
        return numbers | {"skipped": float(self.skipped)}


class Trainer:
    """One training of stage 1 or 2, on this process's share of the data."""

    def __init__(self, config: TrainingConfig, stage: int) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        self.config, self.stage = config, stage
        precision = {"fp32": "no"}.get(config.run.precision, config.run.precision)
        # The critic's estimates of norms are buffers that every process computes alike.
        self.accelerator = Accelerator(
            mixed_precision=precision, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)]
        )
        self.pictures = Pictures(config.data, config.seed)
        network, critic = build_trained(config), build_critic(config)
        first = build_stage_one(config, network).to(self.device).eval() if stage == 2 else None
        dists = build_dists(config)
        self.objectives = Objectives(config, None if dists is None else dists.to(self.device))
        self.parameters = trained_parameters(network)
        self.optimizer = self._adamw(self.parameters.values(), config.optimizer.rate)
        self.generator = self.accelerator.prepare(network)
        self.network = self.accelerator.unwrap_model(self.generator)
        self.critic = self.critic_module = self.critic_optimizer = None
        if critic is not None:
            self.critic_optimizer = self._adamw(critic.heads.parameters(), config.optimizer.critic_rate)
            self.critic = self.accelerator.prepare(critic)
            self.critic_module = self.accelerator.unwrap_model(self.critic)
        self.average = self._average()
        self.first = first
        self.step, self.interrupted, self.stopping = 0, False, False
        self.patience = Patience(config.run.patience)

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.accelerator.is_main_process

    @property
    def cut(self) -> Cut:
        """How batches become chunks."""
        return whole if self.first is None else looped(self.restore_first, self.config.data.chunks)

    def restore_first(self, pictures: Tensor) -> Tensor:
        """Return what the frozen stage one makes of pictures, in this run's precision."""
        with torch.no_grad(), self.accelerator.autocast():
            return self.first(pictures.to(self.device))

    def _adamw(self, parameters, rate: float) -> torch.optim.AdamW:
        o = self.config.optimizer
        return torch.optim.AdamW(parameters, lr=rate, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay)

    def _average(self):
        if not self.config.run.ema:
            return None
        from diffusers.training_utils import EMAModel

        return EMAModel(self.parameters.values(), decay=self.config.run.ema, foreach=True)

    def run(self, report: Report, after_step: Callable[[int], None] = lambda step: None) -> bool:
        """Train to the last step, or until interrupted; return whether it was reached.

        A checkpoint is written every `save_every` steps, at the end and when interrupted. `after_step` is
        called on every process. Raises TrainingError when the loss stays without a number.
        """
        with interrupts(self._interrupt):
            stream = self._stream()
            while self.step < self.config.optimizer.steps and not self.stopping:
                numbers = self.take_step([next(stream) for _ in range(self.config.chunks_per_step)])
                if self.is_main:
                    report(self.step, numbers)
                after_step(self.step)
                last = self.step == self.config.optimizer.steps or self.stopping
                if last or self.step % self.config.run.save_every == 0:
                    self.save()
        return self.step == self.config.optimizer.steps

    def _stream(self) -> Iterator[Chunk]:
        picture, skip = divmod(self.step * self.config.chunks_per_step, self.config.chunks_per_picture)
        own = batches(self.pictures, picture, self.accelerator.process_index, self.accelerator.num_processes)
        return chunks_of(own, self.cut, self.device, skip)

    def take_step(self, chunks: list[Chunk]) -> dict[str, float]:
        """Add up the gradients of `chunks` and step both optimisers once; return the mean of each term."""
        if self.critic_module is not None:
            self.critic_module.refresh()
        sums: dict[str, Tensor] = {}
        for number, chunk in enumerate(chunks):
            with self._exchange(number == len(chunks) - 1):
                for name, value in self.add_gradients(chunk, 1 / len(chunks)).items():
                    sums[name] = sums.get(name, 0) + value.detach().float() / len(chunks)
        numbers = self._shared(sums)
        self.step += 1
        stepped = all(map(is_number, numbers.values())) and self._step_optimizers(numbers)
        if not stepped:
            self._zero()
        return self.patience.after(self.step, numbers, stepped)

    def add_gradients(self, chunk: Chunk, weight: float) -> dict[str, Tensor]:
        """Run both passes over one chunk; each leaves `weight` times its gradient on its own network alone."""
        made = self.generator(chunk.low, chunk.draws(self.config.seed, POSTERIOR))
        with self.accelerator.autocast():
            terms = self.objectives.of_generator(made, chunk, self.critic_module)
        self.accelerator.backward(sum(terms.values()) * weight)
        if self.critic is not None:
            with self.accelerator.autocast():
                opinions = self.objectives.of_critic(made, chunk, self.critic)
            self.accelerator.backward(sum(opinions.values()) * weight)
            terms |= opinions
        return terms

    @contextmanager
    def _exchange(self, last: bool) -> Iterator[None]:
        """Hold back the exchange between processes, forward and backward, but for the `last` pass of a step."""
        with ExitStack() as stack:
            for network in (self.generator, self.critic):
                if network is not None and not last:
                    stack.enter_context(self.accelerator.no_sync(network))
            yield

    def _shared(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Return the means over all processes; an interrupt of any of them stops all."""
        interrupted = torch.tensor(float(self.interrupted), device=self.device)
        values = torch.stack([*sums.values(), interrupted])
        *means, interrupted = (self.accelerator.reduce(values, "sum") / self.accelerator.num_processes).tolist()
        self.stopping = interrupted > 0
        return dict(zip(sums, means, strict=True))

    def _step_optimizers(self, numbers: dict[str, float]) -> bool:
        """Clip and step; return False, with nothing changed, if a gradient is not finite."""
        clip, pairs = self.config.optimizer.clip, [("norm", self.parameters.values(), self.optimizer)]
        if self.critic_module is not None:
            pairs.append(("critic_norm", self.critic_module.heads.parameters(), self.critic_optimizer))
        for name, parameters, _ in pairs:
            numbers[name] = float(nn.utils.clip_grad_norm_(list(parameters), clip))
        if not all(is_number(numbers[name]) for name, _, _ in pairs):
            return False
        for _, _, optimizer in pairs:
            optimizer.step()
        self._zero()
        if self.average is not None:
            self.average.step(self.parameters.values())
        return True

    def _zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if self.critic_optimizer is not None:
            self.critic_optimizer.zero_grad(set_to_none=True)

    def parts(self) -> dict[str, dict[str, Tensor]]:
        """Return everything that a restart needs, by part and name."""
        found = {"adapter": dict(self.parameters), "optimizer": optimizer_tensors(self.optimizer)}
        if self.critic_module is not None:
            found["critic"] = self.critic_module.heads.state_dict()
            found["critic_optimizer"] = optimizer_tensors(self.critic_optimizer)
        if self.average is not None:
            found["average"] = dict(zip(self.parameters, self.average.shadow_params, strict=True))
            found["average_steps"] = {"count": torch.tensor(self.average.optimization_step)}
        return found

    def save(self) -> None:
        """Write a checkpoint, on the first process; the others wait."""
        if self.is_main:
            save_state(self.config, self.step, self.parts())
        self.accelerator.wait_for_everyone()

    @torch.no_grad()
    def resume(self) -> int:
        """Load the newest checkpoint, if there is one; return the step that it was taken at."""
        if not (saved := saved_steps(self.config)):
            return 0
        self.step, parts = load_state(self.config, saved[-1])
        for name, parameter in self.parameters.items():
            parameter.copy_(parts["adapter"][name])
        load_optimizer(self.optimizer, parts.get("optimizer", {}))
        if self.critic_module is not None:
            self.critic_module.heads.load_state_dict(parts["critic"])
            load_optimizer(self.critic_optimizer, parts.get("critic_optimizer", {}))
        if self.average is not None:
            for name, shadow in zip(self.parameters, self.average.shadow_params, strict=True):
                shadow.copy_(parts["average"][name])
            self.average.optimization_step = int(parts["average_steps"]["count"])
        return self.step

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average in the adapter's place for the block, where one is kept."""
        if self.average is None:
            yield
            return
        self.average.store(self.parameters.values())
        self.average.copy_to(self.parameters.values())
        try:
            yield
        finally:
            self.average.restore(self.parameters.values())

    def _interrupt(self) -> None:
        self.interrupted = True


@contextmanager
def interrupts(note: Callable[[], None]) -> Iterator[None]:
    """Let `note` be told of the first Ctrl-C or SIGTERM in the block; a second one ends it at once."""

    def stop(number: int, frame: object) -> None:
        note()
        for kind, old in before.items():
            signal.signal(kind, old)

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {kind: signal.signal(kind, stop) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for kind, old in before.items():
            signal.signal(kind, old)


def is_number(value: float) -> bool:
    """Return whether `value` is finite."""
    return abs(value) < float("inf")
