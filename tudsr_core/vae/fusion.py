"""A decoder that takes the encoder's activations into account, as StableSR's controllable feature wrapping does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from torch import nn

from .feature_maps import FeatureMap
from .graph import Add, Join, Layer, grids, read_dense_blocks, read_resnet

Features = Mapping[str, Sequence[FeatureMap]]
"""The encoder's activations `C H W` by level ("level 1" is half the picture's size), one for each picture."""


@dataclass(frozen=True)
class Fuse:
    """y = x + weight * f(cat([features, x], 1)) at the end of a level of the decoder.

    `layers` are f, of one grid throughout: from the channels of features `F` and x `C` together,
    `F + C`, to `C`. Their modules must be where the decoder is computed. A weight of 0 leaves the
    decoder as it is, and needs no features.
    """

    layers: Sequence[Layer]
    weight: float = 1.0


Fusions = Mapping[str, Fuse]
"""What to fuse at the end of which level of the decoder."""


def wrapping(network: nn.Module, weight: float) -> dict[str, Fuse]:
    """Return StableSR's controllable feature wrapping (Wang et al. 2024, section 3.2), nothing for a weight of 0.

    `network.fusion_layer_N` is what is fused at level N, half and a quarter of the picture's size: a
    residual block of both activations, RRDBs, a residual block. Its modules must be where the decoder
    is computed, and of its dtype, by then. `weight`: 0 is the decoder as it is, 1 as CFW was trained.
    """
    if not weight:
        return {}
    fuse = {}
    for number in (1, 2):
        part = network.get_submodule(f"fusion_layer_{number}")
        dense = [read_dense_blocks(block) for block in part.encode_enc_2]
        layers = [*read_resnet(part.encode_enc_1), *dense, *read_resnet(part.encode_enc_3)]
        fuse[f"level {number}"] = Fuse(layers, weight)
    return fuse


def fused_levels(fuse: Fusions) -> list[str]:
    """Return the levels whose features are used: those of a weight other than 0."""
    return [level for level, one in fuse.items() if one.weight]


def check_levels(layers: Sequence[Layer], levels: Iterable[str]) -> None:
    """Raise ValueError if one of `levels` is none of these layers'."""
    known = [layer.level for layer in layers if getattr(layer, "level", "")]
    if unmatched := [level for level in levels if level not in known]:
        raise ValueError(f"this autoencoder has no {', '.join(unmatched)}; its levels are {', '.join(sorted(known))}")


def up_to_levels(layers: Sequence[Layer], levels: Iterable[str]) -> list[Layer]:
    """Return an encoder's layers as far as `levels` need them."""
    levels = set(levels)
    last = max((number for number, layer in enumerate(layers) if layer.level in levels), default=0)
    # One more: what a list's last layer gives is its result, and lies elsewhere than what waits between layers.
    return list(layers[: last + 2])


def with_fusions(layers: Sequence[Layer], fuse: Fusions) -> list[Layer]:
    """Return a decoder's layers, with f's after the last layer of each level. Raises ValueError where f cannot be."""
    levels, made = fused_levels(fuse), []
    check_levels(layers, levels)
    for layer in layers:
        made.append(layer)
        if layer.level in levels:
            one, width = fuse[layer.level], layer.channels[1]
            first, last = one.layers[0].channels[0], one.layers[-1].channels[1]
            if first <= width or last != width or any(getattr(inner, "resample", "") for inner in one.layers):
                raise ValueError(
                    f"a fusion of {first} to {last} channels does not fit the {width} of {layer.level}; it must take "
                    "those of encoder and decoder together, return the decoder's, and keep the size"
                )
            made += [Join(layer.level, (width, first)), *one.layers, Add(one.weight, (width, width))]
    return made


def check_features(
    layers: Sequence[Layer], start: Fraction, size: tuple[int, int], batch: int, features: Features
) -> None:
    """Raise ValueError if `features` are not what `layers` join, for `batch` inputs of `size` on grid `start`."""
    for layer, scale in grids(layers, start):
        if isinstance(layer, Join):
            wanted = [(layer.channels[1] - layer.channels[0], *(int(side * scale / start) for side in size))] * batch
            given = [(one.channels, one.height, one.width) for one in features.get(layer.level, ())]
            if given != wanted:
                raise ValueError(
                    f"the decoder needs the encoder's activations at {layer.level}, C H W of each picture {wanted}, "
                    f"and got {given or 'none'}; give it those that encoding the same picture returned"
                )
