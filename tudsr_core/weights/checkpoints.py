"""Weight files: this pack's own formats, and the one door through which every adapter is read.

Own formats are read and written here, those of others in `formats.py`; no networks are built.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..assets import asset_path
from ..diffusion import OneStep, from_noise_level, scaled_linear
from ..methods import METHODS, StageLimits
from ..untrusted import Fields, parse_json, shown, some
from .adapters import Adapter, WeightDelta, map_updates
from .formats import UNET_FOLDER, VAE_FOLDER, pair, read_foreign, read_peft_folder, take_alphas
from .tensor_files import SUFFIXES, CheckpointError, TensorFile, check_finite, read_file, write_file

log = logging.getLogger(__name__)

OWN_TITLE = "adapter of this pack"
MODEL_FORMAT = "tudsr-model/1"
ADAPTER_FORMATS = ("tudsr-adapter/1", "tudsr-adapter/2")
DOWN, UP = ".lora_down.weight", ".lora_up.weight"
PARTS = {"unet.": "unet", "detail.": "detail", "": "vae"}  # fields of Adapter by the prefix of their keys
MODEL_FACTS = ("vae_config", "unet_config", "stage_one_timestep", "stage_two_timestep", "stage_two_alpha", "limits")
TIMESTEPS = scaled_linear().steps
MAX_STEPS = 100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class ModelFile:
    """A whole small model in one file: configs, weights, the stage-two adapter and the stages' facts."""

    name: str
    vae_config: dict
    unet_config: dict
    vae: dict[str, Tensor]
    unet: dict[str, Tensor]
    first_step: OneStep
    second: Adapter
    limits: StageLimits


def embedded_path() -> Path:
    """Return the path of the model shipped inside this package."""
    return asset_path("embedded.safetensors")


def read_model(path: Path) -> ModelFile:
    """Read a `tudsr-model` safetensors file. Raises CheckpointError."""
    if path.is_file() and path.suffix != ".safetensors":
        raise CheckpointError(f"{path} is not a tudsr model file, which is a .safetensors; check the path")
    file = read_file(path)
    if file.metadata.get("format") != MODEL_FORMAT:
        said = shown(file.metadata.get("format", "nothing"))
        raise CheckpointError(f"{path} is not a tudsr model file (its metadata says {said}); check the path")
    parts: dict[str, dict[str, Tensor]] = {"vae": {}, "unet": {}, "stage_two": {}}
    for key, tensor in file.tensors.items():
        part, _, name = key.partition(".")
        if part not in parts:
            raise CheckpointError(f"{path} has an unknown tensor {shown(key)}; it was made by another version")
        parts[part][name] = tensor
    for name in ("vae", "unet"):
        check_finite(path, parts[name].items())
    facts = _facts(path, file.metadata, "model")
    facts.only(*MODEL_FACTS)
    alpha = float(facts.number("stage_two_alpha", least=0))
    updates = pair(path, parts["stage_two"], DOWN, UP, lambda *_: alpha)
    first, second = (
        from_noise_level(facts.whole(f"stage_{name}_timestep", most=TIMESTEPS - 1)) for name in ("one", "two")
    )
    return ModelFile(
        name=shown(file.metadata.get("name", path.stem)),
        vae_config=facts.table("vae_config").values,
        unet_config=facts.table("unet_config").values,
        vae=parts["vae"],
        unet=parts["unet"],
        first_step=first,
        second=Adapter("stage two", WeightDelta(updates), stage=2, steps=(second,)),
        limits=_limits(facts.table("limits")),
    )


def _facts(path: Path, metadata: dict[str, str], name: str) -> Fields:
    """Return the JSON object called `name` in a file's metadata; raises CheckpointError."""
    where = f"the metadata of {path}"
    if name not in metadata:
        raise CheckpointError(f"{where} lacks {name!r}; download it again")
    return Fields(parse_json(metadata[name], where, CheckpointError), where, CheckpointError)


def _limits(fields: Fields) -> StageLimits:
    names = vars(StageLimits())
    fields.only(*names)
    try:
        return StageLimits(**{name: fields.number(name) for name in names})
    except ValueError as error:
        raise CheckpointError(f"{fields.where}: {error}") from error


def write_model(path: Path, model: ModelFile) -> None:
    """Write `model` as float16 safetensors, atomically."""
    tensors = {f"vae.{key}": value for key, value in model.vae.items()}
    tensors |= {f"unet.{key}": value for key, value in model.unet.items()}
    for name, update in model.second.unet.updates.items():
        tensors[f"stage_two.{name}{DOWN}"] = update.down
        tensors[f"stage_two.{name}{UP}"] = update.up
    alphas = {update.alpha for update in model.second.unet.updates.values()}
    facts = {
        "vae_config": model.vae_config,
        "unet_config": model.unet_config,
        "stage_one_timestep": model.first_step.t,
        "stage_two_timestep": model.second.steps_for()[0].t,
        "stage_two_alpha": alphas.pop(),
        "limits": vars(model.limits),
    }
    metadata = {"format": MODEL_FORMAT, "name": model.name, "model": json.dumps(facts)}
    write_file(path, {key: value.half() for key, value in tensors.items()}, metadata)


def read_adapter(path: Path, method: str | None = None, stage: int | None = None) -> Adapter:
    """Read a stage adapter of any known format: a file, or a peft folder as OMGSR and TUDSR save it.

    `method` (a key of METHODS) and `stage` (1 or 2) fill in what the file leaves open; that TUDSR is
    assumed is logged. Raises CheckpointError for damaged or foreign files and when the file says otherwise.
    """
    title, adapter = identify(path, method, stage)
    if not method and title != OWN_TITLE and adapter.method == "tudsr":
        log.warning(
            "%s does not say whose it is: taken for TUDSR's, t = %d; OMGSR's want the method omgsr (t = %d)",
            path,
            adapter.steps_for(stage or 1)[0].t,
            METHODS["omgsr"].steps()[0].t,
        )
    return adapter


def identify(path: Path, method: str | None = None, stage: int | None = None) -> tuple[str, Adapter]:
    """Return `(title of the format, adapter)`, as `read_adapter` does."""
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"adapter {path} does not exist; check the path")
    if path.is_dir():
        title, adapter = "peft folder", read_peft_folder(path, read_file)
    elif path.suffix not in SUFFIXES:
        raise CheckpointError(f"adapter {path} is no weight file; known endings are {', '.join(SUFFIXES)}")
    else:
        file = read_file(path)
        own = file.metadata.get("format", "")
        if own.startswith("tudsr-adapter"):
            title, adapter = OWN_TITLE, _read_own(file)
        elif own == MODEL_FORMAT:
            raise CheckpointError(f"{path} is a whole model, not an adapter; give it as the model")
        else:
            title, adapter = read_foreign(file)
    return title, _fill_in(path, adapter, method, stage)


def _fill_in(path: Path, adapter: Adapter, method: str | None, stage: int | None) -> Adapter:
    if method and method != adapter.method:
        if method not in METHODS:
            raise CheckpointError(f"method {method!r} is not known; use one of: {', '.join(METHODS)}")
        if adapter.method != "tudsr" or adapter.steps:
            raise CheckpointError(f"{path} is an adapter of {adapter.about.title}, not of {METHODS[method].title}")
        if method == "omgsr" and path.is_dir() and not adapter.vae:
            raise CheckpointError(
                f"{path} has no {VAE_FOLDER}/, which OMGSR always saves beside {UNET_FOLDER}/ and without which its "
                "pictures are wrong; give the folder that holds both, or get it again"
            )
        adapter = replace(adapter, method=method)
    if stage and adapter.stage not in (None, stage):
        raise CheckpointError(f"{path} is a stage-{adapter.stage} adapter and was given as stage {stage}; swap the two")
    return replace(adapter, stage=adapter.stage or stage)


def write_adapter(
    path: Path, adapter: Adapter, dtype: str | None = None, notes: Mapping[str, str] | None = None
) -> None:
    """Write `adapter` as one safetensors file with its metadata, atomically.

    `dtype` (`fp32`, `bf16`, `fp16`) converts the weights; None keeps theirs. `notes` are kept in the
    metadata for people, such as how it was trained; reading does not look at them.
    """
    convert: Callable[[Tensor], Tensor] = (lambda x: x.to(DTYPES[dtype])) if dtype else (lambda x: x)
    tensors, said = {}, {}
    for part, field in PARTS.items():
        patch = getattr(adapter, field)
        if patch.targets:
            said[field] = {"names": patch.targets, "within": patch.within}
        for name, update in map_updates(patch.updates, convert).items():
            tensors[f"{part}{name}{DOWN}"] = update.down
            tensors[f"{part}{name}{UP}"] = update.up
            tensors[f"{part}{name}.alpha"] = torch.tensor(float(update.alpha))
        tensors |= {f"base.{part}{name}": convert(value) for name, value in patch.weights.items()}
    tensors |= {f"predictor.{key}": convert(value) for key, value in adapter.predictor.items()}
    check_finite(path, tensors.items())
    steps = {} if adapter.steps is None else {"steps": json.dumps([vars(step) for step in adapter.steps])}
    stage = {} if adapter.stage is None else {"stage": str(adapter.stage)}
    targets = {"targets": json.dumps(said)} if said else {}
    about = {"format": ADAPTER_FORMATS[-1], "name": adapter.name, "method": adapter.method, "base": adapter.about.base}
    write_file(path, tensors, {**(notes or {}), **about, **steps, **stage, **targets})


def _read_own(file: TensorFile) -> Adapter:
    """Updates are under `unet.`, `detail.` and VAE paths (`encoder.`, `quant_conv.`), weights under `base.`."""
    path, metadata = file.path, file.metadata
    if metadata["format"] not in ADAPTER_FORMATS:
        raise CheckpointError(f"{path} was written by a newer version ({shown(metadata['format'])}); update this pack")
    patches = {}
    rest = dict(file.tensors)
    predictor = _take(rest, "predictor.")
    weights = _take(rest, "base.")
    said = _facts(path, metadata, "targets") if "targets" in metadata else None
    for part, field in PARTS.items():
        own = _take(rest, part)
        alphas = take_alphas(path, own)
        updates = pair(path, own, DOWN, UP, lambda name, _, alphas=alphas: alphas.get(name, 0.0))
        lost = set(alphas) - set(updates)
        strange = [name for name in updates if not part and not name.startswith(("encoder.", "quant_conv"))]
        if lost or strange:
            raise CheckpointError(f"{path} has keys that fit nothing: {some(sorted([*lost, *strange]))}")
        patches[field] = WeightDelta(updates, _take(weights, part), *_targets(said, field))
    check_finite(path, [*predictor.items(), *(item for patch in patches.values() for item in patch.weights.items())])
    if not (patches["unet"] or predictor):
        raise CheckpointError(f"{path} has no UNet updates and no noise predictor; the file is damaged")
    found = Adapter(shown(metadata.get("name", path.stem)), predictor=predictor, **patches)
    return replace(found, **_read_about(path, metadata))


def _targets(said: Fields | None, part: str) -> tuple[tuple[str, ...], str]:
    """Return a part's `(targets, within)` as WeightDelta takes them; files of earlier versions say none."""
    if said is None or part not in said.values:
        return (), ""
    fields = said.table(part)
    return tuple(fields.texts("names")), fields.text("within")


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}


def _read_about(path: Path, metadata: dict[str, str]) -> dict:
    method = metadata.get("method", "tudsr")
    if method not in METHODS:
        raise CheckpointError(
            f"{path} is of method '{shown(method)}', which this version does not know; update this pack"
        )
    where = f"the metadata of {path}"
    names = metadata.keys() & {"steps", "step", "stage"}
    said = {name: parse_json(metadata[name], where, CheckpointError) for name in names}
    steps = [said["step"]] if "step" in said else said.get("steps")
    if steps is not None and not (isinstance(steps, list) and 0 < len(steps) <= MAX_STEPS):
        raise CheckpointError(f"{where}: 'steps' must be a list of 1 to {MAX_STEPS} steps")
    return {
        "method": method,
        "stage": Fields(said, where, CheckpointError).whole("stage", least=1, most=2) if "stage" in said else None,
        "steps": tuple(_step(Fields(step, where, CheckpointError)) for step in steps) if steps else None,
    }


def _step(fields: Fields) -> OneStep:
    fields.only("t", *"pqab")
    p, q = (fields.number(name, least=-1e4, most=1e4) for name in "pq")
    a, b = (fields.number(name, default, least=-1e4, most=1e4) for name, default in (("a", 1.0), ("b", 0.0)))
    return OneStep(fields.whole("t", most=TIMESTEPS - 1), p, q, a, b)
