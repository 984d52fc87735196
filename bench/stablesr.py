"""What StableSR adds to Stable Diffusion 2.1 at full size, in ComfyUI: two ddpm steps of one tile of 512 px.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python bench/stablesr.py [--repeat 3] [--weights FOLDER]

Random weights; `plain` and `stablesr` take turns in one process, medians. CPU seconds are compared, which other work on
the machine disturbs least; the wall clock is beside them. MiB are the growth while sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from harness import measure

HERE = Path(__file__).parent
STEPS, SIDE = 2, 512


def write(folder: Path) -> None:
    """Write SD2.1's weights and StableSR's 376 tensors, all random."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from full_size import write_weights
    from plain_stablesr import FULL, random_tensors
    from safetensors.torch import save_file

    write_weights(folder)
    save_file(random_tensors("full", **FULL), folder / "stablesr.safetensors")


@torch.inference_mode()
def run_inside(comfyui: str, weights: str, repeat: int) -> None:
    """Sample in ComfyUI's interpreter and print the figures of both ways."""
    from comfyui_pack import load_pack, use_comfyui

    use_comfyui(comfyui)
    import comfy.sample
    import comfy.samplers
    import comfy.sd
    import comfy.utils

    folder, pack = Path(weights), load_pack()
    host = sys.modules["pack.nodes.host.stablesr"]
    model = comfy.sd.load_diffusion_model(str(folder / "unet.safetensors"))
    text = [[comfy.utils.load_torch_file(str(folder / "text.safetensors"))["text"], {}]]
    z = torch.randn(1, 4, SIDE // 8, SIDE // 8, generator=torch.Generator().manual_seed(0))
    sigmas = pack["TUDSRStableSRSigmas"].execute(model, STEPS, 1.0).args[0]
    managed = host.ManagedStableSR(folder / "stablesr.safetensors")
    ways = {"plain": (model, text), "stablesr": (managed.apply(model), host.with_picture(text, z))}

    def sample(steered: object, words: list) -> torch.Tensor:
        ddpm, noise = comfy.samplers.sampler_object("ddpm"), torch.randn_like(z)
        made = comfy.sample.sample_custom(steered, noise, 1.0, ddpm, sigmas, words, words, z, disable_pbar=True)
        if not made.isfinite().all():
            raise SystemExit("the result is not finite")
        return made

    runs = {name: [] for name in ways}
    for turn in range(repeat + 1):
        for name, way in ways.items():
            figures = measure(lambda way=way: sample(*way))[1]
            runs[name] += [figures] if turn else []  # the first loads the weights
    rows = {name: {key: statistics.median(run[key] for run in all_) for key in all_[0]} for name, all_ in runs.items()}
    sys.stdout.write("\n" + json.dumps(rows | {"weights": managed.patcher.model_size() / 2**20}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="folder to keep the weights in; default: a temporary one")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_inside(*args.inside, args.repeat)
        return
    comfyui, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "stablesr.safetensors").is_file():
            write(folder)
        script = str(Path(__file__).resolve())
        command = [python, script, "--repeat", str(args.repeat), "--inside", comfyui, str(folder)]
        done = subprocess.run(command, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        rows = json.loads(done.stdout.splitlines()[-1])
    own, plain = rows.pop("weights"), rows["plain"]["cpu"]
    sys.stdout.write(f"{STEPS} steps of {SIDE} x {SIDE} px, CFG 1, {os.cpu_count()} cores; own weights {own:.0f} MiB\n")
    for name, row in rows.items():
        over = f"{row['cpu'] / plain - 1:+.0%}"
        sys.stdout.write(f"{name:9} {row['cpu']:6.1f} CPU s ({over}), {row['seconds']:6.1f} s, {row['mib']:.0f} MiB\n")


if __name__ == "__main__":
    main()
