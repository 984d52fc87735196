"""StableSR over diffusers' Stable Diffusion 2.1: its UNet steered by hooks, its decoder fused with the encoder."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models import PLACES, StableSR, load_stablesr, load_wrapping
from ..tiling import NetworkFacts, Tile
from ..vae import wrapping
from ..weights import CheckpointError
from .local import Backbone, LocalNetworks, read_backbone


class StableSRNetworks(LocalNetworks):
    """Stable Diffusion whose UNet sees the latent of the low-resolution picture, `seeing` one at a time."""

    def __init__(self, backbone: Backbone, network: StableSR) -> None:
        super().__init__(backbone)
        self.network = nn.Module.to(network, backbone.device, backbone.dtype)
        self.blocks = diffusers_blocks(backbone.unet)
        self.picture: Tensor | None = None

    @property
    def facts(self) -> NetworkFacts:
        """Geometry and memory of the backbone and of StableSR's own networks."""
        own = sum(p.numel() * p.element_size() for p in self.network.parameters())
        facts = super().facts
        return replace(facts, weight_bytes=facts.weight_bytes + own)

    def seeing(self, z: Tensor) -> StableSRNetworks:
        """Return these networks for the picture of latents `z`, `1 C h w`."""
        view = copy.copy(self)
        view.picture = z
        return view

    def _predict(self, z: Tensor, t: int, text: Tensor, tiles: Sequence[Tile]) -> Tensor:
        seen = torch.cat([tile.cut(self.picture) for tile in tiles])
        with self.network.steering(self.blocks, seen, torch.full((len(seen),), t)):
            return super()._predict(z, t, text, tiles)


def diffusers_blocks(unet: nn.Module) -> dict[str, nn.Module]:
    """Return what StableSR steers in diffusers' UNet: the last convolution of every residual block, by its place."""
    parts = *unet.down_blocks, unet.mid_block, *unet.up_blocks
    found = [resnet.conv2 for part in parts if part is not None for resnet in part.resnets]
    return dict(zip(PLACES, found, strict=False))


def load_stablesr_networks(
    base: Path,
    stablesr: Path,
    cfw: Path | None = None,
    fidelity: float = 0.5,
    device: str = "auto",
    dtype: str = "fp32",
    tokenizer: Path | None = None,
) -> StableSRNetworks:
    """Return Stable Diffusion 2.1 (512 or 768) with StableSR's networks, and with CFW in the decoder.

    `fidelity`: CFW's w, 0 (none of the picture's own structure) to 1; without `cfw` it is not used. Raises
    CheckpointError for files that do not fit each other, ValueError for another `fidelity`.
    """
    if not 0 <= fidelity <= 1:
        raise ValueError(f"fidelity {fidelity:g} must be from 0 (off) to 1; 0.5 is usual")
    network = load_stablesr(stablesr)
    backbone = read_backbone(base, device, dtype, tokenizer)
    if backbone.unet.config.cross_attention_dim == 768:
        raise CheckpointError(f"{base} is Stable Diffusion 1.x; StableSR was trained with 2.1, use SD2.1-base")
    if reason := network.misfit(diffusers_blocks(backbone.unet), backbone.prediction):
        raise CheckpointError(
            f"{stablesr} does not fit the UNet of {base}: {reason}; use SD2.1-base, or SD2.1 for 768v"
        )
    if cfw is not None and fidelity:
        fuse = nn.Module.to(load_wrapping(cfw), backbone.device, backbone.dtype)
        backbone.fusion = wrapping(fuse, fidelity)
    return StableSRNetworks(backbone, network)
