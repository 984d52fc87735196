"""Adapter files of other projects: recognised by their keys, validated, brought into `Adapter`.

One reader per published format; every key must find its place, or the error lists those that do not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..methods import METHODS
from ..untrusted import Fields, read_text, shown, some
from .adapters import Adapter, LoRAWeights, WeightDelta, sides
from .lora_config import read_lora_config
from .tensor_files import CheckpointError, TensorFile, check_finite

log = logging.getLogger(__name__)

PEFT_PREFIX = "base_model.model."
UNET_FOLDER, VAE_FOLDER = "unet_lora_adapter", "vae_encoder_lora_adapter"
LISTS = ("encoder", "decoder", "others")
HYPIR_DOWN = ".lora_A.default.weight"
HYPIR_TARGETS = ("to_k", "to_q", "to_v", "to_out.0", "conv", "conv1", "conv2", "conv_shortcut", "conv_out")
HYPIR_TARGETS += ("proj_in", "proj_out", "ff.net.2", "ff.net.0.proj")
MAX_ALPHA = 1e6  # published ones are below 1,000


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
        return Adapter(path.name, _read_peft(path, read))
    if not (path / UNET_FOLDER).is_dir():
        raise CheckpointError(
            f"folder {path} holds neither adapter_config.json nor {UNET_FOLDER}/; give the adapter's own folder"
        )
    vae = WeightDelta()
    if (path / VAE_FOLDER).is_dir():
        encoder = _read_peft(path / VAE_FOLDER, read)
        updates = {f"encoder.{name}": update for name, update in encoder.updates.items()}
        vae = WeightDelta(updates, targets=encoder.targets, within="encoder.")
    return Adapter(path.name, _read_peft(path / UNET_FOLDER, read), vae)


def pair(
    path: Path, tensors: dict[str, Tensor], down: str, up: str, alpha: Callable[[str, int], float]
) -> dict[str, LoRAWeights]:
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
    updates = {}
    for name in sorted(halves[down]):
        first, second = tensors[name + down], tensors[name + up]
        if not (first.is_floating_point() and second.is_floating_point()):
            raise CheckpointError(f"{path}: {shown(name)} is stored in whole numbers; get the unquantised file")
        if first.ndim < 2 or second.ndim < 2 or not first.numel() or second[:1].numel() != len(first):
            raise CheckpointError(
                f"{path}: ranks of {shown(name)} do not agree ({down} is {sides(first.shape)}, {up} "
                f"{sides(second.shape)}); the file is damaged or of another kind"
            )
        updates[name] = LoRAWeights(first, second, alpha(name, first.shape[0]))
        if not 0 < updates[name].alpha < MAX_ALPHA:
            raise CheckpointError(
                f"{path}: alpha of {shown(name)} is missing or not above 0, or far too large; the file is damaged"
            )
    return updates


def take_alphas(path: Path, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Take the `<module>.alpha` out of `tensors`; raises CheckpointError for one that is no single number."""
    keys = [key for key in tensors if key.endswith(".alpha")]
    if wrong := [key for key in keys if tensors[key].numel() != 1]:
        raise CheckpointError(f"{path} has an alpha that is not one number: {some(wrong)}; the file is damaged")
    return {key.removesuffix(".alpha"): float(tensors.pop(key)) for key in keys}


def _read_peft(folder: Path, read: Callable[[Path], TensorFile]) -> WeightDelta:
    config = read_lora_config(read_text(folder / "adapter_config.json", CheckpointError), folder)
    names = ("adapter_model.safetensors", "adapter_model.bin")
    files = [folder / name for name in names if (folder / name).is_file()] or [folder / names[0]]
    return WeightDelta(_peft_updates(folder, read(files[0]).tensors, config), targets=_targets(folder, config))


def _targets(path: Path, config: Fields) -> tuple[str, ...]:
    """Return the name endings of all modules that peft has updated; () and a warning where it is no plain list."""
    narrowing = [key for key in ("exclude_modules", "layers_to_transform") if config.values.get(key)]
    if isinstance(config.values.get("target_modules"), list) and not narrowing:
        return tuple(config.texts("target_modules"))
    log.warning(
        "%s has no plain list of the modules that it changes (its %s), so it cannot be checked that none is lacking",
        path,
        " and ".join(narrowing) or f"target_modules is {shown(config.values.get('target_modules'))}",
    )
    return ()


def _peft_updates(path: Path, tensors: dict[str, Tensor], config: Fields) -> dict[str, LoRAWeights]:
    if config.values.get("rank_pattern"):
        raise CheckpointError(f"{path} uses rank_pattern, which this pack does not support")
    foreign = [key for key in tensors if not key.startswith(PEFT_PREFIX)]
    if foreign:
        raise CheckpointError(f"{path} has keys that are no peft LoRA: {some(foreign)}")
    own = {key.removeprefix(PEFT_PREFIX): value for key, value in tensors.items()}
    updates = pair(path, own, ".lora_A.weight", ".lora_B.weight", lambda _, rank: _alpha(config, rank))
    _check_ranks(path, updates, config, "r", "")
    return updates


def _alpha(config: Fields, rank: int) -> float:
    # rsLoRA scales by alpha / sqrt(r) where plain LoRA has alpha / r.
    return float(config.number("lora_alpha", rank)) * (rank**0.5 if config.values.get("use_rslora") else 1)


def _check_ranks(path: Path, updates: dict[str, LoRAWeights], fields: Fields, name: str, of: str) -> None:
    """Raise CheckpointError unless all updates have the rank that the file says, if it says one."""
    wrong = [module for module, update in updates.items() if update.rank != fields.whole(name, update.rank)]
    if wrong:
        raise CheckpointError(f"{path} says rank {fields.whole(name)}{of}, but these differ: {some(wrong)}")


def _read_peft_file(file: TensorFile) -> Adapter:
    config = _peft_config(file)
    targets = _targets(file.path, config) if config.values else ()
    return Adapter(file.path.stem, WeightDelta(_peft_updates(file.path, file.tensors, config), targets=targets))


def _peft_config(file: TensorFile) -> Fields:
    """The LoRA configuration of a single file: in its metadata (diffusers), or beside it (peft), or empty."""
    beside = file.path.with_name("adapter_config.json")
    text = file.metadata.get("lora_adapter_metadata")
    if text is None:
        text = read_text(beside, CheckpointError) if beside.is_file() else "{}"
    return read_lora_config(text, file.path)


def _read_osediff(file: TensorFile) -> Adapter:
    used: set[str] = set()
    unet, vae = _trained_adapters(file, "unet", "", used), _trained_adapters(file, "vae", "", used)
    form = re.compile(r"state_dict_unet\.conv_in\.(?:base_layer\.)?(weight|bias)")
    found = {key: match[1] for key in file.tensors if (match := form.fullmatch(key))}
    weights = {f"conv_in.{name}": file.tensors[key] for key, name in found.items()}
    check_finite(file.path, weights.items())
    _refuse_leftover(file, used | set(found))
    return Adapter(file.path.stem, WeightDelta(unet, weights), WeightDelta(vae), method="osediff")


def _read_pisa(file: TensorFile) -> Adapter:
    used: set[str] = set()
    pix, sem = (_trained_adapters(file, "unet", suffix, used) for suffix in ("_pix", "_sem"))
    _refuse_leftover(file, used)
    for module in pix.keys() & sem.keys():
        one, other = pix[module], sem[module]
        if (one.down.shape[1:], one.up.shape[0]) != (other.down.shape[1:], other.up.shape[0]):
            raise CheckpointError(
                f"{file.path}: the two updates of {shown(module)} differ in shape (pix {sides(one.shape)}, "
                f"sem {sides(other.shape)}); the file is damaged"
            )
    return Adapter(file.path.stem, WeightDelta(pix), detail=WeightDelta(sem), method="pisa-sr")


def _trained_adapters(file: TensorFile, part: str, suffix: str, used: set[str]) -> dict[str, LoRAWeights]:
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
                raise CheckpointError(f"{file.path}: {shown(module)} is in two adapters, {lists[module]} and {which}")
            own[f"{module}.{half}"] = tensor
            used.add(key)
    updates = pair(file.path, own, ".lora_A", ".lora_B", lambda *_: METHODS["osediff"].alpha)
    said = Fields(file.values, str(file.path), CheckpointError)
    _check_ranks(
        file.path, updates, said, f"lora_rank_{part}{suffix}" if suffix else f"rank_{part}", f" for its {part}"
    )
    for which in LISTS:
        name = f"{part}_lora_{which}_modules{suffix}"
        listed = set(said.texts(name)) if said.values.get(name) is not None else None
        made = {module for module, adapter in lists.items() if adapter == which}
        if listed is not None and made != listed:
            raise CheckpointError(
                f"{file.path} lists {part} modules ({which}{suffix}) that its tensors do not match: "
                f"{some(sorted(made ^ listed))}; the file is damaged"
            )
    return updates


def _refuse_leftover(file: TensorFile, used: set[str]) -> None:
    leftover = [key for key in file.tensors if key not in used]
    if leftover:
        raise CheckpointError(
            f"{file.path} has keys that fit nothing: {some(leftover)}; the file is damaged or of another kind"
        )


def _read_hypir(file: TensorFile) -> Adapter:
    """The UNet's own keys after peft's add_adapter; the file leaves out alpha, which is the rank."""
    updates = pair(file.path, file.tensors, HYPIR_DOWN, ".lora_B.default.weight", lambda _, rank: rank)
    return Adapter(file.path.stem, WeightDelta(updates, targets=HYPIR_TARGETS), method="hypir")


def _read_predictor(file: TensorFile) -> Adapter:
    tensors = {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in file.tensors.items()}
    check_finite(file.path, tensors.items())
    return Adapter(file.path.stem, predictor=tensors, method="invsr")


TEXT_KEYS = ("lora_te", "text_encoder")
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
UNDERSCORED = {
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "time_embedding", "time_emb_proj"),
    *("conv_shortcut", "conv_in", "conv_out", "proj_in", "proj_out", "to_out", "to_q", "to_k", "to_v"),
    *("linear_1", "linear_2"),
}


def _read_lora(file: TensorFile) -> Adapter:
    """LoRA files of diffusers (`unet.<path>.lora_A.weight`, `.lora.down.weight`) and kohya (`lora_unet_<path>`)."""
    own: dict[str, Tensor] = {}
    texts = [key for key in file.tensors if key.startswith(TEXT_KEYS)]
    if texts:
        log.warning(
            "%s also changes the text encoder (%d tensors, %s); a one-step stage has a fixed text, so only its UNet "
            "part is used",
            file.path,
            len(texts),
            some(texts),
        )
    for key, tensor in file.tensors.items():
        if key.startswith(TEXT_KEYS):
            continue
        half = next((half for half in HALVES if key.endswith(f".{half}")), None)
        if not half or not key.startswith(("lora_unet_", "unet.")):
            raise CheckpointError(
                f"{file.path} also changes something else ({shown(key)}), which a one-step stage cannot use; "
                "load such a file with an ordinary LoRA loader"
            )
        own[f"{_module(key.removesuffix(f'.{half}'), file.path)}.{HALVES[half]}"] = tensor
    if not own:
        raise CheckpointError(
            f"{file.path} changes only the text encoder ({some(texts)}), which a one-step stage cannot use; "
            "load such a file with an ordinary LoRA loader"
        )
    alphas = take_alphas(file.path, own)
    lost = [name for name in alphas if f"{name}.down" not in own]
    if lost:
        raise CheckpointError(f"{file.path} has an alpha without its update: {some(lost)}; the file is damaged")
    config = _peft_config(file)
    updates = pair(
        file.path, own, ".down", ".up", lambda name, rank: alphas[name] if name in alphas else _alpha(config, rank)
    )
    return Adapter(file.path.stem, WeightDelta(updates))


def _module(name: str, path: Path) -> str:
    """Return the diffusers path of `unet.<path>` or `lora_unet_<path with underscores>`."""
    if name.startswith("unet."):
        name = re.sub(r"\.processor\.(to_[qkv]|to_out)_lora$", r".\1", name.removeprefix("unet."))
        return f"{name}.0" if name.endswith(".to_out") else name
    name = name.removeprefix("lora_unet_")
    words = dotted(name)
    if name.startswith(("input_blocks", "output_blocks", "middle_block")) or words is None:
        raise CheckpointError(f"{path} names its modules in another way ({shown(name)}); save it with diffusers' names")
    return words


def dotted(name: str) -> str | None:
    """Return a path whose dots kohya has replaced by underscores with its dots, or None if it is no such path."""
    pieces, words = name.split("_"), []
    while pieces:
        length = next((n for n in (3, 2) if "_".join(pieces[:n]) in UNDERSCORED), 1)
        word = "_".join(pieces[:length])
        if length == 1 and not (word.isascii() and (word.isdigit() or word.rstrip("12").isalpha())):
            return None
        words.append(word)
        del pieces[:length]
    return ".".join(words)


def _has(file: TensorFile, pattern: str) -> bool:
    form = re.compile(pattern)
    return any(form.search(key) for key in file.tensors)


FORMATS = (
    Format("PiSA-SR .pkl", lambda file: _has(file, r"^state_dict_unet\..*_(pix|sem)\.weight$"), _read_pisa),
    Format("OSEDiff .pkl", lambda file: _has(file, r"^state_dict_(unet|vae)\."), _read_osediff),
    Format("InvSR noise predictor", lambda file: _has(file, r"(^|\.)encoder\.time_embedding\."), _read_predictor),
    Format("HYPIR .pth", lambda file: _has(file, rf"^(down|mid|up)_block.*{re.escape(HYPIR_DOWN)}$"), _read_hypir),
    Format("peft LoRA file", lambda file: _has(file, rf"^{re.escape(PEFT_PREFIX)}"), _read_peft_file),
    Format(
        "diffusers or kohya LoRA", lambda file: _has(file, r"^(unet\.|lora_unet_|lora_te|text_encoder)"), _read_lora
    ),
)
