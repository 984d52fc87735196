"""Train the embedded model: `python -m tudsr_core.training.embedded configs/embedded.toml`.

A small relative of the real thing, the two networks of `models.embedded`: an autoencoder (f = 4,
32 latents) and a UNet, eps prediction on SD's schedule. Phase one trains VAE and UNet as stage
one at t = 200 (the backbone itself is stage one) and rehearses stage two at t = 50, then polishes
smooth colours; phase two freezes both and trains LoRA-2 at t = 50 on stage one's outputs with the looped-chunk scheme
(TUDSR sec. 3.3: crop N x R, gradients accumulated over N^2 chunks of R before one step).
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import from_noise_level
from ..evaluation import psnr_y
from ..methods import StageLimits
from ..models import make_unet, make_vae
from ..pictures import clean, mild, random_mild, resize
from ..weights import PEFT_PREFIX, Adapter, LoRAWeights, ModelFile, WeightDelta, read_file, write_file, write_model
from . import data
from .config import read_sections
from .embedded_config import EmbeddedConfig
from .identity import start_as_identity

log = logging.getLogger(__name__)

STAGE_ONE, STAGE_TWO = from_noise_level(200), from_noise_level(50)
LATENTS, CHUNK = 32, 128
VAE_CONFIG = {
    "latent_channels": LATENTS,
    "encoder_block_types": "ResBlock",
    "decoder_block_types": "ResBlock",
    "encoder_block_out_channels": [48, 48, 96],
    "decoder_block_out_channels": [48, 48, 96],
    "encoder_layers_per_block": [0, 1, 0],
    "decoder_layers_per_block": [0, 1, 1],
    "encoder_qkv_multiscales": [[], [], []],
    "decoder_qkv_multiscales": [[], [], []],
    "encoder_out_shortcut": False,
    "decoder_in_shortcut": False,
    "scaling_factor": 1.0,
}
# One normalisation group with a large epsilon is nearly the identity: statistics of a tile then
# hardly matter, and tiled equals untiled up to a few 1e-3.
UNET_CONFIG = {
    "sample_size": 32,
    "in_channels": LATENTS,
    "out_channels": LATENTS,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 96],
    "layers_per_block": 2,
    "cross_attention_dim": 32,
    "norm_num_groups": 1,
    "norm_eps": 100.0,
}
LORA_RANK = 24
LORA_TARGETS = ["conv1", "conv2", "conv_in", "conv_shortcut", "conv", "conv_out"]


def build() -> tuple[nn.Module, nn.Module]:
    """Return an untrained `(vae, unet)` with the shapes of the embedded model."""
    return make_vae(VAE_CONFIG, "training"), make_unet(UNET_CONFIG, "training")


@dataclass
class Restorer:
    """The two networks and the two one-step formulas, on pictures `B 3 H W` in 0..1."""

    vae: nn.Module
    unet: nn.Module

    def encode(self, image: Tensor) -> Tensor:
        return self.vae.encode(image * 2 - 1).latent

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample / 2 + 0.5

    def step(self, image: Tensor, formula=STAGE_ONE) -> Tensor:
        z = self.encode(image)
        empty = z.new_zeros(len(z), 1, UNET_CONFIG["cross_attention_dim"])
        return self.decode(formula.finish(z, self.unet(z, formula.t, empty).sample))

    def stage_one(self, small: Tensor, size: tuple[int, int]) -> Tensor:
        """Enlarge with bicubic to `size`, then one step at t = 200."""
        return self.step(resize(small, size))

    def stage_two_start(self, small: Tensor, size: tuple[int, int]) -> Tensor:
        """Return what stage two sees for a picture of `size`: stage one at half of it, then bicubic x2."""
        half = tuple(side // 2 for side in size)
        return resize(self.stage_one(small, half).clamp(0, 1), size)


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


def train_backbone(
    crops: data.Crops, model: Restorer, steps: int, rate: float, report, polish: bool = False
) -> Restorer:
    """Phase one: VAE and UNet together; four steps in five are stage one, the fifth is stage two.

    Stage one sees x4 in seven steps of ten, and any factor from 1.5 to 4 in the others, so that
    it does not overshoot when a plan asks for less than x4. `polish` goes on from a trained model:
    squared error only, and smooth colours must come back smooth (pixel shuffling likes to weave).
    """
    size = (CHUNK, CHUNK)
    both = nn.ModuleList([model.vae, model.unet]).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(both.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average(both, 0.998)
    formulas = (STAGE_ONE, STAGE_TWO)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        sharp = crops.batch(8, CHUNK)
        if step % 5 == 4:
            with torch.no_grad():
                start = model.stage_two_start(random_mild(sharp, 8, crops.rng), size)
            output = model.step(start, STAGE_TWO)
        else:
            scale = 4 if crops.rng.random() < 0.7 else float(crops.rng.uniform(1.5, 4))
            output = model.stage_one(random_mild(sharp, scale, crops.rng), size)
        progress = 1.0 if polish else step / steps
        loss = _loss(output, sharp, progress)
        if step % 2 == 0:
            loss = loss + 0.3 * _loss(model.decode(model.encode(sharp[:4])), sharp[:4], progress)
        if polish:
            smooth = data.draw_gradients(4, CHUNK // 2, crops.rng)
            loss = loss + 5 * F.l1_loss(model.step(smooth, formulas[step % 2]), smooth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 0.5)
        optimizer.step()
        average.update(both)
        report(step, loss.item(), Restorer(*average.shadow))
    return Restorer(*average.shadow)


def train_stage_two(crops: data.Crops, model: Restorer, steps: int, rate: float, report) -> nn.Module:
    """Phase two: LoRA-2 on the frozen backbone, looped over chunks; returns the UNet with the adapter."""
    from peft import LoraConfig, get_peft_model

    model.vae.requires_grad_(False)
    model.unet.requires_grad_(False)
    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS, init_lora_weights="gaussian")
    adapted = get_peft_model(copy.deepcopy(model.unet), config)
    second = Restorer(model.vae, adapted)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = Average(adapted, 0.995)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = _rate(step, steps, rate)
        sharp = crops.batch(2, 2 * CHUNK)
        with torch.no_grad():
            start = model.stage_two_start(random_mild(sharp, 8, crops.rng), (2 * CHUNK, 2 * CHUNK))
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for y in (0, CHUNK):
            for x in (0, CHUNK):
                chunk = (..., slice(y, y + CHUNK), slice(x, x + CHUNK))
                loss = _loss(second.step(start[chunk], STAGE_TWO), sharp[chunk], step / steps) / 4
                loss.backward()
                total += loss.item()
        smooth = data.draw_gradients(2, CHUNK // 2, crops.rng)
        (5 * F.l1_loss(second.step(smooth, STAGE_TWO), smooth)).backward()
        nn.utils.clip_grad_norm_(trained, 0.5)
        optimizer.step()
        average.update(adapted)
        report(step, total, Restorer(model.vae, average.shadow))
    return average.shadow


@torch.inference_mode()
def choice_report(photos: dict[str, Tensor], model: Restorer, first: Restorer | None = None) -> str:
    """Gain in PSNR-Y over bicubic on the choice photos; with `first`, of stage two after `first`."""
    gains = {}
    for name, photo in photos.items():
        sharp = photo[None, :, : photo.shape[1] // 32 * 32, : photo.shape[2] // 32 * 32]
        size = tuple(sharp.shape[-2:])
        for recipe in (clean, mild):
            small = recipe(sharp, 8 if first else 4)
            if first:
                start = first.stage_two_start(small, size)
                gain = psnr_y(model.step(start, STAGE_TWO), sharp) - psnr_y(start, sharp)
            else:
                gain = psnr_y(model.stage_one(small, size), sharp) - psnr_y(resize(small, size), sharp)
            gains[f"{name} {recipe.__name__}"] = gain
    return " ".join(f"{name} {gain:+.3f}" for name, gain in gains.items())


def _reporter(steps: int, photos: dict[str, Tensor], every: int, first: Restorer | None = None):
    began, losses = time.monotonic(), []

    def report(step: int, loss: float, model: Restorer) -> None:
        losses.append(loss)
        if (step + 1) % every == 0 or step + 1 == steps:
            mean = sum(losses[-every:]) / len(losses[-every:])
            seconds = time.monotonic() - began
            log.info("%d/%d %.0fs loss %.5f | %s", step + 1, steps, seconds, mean, choice_report(photos, model, first))

    return report


def train(config: EmbeddedConfig) -> None:
    """Run the phases one after the other and write the model; the backbone is kept beside it after each.

    Raises FileNotFoundError for missing pictures, CheckpointError for `start`, OSError.
    """
    config.output.parent.mkdir(parents=True, exist_ok=True)  # before an hour of work, not after it
    torch.manual_seed(config.seed)
    photos = data.read_photos(data.TRAIN, config.data.wheels) | data.read_photographs(config.data.photographs)
    choice = data.read_photos(data.CHOICE, config.data.wheels)
    crops = data.Crops(photos, data.draw_pictures(config.data.drawn, config.seed, list(photos.values())), config.seed)
    model = Restorer(*build())
    if config.start:
        _load(model, config.start)
    else:
        start_as_identity(model.vae, model.unet, STAGE_ONE, crops.batch(64, CHUNK))
    log.info("start: %s", choice_report(choice, model))
    for name, phase in (("backbone", config.backbone), ("polish", config.polish)):
        if phase.steps:
            report = _reporter(phase.steps, choice, 250)
            model = train_backbone(crops, model, phase.steps, phase.rate, report, polish=name == "polish")
            _keep(model, config.output.with_suffix(f".{name}.safetensors"))
    report = _reporter(config.stage_two.steps, choice, 250, model)
    save(config.output, model, train_stage_two(crops, model, config.stage_two.steps, config.stage_two.rate, report))


def _keep(model: Restorer, path: Path) -> None:
    networks = {"vae": model.vae, "unet": model.unet}
    tensors = {f"{part}.{name}": w for part, net in networks.items() for name, w in net.state_dict().items()}
    write_file(path, tensors, {})


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
            vae=model.vae.state_dict(),
            unet=model.unet.state_dict(),
            first_step=STAGE_ONE,
            second=Adapter("stage two", WeightDelta(_updates(adapted)), stage=2, steps=(STAGE_TWO,)),
            limits=StageLimits(first_max=4, second=2, single_up_to=4),
        ),
    )


def _updates(adapted: nn.Module) -> dict[str, LoRAWeights]:
    from peft import get_peft_model_state_dict

    tensors = get_peft_model_state_dict(adapted)
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
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_flush_denormal(True)
    try:
        train(read_sections(EmbeddedConfig, args.config, {}))
    except (ValueError, OSError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
