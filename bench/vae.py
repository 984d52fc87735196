"""The SD autoencoder at full size with random weights: exact tiles against untiled and diffusers' own tiles.

    python bench/vae.py                          decode and encode, errors, whole upscale, growth
    python bench/vae.py --part vae --sizes 512 --repeat 1

Parts: `vae` (one encode or decode; error is against the untiled result), `upscale` (one x2 stage of
SD2.1-base's size against the published procedure: untiled VAE, tiles of 512 px at 50 % overlap, one
call per tile), `growth` (exact tiles alone, per megapixel). Random weights are as fast as trained
ones. Every measurement is a fresh process, methods take turns (A B A B), medians are shown; memory
is the growth of the peak resident set over the loaded model, or the CUDA allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from gpu import build

from tudsr_core.image import resize
from tudsr_core.local import DTYPES, Backbone
from tudsr_core.pipeline import Model, UpscaleOptions, upscale
from tudsr_core.plan import StageLimits, Target
from tudsr_core.sd21 import VAE_CONFIG
from tudsr_core.tiles import Canvas, plan_tiles
from tudsr_core.vae_graph import run_untiled
from tudsr_core.vae_tiling import Tiling

VAE_METHODS = ("untiled", "diffusers tiles", "exact tiles 512", "exact tiles 256")
UPSCALE_METHODS = ("published", "ours")


def run_vae(backbone: Backbone, side: str, method: str, x: Tensor) -> Tensor:
    """Return moments for pixels in -1..1, or pixels for latents."""
    vae = backbone.vae
    inside = x.to(backbone.device, backbone.dtype)
    if method == "untiled":
        return run_untiled(vae, side, inside).float().cpu()
    if method == "diffusers tiles":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
        tiled = vae._tiled_encode(inside) if side == "encoder" else vae.tiled_decode(inside).sample
        return tiled.float().cpu()
    tiling = Tiling(int(method.split()[-1]))
    if side == "encoder":
        return backbone.tiled_vae.encode(x / 2 + 0.5, lambda: None, tiling)
    return backbone.tiled_vae.decode(x, lambda: None, tiling) * 2 - 1


@torch.inference_mode()
def published(model: Model, image: Tensor) -> Tensor:
    """One x2 stage as the published script does it."""
    stage = model.first
    networks, backbone, step = stage.networks, stage.networks.backbone, stage.steps[0]
    enlarged = resize(image, tuple(2 * side for side in image.shape[-2:])).clamp(0, 1)
    factor = backbone.vae.config.scaling_factor
    moments = run_untiled(backbone.vae, "encoder", (enlarged * 2 - 1).to(backbone.device, backbone.dtype))
    z = moments[:, :4].float().cpu() * factor
    plan = plan_tiles(*z.shape[-2:], 64, 32, spacing="stride")
    canvas, condition = Canvas(plan, "published"), networks.condition("")
    for tile in plan:
        part = tile.cut(z).to(backbone.device, backbone.dtype)
        canvas.add(tile, backbone.unet(part, step.t, encoder_hidden_states=condition).sample.float().cpu())
    restored = step.finish(z, canvas.result()) / factor
    decoded = run_untiled(backbone.vae, "decoder", restored.to(backbone.device, backbone.dtype))
    return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)


def job(part: str, method: str, side: str, px: int, device: str, dtype: str) -> tuple[Callable, Callable]:
    """Return what to measure, and a small call of the same kind to warm up with."""
    generator = torch.Generator().manual_seed(1)
    if part == "upscale":
        model = build(device, dtype)
        small, image = (torch.rand(1, 3, length, length, generator=generator) for length in (32, px // 2))
        if method == "published":
            return lambda: published(model, image), lambda: published(model, small)
        alone, options = Model(model.first, None, StageLimits(single_up_to=2)), UpscaleOptions(color_fix="none")
        return lambda: upscale(image, alone, Target(scale=2), options), lambda: upscale(small, alone, Target(scale=2))
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(VAE_CONFIG)
    backbone = Backbone(vae, torch.nn.Identity(), lambda words: None, torch.device(device), DTYPES[dtype])
    length, channels = (px, 3) if side == "encoder" else (px // 8, 4)
    x = torch.rand(1, channels, length, length, generator=generator) * 2 - 1
    few = x[..., : length // 8, : length // 8]
    return lambda: run_vae(backbone, side, method, x), lambda: run_vae(backbone, side, method, few)


@torch.inference_mode()
def measure(part: str, method: str, side: str, px: int, device: str, dtype: str, out: str) -> dict[str, float]:
    """Run once in this process; the result goes to `out`."""
    work, warm_up = job(part, method, side, px, device, dtype)
    warm_up()
    cuda = device == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    began, busy = time.perf_counter(), time.process_time()
    result = work()
    seconds, busy = time.perf_counter() - began, time.process_time() - busy
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.save(result, out)
    return {"seconds": seconds, "cpu": busy, "mib": (peak - before) / 2**20}


def take_turns(part: str, methods: tuple[str, ...], side: str, px: int, args: argparse.Namespace) -> list[str]:
    """Return table rows of `methods`, ratios to the first."""
    runs: dict[str, list] = {method: [] for method in methods}
    results: dict[str, Tensor] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):
            for method in methods:
                out = Path(folder) / "result.pt"
                one = [part, method, side, str(px), args.device, args.dtype, str(out)]
                command = [sys.executable, __file__, "--one", *one]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[method].append(json.loads(done.stdout))
                results[method] = torch.load(out, weights_only=True)
    rows, truth = [], results[methods[0]]
    base = {key: statistics.median(run[key] for run in runs[methods[0]]) for key in ("cpu", "mib", "seconds")}
    for method in methods:
        own = {key: statistics.median(run[key] for run in runs[method]) for key in base}
        error = (results[method] - truth).abs()
        worst = f"{error.max():.1e} / {error.mean():.1e}" if part != "upscale" else "-"
        name = {"encoder": "encode", "decoder": "decode", "": "upscale x2"}[side]
        rows.append(
            f"| {name} {px} px | {method} | {own['seconds']:.1f} | {own['cpu']:.1f} | {own['cpu'] / px**2 * 1e6:.1f} | "
            f"{own['mib']:.0f} | {own['mib'] * 2**20 / px**2:.0f} | {own['seconds'] / base['seconds']:.2f} | "
            f"{own['cpu'] / base['cpu']:.2f} | {own['mib'] / max(base['mib'], 1):.2f} | {worst} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=("vae", "upscale", "growth"))
    parser.add_argument("--sizes", nargs="+", type=int, default=(512, 1024), help="of the part vae, in pixels")
    parser.add_argument(
        "--growth",
        nargs="+",
        type=int,
        default=(512, 1024, 2048),
        help="of the part growth; 4096 needs 20 GB and an hour of CPU",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--one", nargs=7, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        part, method, side, px, device, dtype, out = args.one
        sys.stdout.write(json.dumps(measure(part, method, side, int(px), device, dtype, out)))
        return
    head = (
        "case | method | s | CPU s | CPU s / MP | peak MiB | bytes / px | time | CPU time | memory | max / mean error"
    )
    sys.stdout.write(f"| {head} |\n|{'---|' * 11}\n")
    cases = {
        "vae": [(VAE_METHODS, side, px) for px in args.sizes for side in ("decoder", "encoder")],
        "upscale": [(UPSCALE_METHODS, "", 1024)],
        "growth": [(("exact tiles 256",), "decoder", px) for px in args.growth],
    }
    for part in args.part:
        for methods, side, px in cases[part]:
            sys.stdout.write("\n".join(take_turns(part, methods, side, px, args)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
