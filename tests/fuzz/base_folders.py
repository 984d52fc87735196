"""A base model's folder in miniature, what is wrong in folders made by hand, and using one as a stage does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import small_sd
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from tudsr_core.backends.sd21 import SCHEDULE, read_base
from tudsr_core.cli.inspection import inspect_file
from tudsr_core.diffusion.schedule import scaled_linear

Tree = dict[str, Any]

WORDS = ("!", "a</w>", "b</w>", "a", "b", "<|startoftext|>", "<|endoftext|>")
UNET = small_sd.SMALL_UNET | {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "cross_attention_dim": 16}
VAE = small_sd.SMALL_VAE | {"block_out_channels": (8, 8, 8, 8)}
TEXT = (
    small_sd.SMALL_TEXT
    | {"vocab_size": len(WORDS), "hidden_size": 16, "intermediate_size": 16}
    | {
        "bos_token_id": 5,
        "eos_token_id": 6,
    }
)
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
DEEP = "[" * 100_000

# Places in the folder, and what stands there instead.
WRONG: tuple[tuple[str, object], ...] = (
    ("tokenizer/tokenizer_config.json", '"owner/name"'),
    ("tokenizer/tokenizer_config.json", DEEP),
    ("tokenizer/tokenizer_config.json", {"pad_token": 3}),
    ("tokenizer/tokenizer_config.json", {"added_tokens_decoder": {"x": 3}}),
    ("tokenizer/tokenizer_config.json", {"extra_special_tokens": 5, "model_max_length": "a"}),
    ("tokenizer/vocab.json", [1, 2]),
    ("tokenizer/vocab.json", DEEP),
    ("tokenizer/vocab.json", {"a": "b"}),
    ("tokenizer/vocab.json", VOCABULARY | {"a</w>": -5}),
    ("tokenizer/vocab.json", VOCABULARY | {"a</w>": 10**30}),
    ("tokenizer/vocab.json", VOCABULARY | {"a</w>": len(WORDS)}),
    ("tokenizer/vocab.json", {"!": 0}),
    ("tokenizer/merges.txt", "#v\nx\n\n a b c\n"),
    ("tokenizer/merges.txt", "#v\nq z\n"),
    ("tokenizer/tokenizer.json", DEEP),
    ("tokenizer/tokenizer.json", {"model": 3}),
    ("tokenizer/added_tokens.json", [1]),
    ("tokenizer/added_tokens.json", {"b": 99, "c": "x"}),
    ("tokenizer/special_tokens_map.json", [1]),
    ("tokenizer/special_tokens_map.json", {"pad_token": [1]}),
    ("vae/config.json/scaling_factor", "a"),
    ("vae/config.json/scaling_factor", 0),
    ("vae/config.json/scaling_factor", [1]),
    ("text_encoder/config.json/vocab_size", 3),
)


def base() -> Tree:
    """Return the content of a whole folder."""
    weights = "diffusion_pytorch_model.safetensors"
    text = CLIPTextModel(CLIPTextConfig(**TEXT))
    tree: Tree = {"text_encoder": {"config.json": TEXT, "model.safetensors": _file(text)}}
    for part, network in (("unet", UNet2DConditionModel(**UNET)), ("vae", AutoencoderKL(**VAE))):
        config = {name: value for name, value in network.config.items() if not name.startswith("_")}
        tree[part] = {"config.json": json.loads(json.dumps(config)), weights: _file(network)}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    words = {"vocab.json": VOCABULARY, "merges.txt": "#version: 0.2\n", "tokenizer_config.json": settings}
    return tree | {"tokenizer": words, "scheduler": {"scheduler_config.json": SCHEDULE}}


def _file(network: nn.Module) -> Tree:
    return {"tensors": network.state_dict(), "metadata": {}}


def use_base(path: Path) -> None:
    """Build the networks of a folder and run each once; raises CheckpointError that names it, or nothing."""
    inspect_file(path)
    vae, unet, embed = read_base(path)
    with torch.inference_mode():
        z = vae.encode(torch.rand(1, 3, 16, 16)).latent_dist.mode() * vae.config.scaling_factor
        unet(z, scaled_linear().steps - 1, embed("a b"))
