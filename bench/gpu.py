"""The core at SD2.1-base size with random weights on a GPU: `python bench/gpu.py [--part PART ...]`.

Parts:
  whole      seconds and peak memory of one picture, for every size, dtype and tile batch
  steps      how one picture's time divides into encoder, UNet, decoder and the rest
  unet       one call of the UNet: as it is, channels last, replayed as a CUDA graph; one tile and eight
  profile    the dearest kernels of one picture, their launches, and how often the host waited

The picture is noise. Published TUDSR (H800): 128 -> 512 in 0.0596 s, 256 -> 2048 in 2.2848 s.
`python bench/engine.py --device cuda --dtype fp16` compares with the published procedure. Without a GPU, to try it:
`python bench/gpu.py --device cpu --sizes 64x2 --dtype fp32 --tile-batch 1 --repeat 1`
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch
from full_size import random_model
from harness import Figures, measure, medians, wait_for
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import TwoStageModel, UpscaleOptions, upscale
from tudsr_core.weights.checkpoints import DTYPES

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx")


def job(model: TwoStageModel, case: str, tile_batch: int) -> Callable[[], Tensor]:
    """Return the upscaling of a picture of noise, without a colour fix, for a case such as "128x4"."""
    side, factor = (int(part) for part in case.split("x"))
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    options = UpscaleOptions(tile_batch=tile_batch, color_fix="none")
    return lambda: upscale(image, model, Target(scale=factor), options)


def figures_of(work: Callable[[], Tensor], args: argparse.Namespace) -> Figures:
    """Return the medians of `measure`, after one run to warm up."""
    work()
    return medians([measure(work, args.device)[1] for _ in range(args.repeat)])


def whole(model: TwoStageModel, dtype: str, args: argparse.Namespace) -> list[str]:
    """Return a row for every size and tile batch."""
    rows = []
    for case in args.sizes:
        for tile_batch in args.tile_batch:
            own = figures_of(job(model, case, tile_batch), args)
            rows.append(f"| {case} | {dtype} | {tile_batch} | {own['seconds']:.3f} | {own['mib']:.0f} |")
    return rows


def steps(model: TwoStageModel, dtype: str, args: argparse.Namespace) -> list[str]:
    """Return a row for every size: seconds of each step, waited for, and of what is left."""
    rows, spent = [], Counter()
    networks = {id(stage.networks): stage.networks for stage in (model.first, model.second)}.values()
    for one in networks:
        for name in ("encode", "denoise", "decode"):
            setattr(one, name, _timed(getattr(one, name), name, spent, args.device))
    for case in args.sizes:
        work = job(model, case, args.tile_batch[-1])
        work()
        spent.clear()
        seconds = measure(work, args.device)[1]["seconds"]
        own = " | ".join(f"{spent[name]:.3f}" for name in ("encode", "denoise", "decode"))
        rows.append(f"| {case} | {dtype} | {own} | {seconds - spent.total():.3f} |")
    for one in networks:
        for name in ("encode", "denoise", "decode"):
            delattr(one, name)
    return rows


def _timed(call: Callable, name: str, spent: Counter, device: str) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        wait_for(device)
        began = time.perf_counter()
        result = call(*args, **kwargs)
        wait_for(device)
        spent[name] += time.perf_counter() - began
        return result

    return run


@torch.inference_mode()
def unet(model: TwoStageModel, dtype: str, args: argparse.Namespace) -> list[str]:
    """Return a row for every way to call the UNet with one tile of 512 px, or eight."""
    backbone, rows = model.first.networks.backbone, []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        network = nn.Module.to(backbone.unet, memory_format=memory_format)
        layout = str(memory_format).rpartition(".")[2]
        for tiles in (1, 8):
            z = torch.randn(tiles, 4, 64, 64, device=args.device, dtype=DTYPES[dtype])
            text, t = model.first.networks.condition("").expand(tiles, -1, -1), torch.tensor([200], device=args.device)
            call = partial(network, z, t, encoder_hidden_states=text, return_dict=False)
            ways = {"as it is": lambda call=call: call()[0]}
            if args.device == "cuda":
                ways["as a CUDA graph"] = _captured(ways["as it is"])
            for way, call in ways.items():
                own = figures_of(call, args)
                rows.append(f"| {layout} | {dtype} | {tiles} | {way} | {1e3 * own['seconds'] / tiles:.2f} |")
    nn.Module.to(backbone.unet, memory_format=torch.contiguous_format)
    return rows


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay


def profiled(model: TwoStageModel, dtype: str, args: argparse.Namespace) -> list[str]:
    """Return, for every size, a line of totals and ten rows of the dearest kernels."""
    rows = []
    for case in args.sizes:
        work = job(model, case, args.tile_batch[-1])
        work()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            work()
            wait_for(args.device)
        events = seen.key_averages()
        kernels = sorted(
            (e for e in events if e.device_type != torch.autograd.DeviceType.CPU), key=lambda e: -e.device_time_total
        )
        total = sum(e.device_time_total for e in kernels)
        counts = [sum(e.count for e in events if e.key in names) for names in (LAUNCHES, WAITS)]
        rows.append(f"| {case} | {dtype} | all | {total / 1e3:.1f} | {counts[0]} launches, {counts[1]} waits |")
        rows += [
            f"| {case} | {dtype} | {e.key[:90]} | {e.device_time_total / 1e3:.1f} | {e.count} |" for e in kernels[:10]
        ]
    return rows


PARTS = {
    "whole": (whole, "case | dtype | tile batch | s (median) | peak MiB over the model"),
    "steps": (steps, "case | dtype | encode s | UNet s | decode s | rest s"),
    "unet": (unet, "memory format | dtype | tiles | way | ms a tile"),
    "profile": (profiled, "case | dtype | kernel | ms | count"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=("whole", "steps"), choices=PARTS)
    parser.add_argument("--sizes", nargs="+", default=("128x4", "256x8"), help="SIDExFACTOR")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--dtype", nargs="+", default=("fp16",), choices=DTYPES)
    parser.add_argument("--tile-batch", nargs="+", type=int, default=(1, 4, 16))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    for part in args.part:
        run, head = PARTS[part]
        sys.stdout.write(f"\n| {head} |\n|{'---|' * (1 + head.count('|'))}\n")
        for dtype in args.dtype:
            sys.stdout.write("\n".join(run(random_model(args.device, dtype), dtype, args)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
