"""Seconds and peak memory of an upscale, as ratios to named references in one run.

    python bench/speed.py                     the table in bench/README.md
    python bench/speed.py --sizes 128x4 --repeat 3

References: `lanczos` (Pillow, the floor) and `plain` (the published procedure written straight:
the same networks, whole-picture VAE, tiles at 50 % overlap, one call per tile). Every measurement
is a fresh process, methods take turns (A B C A B C), medians are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import measure, take_turns

from tudsr_core.backends.local import load_embedded
from tudsr_core.evaluation.measurement import lanczos
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.tiling.blending import TileBlender
from tudsr_core.tiling.plan import plan_tiles

SIZES = ("128x4", "256x8", "512x8")
METHODS = ("lanczos", "plain", "ours")


def picture(side: int) -> torch.Tensor:
    """Return a square test picture with structure at all scales, from the shipped photo."""
    photo = Path(__file__).parent.parent / "tudsr_core" / "assets" / "example.png"
    image = Image.open(photo).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@torch.inference_mode()
def plain(model, image: torch.Tensor, factor: int) -> torch.Tensor:
    """The published procedure with nothing spared: untiled VAE, tiles of 512 px at 50 % overlap."""
    side = image.shape[-1]
    for stage, grown in ((model.first, 4), (model.second, 8))[: 1 if factor == 4 else 2]:
        enlarged = resize(image, (side * grown, side * grown)).clamp(0, 1)
        networks = stage.networks
        networks.backbone.unet_merger.use(networks.unet_delta)
        z = networks.backbone.latents(networks.backbone.vae, enlarged * 2 - 1)
        plan = plan_tiles(*z.shape[-2:], 128, 64, spacing="stride")
        canvas = TileBlender(plan, "published")
        for tile in plan:
            eps = networks.backbone.unet(tile.cut(z), stage.steps[0].t, networks.condition("")).sample
            canvas.add(tile, eps)
        image = networks.backbone.vae.decode(stage.steps[0].finish(z, canvas.result())).sample / 2 + 0.5
        image = image.clamp(0, 1)
    return image


def run_here(method: str, side: int, factor: int) -> dict[str, float]:
    """Measure one method in this process."""
    image = picture(side)
    model = None if method == "lanczos" else load_embedded("cpu")
    if model:
        upscale(image[..., :16, :16], model, Target(scale=8))
    works = {
        "lanczos": lambda: lanczos(image, (side * factor, side * factor)),
        "plain": lambda: plain(model, image, factor),
        "ours": lambda: upscale(image, model, Target(scale=factor), UpscaleOptions()),
    }
    return measure(works[method])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="SIDExFACTOR")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        method, side, factor = args.one
        sys.stdout.write(json.dumps(run_here(method, int(side), int(factor))))
        return
    rows = [
        "| case | method | s | s / MP | peak MiB over the model | time / plain | memory / plain |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in args.sizes:
        side, factor = (int(part) for part in case.split("x"))
        commands = {m: [sys.executable, __file__, "--one", m, str(side), str(factor)] for m in METHODS}
        middle = take_turns(commands, args.repeat)
        pixels = (side * factor) ** 2 / 1e6
        for method in METHODS:
            own, base = middle[method], middle["plain"]
            rows.append(
                f"| {side} to {side * factor} | {method} | {own['seconds']:.2f} | {own['seconds'] / pixels:.2f} | "
                f"{own['mib']:.0f} | {own['seconds'] / base['seconds']:.2f} | {own['mib'] / max(base['mib'], 1):.2f} |"
            )
    sys.stdout.write("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
