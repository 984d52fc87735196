"""The configs of the embedded model's networks: which keys and values of diffusers' configs are implemented.

A key that nobody reads would be a network that is not the one the file was trained with, so every
key must be there, be known, and have a value that the networks can be built with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from reprlib import repr as short
from typing import Any, ClassVar

from ..untrusted import SCALING, some

Check = Callable[[Any], bool]

MAX_LEVELS, MAX_LAYERS, MAX_CHANNELS = 8, 32, 16_384


def _is_count(value: Any, most: int = MAX_CHANNELS) -> bool:
    return type(value) is int and 0 < value <= most


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_scaling(value: Any) -> bool:
    return _is_positive(value) and SCALING[0] <= value <= SCALING[1]


def _each(check: Check) -> Check:
    return lambda value: isinstance(value, list) and 2 <= len(value) <= MAX_LEVELS and all(map(check, value))


def _only(known: object) -> Check:
    return lambda value: type(value) is type(known) and value == known


_widths, _layers = _each(_is_count), _each(lambda value: type(value) is int and 0 <= value <= MAX_LAYERS)


@dataclass(frozen=True)
class VAEConfig:
    """What of AutoencoderDC's config varies: channels and layers of each level, from the picture's side on."""

    latent_channels: int
    encoder_block_out_channels: tuple[int, ...]
    decoder_block_out_channels: tuple[int, ...]
    encoder_layers_per_block: tuple[int, ...]
    decoder_layers_per_block: tuple[int, ...]
    scaling_factor: float

    KEYS: ClassVar[dict[str, Check]] = {
        "latent_channels": _is_count,
        "encoder_block_types": _only("ResBlock"),
        "decoder_block_types": _only("ResBlock"),
        "encoder_block_out_channels": _widths,
        "decoder_block_out_channels": _widths,
        "encoder_layers_per_block": _layers,
        "decoder_layers_per_block": _layers,
        "encoder_qkv_multiscales": _each(_only([])),
        "decoder_qkv_multiscales": _each(_only([])),
        "encoder_out_shortcut": _only(False),
        "decoder_in_shortcut": _only(False),
        "scaling_factor": _is_scaling,
    }


@dataclass(frozen=True)
class UNetConfig:
    """What of UNet2DConditionModel's config varies; the width of the text is known, the text is not used."""

    in_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    cross_attention_dim: int
    norm_num_groups: int
    norm_eps: float

    KEYS: ClassVar[dict[str, Check]] = {
        "sample_size": _is_count,
        "in_channels": _is_count,
        "out_channels": _is_count,
        "down_block_types": _each(_only("DownBlock2D")),
        "mid_block_type": _only("UNetMidBlock2D"),
        "up_block_types": _each(_only("UpBlock2D")),
        "block_out_channels": _widths,
        "layers_per_block": lambda value: _is_count(value, MAX_LAYERS),
        "cross_attention_dim": _is_count,
        "norm_num_groups": _is_count,
        "norm_eps": _is_positive,
    }


def read_config(kind: type, config: object) -> Any:
    """Return `config` as `kind` (VAEConfig or UNetConfig); raises ValueError that names keys not as in its KEYS."""
    if not isinstance(config, dict):
        raise ValueError(f"{short(config)} is no table of settings")
    keys = kind.KEYS
    problems = [f"{short(key)} is not known" for key in config if key not in keys]
    problems += [f"{key} is missing" for key in keys if key not in config]
    problems += [
        f"{key} cannot be {short(config[key])}" for key in keys if key in config and not keys[key](config[key])
    ]
    if not problems and len({len(value) for value in config.values() if isinstance(value, list)}) > 1:
        problems = ["its lists have different lengths, where each has one entry a level"]
    if problems:
        raise ValueError(some(problems))
    values = {field.name: config[field.name] for field in fields(kind)}
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
