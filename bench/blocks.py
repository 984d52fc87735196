"""Peak memory of a result that is written in blocks: by its height, and what the model takes for one block.

    python bench/blocks.py --width 12000 --rows 2 4 --scale 8

A row of blocks is as wide as the picture, so its memory needs the real width; that it does not grow with the height
shows in few rows. Computing 96,000 pixels with the model takes hours on a CPU, so bicubic stands for it here, and the
model is measured on one block: the two peaks add up at worst.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import numpy as np
import tifffile
import torch
from harness import measure
from plain_upscaler import Bicubic

from tudsr_core import load_embedded
from tudsr_core.batch import Output, plan_blocks, upscale_in_blocks
from tudsr_core.batch.blocks import BLOCK_PX, OVERLAP_PX
from tudsr_core.methods import Target, TwoStage


def write_source(path: Path, width: int, height: int) -> None:
    """Write a plain TIFF of noise over a slope, in strips."""
    rng, slope = np.random.default_rng(0), np.linspace(0, 200, width)[None, :, None]
    rows = [(slope + rng.integers(0, 56, (1, width, 3))).astype(np.uint8) for _ in range(height)]
    tifffile.imwrite(path, np.concatenate(rows), photometric="rgb", rowsperstrip=64, compression="zlib")


def blocks(width: int, rows: int, scale: int) -> dict:
    """Measure a picture of so many rows of blocks; bicubic."""
    side, overlap = BLOCK_PX // scale, OVERLAP_PX // scale
    height = side + (rows - 1) * (side - overlap)
    with tempfile.TemporaryDirectory() as folder:
        source, out = Path(folder, "in.tif"), Path(folder, "out.tif")
        write_source(source, width, height)
        target = Target(scale=float(scale))
        more = dict(settings={"scale": scale}, pyramid=True)
        _, figures = measure(lambda: upscale_in_blocks(source, out, Bicubic(), target, Output(), **more))
        size = plan_blocks((height, width), target).size
        return figures | {"height": size[0], "width": size[1], "bytes": out.stat().st_size}


def block(scale: int) -> dict:
    """Measure the embedded model on one block."""
    upscaler, image = TwoStage(load_embedded("cpu")), torch.rand(1, 3, BLOCK_PX // scale, BLOCK_PX // scale)
    return measure(lambda: upscaler.run(image, upscaler.plan(tuple(image.shape[-2:]), Target(scale=float(scale)))))[1]


def main() -> None:
    """Measure every height in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=12000)
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--scale", type=int, default=8)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)  # 0: the model's block
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.one is not None:
        figures = blocks(args.width, args.one, args.scale) if args.one else block(args.scale)
        sys.stdout.write(json.dumps(figures))
        return
    sys.stdout.write(
        "| result | rows of blocks | file, MB | CPU s | peak MiB over what was there |\n|---|---|---|---|---|\n"
    )
    for rows in (*args.rows, 0):
        command = [sys.executable, __file__, "--width", str(args.width), "--scale", str(args.scale), "--one", str(rows)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
        figures = json.loads(done.stdout)
        what = f"{figures['width']} x {figures['height']}" if rows else f"one block of {BLOCK_PX} px, embedded model"
        written = f"{figures['bytes'] / 1e6:.0f}" if rows else ""
        cells = what, rows or "", written, f"{figures['cpu']:.0f}", f"{figures['mib']:.0f}"
        sys.stdout.write("| " + " | ".join(map(str, cells)) + " |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
