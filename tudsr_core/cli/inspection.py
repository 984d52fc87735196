"""Saying what a weight file is, in words; reads everything through the ordinary readers."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..backends import TEXT_PREFIXES, UNET_PREFIX, VAE_PREFIX
from ..diffusion import OneStep
from ..models import (
    DOWNSAMPLER_FORMAT,
    TAGGER_FORMAT,
    kind_of,
    load_downsampler,
    load_stablesr,
    load_tagger,
    load_wrapping,
)
from ..weights import (
    MODEL_FORMAT,
    OWN_TITLE,
    Adapter,
    CheckpointError,
    WeightDelta,
    file_prediction,
    identify,
    known_file,
    open_safetensors,
    read_model,
    stream,
)

Lines = list[tuple[str, str]]


def inspect_file(path: Path) -> Lines:
    """Return `(name, value)` lines about an adapter, a base model or a whole model; raises CheckpointError."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; check the path")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    lines = [("file", f"{path}, {sum(file.stat().st_size for file in files) / 2**20:.1f} MiB")]
    lines += _base_folder(path) if (path / "unet").is_dir() else _single(path)
    known = known_file(path.name)
    return [*lines, *([("known as", known.gives), ("licence", known.licence), ("from", known.page)] if known else [])]


def describe_adapter(adapter: Adapter) -> Lines:
    """Return what an adapter changes and how it is used."""
    about = adapter.about
    lines = [("method", about.title), ("base model", about.base)]
    lines += [("stage", str(adapter.stage))] if adapter.stage else []
    lines += [("steps", ", ".join(map(_step, adapter.steps_for(adapter.stage or 1))))]
    prompt = "tags of each picture" if about.prompt is None else f"fixed: {about.prompt}" if about.prompt else "empty"
    lines += [("prompt", prompt)]
    for name, patch in (("UNet", adapter.unet), ("UNet, detail", adapter.detail), ("VAE", adapter.vae)):
        lines += [(name, _patch(patch))] if patch else []
    if adapter.predictor:
        count = sum(tensor.numel() for tensor in adapter.predictor.values())
        lines += [("noise predictor", f"{count / 1e6:.1f} M parameters")]
    return lines


def _step(step: OneStep) -> str:
    start = "" if step.b == 0 else f", z_in = {step.a:.5f} z + {step.b:.5f} n"
    return f"t = {step.t} (z = {step.p:.5f} z_in {step.q:+.6f} eps{start})"


def _patch(patch: WeightDelta) -> str:
    ranks = sorted({update.rank for update in patch.updates.values()})
    scales = sorted({round(update.alpha / update.rank, 4) for update in patch.updates.values()})
    parameters = sum(update.down.numel() + update.up.numel() for update in patch.updates.values())
    kinds = sorted({str(update.down.dtype).removeprefix("torch.") for update in patch.updates.values()})
    text = (
        f"{len(patch.updates)} updates, rank {', '.join(map(str, ranks))}, "
        f"scale {', '.join(f'{s:g}' for s in scales)}, "
        f"{parameters:,} parameters, {', '.join(kinds)}"
    )
    return f"{text}; trained: {', '.join(patch.weights)}" if patch.weights else text


def _single(path: Path) -> Lines:
    if path.suffix == ".safetensors":
        file = open_safetensors(path)
        metadata = file.metadata() or {}
        if metadata.get("format") == MODEL_FORMAT:
            model = read_model(path)
            steps = f"stage one: {_step(model.first_step)}; stage two: {_step(model.second.steps_for(2)[0])}"
            return [("kind", f"whole model {model.name!r}"), ("steps", steps), ("stage two", _patch(model.second.unet))]
        if metadata.get("format") == TAGGER_FORMAT:
            return [("kind", f"tagger of {len(load_tagger(path).labels):,} tags (RAM, DAPE)")]
        if metadata.get("format") == DOWNSAMPLER_FORMAT:
            if kind_of(path) == "shared":
                return [("kind", "learned downsampler (an adapter of SD2.1-base's UNet; tudsr degrade --base)")]
            network = load_downsampler(path)
            sees = {"pixel": "pixels alone", "latent": "one diffusion step on latents"}[network.config.kind]
            return [("kind", f"learned downsampler ({sees})"), _size(network)]
        keys = list(file.keys())
    else:
        keys = [key for key, _ in stream(path)] if path.is_file() else []
    if lines := _stablesr(path, keys):
        return lines
    if any(key.startswith((UNET_PREFIX, VAE_PREFIX)) for key in keys):
        return _base_file(path, keys)
    title, adapter = identify(path)
    lines = [("kind", title), *describe_adapter(adapter)]
    if adapter.method == "tudsr" and title != OWN_TITLE:
        lines.append(("note", "it does not say whose it is: TUDSR is assumed, give --method omgsr for OMGSR's"))
    return lines


def _stablesr(path: Path, keys: list[str]) -> Lines:
    """Return what is said of StableSR's files, nothing of others."""
    if any(key.startswith("structcond_stage_model.") for key in keys):
        network = load_stablesr(path)
        trained = {"epsilon": "SD2.1-base (512)", "v_prediction": "SD2.1 (768, v prediction)"}
        base = trained.get(network.prediction, "SD2.1, which of them it does not say")
        return [("kind", "StableSR: encoder and feature transforms"), ("base model", base), _size(network)]
    if any(".fusion_layer_1." in f".{key}" for key in keys):
        return [("kind", "StableSR's CFW, for the decoder of SD2.1"), _size(load_wrapping(path))]
    return []


def _size(network: nn.Module) -> tuple[str, str]:
    weights = list(network.parameters())
    return "weights", f"{len(weights)} tensors, {sum(one.numel() for one in weights) / 1e6:.1f} M parameters"


def _base_file(path: Path, keys: list[str]) -> Lines:
    parts = {"UNet": UNET_PREFIX, "VAE": VAE_PREFIX, "text encoder": TEXT_PREFIXES}
    counts = [f"{name}: {sum(key.startswith(prefix) for key in keys)} tensors" for name, prefix in parts.items()]
    predicts = {
        None: "unknown",
        "epsilon": "eps (suitable)",
        "v_prediction": "v (SD2.1 768, for zoom and StableSR only)",
    }
    return [
        ("kind", "Stable Diffusion checkpoint"),
        ("holds", ", ".join(counts)),
        ("predicts", predicts[file_prediction(path)]),
    ]


def _base_folder(path: Path) -> Lines:
    parts = sorted(part.name for part in path.iterdir() if part.is_dir())
    return [("kind", "diffusers folder of Stable Diffusion"), ("holds", ", ".join(parts))]
