"""Adapter files of other projects: recognised by their keys, validated, brought into `Adapter`.

One reader per published format; every key must find its place, or the error lists those that do not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from .adapters import Adapter, Low, Patch
from .methods import METHODS
from .tensor_files import CheckpointError, TensorFile, check_finite, some

PEFT_PREFIX = "base_model.model."
UNET_FOLDER, VAE_FOLDER = "unet_lora_adapter", "vae_encoder_lora_adapter"
LISTS = ("encoder", "decoder", "others")


@dataclass(frozen=True)
class Format:
    """A kind of file: its name for people, how to tell it, and its reader."""

    title: str
    matches: Callable[[TensorFile], bool]
    read: Callable[[TensorFile], Adapter]


def read_foreign(file: TensorFile) -> tuple[str, Adapter]:
    """Return `(title of the format, adapter)`; raises CheckpointError when no format matches."""
    for kind in FORMATS:
        if kind.matches(file):
            return kind.title, kind.read(file)
    known = ", ".join(kind.title for kind in FORMATS)
    keys = some(file.tensors) or "none"
    raise CheckpointError(
        f"{file.path} is no adapter this pack knows (its tensors: {keys}); known are: {known}, and this pack's own"
    )


def read_peft_folder(path: Path, read: Callable[[Path], TensorFile]) -> Adapter:
    """Read one peft adapter, or the pair of folders that OMGSR and TUDSR save."""
    if (path / "adapter_config.json").is_file():
        return Adapter(path.name, Patch(_read_peft(path, read)))
    if not (path / UNET_FOLDER).is_dir():
        raise CheckpointError(
            f"folder {path} holds neither adapter_config.json nor {UNET_FOLDER}/; give the adapter's own folder"
        )
    encoder = _read_peft(path / VAE_FOLDER, read) if (path / VAE_FOLDER).is_dir() else {}
    vae = Patch({f"encoder.{name}": low for name, low in encoder.items()})
    return Adapter(path.name, Patch(_read_peft(path / UNET_FOLDER, read)), vae)


def pair(
    path: Path, tensors: dict[str, Tensor], down: str, up: str, alpha: Callable[[str, int], float]
) -> dict[str, Low]:
    """Join the halves `<module><down>` and `<module><up>` of every key into updates.

    `alpha(module, rank)` gives each update's alpha. Raises CheckpointError that lists leftover keys,
    missing halves, and ranks that disagree, and names NaN.
    """
    halves = {suffix: {key.removesuffix(suffix) for key in tensors if key.endswith(suffix)} for suffix in (down, up)}
    leftover = [key for key in tensors if not key.endswith((down, up))]
    single = sorted(halves[down] ^ halves[up])
    if leftover or single:
        problem = f"keys that fit nothing: {some(leftover)}" if leftover else f"half an update: {some(single)}"
        raise CheckpointError(f"{path} has {problem}; the file is damaged or of another kind")
    check_finite(path, tensors.items())
    lows = {}
    for name in sorted(halves[down]):
        first, second = tensors[name + down], tensors[name + up]
        if first.ndim < 2 or second.ndim < 2 or not first.numel() or first.shape[0] != second.shape[1]:
            raise CheckpointError(f"{path}: ranks of {name} do not agree; the file is damaged or of another kind")
        lows[name] = Low(first, second, alpha(name, first.shape[0]))
        if not lows[name].alpha > 0:
            raise CheckpointError(f"{path}: alpha of {name} is missing or not above 0; the file is damaged")
    return lows


def _read_peft(folder: Path, read: Callable[[Path], TensorFile]) -> dict[str, Low]:
    config_file = folder / "adapter_config.json"
    try:
        config = json.loads(config_file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{config_file} cannot be read: {error}") from error
    names = ("adapter_model.safetensors", "adapter_model.bin")
    files = [folder / name for name in names if (folder / name).is_file()] or [folder / names[0]]
    return _peft_lows(folder, read(files[0]).tensors, config)


def _peft_lows(path: Path, tensors: dict[str, Tensor], config: dict) -> dict[str, Low]:
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise CheckpointError(f"{path} uses {key}, which this pack does not support")
    foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if foreign:
        raise CheckpointError(f"{path} has keys that are no peft LoRA: {some(foreign)}")
    own = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    # rsLoRA scales by alpha / sqrt(r) where plain LoRA has alpha / r.
    alpha = config.get("lora_alpha")
    lows = pair(
        path,
        own,
        ".lora_A.weight",
        ".lora_B.weight",
        lambda _, rank: float(rank if alpha is None else alpha) * (rank**0.5 if config.get("use_rslora") else 1),
    )
    wrong = [name for name, low in lows.items() if low.rank != config.get("r", low.rank)]
    if wrong:
        raise CheckpointError(f"{path} says rank {config['r']}, but these differ: {some(wrong)}")
    return lows


def _read_peft_file(file: TensorFile) -> Adapter:
    return Adapter(file.path.stem, Patch(_peft_lows(file.path, file.tensors, _peft_config(file))))


def _peft_config(file: TensorFile) -> dict:
    """The LoRA configuration of a single file: in its metadata (diffusers), or beside it (peft), or empty."""
    beside = file.path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in file.metadata:
            config = json.loads(file.metadata["lora_adapter_metadata"])
        else:
            config = json.loads(beside.read_bytes()) if beside.is_file() else {}
        return {key.removeprefix("unet."): value for key, value in config.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"the LoRA configuration of {file.path} cannot be read: {error}") from error


def _read_osediff(file: TensorFile) -> Adapter:
    used: set[str] = set()
    unet, vae = _trained_adapters(file, "unet", "", used), _trained_adapters(file, "vae", "", used)
    form = re.compile(r"state_dict_unet\.conv_in\.(?:base_layer\.)?(weight|bias)")
    found = {key: match[1] for key in file.tensors if (match := form.fullmatch(key))}
    weights = {f"conv_in.{name}": file.tensors[key] for key, name in found.items()}
    check_finite(file.path, weights.items())
    _refuse_leftover(file, used | set(found))
    return Adapter(file.path.stem, Patch(unet, weights), Patch(vae), method="osediff")


def _read_pisa(file: TensorFile) -> Adapter:
    used: set[str] = set()
    pix, sem = (_trained_adapters(file, "unet", suffix, used) for suffix in ("_pix", "_sem"))
    _refuse_leftover(file, used)
    return Adapter(file.path.stem, Patch(pix), detail=Patch(sem), method="pisa-sr")


def _trained_adapters(file: TensorFile, part: str, suffix: str, used: set[str]) -> dict[str, Low]:
    """Read `state_dict_<part>.<module>.lora_A.default_<list><suffix>.weight`, adding the keys to `used`.

    The files leave out alpha: it is peft's default of 8 (scale 2 at rank 4).
    """
    form = re.compile(rf"state_dict_{part}\.(.+)\.(lora_[AB])\.default_({'|'.join(LISTS)}){suffix}\.weight")
    own: dict[str, Tensor] = {}
    lists: dict[str, str] = {}
    for key, tensor in file.tensors.items():
        if match := form.fullmatch(key):
            module, half, which = match.groups()
            if lists.setdefault(module, which) != which:
                raise CheckpointError(f"{file.path}: {module} is in two adapters, {lists[module]} and {which}")
            own[f"{module}.{half}"] = tensor
            used.add(key)
    lows = pair(file.path, own, ".lora_A", ".lora_B", lambda *_: METHODS["osediff"].alpha)
    rank = file.values.get(f"lora_rank_{part}{suffix}" if suffix else f"rank_{part}")
    wrong = [name for name, low in lows.items() if rank is not None and low.rank != rank]
    if wrong:
        raise CheckpointError(f"{file.path} says rank {rank} for its {part}, but these differ: {some(wrong)}")
    for which in LISTS:
        listed = file.values.get(f"{part}_lora_{which}_modules{suffix}")
        made = {module for module, name in lists.items() if name == which}
        if listed is not None and made != set(listed):
            raise CheckpointError(
                f"{file.path} lists {part} modules ({which}{suffix}) that its tensors do not match: "
                f"{some(sorted(made ^ set(listed)))}; the file is damaged"
            )
    return lows


def _refuse_leftover(file: TensorFile, used: set[str]) -> None:
    leftover = [key for key in file.tensors if key not in used]
    if leftover:
        raise CheckpointError(
            f"{file.path} has keys that fit nothing: {some(leftover)}; the file is damaged or of another kind"
        )


def _read_predictor(file: TensorFile) -> Adapter:
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in file.tensors.items()}
    check_finite(file.path, tensors.items())
    return Adapter(file.path.stem, predictor=tensors, method="invsr")


HALVES = {
    "lora_A.weight": "down",
    "lora_down.weight": "down",
    "lora.down.weight": "down",
    "lora_B.weight": "up",
    "lora_up.weight": "up",
    "lora.up.weight": "up",
    "alpha": "alpha",
}
# kohya replaces the dots of a path by underscores; these are the words that had one before.
WORDS = (
    "down_blocks|up_blocks|mid_block|transformer_blocks|time_embedding|time_emb_proj|conv_shortcut|conv_in|conv_out|"
    "proj_in|proj_out|to_out|to_q|to_k|to_v|linear_1|linear_2|[a-zA-Z]+[12]?|[0-9]+"
)
UNDERSCORED = re.compile(rf"(?:{WORDS})(?:_(?:{WORDS}))*")


def _read_lora(file: TensorFile) -> Adapter:
    """LoRA files of diffusers (`unet.<path>.lora_A.weight`, `.lora.down.weight`) and kohya (`lora_unet_<path>`)."""
    own: dict[str, Tensor] = {}
    for key, tensor in file.tensors.items():
        half = next((half for half in HALVES if key.endswith(f".{half}")), None)
        if not half or not key.startswith(("lora_unet_", "unet.")):
            what = "the text encoder" if key.startswith(("lora_te", "text_encoder")) else "something else"
            raise CheckpointError(
                f"{file.path} also changes {what} ({key}), which a one-step stage cannot use; "
                "load such a file with an ordinary LoRA loader"
            )
        own[f"{_module(key.removesuffix(f'.{half}'), file.path)}.{HALVES[half]}"] = tensor
    alphas = {key.removesuffix(".alpha"): float(own.pop(key)) for key in [key for key in own if key.endswith(".alpha")]}
    lost = [name for name in alphas if f"{name}.down" not in own]
    if lost:
        raise CheckpointError(f"{file.path} has an alpha without its update: {some(lost)}; the file is damaged")
    config = _peft_config(file)
    lows = pair(
        file.path, own, ".down", ".up", lambda name, rank: alphas.get(name, float(config.get("lora_alpha", rank)))
    )
    return Adapter(file.path.stem, Patch(lows))


def _module(name: str, path: Path) -> str:
    """Return the diffusers path of `unet.<path>` or `lora_unet_<path with underscores>`."""
    if name.startswith("unet."):
        name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora$", r".\1", name.removeprefix("unet."))
        return f"{name}.0" if name.endswith(".to_out") else name
    name = name.removeprefix("lora_unet_")
    if name.startswith(("input_blocks", "output_blocks", "middle_block")) or not UNDERSCORED.fullmatch(name):
        raise CheckpointError(f"{path} names its modules in another way ({name}); save it with diffusers' names")
    return ".".join(re.findall(WORDS, name))


def _has(file: TensorFile, pattern: str) -> bool:
    form = re.compile(pattern)
    return any(form.search(key) for key in file.tensors)


FORMATS = (
    Format("PiSA-SR .pkl", lambda file: _has(file, r"^state_dict_unet\..*_(pix|sem)\.weight$"), _read_pisa),
    Format("OSEDiff .pkl", lambda file: _has(file, r"^state_dict_(unet|vae)\."), _read_osediff),
    Format("InvSR noise predictor", lambda file: _has(file, r"(^|\.)encoder\.time_embedding\."), _read_predictor),
    Format("peft LoRA file", lambda file: _has(file, rf"^{re.escape(PEFT_PREFIX)}"), _read_peft_file),
    Format(
        "diffusers or kohya LoRA", lambda file: _has(file, r"^(unet\.|lora_unet_|lora_te|text_encoder)"), _read_lora
    ),
)
