"""Loaders of trained prompters: DAPE / RAM, and captioning models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy_api.latest import io

from ..tudsr_core.prompts import CaptionPrompter, TaggerPrompter, caption_kind
from ..tudsr_core.weights import CheckpointError, open_safetensors
from .host.model_files import find_below, list_below, model_roots
from .inputs import CATEGORY, prompter_output

NO_TAGGER = "(put DAPE into models/tudsr)"
NO_CAPTIONER = "(put a captioner's folder into models/tudsr or models/LLM)"
RAM_FILE = "ram_swin_large_14m.pth"
TAGGER_FORMAT = "tudsr-tagger/1"
CAPTION_ROOTS = ("LLM",)


def list_taggers() -> list[str]:
    """Return folders with RAM's published file and converted taggers below `models/tudsr`."""
    found = set()
    for root in model_roots():
        files = list(list_below(root))
        found |= {file.parent for file in files if file.name == RAM_FILE}
        found |= {file for file in files if file.suffix == ".safetensors" and _is_tagger(root / file)}
    return sorted(path.as_posix() for path in found)


def _is_tagger(file: Path) -> bool:
    try:
        return (open_safetensors(file).metadata() or {}).get("format") == TAGGER_FORMAT
    except CheckpointError:
        return False


def list_captioners() -> list[str]:
    """Return folders of BLIP and Florence-2 below `models/tudsr` and `models/LLM`."""
    return sorted(
        {
            file.parent.as_posix()
            for root in model_roots(*CAPTION_ROOTS)
            for file in list_below(root)
            if file.name == "config.json" and caption_kind(root / file.parent)
        }
    )


def patched(network: Any) -> Any:
    """Return a ModelPatcher, so that ComfyUI moves the network as it does its own."""
    return comfy.model_patcher.ModelPatcher(
        network,
        load_device=comfy.model_management.text_encoder_device(),
        offload_device=comfy.model_management.text_encoder_offload_device(),
    )


def _loader(node_id: str, title: str, says: str, inputs: list[io.Input]) -> io.Schema:
    """Return the schema of a node that loads a prompter."""
    return io.Schema(
        node_id=node_id,
        display_name=title,
        category=CATEGORY,
        description=says,
        inputs=inputs,
        outputs=[prompter_output()],
    )


class LoadDape(io.ComfyNode):
    """DAPE (or RAM) to a prompter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        chooser = io.Combo.Input(
            "model",
            options=list_taggers() or [NO_TAGGER],
            tooltip="A folder in models/tudsr with ram_swin_large_14m.pth, DAPE.pth and RAM's two tag lists, "
            "or a converted .safetensors file.",
        )
        says = (
            "The degradation-aware tagger of SeeSR (RAM Swin-L with DAPE's updates): trained to name "
            "what blurred and noisy tiles show."
        )
        return _loader("TUDSRLoadDape", "Load DAPE", says, [chooser])

    @classmethod
    def execute(cls, model) -> io.NodeOutput:
        from ..tudsr_core.models import load_tagger

        tagger = load_tagger(find_below(model_roots(), model))
        patcher = patched(tagger.network)
        return io.NodeOutput(TaggerPrompter(tagger, lambda: comfy.model_management.load_model_gpu(patcher)))


class LoadCaptioner(io.ComfyNode):
    """A captioning model of transformers to a prompter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        inputs = [
            io.Combo.Input(
                "model",
                options=list_captioners() or [NO_CAPTIONER],
                tooltip="A folder in models/tudsr or models/LLM with config.json and safetensors weights in "
                "transformers' layout.",
            ),
            io.Combo.Input(
                "detail",
                options=["<CAPTION>", "<DETAILED_CAPTION>"],
                default="<CAPTION>",
                tooltip="Florence-2's task. Take the detailed one for longer sentences; BLIP does not know it.",
            ),
        ]
        says = (
            "A BLIP or Florence-2 folder as a prompter: one sentence per tile. Nothing is downloaded, "
            "only safetensors are read, and no code of the folder is run."
        )
        return _loader("TUDSRLoadCaptioner", "Load Captioner", says, inputs)

    @classmethod
    def execute(cls, model, detail) -> io.NodeOutput:
        folder = find_below(model_roots(*CAPTION_ROOTS), model)
        return io.NodeOutput(CaptionPrompter(folder, detail, _place()))


def _place() -> Any:
    """Return a function that lets ComfyUI load the captioner and says where it is."""
    patchers: dict[int, Any] = {}

    def place(network: Any) -> Any:
        patcher = patchers.setdefault(id(network), patched(network))
        comfy.model_management.load_model_gpu(patcher)
        return patcher.load_device

    return place
