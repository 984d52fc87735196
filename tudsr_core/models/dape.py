"""DAPE: tags for degraded pictures, from RAM's weights, DAPE's low-rank updates and RAM's tag list.

Reads the published files safely, merges the updates, converts to one file, and tags pictures. The
network is in `ram.py`; prompts are made of the tags elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..untrusted import Fields, parse_json, read_text, some
from ..weights import CheckpointError, LoRAWeights, TensorFile, check_finite, read_file, where_to_get, write_file
from .fill_weights import fill, mismatches
from .ram import RamConfig, RamTagger, prepare
from .swin import SwinConfig

log = logging.getLogger(__name__)

TAGGER_FORMAT = "tudsr-tagger/1"
RAM_FILE, DAPE_FILE = "ram_swin_large_14m.pth", "DAPE.pth"
LIST_FILE, THRESHOLD_FILE = "ram_tag_list.txt", "ram_tag_list_threshold.txt"
LIST_SHA256 = {  # of the lines, joined by newlines without a last one
    LIST_FILE: "5d96d2f7225527480ad773aaac76b6e5c08a18adf6eae9ca7d2ab923d5e7bd8b",
    THRESHOLD_FILE: "36e274671ec88ea9e5a4a86c2ce8af96b7aa0f31c5e80ce2643194790609929c",
}

# RAM's names of one decoder layer's parts, and ours.
HEAD_PARTS = {
    "crossattention.self.query": "query",
    "crossattention.self.key": "key",
    "crossattention.self.value": "value",
    "crossattention.output.dense": "dense",
    "crossattention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}
HEAD_KEY = re.compile(r"tagging_head\.encoder\.layer\.(?P<layer>\d+)\.(?P<part>.+)\.(?P<kind>\w+)")
OWN_PARTS = ("visual_encoder.", "tagging_head.", "image_proj.", "wordvec_proj.", "fc.", "label_embed")
# Buffers that are computed anew, and what Query2Label's decoder drops of BERT.
SPARE = re.compile(
    r".+\.(relative_position_index|attn_mask)|tagging_head\.(embeddings|encoder\.layer\.\d+\.attention)\..+"
)
CAPTIONING = ("tag_encoder.", "text_decoder.")
RANK = 8  # of DAPE's updates


class DapeTagger:
    """RAM or DAPE with its tag list, ready to tag.

    `device` is where to compute; None: wherever the network's owner has put it.
    """

    def __init__(self, network: RamTagger, labels: tuple[str, ...], thresholds: tuple[float, ...], name: str) -> None:
        self.network = network.eval().requires_grad_(False)
        self.labels, self.thresholds, self.name = labels, thresholds, name
        self.device: torch.device | None = None

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return `B labels` in 0..1 (float32, CPU) for `B 3 H W` in 0..1 of any size."""
        if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
            raise ValueError(f"expected pictures of B 3 H W to tag, got shape {tuple(images.shape)}")
        if self.device:
            self.network.to(self.device)
        weight = self.network.fc.weight
        side = self.network.config.swin.image_px
        # One at a time, so that the tags of a picture do not depend on its neighbours in the batch.
        rows = [self.network(prepare(image, side).to(weight)).float().cpu().sigmoid() for image in images.split(1)]
        return torch.cat(rows) if rows else torch.empty(0, len(self.labels))

    def tags(self, images: Tensor) -> list[str]:
        """Return "tag, tag" in list order for each of `B 3 H W` in 0..1; "" where no tag passes its threshold."""
        kept = self.probabilities(images) > torch.tensor(self.thresholds)
        return [", ".join(self.labels[index] for index in row.nonzero().flatten().tolist()) for row in kept]

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256(json.dumps([self.labels, self.thresholds]).encode())
        for key, tensor in sorted(self.network.state_dict().items()):
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """Return a hash of weights, tags and thresholds, for caches."""
        return self._digest

    def release(self) -> None:
        """Move the weights to the CPU, unless somebody else decides where they are."""
        if self.device:
            self.network.to("cpu")


def load_tagger(path: Path) -> DapeTagger:
    """Return a tagger, float32 on the CPU, from a converted file or a folder of the published files.

    The folder holds `ram_swin_large_14m.pth`, `ram_tag_list.txt`, `ram_tag_list_threshold.txt` and, for
    DAPE rather than plain RAM, `DAPE.pth`. Raises CheckpointError.
    """
    if path.is_dir():
        adapter = path / DAPE_FILE
        return read_published(path / RAM_FILE, adapter if adapter.exists() else None, path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path} is not a converted tagger (.safetensors); give the folder that holds {RAM_FILE}, {DAPE_FILE}, "
            f"{LIST_FILE} and {THRESHOLD_FILE}"
        )
    file = read_file(path)
    if file.metadata.get("format") != TAGGER_FORMAT:
        raise CheckpointError(
            f"{path} is not a tagger of this pack (its metadata says {file.metadata.get('format')!r})"
        )
    where = f"the metadata of {path}"
    facts = Fields(parse_json(file.metadata.get("tagger", "null"), where, CheckpointError), where, CheckpointError)
    config = _config(facts)
    labels, thresholds = tuple(facts.texts("tags")), tuple(facts.numbers("thresholds"))
    if not len(labels) == len(thresholds) == config.labels:
        raise CheckpointError(f"{path} has {len(labels)} tags and {len(thresholds)} thresholds for {config.labels}")
    return DapeTagger(_network(path, config, file.tensors), labels, thresholds, path.stem)


def _config(facts: Fields) -> RamConfig:
    """Return the sizes that a converted file names; raises CheckpointError for those of no tagger."""
    swin, head = facts.table("swin"), facts.table("head")
    depths, heads = (tuple(map(int, swin.numbers(name))) for name in ("depths", "heads"))
    limits = {"image_px": 1024, "patch_px": 64, "width": 1024, "window": 16}
    sizes = {name: swin.whole(name, least=1, most=most) for name, most in limits.items()}
    limits = {"labels": 2**16, "token_width": 4096, "width": 4096, "heads": 64, "layers": 16}
    own = {name: head.whole(name, least=1, most=most) for name, most in limits.items()}
    # Tokens per side are halved from level to level, and must make whole windows on each.
    windows = sizes["image_px"] / sizes["patch_px"] / sizes["window"]
    fits = 0 < len(depths) == len(heads) <= 8 and min(depths) > 0 and sum(depths) <= 64 and min(heads) > 0
    fits = fits and windows <= 16 and windows % 2 ** (len(depths) - 1) == 0 and own["width"] % own["heads"] == 0
    if not fits or any(sizes["width"] * 2**level % count for level, count in enumerate(heads)):
        raise CheckpointError(f"{facts.where}: these are no sizes of a tagger; convert the weights again")
    return RamConfig(SwinConfig(**sizes, depths=depths, heads=heads), **own)


def write_tagger(path: Path, tagger: DapeTagger) -> None:
    """Write `tagger` as one float16 safetensors file with its tags and thresholds, atomically."""
    sizes = asdict(tagger.network.config)
    facts = {"swin": sizes.pop("swin"), "head": sizes, "tags": tagger.labels, "thresholds": tagger.thresholds}
    metadata = {"format": TAGGER_FORMAT, "tagger": json.dumps(facts)}
    write_file(path, {key: value.half() for key, value in tagger.network.state_dict().items()}, metadata)


def read_published(ram: Path, dape: Path | None, lists: Path, config: RamConfig | None = None) -> DapeTagger:
    """Return RAM's tagger from its published weights, with DAPE's updates merged if `dape` is given.

    `lists` is the folder of the tag list and its thresholds. Raises CheckpointError.
    """
    config = config or RamConfig()
    labels, thresholds = read_lists(lists, config.labels)
    network = _network(ram, config, _own_names(read_file(ram), config.layers))
    if dape:
        merge_updates(network, read_file(dape))
    return DapeTagger(network, labels, thresholds, dape.stem if dape else ram.stem)


def read_lists(folder: Path, count: int) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return the tags and their thresholds from RAM's two text files, one entry a line. Raises CheckpointError."""
    lines = {}
    for name in (LIST_FILE, THRESHOLD_FILE):
        path = folder / name
        try:
            lines[name] = read_text(path, CheckpointError).splitlines()
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {where_to_get(name)}and put it beside the weights") from error
        if len(lines[name]) != count:
            raise CheckpointError(f"{path} has {len(lines[name])} lines, but the weights know {count} tags")
        if hashlib.sha256("\n".join(lines[name]).encode()).hexdigest() != LIST_SHA256[name]:
            log.warning("%s differs from the published list; tags are right only if its order is", path)
    try:
        thresholds = tuple(float(line) for line in lines[THRESHOLD_FILE])
    except ValueError as error:
        raise CheckpointError(f"{folder / THRESHOLD_FILE} holds something else than numbers: {error}") from error
    if not all(math.isfinite(value) for value in thresholds):
        raise CheckpointError(f"{folder / THRESHOLD_FILE} holds a threshold that is not finite")
    return tuple(lines[LIST_FILE]), thresholds


def _own_names(file: TensorFile, layers: int) -> dict[str, Tensor]:
    """Return what of RAM's checkpoint belongs to the tagger, under our names."""
    if "model" in file.values:
        raise CheckpointError(f"{file.path} is not a RAM checkpoint: its 'model' is no table of tensors")
    tensors, shared, ignored = {}, {}, []
    for key, value in file.tensors.items():
        key = key.removeprefix("model.").replace("vision_multi.", "tagging_head.")
        if key.startswith("tag_encoder."):
            shared[_own_name(key.replace("tag_encoder.", "tagging_head."), layers)] = value
        elif key.startswith(OWN_PARTS):
            if not SPARE.fullmatch(key):
                tensors[_own_name(key, layers)] = value
        elif not key.startswith("text_decoder."):
            ignored.append(key)
    if ignored:
        log.info("%s: %d tensors are not the tagger's: %s", file.path, len(ignored), some(ignored))
    # The decoder shares its weights with tag_encoder's lowest layers, and may be stored there alone.
    return {key: value for key, value in shared.items() if key.startswith("head.")} | tensors


def _own_name(key: str, layers: int) -> str:
    """Return `head.<i>.<part>.<kind>` for RAM's name of a decoder tensor, any other key as it is."""
    found = HEAD_KEY.fullmatch(key)
    if found and int(found["layer"]) < layers and found["part"] in HEAD_PARTS:
        return f"head.{found['layer']}.{HEAD_PARTS[found['part']]}.{found['kind']}"
    return key


def _network(path: Path, config: RamConfig, tensors: Mapping[str, Tensor]) -> RamTagger:
    with torch.device("meta"):
        network = RamTagger(config)
    return fill(network, tensors, path, "the tagger", f"use {RAM_FILE} or a converted file")


@torch.no_grad()
def merge_updates(network: RamTagger, updates: TensorFile) -> None:
    """Add DAPE's low-rank updates (loralib, alpha 1) to `network`'s weights, in place.

    Every Swin `qkv` has one for q and one for v, stacked; k is not updated. In the decoder, `query`
    and `key` have one each. Raises CheckpointError.
    """
    weights, layers = network.state_dict(), len(network.head)
    own = {_own_name(key, layers): update for key, update in updates.tensors.items() if not key.startswith(CAPTIONING)}
    stacked = [key.removesuffix(".weight") for key in weights if key.endswith("attn.qkv.weight")]
    single = [f"head.{layer}.{part}" for layer in range(layers) for part in ("query", "key")]
    wanted = {}
    for name in stacked + single:
        (rows, columns), parts = weights[f"{name}.weight"].shape, 2 if name in stacked else 1
        wanted[f"{name}.lora_A"] = (parts * RANK, columns)
        wanted[f"{name}.lora_B"] = (2 * columns if name in stacked else rows, RANK)
    problems = mismatches(wanted, own)
    if problems:
        raise CheckpointError(f"{updates.path} does not fit RAM: {problems}; use {DAPE_FILE} of SeeSR or OSEDiff")
    check_finite(updates.path, own.items())
    for name in stacked:
        down, up = own[f"{name}.lora_A"], own[f"{name}.lora_B"]
        q, _, v = weights[f"{name}.weight"].chunk(3)
        for weight, update in zip((q, v), zip(down.chunk(2), up.chunk(2), strict=True), strict=True):
            weight.add_(LoRAWeights(*update, alpha=1.0).delta(weight))
    for name in single:
        weight = weights[f"{name}.weight"]
        weight.add_(LoRAWeights(own[f"{name}.lora_A"], own[f"{name}.lora_B"], alpha=1.0).delta(weight))
