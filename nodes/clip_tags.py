"""The CLIP tag prompter: ComfyUI's CLIP and CLIP_VISION on a list of words. Trained taggers are in `taggers.py`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..tudsr_core.atomic_write import temporary_beside
from ..tudsr_core.prompts import (
    ClipTagPrompter,
    CountProgress,
    TagChoice,
    check_tag_space,
    check_tags,
    content_key,
    read_tags,
)
from .host.model_files import find_below, list_below, model_roots
from .inputs import CATEGORY, float_input, prompter_output

log = logging.getLogger(__name__)

BUILT_IN = "(built-in list)"
TEMPLATE = "a photo of {}"
BATCH = 32
CHOICE = TagChoice()


def weights_mark(module: torch.nn.Module, patcher: Any) -> str:
    """Return a hash of a network's small tensors, each matrix's first row, and its patches."""
    rows = [tensor if tensor.ndim < 2 else tensor[0] for _, tensor in sorted(module.state_dict().items())]
    patches = str(patcher.patches_uuid) if patcher.patches else ""
    return content_key(patches, *(row.detach().float().cpu() for row in rows))


def embed_pictures(clip_vision: Any, tiles: Sequence[Tensor], tick: CountProgress) -> Tensor:
    """Return CLIP's projected embeddings `N D` of tiles `3 h w`."""
    found, start = [], 0
    while start < len(tiles):
        end = start + 1
        while end < len(tiles) and end - start < BATCH and tiles[end].shape == tiles[start].shape:
            end += 1
        batch = torch.stack(list(tiles[start:end])).movedim(1, -1)
        found.append(clip_vision.encode_image(batch, crop=False)["image_embeds"].float().cpu())
        tick(end, len(tiles))
        start = end
    return torch.cat(found)


def text_tower(clip: Any) -> tuple[str, Any]:
    """Return name and network of the CLIP text encoder with the widest projection in a ComfyUI CLIP.

    Raises ValueError for encoders that are not CLIP (T5, Llama).
    """
    for name in ("h", "g", "l"):
        tower = getattr(clip.cond_stage_model, f"clip_{name}", None)
        if tower is not None and hasattr(tower.transformer, "text_projection"):
            return name, tower
    raise ValueError("this text encoder is no CLIP; connect the CLIP of an SD2.x or SDXL checkpoint")


@torch.inference_mode()
def embed_words(clip: Any, words: Sequence[str]) -> Tensor:
    """Return CLIP's projected embeddings `T D` of words put into a sentence."""
    name, tower = text_tower(clip)
    clip.cond_stage_model.reset_clip_options()
    clip.load_model()
    device = clip.patcher.load_device
    tower.set_clip_options({"projected_pooled": True, "execution_device": device})
    bar, found = comfy.utils.ProgressBar(len(words)), []
    try:
        for start in range(0, len(words), BATCH):
            comfy.model_management.throw_exception_if_processing_interrupted()
            sentences = [TEMPLATE.format(word) for word in words[start : start + BATCH]]
            tokens = [[token for token, *_ in clip.tokenize(sentence)[name][0]] for sentence in sentences]
            found.append(tower.encode(tokens)[1].float().cpu())
            bar.update(len(sentences))
    finally:
        clip.cond_stage_model.reset_clip_options()
    return check_tag_space(torch.cat(found))


def cached_words(clip: Any, words: Sequence[str]) -> Tensor:
    """Return `embed_words`, kept as a file in ComfyUI's user folder for unpatched encoders."""
    if clip.patcher.patches:
        return embed_words(clip, words)
    key = content_key(weights_mark(text_tower(clip)[1], clip.patcher), TEMPLATE, *words)
    path = Path(folder_paths.get_user_directory()) / "tudsr" / f"tags-{key[:24]}.safetensors"
    try:
        return load_file(path)["tags"].float()
    except (OSError, KeyError, SafetensorError):
        found = embed_words(clip, words)
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_beside(path) as temporary:
        save_file({"tags": found.half().contiguous()}, temporary)
    log.info("embedded %d tags once; kept in %s", len(words), path)
    return found.half().float()


def list_tag_files() -> list[str]:
    """Return text files below `models/tudsr`."""
    return sorted({file.as_posix() for root in model_roots() for file in list_below(root) if file.suffix == ".txt"})


def _word_inputs() -> list[io.Input]:
    """Which words there are to choose from."""
    return [
        io.Combo.Input(
            "tags",
            options=[BUILT_IN, *list_tag_files()],
            default=BUILT_IN,
            tooltip="The words to choose from: the built-in list, or a text file in models/tudsr, one per "
            "line. Use your own for special subjects.",
        ),
        io.String.Input(
            "more_tags",
            default="",
            tooltip="Further words, separated by commas, such as a name for your subject.",
        ),
    ]


def _choice_inputs() -> list[io.Input]:
    """Which of them a tile gets."""
    return [
        io.Int.Input(
            "count",
            default=CHOICE.count,
            min=1,
            max=40,
            tooltip="Most words per tile. Raise it for richer prompts; lower it if wrong words appear.",
        ),
        float_input(
            "least",
            CHOICE.least,
            "How far a word must stand out (standard deviations over the list). Raise it for fewer, "
            "surer words; lower it if tiles stay empty.",
            most=6.0,
        ),
        float_input(
            "specific",
            CHOICE.specific,
            "How much of what all tiles have in common is discounted. Raise it if every tile says the "
            "same; lower it if tiles say odd things.",
            most=1.0,
        ),
    ]


class ClipTags(io.ComfyNode):
    """CLIP and CLIP_VISION to a prompter."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="TUDSRClipTagPrompter",
            display_name="CLIP Tag Prompter",
            category=CATEGORY,
            description="Names what a tile shows by comparing it with a list of words in CLIP. Needs the two halves "
            "of one CLIP: SD2.x with CLIP-ViT-H-14, or SDXL with CLIP-ViT-bigG-14.",
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoder of an SD2.x (or SDXL) checkpoint."),
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="The picture half of the same CLIP: CLIP-ViT-H-14 (laion2B) for SD2.x, bigG for SDXL.",
                ),
                *_word_inputs(),
                *_choice_inputs(),
            ],
            outputs=[prompter_output()],
        )

    @classmethod
    def execute(cls, clip, clip_vision, tags, more_tags, count, least, specific) -> io.NodeOutput:
        words = read_tags() if tags == BUILT_IN else read_tags(find_below(model_roots(), tags))
        more = [word.strip() for word in more_tags.split(",") if word.strip()]
        words = list(dict.fromkeys([*words, *check_tags(more, "more_tags")]))
        weights = weights_mark(text_tower(clip)[1], clip.patcher)
        weights += weights_mark(clip_vision.model, clip_vision.patcher)
        prompter = ClipTagPrompter(
            words,
            lambda tiles, tick: embed_pictures(clip_vision, tiles, tick),
            lambda: cached_words(clip, words),
            weights,
            TagChoice(count, least, specific),
        )
        return io.NodeOutput(prompter)
