"""Stable Diffusion in miniature: the sizes of its networks, and a folder as diffusers saves one."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from transformers import CLIPTextConfig, CLIPTextModel

SMALL_UNET = dict(
    sample_size=8,
    block_out_channels=(32, 64, 64, 64),
    layers_per_block=2,
    attention_head_dim=(2, 4, 4, 4),
    cross_attention_dim=32,
    use_linear_projection=True,
    norm_num_groups=8,
)
SMALL_VAE = dict(
    block_out_channels=(16, 32, 32, 32),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=1,
    norm_num_groups=8,
    latent_channels=4,
    scaling_factor=0.18215,
)
SMALL_TEXT = dict(
    vocab_size=49408,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    projection_dim=32,
)


def write(root: Path) -> Path:
    """Write `base`, with a tokenizer, and two adapters, `one` and `two`, all random, into `root`; returns `root`."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SMALL_UNET)
    unet.save_pretrained(root / "base" / "unet")
    AutoencoderKL(**SMALL_VAE).save_pretrained(root / "base" / "vae")
    CLIPTextModel(CLIPTextConfig(**SMALL_TEXT)).save_pretrained(root / "base" / "text_encoder")
    noise = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    DDPMScheduler(**noise).save_pretrained(root / "base" / "scheduler")
    write_tokenizer(root / "base" / "tokenizer")
    for name in ("one", "two"):
        targets = ["conv1", "conv2", "to_q", "to_v", "to_out.0", "conv_in"]
        adapted = get_peft_model(unet, LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        for key, parameter in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(root / name / "unet_lora_adapter")
        unet = adapted.unload()
    return root


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of seven words, in CLIP's form."""
    folder.mkdir()
    words = {"!": 0, "a</w>": 1, "b</w>": 2, "a": 3, "b": 4, "<|startoftext|>": 5, "<|endoftext|>": 6}
    (folder / "vocab.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "!"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
