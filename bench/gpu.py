"""The core at SD2.1-base size with random weights on a GPU: seconds and peak memory.

    python bench/gpu.py                    128 -> 512 and 256 -> 2048 in float16
    python bench/gpu.py --device cpu --sizes 64x2 --dtype fp32 --repeat 1

The picture is noise. Published TUDSR (H800): 128 -> 512 in 0.0596 s, 256 -> 2048 in 2.2848 s.
`python bench/engine.py --device cuda --dtype fp16` compares with the published procedure.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from full_size import load_model, write_weights
from harness import measure

from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.weights.checkpoints import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=("128x4", "256x8"), help="SIDExFACTOR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", default="fp16", choices=DTYPES)
    parser.add_argument("--tile-batch", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_weights(Path(folder))
        model = load_model(Path(folder), args.device, args.dtype)
    lines = ["| case | dtype | s (median) | peak MiB over the model |", "|---|---|---|---|"]
    for case in args.sizes:
        side, factor = (int(part) for part in case.split("x"))
        image, options = torch.rand(1, 3, side, side), UpscaleOptions(tile_batch=args.tile_batch, color_fix="none")

        def work(image=image, options=options, factor=factor) -> torch.Tensor:
            return upscale(image, model, Target(scale=factor), options)

        work()
        runs = [measure(work, args.device)[1] for _ in range(args.repeat)]
        seconds, mib = (statistics.median(run[key] for run in runs) for key in ("seconds", "mib"))
        lines.append(f"| {side} to {side * factor} | {args.dtype} | {seconds:.3f} | {mib:.0f} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
