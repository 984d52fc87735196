"""Stable Diffusion 2.1-base and SD-Turbo as diffusers networks, from a folder or one file, offline.

Holds the published architecture as data, because single files carry no configuration and a hub
look-up is not an option. Adapters and stages are not here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from reprlib import repr as short

import torch
from torch import Tensor, nn

from ..untrusted import SCALING, Fields, network_config, parse_json, read_text, shown, some
from ..weights import TELLTALE, CheckpointError, check_finite, file_prediction, prediction_of, stream
from .clip_tokens import PAD, TOKENS, Tokens, import_transformers, tokens_of

UNET_CONFIG = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
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
# The text tower's prefix in single files: of the original code, and of SD-Turbo's.
TEXT_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.0.model.")
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
# Under these two prefixes, what training leaves behind and no network of ours has.
OF_TRAINING = ("loss.", "model_ema.")

PREDICTIONS = ("epsilon", "v_prediction")
# What a folder may say of its noise levels, which `schedule.py` has; a missing setting is taken to be this.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
}
# Later VAEs move and scale each latent channel by these; SD's has one factor.
UNUSED_LATENTS = ("shift_factor", "latents_mean", "latents_std")

Embed = Callable[..., Tensor]


@dataclass(frozen=True)
class Architecture:
    """Configurations of the three networks; tests pass small ones."""

    unet: dict = field(default_factory=lambda: UNET_CONFIG)
    vae: dict = field(default_factory=lambda: VAE_CONFIG)
    text: dict = field(default_factory=lambda: TEXT_CONFIG)


def read_base(
    path: Path,
    dtype: torch.dtype = torch.float32,
    architecture: Architecture | None = None,
    tokenizer: Path | None = None,
    predictions: tuple[str, ...] = ("epsilon",),
) -> tuple[nn.Module, nn.Module, Embed]:
    """Return `(vae, unet, embed)` of a diffusers folder or a `.safetensors` / `.ckpt` file, in `dtype`.

    `embed(*texts)` gives `texts 77 width`, the text tower's last hidden state after its final LayerNorm,
    and needs `transformers`; for a single file, texts other than "" need `tokenizer`, a folder with
    CLIP's vocab.json and merges.txt. Raises CheckpointError, also for a folder whose UNet predicts
    something else than `predictions`.
    """
    check_exists(path)
    if path.is_dir():
        kind = read_prediction(path)
        _check_noise(path)
        if kind not in predictions:
            raise CheckpointError(
                f"{path} predicts {kind}, but one-step adapters need an epsilon model; "
                "use SD2.1-base (512), not SD2.1 (768)"
            )
        return _read_folder(path, dtype)
    return _read_single_file(path, dtype, architecture or Architecture(), tokenizer, predictions)


def check_exists(path: Path) -> None:
    """Raise CheckpointError unless there is a file or folder."""
    if not path.exists():
        raise CheckpointError(
            f"base model {path} does not exist; give a diffusers folder or a checkpoint file of SD2.1-base or SD-Turbo "
            "(for example v2-1_512-ema-pruned.safetensors)"
        )


def _read_folder(path: Path, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, Embed]:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    for part in ("vae", "unet", "text_encoder", "tokenizer"):
        if not (path / part).is_dir():
            raise CheckpointError(f"{path} is not a diffusers folder of Stable Diffusion: {part}/ is missing")
    networks = []
    for part, kind in (("vae", AutoencoderKL), ("unet", UNet2DConditionModel)):
        fields = _read_fields(path / part / "config.json")
        _refuse_settings(fields, [name for name in UNUSED_LATENTS if fields.values.get(name)])
        config = network_config(fields)
        if part == "vae":
            default = VAE_CONFIG["scaling_factor"]
            config["scaling_factor"] = fields.number("scaling_factor", default, *SCALING)
        weights = _copied(path / part, _folder_weights(path / part), dtype)
        networks.append(_fill(path, part, kind, config, weights))

    def load_text() -> tuple[nn.Module, Tokens]:
        text = path / "text_encoder"
        fields = _read_fields(text / "config.json")
        config = network_config(fields) | {"eos_token_id": fields.whole("eos_token_id", 2, least=0)}
        weights = _copied(text, _folder_weights(text, ("model", "pytorch_model")), dtype)
        network = _text_network(path, config, lambda network: weights)
        return network, tokens_of(path / "tokenizer", network.config.vocab_size)

    return *networks, _embedder(load_text)


def _read_fields(path: Path) -> Fields:
    return Fields(parse_json(read_text(path, CheckpointError), str(path), CheckpointError), str(path), CheckpointError)


def _folder_weights(
    folder: Path, stems: tuple[str, ...] = ("diffusion_pytorch_model",)
) -> Iterable[tuple[str, Tensor]]:
    """Stream the weights of one network of a diffusers folder, in whichever of its usual files they are."""
    for end in ("safetensors", "fp16.safetensors", "bin", "fp16.bin"):
        for stem in stems:
            if (folder / f"{stem}.{end}").is_file():
                return stream(folder / f"{stem}.{end}")
    index = folder / f"{stems[0]}.safetensors.index.json"
    if not index.is_file():
        raise CheckpointError(f"{folder} has no {stems[0]}.safetensors; download the whole folder again")
    files = _read_fields(index).table("weight_map")
    shards = sorted({Path(files.text(name)).name for name in files.values})
    return (item for shard in shards for item in stream(folder / shard))


# Attention layers of VAEs saved by diffusers before 0.18.
_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _copied(path: Path, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the streamed weights of `path` in `dtype`, so that the file's mapping can be let go.

    Raises CheckpointError that names one in whole numbers, or with NaN or infinite values.
    """
    own = {}
    for key, value in weights:
        if key.endswith("position_ids"):  # 0, 1, 2, ..., which older files of text encoders hold
            continue
        if not value.is_floating_point():
            raise CheckpointError(f"{path}: {shown(key)} is stored in whole numbers; get the unquantised file")
        check_finite(path, [(key, value)])
        own[key] = value.to(dtype, copy=True)
    return own


@contextmanager
def _no_weights() -> Iterator[None]:
    """Let networks be built with neither memory nor random numbers, which take longer than reading a small file."""
    from diffusers.models.modeling_utils import no_init_weights

    with no_init_weights(), torch.device("meta"):
        yield


def _fill(path: Path, name: str, kind: type, config: dict, weights: dict[str, Tensor]) -> nn.Module:
    """Build a network that takes `weights` as they are, without memory of its own."""
    for old, new in _RENAMED.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    try:
        with _no_weights():
            network, unused = kind.from_config(config, return_unused_kwargs=True)
        _check_all_used(path, name, unused)
        network.load_state_dict(weights, assign=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever diffusers makes of settings that cannot be
        raise _misfit(path, name, error) from error
    return network


def _misfit(path: Path, name: str, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return CheckpointError(f"{path} cannot be loaded as Stable Diffusion: its {name} does not fit ({reason})")


def _check_all_used(path: Path, name: str, unused: Iterable[str]) -> None:
    # diffusers drops what it does not know and builds another network than the file's.
    dropped = [short(key) for key in unused if not key.startswith("_")]
    if dropped:
        raise CheckpointError(
            f"{path}: the config of its {name} says {some(dropped)}, which the installed diffusers "
            f"{metadata.version('diffusers')} does not know and would ignore; update diffusers"
        )


def _refuse_settings(fields: Fields, names: list[str]) -> None:
    if names:
        said = ", ".join(f"{name} {shown(fields.values[name])}" for name in names)
        raise CheckpointError(
            f"{fields.where} says {said}, which Stable Diffusion 2.1 and SD-Turbo do not have; "
            "use a folder of one of these"
        )


def read_prediction(path: Path) -> str:
    """Return what the UNet of a base model predicts, "epsilon" unless its folder or weights say otherwise."""
    if path.is_file():
        return file_prediction(path) or "epsilon"
    return _scheduler(path).text("prediction_type", "epsilon")


def _check_noise(path: Path) -> None:
    """Raise CheckpointError if the folder of a base model says that it was trained with other noise levels."""
    fields = _scheduler(path)
    _refuse_settings(fields, [name for name, value in SCHEDULE.items() if fields.values.get(name, value) != value])


def _scheduler(path: Path) -> Fields:
    file = path / "scheduler" / "scheduler_config.json"
    return _read_fields(file) if file.is_file() else Fields({}, str(file), CheckpointError)


def _read_single_file(
    path: Path,
    dtype: torch.dtype,
    architecture: Architecture,
    tokenizer: Path | None,
    predictions: tuple[str, ...],
) -> tuple[nn.Module, nn.Module, Embed]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders import single_file_utils as convert

    networks = []
    for name, kind, config, prefix, rename in (
        ("VAE", AutoencoderKL, architecture.vae, VAE_PREFIX, convert.convert_ldm_vae_checkpoint),
        ("UNet", UNet2DConditionModel, architecture.unet, UNET_PREFIX, convert.convert_ldm_unet_checkpoint),
    ):
        own = _copied(path, stream(path, (prefix,)), dtype)
        if not own:
            raise CheckpointError(f"{path} is no checkpoint of Stable Diffusion: it has no {prefix}* tensors")
        if TELLTALE in own and prediction_of(own[TELLTALE]) not in predictions:
            raise CheckpointError(f"{path} is SD2.1 (768), which predicts v; use SD2.1-base (512) or SD-Turbo")
        with _no_weights():
            full = dict(kind.from_config(config).config)
        try:
            weights = rename(dict(own), config=full)
        except (KeyError, IndexError) as error:
            raise CheckpointError(f"{path} is not an SD2.1-base checkpoint: {error} is missing") from error
        networks.append(_fill(path, name, kind, config, weights))
        _check_all_taken(path, prefix, own, weights)

    def load_text() -> tuple[nn.Module, Tokens]:
        network = _single_file_text(path, dtype, architecture.text)
        return network, tokens_of(tokenizer, network.config.vocab_size, PAD)

    return *networks, _embedder(load_text)


def _check_all_taken(path: Path, prefix: str, own: dict[str, Tensor], taken: dict[str, Tensor]) -> None:
    # diffusers renames what it knows and drops the rest; it may reshape, but copies nothing.
    used = {tensor.untyped_storage().data_ptr() for tensor in taken.values()}
    left = [key for key, tensor in own.items() if tensor.untyped_storage().data_ptr() not in used]
    left = [key for key in left if not key.removeprefix(prefix).startswith(OF_TRAINING)]
    if left:
        raise CheckpointError(
            f"{path} has weights that the networks of SD2.1-base and SD-Turbo do not: {some(left)}; "
            "it is damaged, or a checkpoint of another model"
        )


def _single_file_text(path: Path, dtype: torch.dtype, config: dict) -> nn.Module:
    from diffusers.loaders import single_file_utils as convert

    own = _copied(path, stream(path, TEXT_PREFIXES), dtype)
    if not own:
        raise CheckpointError(f"{path} has no text encoder; use a full checkpoint or a diffusers folder")
    prefix = next(prefix for prefix in TEXT_PREFIXES if next(iter(own)).startswith(prefix))
    return _text_network(path, config, lambda text: convert.convert_open_clip_checkpoint(text, own, prefix=prefix))


def _text_network(path: Path, config: dict, read: Callable[[nn.Module], dict[str, Tensor]]) -> nn.Module:
    """Return CLIP's text tower of `config` with the weights of `read(tower)`; nothing is looked up anywhere."""
    transformers = import_transformers()
    try:
        with _no_weights():
            text = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config))
        # Newer transformers leave out the level `text_model`, which files have.
        flat = "text_model.final_layer_norm.weight" not in text.state_dict()
        weights = {key.removeprefix("text_model.") if flat else key: value for key, value in read(text).items()}
        missing = text.load_state_dict(weights, strict=False, assign=True).missing_keys
    except Exception as error:  # whatever transformers makes of settings that cannot be
        raise _misfit(path, "text encoder", error) from error
    if missing:
        raise CheckpointError(f"{path}: its text encoder is not SD2.1's (missing: {some(missing)})")
    embeddings = text.embeddings if flat else text.text_model.embeddings
    embeddings.position_ids = torch.arange(TOKENS)[None]  # a buffer that no file holds
    return text


def _embedder(load_text: Callable[[], tuple[nn.Module, Tokens]]) -> Embed:
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
