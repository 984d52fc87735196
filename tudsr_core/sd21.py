"""Stable Diffusion 2.1-base as diffusers networks, from a folder or one checkpoint file, offline.

Holds the published architecture as data, because single files carry no configuration and a hub
look-up is not an option. Adapters and stages are not here.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import CheckpointError, read_tensors

PREDICTIONS = ("epsilon", "v_prediction")
TOKENS, START, END, PAD = 77, 49406, 49407, 0

UNET_CONFIG = {
    "sample_size": 64,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "use_linear_projection": True,
}
VAE_CONFIG = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT_CONFIG = {
    "vocab_size": 49408,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}


@dataclass(frozen=True)
class Architecture:
    """Configurations of the three networks; tests pass small ones."""

    unet: dict = field(default_factory=lambda: UNET_CONFIG)
    vae: dict = field(default_factory=lambda: VAE_CONFIG)
    text: dict = field(default_factory=lambda: TEXT_CONFIG)


def read_base(
    path: Path, architecture: Architecture | None = None, predictions: tuple[str, ...] = ("epsilon",)
) -> tuple[nn.Module, nn.Module, Callable[..., Tensor]]:
    """Return `(vae, unet, embed)` of an SD2.1-base folder or `.safetensors` / `.ckpt` file.

    `embed(*texts)` gives `texts 77 width`, the text tower's last hidden state after its final
    LayerNorm, and needs `transformers`. Raises CheckpointError, also when the folder's UNet
    predicts something else than `predictions`.
    """
    path = Path(path)
    if path.is_dir():
        kind = read_prediction(path)
        if kind not in predictions:
            raise CheckpointError(
                f"{path} predicts {kind}, but one-step adapters need an epsilon model; "
                "use SD2.1-base (512), not SD2.1 (768)"
            )
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(
            f"base model {path} does not exist; give a diffusers folder or a checkpoint file of SD2.1-base "
            "(for example v2-1_512-ema-pruned.safetensors)"
        )
    return _read_single_file(path, architecture or Architecture())


def _read_folder(path: Path) -> tuple[nn.Module, nn.Module, Callable[..., Tensor]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for part in ("vae", "unet", "text_encoder", "tokenizer"):
        if not (path / part).is_dir():
            raise CheckpointError(f"{path} is not a diffusers folder of Stable Diffusion: {part}/ is missing")
    try:
        vae = AutoencoderKL.from_pretrained(path, subfolder="vae", local_files_only=True)
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded as Stable Diffusion: {error}") from error

    def load_text() -> tuple[nn.Module, Callable[[str], Tensor]]:
        transformers = _transformers()
        tokenizer = transformers.CLIPTokenizer.from_pretrained(path, subfolder="tokenizer", local_files_only=True)
        text = transformers.CLIPTextModel.from_pretrained(path, subfolder="text_encoder", local_files_only=True)

        def tokens(words: str) -> Tensor:
            batch = tokenizer(words, padding="max_length", truncation=True, return_tensors="pt")
            return batch.input_ids

        return text, tokens

    return vae, unet, _embedder(load_text)


def read_prediction(path: Path) -> str:
    """Return what the UNet of a base model predicts, "epsilon" unless its folder says otherwise."""
    file = path / "scheduler" / "scheduler_config.json"
    try:
        return json.loads(file.read_text()).get("prediction_type", "epsilon") if file.is_file() else "epsilon"
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error


def _read_single_file(path: Path, architecture: Architecture) -> tuple[nn.Module, nn.Module, Callable[..., Tensor]]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert

    tensors = read_tensors(path)
    unet = UNet2DConditionModel.from_config({**architecture.unet, "in_channels": 4, "out_channels": 4})
    vae = AutoencoderKL.from_config(architecture.vae)
    _fill(path, "UNet", unet, convert.convert_ldm_unet_checkpoint, tensors, dict(unet.config))
    _fill(path, "VAE", vae, convert.convert_ldm_vae_checkpoint, tensors, dict(vae.config))
    prefix = "cond_stage_model.model."
    own = {key: value for key, value in tensors.items() if key.startswith(prefix)}

    def load_text() -> tuple[nn.Module, Callable[[str], Tensor]]:
        transformers = _transformers()
        if not own:
            raise CheckpointError(f"{path} has no text encoder; use a full checkpoint or a diffusers folder")
        text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**architecture.text))
        weights = convert.convert_open_clip_checkpoint(text, dict(own), prefix=prefix)
        missing, _ = text.load_state_dict(weights, strict=False)
        if [key for key in missing if "position_ids" not in key]:
            raise CheckpointError(f"{path}: its text encoder is not SD2.1's ({len(missing)} tensors missing)")
        return text, _empty_prompt_tokens

    return vae, unet, _embedder(load_text)


def _empty_prompt_tokens(words: str) -> Tensor:
    if words:
        raise CheckpointError("a single checkpoint file has no tokenizer; for prompts use a diffusers folder")
    return torch.tensor([[START, END] + [PAD] * (TOKENS - 2)])


def _fill(path: Path, name: str, network: nn.Module, convert: Callable, tensors: dict, config: dict) -> None:
    try:
        weights = convert(dict(tensors), config=config)
        network.load_state_dict(weights)
    except (KeyError, RuntimeError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not an SD2.1-base checkpoint: its {name} does not fit ({reason})") from error


def _transformers():
    try:
        import transformers
    except ImportError:
        raise CheckpointError(
            "Stable Diffusion's text encoder needs transformers; run: pip install 'comfyui-tudsr[sd]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def _embedder(load_text: Callable[[], tuple[nn.Module, Callable[[str], Tensor]]]) -> Callable[..., Tensor]:
    """Return `embed(*texts)` that remembers results, and holds the text tower only while it computes new ones."""
    known: dict[str, Tensor] = {}

    @torch.inference_mode()
    def embed(*texts: str) -> Tensor:
        new = [words for words in dict.fromkeys(texts) if words not in known]
        if new:
            text, tokens = load_text()
            text.eval()
            for words in new:
                known[words] = text(tokens(words))[0].clone()
        return torch.cat([known[words] for words in texts])

    return embed
