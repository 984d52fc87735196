"""A few training steps with random weights of Stable Diffusion 2.1-base's size: seconds and memory.

    python bench/training.py FOLDER [--size 128] [--steps 3] [--base-precision fp32]         both stages
    python bench/training.py FOLDER --stage colearn [--size 256] [--steps 1]                 joint steps of co-learning

Writes weights of 2.3 GiB into FOLDER once: base model, DINOv3 ViT-B/16 and VGG16. The text tower has one layer, since
its words are computed once; everything else has its published shape.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from full_size import CONFIGS
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from small_sd import write_tokenizer

from tudsr_core.models.features import EXTRACTORS
from tudsr_core.training.colearn import Colearner
from tudsr_core.training.colearn_config import read_colearn
from tudsr_core.training.config import read_config
from tudsr_core.training.trainer import Trainer
from tudsr_core.training.two_folders import samples

SETTINGS = """
output = "out-{stage}"
[model]
base = "base"
stage_one = "{adapter}"
[data]
folders = ["photos"]
size = {size}
workers = 0
[loss]
dists_weights = "vgg16.safetensors"
[discriminator]
weights = "dinov3.safetensors"
[optimizer]
steps = {steps}
accumulation = 1
[run]
precision = "fp32"
base_precision = "{base_precision}"
tensorboard = false
"""

COLEARN = """
output = "out-colearn"
[model]
base = "base"
[data]
good = ["photos"]
poor = ["poor"]
size = {size}
batch = 1
workers = 0
[downsampler]
kind = "shared"
[teacher]
kind = "none"
[weights]
cycle_after = 0
[phases]
joint = {steps}
order = "joint"
[run]
precision = "fp32"
base_precision = "{base_precision}"
tensorboard = false
"""


def write_weights(folder: Path) -> None:
    """Write everything that a training needs into `folder`, half precision where files usually are."""
    torch.manual_seed(0)
    for name, (kind, config) in CONFIGS.items():
        kind.from_config(config).half().save_pretrained(folder / "base" / name)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=1024, intermediate_size=4096, num_hidden_layers=1, num_attention_heads=16
    )
    CLIPTextModel(text).save_pretrained(folder / "base" / "text_encoder")
    write_tokenizer(folder / "base" / "tokenizer")
    for name, file in (("dinov3-vit-b16", "dinov3"), ("vgg16", "vgg16")):
        state = EXTRACTORS[name].build().state_dict()
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{file}.safetensors")
    (folder / "photos").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (160, 160, 3), np.uint8)
    Image.fromarray(noise).resize((1280, 1280), Image.Resampling.BICUBIC).save(folder / "photos" / "noise.png")


def run_colearn(folder: Path, **settings: object) -> None:
    """Take joint steps of student and shared downsampler, and print one JSON line of figures."""
    if not (folder / "poor").exists():
        (folder / "poor").mkdir()
        with Image.open(folder / "photos" / "noise.png") as photo:
            photo.resize((320, 320), Image.Resampling.BOX).save(folder / "poor" / "noise.png")
    (folder / "colearn.toml").write_text(COLEARN.format(**settings), encoding="utf-8")
    began = time.monotonic()
    learner = Colearner(read_colearn(folder / "colearn.toml", "colearn"))
    loaded, loaded_kib = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    busy, stream, times, last = time.process_time(), samples(learner.pictures, 0), [], {}
    for _ in range(int(settings["steps"])):
        began = time.monotonic()
        last = learner.take_step(next(stream))
        times.append(round(time.monotonic() - began, 1))
    figures = {
        "stage": "colearn",
        **settings,
        "trained": {name: sum(p.numel() for p in own.values()) for name, own in learner.parameters.items()},
        "one_backbone": learner.networks.down.networks.unet is learner.networks.student.unet,
        "load_s": round(loaded, 1),
        "step_s": times,
        "step_cpu_s": round((time.process_time() - busy) / len(times), 1),
        "loaded_gib": round(loaded_kib / 2**20, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "last": {name: round(value, 4) for name, value in last.items()},
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def run(folder: Path, stage: int, **settings: object) -> None:
    """Train as `settings` say, save the adapter for stage two, and print one JSON line of figures."""
    text = SETTINGS.format(stage=stage, adapter="adapter" if stage == 2 else "", **settings)
    (folder / f"stage-{stage}.toml").write_text(text, encoding="utf-8")
    began = time.monotonic()
    trainer = Trainer(read_config(folder / f"stage-{stage}.toml", stage), stage)
    loaded, loaded_kib = time.monotonic() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times, seen = [time.monotonic()], []

    def report(step: int, numbers: dict[str, float]) -> None:
        times.append(time.monotonic())
        seen.append(numbers)

    trainer.run(report)
    if stage == 1:
        trainer.network.unet.save_pretrained(folder / "adapter" / "unet_lora_adapter")
    figures = {
        "stage": stage,
        **settings,
        "trained": sum(p.numel() for p in trainer.parameters.values()),
        "heads": sum(p.numel() for p in trainer.critic_module.heads.parameters()),
        "load_s": round(loaded, 1),
        "step_s": [round(after - before, 1) for before, after in zip(times, times[1:], strict=False)],
        "loaded_gib": round(loaded_kib / 2**20, 2),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "last": {name: round(value, 4) for name, value in seen[-1].items()},
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def main() -> None:
    """Run both stages, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--base-precision", default="fp32", help="of the frozen weights: fp32 or bf16")
    parser.add_argument("--stage", choices=("1", "2", "colearn"), help="one alone, in this process")
    args = parser.parse_args()
    if not (args.folder / "photos").exists():
        write_weights(args.folder)
    settings = dict(size=args.size, steps=args.steps, base_precision=args.base_precision)
    if args.stage == "colearn":
        run_colearn(args.folder, **settings)
    elif args.stage:
        run(args.folder, int(args.stage), **settings)
    if args.stage:
        return
    for stage in ("1", "2"):
        subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=True)


if __name__ == "__main__":
    main()
