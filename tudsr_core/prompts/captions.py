"""Captions by a local transformers model (BLIP, Florence-2), without network access or foreign code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import MAX_LAYERS, Fields, UntrustedError, parse_json, read_text, shown
from .tile_prompts import CountProgress, TilePrompt, content_key

BLIP, FLORENCE = "blip", "florence2"
MAX_NEW_TOKENS = 48


def caption_kind(folder: Path) -> str | None:
    """Return which supported model a folder holds, by its `config.json`, or None."""
    try:
        path = folder / "config.json"
        kind = Fields(parse_json(read_text(path), str(path)), str(path)).text("model_type")
    except UntrustedError:
        return None
    return kind if kind in (BLIP, FLORENCE) else None


def _check_layers(path: Path) -> None:
    """Raise UntrustedError for a configuration of more layers than any captioner has: they are built before a look."""
    waiting = [parse_json(read_text(path), str(path))]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, dict):
                waiting.append(value)
            elif "layers" in name or name == "depths":
                if sum(x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int)) > MAX_LAYERS:
                    raise UntrustedError(
                        f"{path}: {shown(name)} has too many layers, no captioner has over {MAX_LAYERS}"
                    )


class CaptionPrompter:
    """One caption per tile from a model folder; the model is loaded at the first tile.

    Only safetensors weights are read and no code of the folder is run. `place` moves the model to
    its device before use and returns that device. Raises ValueError for folders of other models,
    without transformers, or without safetensors weights.
    """

    def __init__(self, folder: Path, task: str = "<CAPTION>", place: Callable[[Any], Any] | None = None) -> None:
        kind = caption_kind(folder)
        if kind is None:
            raise ValueError(f"{folder} holds no BLIP or Florence-2 model (model_type in config.json)")
        self.folder, self.kind, self.task, self.place = folder, kind, task, place
        self.model: Any = None
        self.processor: Any = None

    def _load(self) -> None:
        try:
            import transformers
        except ImportError as error:
            raise ValueError("captions need transformers; run: pip install transformers") from error
        name = {BLIP: "BlipForConditionalGeneration", FLORENCE: "Florence2ForConditionalGeneration"}[self.kind]
        if not hasattr(transformers, name):
            raise ValueError(f"transformers {transformers.__version__} has no {name}; update it")
        transformers.utils.logging.disable_progress_bar()
        _check_layers(self.folder / "config.json")
        safe = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(self.folder, **safe)
            self.model = getattr(transformers, name).from_pretrained(self.folder, use_safetensors=True, **safe)
        except Exception as error:  # whatever transformers makes of settings that cannot be
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UntrustedError(
                f"{self.folder} cannot be loaded by transformers {transformers.__version__}: {reason}. "
                "It needs safetensors weights in transformers' own layout (for Florence-2: florence-community)"
            ) from error
        self.model.eval().requires_grad_(False)

    def describe(self, tiles: Sequence[Tensor], tick: CountProgress) -> list[TilePrompt]:
        """Return a caption of each tile."""
        if self.model is None:
            self._load()
        device = self.place(self.model) if self.place else self.model.device
        prompts = []
        for number, tile in enumerate(tiles, 1):
            prompts.append(TilePrompt(self._caption(tile, device)))
            tick(number, len(tiles))
        return prompts

    @torch.inference_mode()
    def _caption(self, tile: Tensor, device: Any) -> str:
        from PIL import Image

        picture = Image.fromarray((tile.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())
        words = {"text": self.task} if self.kind == FLORENCE else {}
        inputs = self.processor(images=picture, return_tensors="pt", **words)
        inputs = {key: value.to(device) for key, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        return self.processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()

    def fingerprint(self) -> str:
        """Return a hash of the folder's files by name, size and time."""
        files = sorted(path for path in self.folder.iterdir() if path.is_file())
        facts = [f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
        return content_key("caption", str(self.folder), self.task, *facts)

    def release(self) -> None:
        """Move the model to the CPU, unless its host places it."""
        if self.model is not None and not self.place:
            self.model.to("cpu")
