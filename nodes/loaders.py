"""Loaders: the embedded model, and adapter files of every known method onto MODEL and VAE."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..tudsr_core.methods import METHODS
from ..tudsr_core.untrusted import shown
from ..tudsr_core.weights import SUFFIXES, CheckpointError, embedded_path, read_adapter, read_model, where_to_get
from .host.adapters import ManagedPredictor, VAEChange, apply, apply_to_unet, lora_patches, unet_keys, with_change
from .host.embedded import UNET_PREFIX, build
from .host.model_files import find_below, list_below, model_roots
from .host.stages import StageFacts, attach
from .inputs import CATEGORY, float_input

log = logging.getLogger(__name__)

NOTHING = "(put an adapter into models/tudsr)"
STAGES = {"from file": None, "one": 1, "two": 2}
PARTS = ("unet_lora_adapter", "vae_encoder_lora_adapter")


def list_adapters() -> list[str]:
    """Return adapter files and peft folders below `models/tudsr`, as names for the chooser."""
    found = set()
    for root in model_roots():
        files = list(list_below(root))
        folders = {file.parent for file in files if file.name == "adapter_config.json"}
        found |= {folder.parent if folder.name in PARTS else folder for folder in folders}
        found |= {file for file in files if file.suffix in SUFFIXES and file.parent not in folders}
    return sorted(path.as_posix() for path in found)


def find_adapter(name: str) -> Path:
    """Return the path of a chosen adapter; raises CheckpointError that says where to put it."""
    put = f"put the file, or the folder with {PARTS[0]}/ inside, there, then press R to refresh"
    return find_below(model_roots(), name, where_to_get(name) + put)


class LoadEmbedded(io.ComfyNode):
    """The shipped model as MODEL (two stages), VAE and CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadEmbedded",
            display_name="Load Embedded TUDSR Model",
            category=CATEGORY,
            description="The small two-stage model that comes with this pack: no download, runs on a CPU. "
            "A faithful sharpener, made to try the pack and to test graphs.",
            outputs=[
                io.Model.Output(display_name="stage_one", tooltip="MODEL for stage one (x4)."),
                io.Model.Output(display_name="stage_two", tooltip="The same weights with LoRA-2, for stage two (x2)."),
                io.Vae.Output(display_name="vae", tooltip="Its autoencoder (4 pixels per latent, 32 channels)."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The empty prompt it was trained with."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        file = read_model(embedded_path())
        base, vae = build(file)
        first = attach(base, StageFacts("embedded stage one", 1, None, steps=(file.first_step,), limits=file.limits))
        keys = {f"{path}.weight": f"{UNET_PREFIX}{path}.weight" for path in file.second.unet.updates}
        patched = apply(base, file.second.unet, keys, "embedded stage two", "UNet")
        second = attach(patched, StageFacts("embedded stage two", 2, None, steps=file.second.steps, limits=file.limits))
        empty = torch.zeros(1, 1, file.unet_config["cross_attention_dim"])
        return io.NodeOutput(first, second, vae, [[empty, {}]])


def _adapter_inputs() -> list:
    """Which adapter, for which stage, how strongly."""
    return [
        io.Combo.Input("adapter", options=list_adapters() or [NOTHING], tooltip="A file or folder in models/tudsr."),
        io.Combo.Input(
            "stage",
            options=list(STAGES),
            default="from file",
            tooltip="Which stage it was trained for. Files of this pack say so themselves; "
            "for published folders choose it here.",
        ),
        float_input("strength", 1.0, "1 is as trained. Lower for a gentler, higher for a stronger effect.", most=2.0),
    ]


def _method_inputs() -> list:
    """What only some methods have."""
    return [
        io.Combo.Input(
            "method",
            options=["from file", "tudsr", "omgsr"],
            default="from file",
            optional=True,
            tooltip="Only for peft folders, which do not say whose they are: TUDSR (t = 200 and 50) unless "
            "you choose omgsr (t = 273).",
        ),
        io.Int.Input(
            "steps",
            default=1,
            min=1,
            max=5,
            optional=True,
            tooltip="InvSR only: network evaluations per tile. Raise it for more detail, at that many times the time.",
        ),
        float_input(
            "fidelity",
            1.0,
            "PiSA-SR only: weight of the pixel-level part. Raise it to remove more degradation, lower "
            "it to stay closer to the input. Other values than detail's take two evaluations per tile.",
            most=2.0,
            optional=True,
        ),
        float_input(
            "detail",
            1.0,
            "PiSA-SR only: weight of the semantic part. Raise it for more invented texture, lower it "
            "for a plainer picture.",
            most=2.0,
            optional=True,
        ),
    ]


class LoadAdapter(io.ComfyNode):
    """An adapter of any known method onto MODEL, and onto the VAE if the file changes it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRLoadAdapter",
            display_name="Load TUDSR Adapter",
            category=CATEGORY,
            description="Puts a one-step adapter from models/tudsr onto SD2.1-base: TUDSR or OMGSR (folder or "
            ".safetensors), HYPIR (.pth), OSEDiff or PiSA-SR (.pkl), or InvSR (.pth, onto SD-Turbo). Base weights are "
            "shared by all stages. See the help page for which file gives what.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="SD2.1-base, or SD-Turbo for InvSR, from Load Checkpoint or Load Diffusion Model.",
                ),
                *_adapter_inputs(),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Comes out with the adapter's changes (OMGSR and OSEDiff change the encoder), for Exact "
                    "Tiled VAE and stock nodes. TUDSR's own upscalers make these changes themselves, for each stage.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="CLIP of the checkpoint: gives the prompt the method was trained with as CONDITIONING.",
                ),
                *_method_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The MODEL with the adapter, for its stage."),
                io.Vae.Output(display_name="vae", tooltip="The VAE with the adapter's changes, if it has any."),
                io.Conditioning.Output(display_name="conditioning", tooltip="The method's own prompt, through CLIP."),
            ],
        )

    @classmethod
    def validate_inputs(cls, adapter) -> bool | str:
        try:
            find_adapter(adapter)
        except CheckpointError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, adapter, **_) -> str:
        path = find_adapter(adapter)
        files = [path] if path.is_file() else sorted(path / file for file in list_below(path))
        return " ".join(f"{file}:{file.stat().st_mtime_ns}" for file in files if file.is_file())

    @classmethod
    def execute(
        cls,
        model,
        adapter,
        stage,
        strength,
        vae=None,
        clip=None,
        method="from file",
        steps=1,
        fidelity=1.0,
        detail=1.0,
    ) -> io.NodeOutput:
        number = _stage_number(stage)
        loaded = read_adapter(find_adapter(adapter), None if method == "from file" else method, number)
        loaded.dials(fidelity, detail)  # those of another method are refused
        semantic = (lora_patches(loaded.detail, unet_keys(model)), strength) if loaded.detail else None
        facts = StageFacts(
            adapter,
            loaded.stage,
            loaded.method,
            steps=loaded.steps,
            count=steps,
            fidelity=fidelity,
            detail=detail,
            semantic=semantic,
            predictor=ManagedPredictor(loaded) if loaded.predictor else None,
            vae=VAEChange(adapter, strength, loaded.vae) if loaded.vae else None,
        )
        facts.steps_for(loaded.stage or 1)  # a number of steps the method does not know fails here
        result = attach(apply_to_unet(model, loaded, adapter, strength), facts)
        changed = _blocked("VAE", "it with the adapter's changes") if vae is None else with_change(vae, facts.vae)
        return io.NodeOutput(result, changed, _prompt(clip, loaded.method))


def _stage_number(stage: str) -> int | None:
    if stage not in STAGES:
        raise ValueError(f"stage is {shown(stage)!r}; use {', '.join(STAGES)}")
    return STAGES[stage]


def _blocked(socket: str, what: str) -> ExecutionBlocker:
    """Return what stops the node that asks for an output whose input is not connected."""
    return ExecutionBlocker(f"connect the checkpoint's {socket} to Load TUDSR Adapter to get {what}")


def _prompt(clip: Any, method: str) -> Any:
    """Return the CONDITIONING of the method's prompt, or what stops the node that asks for it without a CLIP."""
    if clip is None:
        return _blocked("CLIP", "its prompt")
    text = METHODS[method].prompt
    if text is None:
        log.warning(
            "%s was trained with tags of each picture; its conditioning output is the empty prompt. "
            "For more, encode tags of your own and connect them instead",
            METHODS[method].title,
        )
    return clip.encode_from_tokens_scheduled(clip.tokenize(text or ""))
