"""The tile engine at Stable Diffusion 2.1-base's full size, random weights: `python bench/engine.py [--part PART ...]`.

Parts:
  stage      one x2 stage to 1024 px: the published procedure (untiled VAE, UNet tiles of 512 px at 50 %
             overlap, one call each), everything untiled, ours; and with COMFYUI_PATH (COMFYUI_PYTHON) set
             the same through ComfyUI's nodes. Errors are against the untiled run of the same host
  vae        decode and encode, exact tiles against untiled and diffusers' own tiles
  unet       one tile of 512 px: memory format, attention, two at once
  compile    the same with torch.compile; takes minutes to compile
  denoise    the UNet over a whole picture: grids of tiles
  growth     one x2 stage of ours, per megapixel

Rows of one case took turns (A B A B), each in a fresh process; medians; ratios are to the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import torch
from comfyui import find
from diffusers.models.attention_processor import AttnProcessor
from full_size import load_model, load_network, load_text, write_weights
from harness import measure, take_turns
from safetensors.torch import load_file, save_file
from torch import Tensor

from tudsr_core.backends.local import DTYPES, Backbone
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.tiling.blending import TileBlender
from tudsr_core.tiling.fitting import fit_tile
from tudsr_core.tiling.plan import TilePlan, plan_tiles
from tudsr_core.vae import layer_pass
from tudsr_core.vae.graph import run_untiled
from tudsr_core.vae.settings import VAETiling

COMFYUI = {"ComfyUI, untiled nodes": "whole", "ComfyUI, tiled nodes": "tiled", "ours in ComfyUI": "ours"}
METHODS = {
    "stage": ("published", "untiled", "ours"),
    "decode": ("untiled", "diffusers tiles", "exact 512", "exact 128", "exact 128, doubling not folded"),
    "encode": ("untiled", "diffusers tiles", "exact 512", "exact 128"),
    "unet": ("as it is", "channels last", "attention without SDPA", "two tiles at once, per tile"),
    "compile": ("as it is", "compiled", "compiled, weights frozen"),
    "denoise": ("512 at 50 %", "512 at 25 %", "side that fits"),
    "growth": ("ours",),
}
PARTS = {"vae": ("decode", "encode")}
TRUTH = {"published": "untiled", "ours": "untiled", "ComfyUI, tiled nodes": "ComfyUI, untiled nodes"}
TRUTH |= {"ours in ComfyUI": "ComfyUI, untiled nodes"}


def run_stage(method: str, px: int, args: argparse.Namespace) -> tuple[Callable, Callable]:
    """Return the work on a picture of px / 2, and a small one to warm up with."""
    model = load_model(args.weights, args.device, args.dtype)
    stage, image = model.first, load_file(args.weights / f"input-{px}.safetensors")["image"]
    networks, backbone, step = stage.networks, stage.networks.backbone, stage.steps[0]

    def spelled_out(picture: Tensor) -> Tensor:
        enlarged = resize(picture, tuple(2 * side for side in picture.shape[-2:])).clamp(0, 1) * 2 - 1
        factor, inside = backbone.vae.config.scaling_factor, dict(device=backbone.device, dtype=backbone.dtype)
        z = run_untiled(backbone.vae, "encoder", enlarged.to(**inside))[:, :4].float().cpu() * factor
        tile, overlap = (64, 32) if method == "published" else (max(z.shape[-2:]), 0)
        eps = denoise(backbone, z, plan_tiles(*z.shape[-2:], tile, overlap, spacing="stride"), networks.condition(""))
        decoded = run_untiled(backbone.vae, "decoder", (step.finish(z, eps) / factor).to(**inside))
        return (decoded.float().cpu() / 2 + 0.5).clamp(0, 1)

    def ours(picture: Tensor) -> Tensor:
        alone = replace(model, second=None, limits=StageLimits(single_up_to=2))
        return upscale(picture, alone, Target(scale=2), UpscaleOptions(color_fix="none", native_size=False))

    run = ours if method == "ours" else spelled_out
    return lambda: run(image), lambda: run(image[..., :32, :32])


def denoise(backbone: Backbone, z: Tensor, plan: TilePlan, text: Tensor) -> Tensor:
    """Return eps of the tiles, blended, one call each."""
    canvas = TileBlender(plan, "published")
    for tile in plan:
        part = tile.cut(z).to(backbone.device, backbone.dtype)
        canvas.add(tile, backbone.unet(part, 200, encoder_hidden_states=text).sample.float().cpu())
    return canvas.result()


def run_denoise(method: str, px: int, args: argparse.Namespace) -> tuple[Callable, Callable]:
    """Return the UNet's work on a picture of px, and one tile."""
    model = load_model(args.weights, args.device, args.dtype)
    networks = model.first.networks
    z = torch.randn(1, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(1))
    sides = fit_tile((px, px), 128, networks.facts) if method == "side that fits" else (512, 512)
    overlap = 32 if method == "512 at 50 %" else 16
    plan = plan_tiles(*z.shape[-2:], tuple(side // 8 for side in sides), overlap)
    text = networks.condition("")
    first = z[..., : plan.tile_height, : plan.tile_width]
    whole = plan_tiles(plan.tile_height, plan.tile_width, max(sides) // 8, 0)
    return (
        lambda: denoise(networks.backbone, z, plan, text),
        lambda: denoise(networks.backbone, first, whole, text),
    )


def run_vae(method: str, px: int, args: argparse.Namespace, side: str) -> tuple[Callable, Callable]:
    """Return one pass through a half of the autoencoder: moments of pixels in -1..1, or pixels of latents."""
    vae = load_network(args.weights, "vae", args.device, args.dtype)
    backbone = Backbone(vae, torch.nn.Identity(), lambda words: None, torch.device(args.device), DTYPES[args.dtype])
    length, channels = (px, 3) if side == "encoder" else (px // 8, 4)
    x = torch.rand(1, channels, length, length, generator=torch.Generator().manual_seed(1)) * 2 - 1
    if method == "diffusers tiles":
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = 512, 64
    if "not folded" in method:
        layer_pass.read_doubling = lambda *_: None

    def run(x: Tensor) -> Tensor:
        inside = x.to(backbone.device, backbone.dtype)
        if method == "untiled":
            return run_untiled(vae, side, inside).float().cpu()
        if method == "diffusers tiles":
            tiled = vae._tiled_encode(inside) if side == "encoder" else vae.tiled_decode(inside).sample
            return tiled.float().cpu()
        tiling = VAETiling(int(method.split()[1].strip(",")))
        if side == "encoder":
            return backbone.tiled_vae.encode(x / 2 + 0.5, lambda: None, tiling)
        return backbone.tiled_vae.decode(x, lambda: None, tiling) * 2 - 1

    return lambda: run(x), lambda: run(x[..., : length // 8, : length // 8])


def run_unet(method: str, px: int, args: argparse.Namespace) -> tuple[Callable, Callable]:
    """Return one call of the UNet, twice."""
    unet, text = load_network(args.weights, "unet", args.device, args.dtype), load_text(args.weights)
    count = 2 if method.startswith("two") else 1
    z = torch.randn(count, 4, px // 8, px // 8, generator=torch.Generator().manual_seed(1))
    z, text = (x.to(args.device, DTYPES[args.dtype]) for x in (z, text.expand(count, -1, -1)))
    if method == "channels last":
        unet, z = unet.to(memory_format=torch.channels_last), z.contiguous(memory_format=torch.channels_last)
    if method == "attention without SDPA":
        unet.set_attn_processor(AttnProcessor())
    if method.startswith("compiled"):
        from torch._inductor import config

        config.freezing = method.endswith("frozen")
        unet = torch.compile(unet)

    def run() -> Tensor:
        return unet(z, 200, encoder_hidden_states=text).sample.float().cpu()

    return run, run


def run_here(args: argparse.Namespace) -> None:
    """Measure one method in this process; the result goes to `args.one[3]`."""
    part, method, px, out = args.one
    runs = {
        "stage": run_stage,
        "growth": run_stage,
        "denoise": run_denoise,
        "unet": run_unet,
        "compile": run_unet,
        "decode": lambda *rest: run_vae(*rest, side="decoder"),
        "encode": lambda *rest: run_vae(*rest, side="encoder"),
    }
    with torch.inference_mode():
        work, warm_up = runs[part](method, int(px), args)
        warm_up()
        result, figures = measure(work, args.device)
    if method.startswith("two"):
        figures = {key: value / 2 for key, value in figures.items()}
    torch.save(result[:1].clone(), out)
    sys.stdout.write("\n" + json.dumps(figures))


def commands_for(part: str, px: int, folder: Path, args: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of every method; its result goes to a file of its own in `folder`."""
    commands = {}
    for method in METHODS[part]:
        own = ["--one", part, method, str(px), str(folder / f"{method}.pt"), "--weights", str(args.weights)]
        commands[method] = [sys.executable, __file__, *own, "--device", args.device, "--dtype", args.dtype]
    if part == "stage" and (comfyui := find()):
        python = os.environ.get("COMFYUI_PYTHON", sys.executable)
        for method, word in COMFYUI.items():
            files = [str(args.weights), str(args.weights / f"input-{px}.safetensors"), str(folder / f"{method}.pt")]
            commands[method] = [python, str(HERE / "comfyui_nodes.py"), word, str(comfyui), *files]
    return commands


def rows_of(part: str, px: int, args: argparse.Namespace) -> list[str]:
    """Return table rows of one case."""
    image = torch.rand(1, 3, px // 2, px // 2, generator=torch.Generator().manual_seed(1))
    save_file({"image": image}, args.weights / f"input-{px}.safetensors")
    with tempfile.TemporaryDirectory() as folder:
        commands = commands_for(part, px, Path(folder), args)
        medians = take_turns(commands, args.repeat)
        results = {method: torch.load(Path(folder) / f"{method}.pt", weights_only=True) for method in commands}
    base, rows = medians[next(iter(commands))], []
    for method, own in medians.items():
        truth = results[TRUTH.get(method, method) if part == "stage" else next(iter(commands))]
        error = (results[method] - truth).abs()
        alike = results[method] is truth or part == "denoise"
        worst = "" if alike else f"{error.max():.1e} / {error.mean():.1e}"
        per_pixel, time, memory = 1e6 / px**2, own["seconds"] / base["seconds"], own["mib"] / max(base["mib"], 1)
        rows.append(
            f"| {part} {px} px | {method} | {own['seconds']:.1f} | {own['cpu']:.1f} | {own['seconds'] * per_pixel:.1f} "
            f"| {own['mib']:.0f} | {own['mib'] * per_pixel:.0f} | {time:.2f} | {memory:.2f} | {worst} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=("stage", "vae", "unet", "denoise", "growth"))
    parser.add_argument("--sizes", nargs="+", type=int, help="of the pictures, in pixels; growth 4096 needs 20 GB")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="folder to keep the weights in; default: a temporary one")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run_here(args)
        return
    sizes = {"unet": (512,), "compile": (512,), "growth": (512, 1024, 2048)}
    head = "case | method | s | CPU s | s / MP | peak MiB | MiB / MP | time | memory | max / mean error"
    sys.stdout.write(f"| {head} |\n|{'---|' * 10}\n")
    with tempfile.TemporaryDirectory() as folder:
        args.weights = args.weights or Path(folder)
        args.weights.mkdir(parents=True, exist_ok=True)
        if not (args.weights / "text.safetensors").exists():
            write_weights(args.weights)
        for name in args.part:
            for part in PARTS.get(name, (name,)):
                for px in args.sizes or sizes.get(part, (1024,)):
                    sys.stdout.write("\n".join(rows_of(part, px, args)) + "\n")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
