"""Loaders: the embedded model, and stage adapters onto a MODEL and a VAE."""

from __future__ import annotations

import copy
from pathlib import Path

import comfy.diffusers_convert
import comfy.utils
import comfy.weight_adapter
import folder_paths
import torch
from comfy_api.latest import io

from ..tudsr_core.checkpoints import Adapter, CheckpointError, Low, embedded_path, read_adapter, read_model
from .embedded import UNET_PREFIX, build
from .stages import StageFacts, attach
from .tiles import CATEGORY

FOLDER = "tudsr"
NOTHING = "(put an adapter into models/tudsr)"


def register_folder() -> None:
    """Make `models/tudsr` known to ComfyUI, keeping paths that extra_model_paths.yaml has added."""
    default = str(Path(folder_paths.models_dir) / FOLDER)
    folder_paths.add_model_folder_path(FOLDER, default)
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | {".safetensors"})


register_folder()


def list_adapters() -> list[str]:
    """Return adapter files and peft folders below `models/tudsr`, as names for the chooser."""
    found = set()
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        if not root.is_dir():
            continue
        folders = {file.parent for file in root.rglob("adapter_config.json")}
        for folder in folders:
            whole = folder.parent if folder.name in ("unet_lora_adapter", "vae_encoder_lora_adapter") else folder
            found.add(whole.relative_to(root).as_posix())
        for file in root.rglob("*.safetensors"):
            if file.parent not in folders:
                found.add(file.relative_to(root).as_posix())
    return sorted(found)


def find_adapter(name: str) -> Path:
    """Return the path of a chosen adapter; raises CheckpointError that says where to put it."""
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        path = root / name
        if path.exists() and root.resolve() in (path.resolve(), *path.resolve().parents):
            return path
    where = ", ".join(folder_paths.get_folder_paths(FOLDER))
    raise CheckpointError(
        f"adapter {name!r} was not found in {where}; get it from its authors' page and put the .safetensors "
        "file, or the folder with unet_lora_adapter/ inside, there, then press R to refresh"
    )


def as_patches(lows: dict[str, Low], keys: dict[str, str], name: str, network: str) -> dict:
    """Return ComfyUI weight patches for low-rank updates; `keys` maps module paths to weight keys.

    Raises CheckpointError naming the updates that have no weight: a half-applied adapter is worse
    than none.
    """
    unknown = [path for path in lows if path not in keys]
    if unknown:
        raise CheckpointError(
            f"adapter {name!r} does not fit this {network}: {len(unknown)} of {len(lows)} updates have no place "
            f"({', '.join(unknown[:3])}); it was made for another base model, use SD2.1-base"
        )
    return {
        keys[path]: comfy.weight_adapter.LoRAAdapter(
            set(), (low.up.float(), low.down.float(), float(low.alpha), None, None, None)
        )
        for path, low in lows.items()
    }


def patch(patcher, patches: dict, name: str):
    """Return a clone of `patcher` with `patches`; raises CheckpointError if one does not fit its weight."""
    clone = patcher.clone()
    for key, adapter in patches.items():
        up, down = adapter.weights[:2]
        weight = comfy.utils.get_attr(clone.model, key)
        if up.shape[0] * down[0].numel() != weight.numel():
            raise CheckpointError(f"adapter {name!r} has another shape than this model at {key}; use SD2.1-base")
    applied = clone.add_patches(patches)
    if len(applied) != len(patches):
        raise CheckpointError(f"only {len(applied)} of {len(patches)} updates of {name!r} found their weight")
    return clone


def unet_keys(model) -> dict[str, str]:
    """Return `{diffusers module path: weight key}` for a ComfyUI UNet."""
    config = model.model.model_config.unet_config
    pairs = comfy.utils.unet_to_diffusers(config) if "model_channels" in config else {}
    suffix = ".weight"
    return {
        theirs.removesuffix(suffix): f"diffusion_model.{ours}"
        for theirs, ours in pairs.items()
        if theirs.endswith(suffix)
    }


def encoder_keys(vae, paths: list[str]) -> dict[str, str]:
    """Return `{diffusers path below the encoder: weight key}` for those of `paths` that `vae` has.

    ComfyUI's own renaming is asked: each name goes in with its number and comes out as a key.
    """
    numbered = {f"encoder.{path}.weight": torch.tensor([float(i)]) for i, path in enumerate(paths)}
    present = vae.first_stage_model.state_dict()
    renamed = comfy.diffusers_convert.convert_vae_state_dict(numbered)
    return {paths[int(number.flatten()[0])]: key for key, number in renamed.items() if key in present}


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
        first = attach(base, StageFacts("embedded stage one", 1, file.first_step, file.limits))
        keys = {path: f"{UNET_PREFIX}{path}.weight" for path in file.second.unet}
        patched = patch(base, as_patches(file.second.unet, keys, "embedded stage two", "UNet"), "embedded stage two")
        second = attach(patched, StageFacts("embedded stage two", 2, file.second.step, file.limits))
        empty = torch.zeros(1, 1, file.unet_config["cross_attention_dim"])
        return io.NodeOutput(first, second, vae, [[empty, {}]])


class LoadAdapter(io.ComfyNode):
    """A stage adapter (LoRA) onto MODEL, and onto the VAE encoder if the file has such weights."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = list_adapters() or [NOTHING]
        return io.Schema(
            node_id="TUDSRLoadAdapter",
            display_name="Load TUDSR Adapter",
            category=CATEGORY,
            description="Puts a one-step adapter (TUDSR or OMGSR: a .safetensors file or a peft folder in "
            "models/tudsr) onto SD2.1-base. Base weights are shared by all stages.",
            inputs=[
                io.Model.Input("model", tooltip="SD2.1-base, from Load Checkpoint or Load Diffusion Model."),
                io.Combo.Input("adapter", options=names, tooltip="A file or folder in models/tudsr."),
                io.Combo.Input(
                    "stage",
                    options=["from file", "one", "two"],
                    default="from file",
                    tooltip="Which stage it was trained for. Files of this pack say so themselves; "
                    "for published folders choose it here.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 is as trained. Lower for a gentler, higher for a stronger effect.",
                ),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Needed when the adapter also changes the VAE encoder (OMGSR does)."
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), io.Vae.Output(display_name="vae")],
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
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        return " ".join(f"{file}:{file.stat().st_mtime_ns}" for file in files)

    @classmethod
    def execute(cls, model, adapter, stage, strength, vae=None) -> io.NodeOutput:
        loaded = read_adapter(find_adapter(adapter))
        number = {"from file": loaded.stage, "one": 1, "two": 2}[stage]
        if loaded.stage not in (None, number):
            raise CheckpointError(
                f"{adapter!r} is a stage-{loaded.stage} adapter; set 'stage' to 'from file', or choose another file"
            )
        patches = as_patches(_scaled(loaded.unet, strength), unet_keys(model), adapter, "UNet")
        result = attach(patch(model, patches, adapter), StageFacts(adapter, number, loaded.step))
        return io.NodeOutput(result, _patch_encoder(vae, loaded, adapter, strength))


def _scaled(lows: dict[str, Low], strength: float) -> dict[str, Low]:
    return {path: Low(low.down, low.up, low.alpha * strength) for path, low in lows.items()}


def _patch_encoder(vae, loaded: Adapter, name: str, strength: float):
    if not loaded.encoder:
        return vae
    if vae is None:
        raise CheckpointError(f"adapter {name!r} also changes the VAE encoder; connect the VAE to this node")
    result = copy.copy(vae)
    patches = as_patches(
        _scaled(loaded.encoder, strength), encoder_keys(vae, list(loaded.encoder)), name, "VAE encoder"
    )
    result.patcher = patch(vae.patcher, patches, name)
    return result
