"""The Recognize Anything Model as a tagger: Swin backbone and a label decoder after Query2Label.

The network and its forward pass only; weights are read in `dape.py`. The captioning parts of the
published model are not built.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .swin import SwinConfig, SwinTransformer

LABELS = 4585
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class RamConfig:
    """Sizes of the tagger; the defaults are `ram_swin_large_14m` (RAM, Zhang et al. 2023)."""

    swin: SwinConfig = field(default_factory=SwinConfig)
    labels: int = LABELS
    token_width: int = 512
    width: int = 768
    heads: int = 4
    layers: int = 2


class HeadLayer(nn.Module):
    """A decoder layer without self-attention: labels look at image tokens, then an MLP; post-norm."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        width, tokens = config.width, config.token_width
        self.heads = config.heads
        self.query = nn.Linear(width, width)
        self.key, self.value = nn.Linear(tokens, width), nn.Linear(tokens, width)
        self.dense = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-12)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-12)

    def forward(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """Labels `1 or B, n, width` and tokens `B m token_width` to `B n width`."""
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(labels), self.key(tokens), self.value(tokens))
        )
        mixed = F.scaled_dot_product_attention(q.expand(len(tokens), -1, -1, -1), k, v)
        labels = self.norm1(labels + self.dense(mixed.transpose(1, 2).flatten(-2)))
        return self.norm2(labels + self.fc2(F.gelu(self.fc1(labels))))


class RamTagger(nn.Module):
    """Image to one logit per label, and to the image tokens that SeeSR's cross-attention takes."""

    def __init__(self, config: RamConfig) -> None:
        super().__init__()
        self.config = config
        self.visual_encoder = SwinTransformer(config.swin)
        self.image_proj = nn.Linear(config.swin.features, config.token_width)
        self.label_embed = nn.Parameter(torch.zeros(config.labels, config.token_width))
        self.wordvec_proj = nn.Linear(config.token_width, config.width)
        self.head = nn.ModuleList(HeadLayer(config) for _ in range(config.layers))
        self.fc = nn.Linear(config.width, 1)

    def tokens(self, x: Tensor) -> Tensor:
        """`B 3 image_px image_px`, as `prepare` returns it, to `B 1+m token_width`; token 0 is the mean."""
        features = self.visual_encoder(x)
        return self.image_proj(torch.cat([features.mean(1, keepdim=True), features], 1))

    def forward(self, x: Tensor) -> Tensor:
        """`B 3 image_px image_px`, as `prepare` returns it, to logits `B labels`."""
        tokens = self.tokens(x)
        labels = F.relu(self.wordvec_proj(self.label_embed))[None]
        for layer in self.head:
            labels = layer(labels, tokens)
        return self.fc(labels).squeeze(-1)


def prepare(images: Tensor, side: int) -> Tensor:
    """Resize `B 3 H W` in 0..1 to `side x side` (bilinear, antialiased) and normalise; float32, on the CPU."""
    small = F.interpolate(images.float().cpu(), size=(side, side), mode="bilinear", antialias=True, align_corners=False)
    return (small - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
