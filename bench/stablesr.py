"""What StableSR adds to Stable Diffusion 2.1 at full size, in ComfyUI: two ddpm steps of one tile of 512 px.

    COMFYUI_PATH=... COMFYUI_PYTHON=... python bench/stablesr.py [--repeat 3] [--weights FOLDER]

Random weights, one process per run, `plain` and `stablesr` in turns. `mib` is the growth while sampling; what the
weights take is printed apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch
from harness import measure, take_turns

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
def run_inside(method: str, comfyui: str, weights: str) -> None:
    """Sample once in ComfyUI's interpreter and print the figures."""
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
    own = 0
    if method == "stablesr":
        managed = host.ManagedStableSR(folder / "stablesr.safetensors")
        model, text, own = managed.apply(model), host.with_picture(text, z), managed.patcher.model_size()

    def sample() -> torch.Tensor:
        ddpm, noise = comfy.samplers.sampler_object("ddpm"), torch.randn_like(z)
        return comfy.sample.sample_custom(model, noise, 1.0, ddpm, sigmas, text, text, z, disable_pbar=True)

    sample()
    made, figures = measure(sample)
    if not made.isfinite().all():
        raise SystemExit("the result is not finite")
    sys.stdout.write("\n" + json.dumps(figures | {"weights": own / 2**20}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="folder to keep the weights in; default: a temporary one")
    parser.add_argument("--inside", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        run_inside(*args.inside)
        return
    comfyui, python = os.environ["COMFYUI_PATH"], os.environ.get("COMFYUI_PYTHON", sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.weights or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "stablesr.safetensors").is_file():
            write(folder)
        script = str(Path(__file__).resolve())
        commands = {name: [python, script, "--inside", name, comfyui, str(folder)] for name in ("plain", "stablesr")}
        rows = take_turns(commands, args.repeat)
    sys.stdout.write(f"{STEPS} steps of {SIDE} x {SIDE} px, CFG 1, {os.cpu_count()} cores\n")
    for name, row in rows.items():
        over = row["cpu"] / rows["plain"]["cpu"] - 1
        seconds = f"{row['seconds']:6.1f} s, {row['cpu']:6.1f} CPU s ({over:+.0%})"
        sys.stdout.write(
            f"{name:9} {seconds}, sampling {math.ceil(row['mib'])} MiB, own weights {row['weights']:.0f} MiB\n"
        )


if __name__ == "__main__":
    main()
