"""Initial weights that make the embedded model return its input, so that training starts at bicubic.

Written for the shapes in `embedded.py`: AutoencoderDC with two halvings and one ResBlock a level,
and a UNet whose first width is twice its latent channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..diffusion import OneStep


@torch.no_grad()
def start_as_identity(vae: nn.Module, unet: nn.Module, step: OneStep, pictures: Tensor) -> None:
    """Set weights so that the untrained model returns its input: training starts at bicubic.

    VAE: space-to-depth and its inverse around a PCA of 4 x 4 blocks of `pictures` (B 3 H W).
    UNet: eps = z (1 - sqrt(abar)) / sqrt(1 - abar), through pairs +x, -x, since
    silu(x) - silu(-x) = x. All other branches start at zero.
    """
    blocks = F.pixel_unshuffle(F.pixel_unshuffle(pictures * 2 - 1, 2), 2).movedim(1, -1).reshape(-1, 48)
    latents = unet.config.in_channels
    _, spread, axes = torch.linalg.svd(blocks[torch.randperm(len(blocks))[:60000]], full_matrices=False)
    std = spread[:latents] / min(len(blocks), 60000) ** 0.5
    gain = std.clamp_min(0.02).rsqrt() / 1.4
    _start_encoder(vae.encoder, axes[:latents] * gain[:, None])
    _start_decoder(vae.decoder, axes[:latents].T / gain)
    for name, module in unet.named_modules():
        if name.endswith("conv2"):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.GroupNorm):
            module.weight.fill_(module.eps**0.5)
    pairs = torch.cat([torch.eye(latents), -torch.eye(latents)])
    _center(unet.conv_in, pairs)
    last = unet.up_blocks[-1].resnets[-1].conv_shortcut
    _center(last, torch.cat([torch.zeros(2 * latents, 2 * latents), torch.eye(2 * latents)], 1))
    _center(unet.conv_out, pairs.T * (step.p - 1) / -step.q)


def _center(conv: nn.Conv2d, matrix: Tensor) -> None:
    conv.weight.zero_()
    conv.weight[: matrix.shape[0], : matrix.shape[1], conv.kernel_size[0] // 2, conv.kernel_size[1] // 2] = matrix
    if conv.bias is not None:
        conv.bias.zero_()


def _quiet_blocks(module: nn.Module) -> None:
    for block in module.modules():
        if type(block).__name__ == "ResBlock":
            nn.init.zeros_(block.norm.weight)
            nn.init.zeros_(block.norm.bias)


def _start_encoder(encoder: nn.Module, to_latent: Tensor) -> None:
    """Make the encoder compute `to_latent` (latents x 48) of each 4 x 4 block exactly."""
    _quiet_blocks(encoder)
    _center(encoder.conv_in.conv, torch.eye(3))
    _center(encoder.down_blocks[1][-1].conv, torch.eye(12))
    # The non-parametric shortcuts mix channels; undo that mixture in the last 1 x 1 tap.
    probe = torch.randn(4000, 3, 4, 4)
    hidden = encoder.conv_in(probe)
    for block in encoder.down_blocks:
        hidden = block(hidden)
    blocks = F.pixel_unshuffle(F.pixel_unshuffle(probe, 2), 2).flatten(1)
    unmix = torch.linalg.lstsq(hidden.flatten(1).double(), (blocks @ to_latent.T).double(), driver="gelsd").solution
    _center(encoder.conv_out, unmix.T.float())


def _start_decoder(decoder: nn.Module, to_block: Tensor) -> None:
    """Make the decoder compute `to_block` (48 x latents) exactly, but for a 1 % gain error.

    The last RMSNorm and ReLU become linear: one large constant channel rules the norm, and each
    signal travels as a pair +x, -x.
    """
    _quiet_blocks(decoder)
    constant = 20.0
    latents = to_block.shape[1]
    _center(decoder.conv_in, torch.eye(latents))
    up = decoder.up_blocks[1][0]
    signals = to_block.view(12, 4, latents)  # half-resolution channel, 2 x 2 position
    wanted = torch.zeros(48, 4, 96)
    wanted[:12, :, :latents], wanted[12:24, :, :latents] = signals, -signals
    shortcut = torch.eye(96).repeat_interleave(2, 0)
    _center(up.conv, wanted.view(192, 96) - shortcut)
    up.conv.bias.view(48, 4)[24] = constant
    decoder.norm_out.weight.fill_(constant / 48**0.5)
    decoder.norm_out.bias.zero_()
    _center(decoder.conv_out.conv, torch.cat([torch.eye(12), -torch.eye(12)], 1))
