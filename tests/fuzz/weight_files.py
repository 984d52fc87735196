"""Small whole files of every kind that is read, random; and reading them all the way, as nodes and command line do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tudsr_core.backends.local import load_embedded
from tudsr_core.cli.inspection import inspect_file
from tudsr_core.diffusion.one_step import from_noise_level
from tudsr_core.models import dape
from tudsr_core.models.cfw import FeatureWrapping, load_wrapping
from tudsr_core.models.downsampler import Downsampler, DownsamplerConfig
from tudsr_core.models.downsampler_files import DOWNSAMPLER_FORMAT, load_downsampler, write_downsampler
from tudsr_core.models.embedded import make_unet, make_vae
from tudsr_core.models.invsr import NoisePredictor, build_predictor
from tudsr_core.models.ram import RamConfig, RamTagger
from tudsr_core.models.swin import SwinConfig
from tudsr_core.weights.adapters import Adapter, LoRAMerger, LoRAWeights, WeightDelta
from tudsr_core.weights.checkpoints import (
    ModelFile,
    embedded_path,
    read_adapter,
    read_model,
    write_adapter,
    write_model,
)
from tudsr_core.weights.tensor_files import CheckpointError, open_safetensors, read_file

from .base_folders import base, use_base

# Modules of a UNet and of a VAE encoder, by the shape of their weights.
QUERY, CONV, FIRST = (
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.resnets.0.conv1",
    "conv_in",
)
UNET = {QUERY: (8, 8), CONV: (8, 8, 3, 3), FIRST: (8, 4, 3, 3)}
VAE = {"encoder.conv_in": (8, 3, 3, 3), "encoder.mid_block.resnets.0.conv1": (8, 8, 3, 3), "quant_conv": (8, 8, 1, 1)}
RANK = 4
TAGGER = RamConfig(SwinConfig(16, 4, 8, (1,), (1,), 4), labels=3, token_width=8, width=8, heads=2, layers=1)
SMALL_VAE = {
    "latent_channels": 4,
    **{f"{part}_block_out_channels": [8, 8, 16] for part in ("encoder", "decoder")},
    **{f"{part}_layers_per_block": [0, 1, 1] for part in ("encoder", "decoder")},
    **{f"{part}_qkv_multiscales": [[], [], []] for part in ("encoder", "decoder")},
}
SMALL_UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2,
    "up_block_types": ["UpBlock2D"] * 2,
}
Tree = dict[str, Any]


def halves(shape: tuple[int, ...], rank: int = RANK) -> tuple[Tensor, Tensor]:
    """Return the two matrices of an update, as peft stores them."""
    down, up = torch.randn(rank, *shape[1:]), torch.randn(shape[0], rank, *[1] * (len(shape) - 2))
    return down * 0.1, up * 0.1


def updates(modules: dict[str, tuple[int, ...]]) -> dict[str, LoRAWeights]:
    """Return an update of every module."""
    return {path: LoRAWeights(*halves(shape), 2.0) for path, shape in modules.items()}


def peft(modules: dict[str, tuple[int, ...]]) -> Tree:
    """Return one peft folder: its configuration and its tensors."""
    names = {path: halves(shape) for path, shape in modules.items()}
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": [*modules], "use_dora": False}
    tensors = {
        f"base_model.model.{p}.lora_{h}.weight": x for p, pair in names.items() for h, x in zip("AB", pair, strict=True)
    }
    return {"adapter_config.json": config, "adapter_model.safetensors": {"tensors": tensors, "metadata": {}}}


def osediff() -> Tree:
    """Return what OSEDiff saves."""
    lists = {"encoder": [QUERY, FIRST], "decoder": [], "others": [CONV]}
    tree: Tree = {f"unet_lora_{which}_modules": modules for which, modules in lists.items()}
    tree |= {"vae_lora_encoder_modules": [*VAE], "rank_unet": RANK, "rank_vae": RANK}
    tree["state_dict_unet"] = listed(lists, "") | {"conv_in.base_layer.weight": torch.randn(UNET[FIRST])}
    tree["state_dict_vae"] = listed({"encoder": [*VAE]}, "", VAE)
    return tree


def hypir() -> Tree:
    """Return what HYPIR publishes: the UNet's own keys, and nothing else."""
    return {f"{p}.lora_{h}.default.weight": x for p, s in UNET.items() for h, x in zip("AB", halves(s), strict=True)}


def pisa() -> Tree:
    """Return what PiSA-SR saves."""
    lists = {"encoder": [QUERY, FIRST], "decoder": [], "others": [CONV]}
    tree: Tree = {"lora_rank_unet_pix": RANK, "lora_rank_unet_sem": RANK, "state_dict_unet": {}}
    for kind in ("pix", "sem"):
        tree |= {f"unet_lora_{which}_modules_{kind}": modules for which, modules in lists.items()}
        tree["state_dict_unet"] |= listed(lists, f"_{kind}")
    return tree


def listed(lists: dict[str, list[str]], suffix: str, shapes: dict[str, tuple[int, ...]] = UNET) -> dict[str, Tensor]:
    """Return the tensors of peft adapters named `default_<list><suffix>`."""
    return {
        f"{path}.lora_{half}.default_{which}{suffix}.weight": tensor
        for which, modules in lists.items()
        for path in modules
        for half, tensor in zip("AB", halves(shapes[path]), strict=True)
    }


def kohya() -> Tree:
    """Return a kohya LoRA."""
    tensors = {}
    for path, shape in UNET.items():
        name, pair = f"lora_unet_{path.replace('.', '_')}", halves(shape)
        tensors |= {f"{name}.lora_{half}.weight": x for half, x in zip(("down", "up"), pair, strict=True)}
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    return {"tensors": tensors, "metadata": {}}


def diffusers() -> Tree:
    """Return a LoRA of diffusers with its configuration in the metadata."""
    tensors = {f"unet.{p}.lora_{h}.weight": x for p, s in UNET.items() for h, x in zip("AB", halves(s), strict=True)}
    return {"tensors": tensors, "metadata": {"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 2}'}}


def invsr() -> Tree:
    """Return InvSR's noise predictor as it was trained."""
    network = NoisePredictor((64, 64), 1, 32)
    return {"state_dict": {f"module._orig_mod.{key}": value for key, value in network.state_dict().items()}}


def cfw() -> Tree:
    """Return StableSR's CFW as it was trained, within an autoencoder."""
    network = FeatureWrapping((32, 32), growth=1)
    state = {f"decoder.{key}": value for key, value in network.state_dict().items()}
    return {"epoch": 11, "state_dict": state | {"encoder.conv_in.bias": torch.ones(2)}}


def own(path: Path) -> Tree:
    """Return an adapter of this pack, with everything that one can have."""
    steps = (from_noise_level(200),)
    weights = {"conv_in.bias": torch.randn(8)}
    write_adapter(
        path, Adapter("own", WeightDelta(updates(UNET), weights), WeightDelta(updates(VAE)), stage=1, steps=steps)
    )
    return read_back(path)


def model(path: Path) -> Tree:
    """Return a whole small model."""
    shipped = read_model(embedded_path())
    vae, unet = shipped.vae_config | SMALL_VAE, shipped.unet_config | SMALL_UNET
    networks = [make(config, "here").state_dict() for make, config in ((make_vae, vae), (make_unet, unet))]
    second = Adapter("stage two", WeightDelta(updates({FIRST: (8, 4, 3, 3)})), stage=2, steps=shipped.second.steps)
    write_model(path, ModelFile("small", vae, unet, *networks, shipped.first_step, second, shipped.limits))
    return read_back(path)


def tagger(path: Path) -> Tree:
    """Return a converted tagger."""
    dape.write_tagger(path, dape.DapeTagger(RamTagger(TAGGER), ("a", "b", "c"), (0.5, 0.5, 0.5), "small"))
    return read_back(path)


def downsampler(path: Path, kind: str) -> Tree:
    """Return a learned downsampler."""
    vae = read_model(embedded_path()).vae_config | SMALL_VAE if kind == "latent" else None
    write_downsampler(path, Downsampler(DownsamplerConfig(kind, 4, 1, 4, 2, vae=vae)), {"training": "{}"})
    return read_back(path)


def read_back(path: Path) -> Tree:
    """Return tensors and metadata of a safetensors file."""
    file = read_file(path)
    tensors = {key: value.clone() for key, value in file.tensors.items()}
    return {"tensors": tensors, "metadata": dict(sorted(file.metadata.items()))}


SUFFIXES = {
    **dict.fromkeys(("own", "model", "tagger", "kohya", "diffusers", "peft file", "pixel", "latent"), ".safetensors"),
    "base": ".base",
    **{"hypir": ".pth", "osediff": ".pkl", "pisa": ".pkl", "invsr": ".pth", "cfw": ".pt", "peft": "", "omgsr": ""},
}


def stripped(modules: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the encoder's modules as peft names them when it wraps the encoder."""
    return {path.removeprefix("encoder."): shape for path, shape in modules.items() if path.startswith("encoder.")}


def whole_files(scratch: Path) -> dict[str, Tree]:
    """Return the content of a whole file of every kind in SUFFIXES; `scratch` is a folder to write in."""
    torch.manual_seed(0)
    return {
        "own": own(scratch / "own.safetensors"),
        "model": model(scratch / "model.safetensors"),
        "tagger": tagger(scratch / "tagger.safetensors"),
        "pixel": downsampler(scratch / "pixel.safetensors", "pixel"),
        "latent": downsampler(scratch / "latent.safetensors", "latent"),
        "kohya": kohya(),
        "diffusers": diffusers(),
        "peft file": peft(UNET)["adapter_model.safetensors"],
        "base": base(),
        "hypir": hypir(),
        "osediff": osediff(),
        "pisa": pisa(),
        "invsr": invsr(),
        "cfw": cfw(),
        "peft": peft(UNET),
        "omgsr": {"unet_lora_adapter": peft(UNET), "vae_encoder_lora_adapter": peft(stripped(VAE))},
    }


def write(path: Path, tree: Tree) -> Path:
    """Write the content of a file (by its suffix) or of a folder."""
    if path.suffix in (".json", ".txt"):
        path.write_text(tree if isinstance(tree, str) else json.dumps(tree), encoding="utf-8")
    elif path.suffix == ".safetensors":
        tensors = {str(key): value.contiguous() for key, value in tree["tensors"].items()}
        save_file(tensors, path, {str(key): str(value) for key, value in tree["metadata"].items()})
        sort_header(path)
    elif path.suffix not in ("", ".base"):
        torch.save(tree, path)
    else:
        path.mkdir(parents=True, exist_ok=True)
        for name, part in tree.items():
            write(path / name, part)
    return path


def sort_header(path: Path) -> None:
    """Write the header's entries by name: safetensors orders the metadata anew in every process."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    # Sorted and without spaces it is no longer than it was.
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    path.write_bytes(data[:8] + header.ljust(end - 8) + data[end:])


def network(shapes: dict[str, tuple[int, ...]]) -> nn.Module:
    """Return an empty module tree with a weight and a bias at every path."""
    root = nn.Module()
    for path, shape in shapes.items():
        node = root
        for name in path.split("."):
            if not hasattr(node, name):
                node.add_module(name, nn.Module())
            node = getattr(node, name)
        node.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)
        node.bias = nn.Parameter(torch.zeros(shape[0]), requires_grad=False)
    return root


def read_all_the_way(path: Path) -> None:
    """Do with a file all that nodes and command line do; raises CheckpointError that names it, or nothing."""
    try:
        if path.suffix == ".base":
            use_base(path)
            return
        if path.suffix == ".pt":
            use_wrapping(path)
            return
        inspect_file(path)
        kind = open_safetensors(path).metadata() or {} if path.suffix == ".safetensors" else {}
        if kind.get("format") == dape.TAGGER_FORMAT:
            dape.load_tagger(path).tags(torch.rand(1, 3, 16, 16))
            return
        if kind.get("format") == DOWNSAMPLER_FORMAT:
            load_downsampler(path).degrade(torch.rand(1, 3, 24, 20), 3.0)
            return
        if kind.get("format") == "tudsr-model/1":
            use_model(path)
            return
        adapter = read_adapter(path, stage=1)
    except CheckpointError as error:
        assert path.stem in str(error), f"the message does not name the file: {error}"
        raise
    use_adapter(path, adapter)


def use_wrapping(path: Path) -> None:
    """Run both levels of CFW once."""
    loaded = load_wrapping(path)
    for level in (loaded.fusion_layer_1, loaded.fusion_layer_2):
        x = torch.rand(1, level.encode_enc_3.conv1.in_channels, 4, 4)
        level(x, x)


def use_model(path: Path) -> None:
    """Run both stages of a whole model once."""
    loaded = load_embedded("cpu", path=path)
    for stage in (loaded.first, loaded.second):
        z = stage.networks.encode(torch.rand(1, 3, 16, 16), None, lambda: None).z
        stage.networks.denoise(z, 5, stage.networks.condition(""), z.shape, lambda predict, z=z: predict(z, []))


def use_adapter(path: Path, adapter: Adapter) -> None:
    """Merge an adapter into networks, run its predictor, convert it and read it back."""
    adapter.steps_for(adapter.stage or 1)
    branches = adapter.branches()
    for name, shapes, patches in (("UNet", UNET, [patch for _, patch in branches]), ("VAE", VAE, [adapter.vae])):
        slot = LoRAMerger(network(shapes), name)
        for patch in patches:
            slot.check(patch, adapter.name)
            slot.use(copy.deepcopy(patch))
    if adapter.predictor:
        build_predictor(adapter.predictor, adapter.name)(torch.rand(1, 3, 4, 4), 199)
    converted = path.with_name(f"{path.stem} converted.safetensors")
    write_adapter(converted, adapter)
    read_adapter(converted)
