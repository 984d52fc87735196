"""Captions by a local transformers model (BLIP, Florence-2), without network access or foreign code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..untrusted import MAX_LAYERS, MAX_SIZE, Fields, UntrustedError, parse_json, read_text, shown, some
from .tile_prompts import CountProgress, TilePrompt, content_key

BLIP, FLORENCE = "blip", "florence2"
MAX_NEW_TOKENS = 48
MAX_SIDE = 2048  # pixels, as a network sees a picture; BLIP's are 384, Florence's 768
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def caption_kind(folder: Path) -> str | None:
    """Return which supported model a folder holds, by its `config.json`, or None."""
    try:
        path = folder / "config.json"
        kind = Fields(parse_json(read_text(path), str(path)), str(path)).text("model_type")
    except UntrustedError:
        return None
    return kind if kind in (BLIP, FLORENCE) else None


def _settings(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a table, and of the tables inside it; raises UntrustedError naming the file."""
    waiting = [Fields(parse_json(read_text(path), str(path)), str(path)).values]
    while waiting:
        for name, value in waiting.pop().items():
            yield name, value
            if isinstance(value, dict):
                waiting.append(value)


def _check_settings(folder: Path) -> None:
    """Raise UntrustedError for sizes that no captioner has: networks are built of them before a look at the weights."""
    path = folder / "config.json"
    for name, value in _settings(path):
        numbers = [x for x in (value if isinstance(value, list) else [value]) if isinstance(x, int | float)]
        if ("layers" in name or name == "depths") and sum(numbers) > MAX_LAYERS:
            raise UntrustedError(f"{path}: {shown(name)} has too many layers, no captioner has over {MAX_LAYERS}")
        if any(abs(x) > MAX_SIZE for x in numbers):
            raise UntrustedError(f"{path}: {shown(name)} is too large, no captioner has over {MAX_SIZE:,}")
    for path in filter(Path.is_file, (folder / name for name in PROCESSOR_FILES)):
        for name, value in _settings(path):
            sizes = (value if isinstance(value, dict) else {name: value}) if name in ("size", "crop_size") else {}
            for side in sizes:
                Fields(sizes, f"{path}, {name}").whole(side, default=1, least=1, most=MAX_SIDE)
            if name in ("image_mean", "image_std") and len(Fields({name: value}, str(path)).numbers(name)) != 3:
                raise UntrustedError(f"{path}: {name} must be three numbers, one for each colour")


def _check_weights(folder: Path, kind: type, config: Any) -> None:
    """Raise UntrustedError if the configuration asks for more weights than the files can hold, before they are made."""
    with torch.device("meta"):
        wanted = sum(parameter.numel() for parameter in kind(config).parameters())
    held = sum(path.stat().st_size for path in folder.glob("*.safetensors"))  # at least a byte for each weight
    if held and wanted > held:
        raise UntrustedError(
            f"{folder}: its config.json asks for {wanted:,} weights, its files hold {held:,} bytes; download it again"
        )


def _refuse_lacking(folder: Path, model: Any, missing: Iterable[str]) -> None:
    """Raise UntrustedError for weights that transformers has made up, other than those that share another's."""
    weights, missing = model.state_dict(), set(missing)
    held = {tensor.data_ptr() for key, tensor in weights.items() if key not in missing}
    lost = [key for key in missing & weights.keys() if weights[key].data_ptr() not in held]
    if lost := sorted(key for key in lost if weights[key].is_floating_point()):
        raise UntrustedError(f"{folder} lacks weights that its config.json asks for: {some(lost)}; download it again")


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
        _check_settings(self.folder)
        kind = getattr(transformers, name)
        safe = {"local_files_only": True, "trust_remote_code": False}
        try:
            self.processor = transformers.AutoProcessor.from_pretrained(self.folder, **safe)
            _check_weights(self.folder, kind, kind.config_class.from_pretrained(self.folder, local_files_only=True))
            model, about = kind.from_pretrained(self.folder, use_safetensors=True, output_loading_info=True, **safe)
            _refuse_lacking(self.folder, model, about["missing_keys"])
        except UntrustedError:
            raise
        except Exception as error:  # whatever transformers makes of settings that cannot be
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UntrustedError(
                f"{self.folder} cannot be loaded by transformers {transformers.__version__}: {reason}. "
                "It needs safetensors weights in transformers' own layout (for Florence-2: florence-community)"
            ) from error
        self.model = model.eval().requires_grad_(False)

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

    def _caption(self, tile: Tensor, device: Any) -> str:
        try:
            return self._generate(tile, device)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if "memory" in str(error):  # torch's are RuntimeErrors too, and nothing is wrong with the folder
                raise
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise UntrustedError(
                f"{self.folder} cannot caption: {reason}; its settings do not belong together, download it again"
            ) from error

    @torch.inference_mode()
    def _generate(self, tile: Tensor, device: Any) -> str:
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
