"""Time and memory of a picture with a prompt per tile through a real ComfyUI: `python bench/tile_prompts.py`.

Needs ComfyUI (COMFYUI_PATH, COMFYUI_PYTHON). The UNet and both halves of CLIP are the
tests' Stable Diffusion 2.1 in miniature and the VAE only folds pixels, so seconds say how calls add
up, not what a real model takes; the memory beyond the picture's own tensors must not grow.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "tests" / "nodes"), str(HERE.parent / "tests"), str(HERE.parent)]

import numpy as np
import sd_stand_in
from comfyui import Server, find
from PIL import Image


class Peak:
    """The largest resident memory of a process while the block runs, in MiB."""

    def __init__(self, pid: int) -> None:
        self.path, self.most, self.ended = Path(f"/proc/{pid}/statm"), 0.0, threading.Event()

    def now(self) -> float:
        return int(self.path.read_text("utf-8").split()[1]) * 4096 / 2**20

    def __enter__(self) -> Peak:
        self.start = self.most = self.now()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.now())

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()


def graph(side: int, steps: int, overlap: int, batch: int) -> dict:
    """Return template 09 for one picture enlarged to `side`, with a VAE that costs nothing."""
    work = json.loads((HERE.parent / "workflows" / "api" / "09-tile-prompts.json").read_text("utf-8"))
    work["1"]["inputs"]["image"] = f"{side}.png"
    work["5"]["inputs"] |= {"overlap": overlap, "steps": steps}
    work["15"] = {"class_type": "TestFoldVAE", "inputs": {}}
    for node in ("8", "12"):
        work[node]["inputs"]["vae"] = ["15", 0]
    work["10"]["inputs"]["tile_batch"] = batch
    work["11"]["inputs"]["steps"] = steps
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    comfyui = find()
    if comfyui is None:
        raise SystemExit("set COMFYUI_PATH and COMFYUI_PYTHON to a ComfyUI")
    base = Path(tempfile.mkdtemp())
    sd_stand_in.write(base / "models")
    sys.stdout.write("| picture | tiles | calls | seconds | peak MiB above idle | of which one picture in float |\n")
    sys.stdout.write("|---|---|---|---|---|---|\n")
    example = Image.open(HERE.parent / "tudsr_core" / "assets" / "example.png").convert("RGB")
    server = Server(comfyui, base, packs={"tests_pack": sd_stand_in.PACK})
    try:
        for side in args.sides:
            server.put_image(f"{side}.png", np.array(example.resize((side // 4, side // 4))))
            work = graph(side, args.steps, args.overlap, args.batch)
            with Peak(server.process.pid) as peak:
                began = time.monotonic()
                history = server.wait(server.queue(work), 7200)
                seconds = time.monotonic() - began
            outputs = history["outputs"]
            assert history["status"]["status_str"] == "success", history["status"]
            tiles = len(next(one["tudsr_tiles"][0]["boxes"] for one in outputs.values() if "tudsr_tiles" in one))
            assert server.images(outputs, "14")[0].shape == (side, side, 3)
            picture = side * side * 3 * 4 / 2**20
            sys.stdout.write(
                f"| {side} x {side} | {tiles} | {tiles * args.steps} | {seconds:.0f} | {peak.most - peak.start:.0f} "
                f"| {picture:.0f} |\n"
            )
            sys.stdout.flush()
            server.post("/free", {"unload_models": False, "free_memory": True})
            time.sleep(1)
    finally:
        server.stop()


if __name__ == "__main__":
    main()
