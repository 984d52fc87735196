"""The core at SD2.1-base size with random weights on a GPU: seconds and peak memory.

    python bench/gpu.py                    128 -> 512 and 256 -> 2048 in float16
    python bench/gpu.py --device cpu --sizes 64x2 --dtype fp32 --repeat 1

Random weights are as fast as trained ones; the picture is noise. Published TUDSR (H800): 128 -> 512
in 0.0596 s, 256 -> 2048 in 2.2848 s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

sys.path.insert(0, str(Path(__file__).parent.parent))

from tudsr_core.local import DTYPES, Backbone, LocalNetworks
from tudsr_core.pipeline import Model, Stage, UpscaleOptions, upscale
from tudsr_core.plan import StageLimits, Target
from tudsr_core.schedule import from_noise_level
from tudsr_core.sd21 import UNET_CONFIG, VAE_CONFIG


def build(device: str, dtype: str) -> Model:
    """Return a two-stage model of SD2.1-base's shapes; both stages share the bare backbone."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**UNET_CONFIG, "in_channels": 4, "out_channels": 4})
    vae = AutoencoderKL.from_config(VAE_CONFIG)
    text = torch.randn(1, 77, 1024)
    backbone = Backbone(vae, unet, lambda words: text, torch.device(device), DTYPES[dtype])
    stages = [Stage(LocalNetworks(backbone), (from_noise_level(t),), f"t={t}") for t in (200, 50)]
    return Model(*stages, StageLimits())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=("128x4", "256x8"), help="SIDExFACTOR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--tile-batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    model, cuda = build(args.device, args.dtype), args.device == "cuda"
    lines = ["| case | dtype | s (median) | peak GiB |", "|---|---|---|---|"]
    for case in args.sizes:
        side, factor = (int(part) for part in case.split("x"))
        image, seconds = torch.rand(1, 3, side, side), []
        for _ in range(args.repeat + 1):
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            began = time.perf_counter()
            options = UpscaleOptions(tile_batch=args.tile_batch, color_fix="none")
            upscale(image, model, Target(scale=factor), options)
            seconds.append(time.perf_counter() - began)
        peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}" if cuda else "-"
        middle = statistics.median(seconds[1:])
        lines.append(f"| {side} to {side * factor} | {args.dtype} | {middle:.3f} | {peak} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
