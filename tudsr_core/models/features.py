"""Frozen networks whose feature maps training looks through: DINOv3, VGG16, and one that needs no weights.

Each takes pictures `B 3 H W` in 0..1 and returns maps, fine to coarse; gradients flow through it to the picture.
Which one is used is always the caller's word: none stands in for another.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import CheckpointError, read_file
from .fill_weights import fill

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for all pretrained ones
BLUR = ((1, 2, 1), (2, 4, 2), (1, 2, 1))
VGG_WIDTHS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
VIT_TAPS = (3, 6, 9)  # of twelve layers: TUDSR's choice for its discriminator
CONVNEXT_STAGES = 3
SCRATCH_WIDTHS = (32, 64, 96)


class Features(nn.Module):
    """What every extractor is: `channels` and `strides` of its maps, and the maps of pictures in 0..1."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def maps(self, pictures: Tensor) -> list[Tensor]:
        """Return the maps of `B 3 H W`, normalised as the network expects it."""
        raise NotImplementedError

    def forward(self, pictures: Tensor) -> list[Tensor]:
        """Return the maps of pictures `B 3 H W` in 0..1."""
        mean, std = (pictures.new_tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
        return self.maps((pictures - mean) / std)


def l2_pool(maps: Tensor, stride: int) -> Tensor:
    """Return sqrt of the blurred squares of `B C H W`: pooling that does not alias (Henaff and Simoncelli 2016)."""
    channels = maps.shape[1]
    kernel = (maps.new_tensor(BLUR) / 16).expand(channels, 1, 3, 3)
    return (F.conv2d(maps.square(), kernel, stride=stride, padding=1, groups=channels) + 1e-12).sqrt()


class Vgg16(Features):
    """relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of VGG16 with L2 pooling between (Ding et al. 2020, DISTS)."""

    channels, strides = (64, 128, 256, 512, 512), (1, 2, 4, 8, 16)

    def __init__(self) -> None:
        super().__init__()
        # Numbered as torchvision's `features`, in which ReLUs and pools count too.
        self.features = nn.ModuleDict()
        place, before = 0, 3
        for widths in VGG_WIDTHS:
            for width in widths:
                self.features[str(place)] = nn.Conv2d(before, width, 3, padding=1)
                place, before = place + 2, width
            place += 1

    def maps(self, pictures: Tensor) -> list[Tensor]:
        found, x, convs = [], pictures, iter(self.features.values())
        for widths in VGG_WIDTHS:
            x = l2_pool(x, 2) if found else x
            for _ in widths:
                x = F.relu(next(convs)(x))
            found.append(x)
        return found


class DinoViT(Features):
    """Patch tokens after the layers `taps` of a DINOv3 vision transformer, each through the final LayerNorm.

    Layers after the last tap are not built. `B width H/16 W/16` each; sides must be multiples of the patch.
    """

    def __init__(self, taps: Sequence[int] = VIT_TAPS, **sizes: int) -> None:
        super().__init__()
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        config = DINOv3ViTConfig(num_hidden_layers=max(taps), num_register_tokens=4, **sizes)
        self.taps, self.patch, self.width = tuple(taps), config.patch_size, config.hidden_size
        self.skip = 1 + config.num_register_tokens  # the class token and the registers stand before the patches
        self.channels, self.strides = (self.width,) * len(taps), (self.patch,) * len(taps)
        self.network = DINOv3ViTModel(config)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        if any(side % self.patch for side in pictures.shape[-2:]):
            raise ValueError(f"sides {tuple(pictures.shape[-2:])} must be multiples of DINOv3's patch of {self.patch}")
        network, found = self.network, []
        tokens, place = network.embeddings(pictures), network.rope_embeddings(pictures)
        # transformers 5 has put the layers one level deeper
        for number, layer in enumerate(getattr(network, "layer", None) or network.model.layer, 1):
            tokens = layer(tokens, position_embeddings=place)
            if number in self.taps:
                rows, columns = (side // self.patch for side in pictures.shape[-2:])
                patches = network.norm(tokens)[:, self.skip :].transpose(1, 2)
                found.append(patches.unflatten(2, (rows, columns)))
        return found


class DinoConvNext(Features):
    """The first three stages of a DINOv3 ConvNeXt, at strides 4, 8, 16.

    With `pooled`, each stage is smoothed by L2 pooling of stride 1 before the next one sees it, which is
    OMGSR's variant for DISTS.
    """

    strides = (4, 8, 16)

    def __init__(self, widths: Sequence[int], depths: Sequence[int], pooled: bool = False) -> None:
        super().__init__()
        from transformers import DINOv3ConvNextConfig, DINOv3ConvNextModel

        config = DINOv3ConvNextConfig(hidden_sizes=list(widths), depths=list(depths))
        self.channels, self.pooled = tuple(widths[:CONVNEXT_STAGES]), pooled
        self.network = DINOv3ConvNextModel(config)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        network, found, x = self.network, [], pictures
        for stage in list(getattr(network, "stages", None) or network.model.stages)[:CONVNEXT_STAGES]:
            x = stage(x)
            x = l2_pool(x, 1) if self.pooled else x
            found.append(x)
        return found


class Scratch(Features):
    """Three strided convolutions with fixed random filters, for machines without pretrained weights.

    Random filters see edges and textures but know nothing of what is shown: enough to try a training out
    and for small networks, not a substitute for DINOv3. The filters follow from `seed` alone.
    """

    channels, strides = SCRATCH_WIDTHS, (2, 4, 8)

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.convs = nn.ModuleList()
        for before, width in zip((3, *SCRATCH_WIDTHS), SCRATCH_WIDTHS, strict=False):
            conv = nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False)
            with torch.no_grad():
                conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator) * (2 / (9 * before)) ** 0.5)
            self.convs.append(conv)

    def maps(self, pictures: Tensor) -> list[Tensor]:
        found, x = [], pictures
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.2)
            found.append(x)
        return found


@dataclass(frozen=True)
class Kind:
    """How an extractor is built, and where its weights come from; "" for one that has none."""

    build: Callable[[], Features]
    weights: str = ""


def _convnext(depths: tuple[int, ...], *widths: int, **options: bool) -> Callable[[], Features]:
    return partial(DinoConvNext, widths, depths, **options)


_META = "model.safetensors of facebook/dinov3-{}-pretrain-lvd1689m (DINOv3 licence)"
_CONVNEXTS = {
    "tiny": ((3, 3, 9, 3), 96, 192, 384, 768),
    "small": ((3, 3, 27, 3), 96, 192, 384, 768),
    "base": ((3, 3, 27, 3), 128, 256, 512, 1024),
    "large": ((3, 3, 27, 3), 192, 384, 768, 1536),
}
EXTRACTORS: dict[str, Kind] = {
    "dinov3-vit-b16": Kind(
        partial(DinoViT, hidden_size=768, intermediate_size=3072, num_attention_heads=12), _META.format("vitb16")
    ),
    **{
        f"dinov3-convnext-{size}": Kind(_convnext(*shape), _META.format(f"convnext-{size}"))
        for size, shape in _CONVNEXTS.items()
    },
    **{
        f"dinov3-convnext-{size}-pooled": Kind(_convnext(*shape, pooled=True), _META.format(f"convnext-{size}"))
        for size, shape in _CONVNEXTS.items()
    },
    "vgg16": Kind(Vgg16, "torchvision's vgg16-397923af.pth"),
    "scratch": Kind(Scratch),
}


def load_features(name: str, weights: Path | None = None) -> Features:
    """Return the extractor `name` of EXTRACTORS, frozen, with the weights of a file.

    Raises CheckpointError if the name is not known, if weights are missing or do not fit, and if they are
    given where there are none.
    """
    if name not in EXTRACTORS:
        raise CheckpointError(f"features {name!r} are not known; use one of: {', '.join(EXTRACTORS)}")
    kind = EXTRACTORS[name]
    if bool(kind.weights) != bool(weights):
        wants = f"need {kind.weights}; give its path" if kind.weights else "have no weights; leave the path empty"
        raise CheckpointError(f"features {name} {wants}")
    features = kind.build()
    if weights is None:
        return features.eval().requires_grad_(False)
    return _load(features, weights, name)


def _load(features: Features, path: Path, name: str) -> Features:
    """Fill `features`; what the file has beyond it (later layers, a classifier, a mask token) is left out."""
    own = {_plain(key): key for key in features.state_dict()}
    tensors = {own[_plain(key)]: value for key, value in read_file(path).tensors.items() if _plain(key) in own}
    for key, value in features.state_dict().items():
        if key.endswith("mask_token"):  # of pretraining alone
            tensors[key] = torch.zeros_like(value)
    return fill(features, tensors, path, f"the features {name}", "get the file again, or give the kind that it is of")


def _plain(key: str) -> str:
    """Return a key without the levels that transformers has added between versions."""
    return re.sub(r"^(network\.)?(model\.)*", "", key)
