"""InvSR's noise predictor, built from diffusers' blocks under its published key names.

Only the network; when it is called and what becomes of the noise is the pipeline's business.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..tensor_files import CheckpointError, some

HEAD_CHANNELS, EPS = 64, 1e-6


class NoisePredictor(nn.Module):
    """Predicts the noise to start from, out of the small picture (InvSR).

    An encoder of two attention blocks with time embedding, one downsampling by 2 between them:
    pixels `B 3 2h 2w` give mean and log-variance `B 8 h w` of the noise for latents `h w`.
    """

    def __init__(
        self, widths: tuple[int, int] = (256, 512), layers: int = 3, temb: int = 512, groups: int = 32
    ) -> None:
        super().__init__()
        self.encoder = _TimeAwareEncoder(widths, layers, temb, groups)

    def forward(self, pixels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, float32, for pixels in 0..1."""
        first = self.encoder.conv_in.weight
        moments = self.encoder((pixels * 2 - 1).to(first.device, first.dtype), t).float()
        mean, log_variance = moments.chunk(2, 1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()


class _TimeAwareEncoder(nn.Module):
    def __init__(self, widths: tuple[int, int], layers: int, temb: int, groups: int) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, UNetMidBlock2D

        super().__init__()
        shared = dict(
            temb_channels=temb,
            resnet_eps=EPS,
            resnet_act_fn="silu",
            resnet_groups=groups,
            attention_head_dim=HEAD_CHANNELS,
        )
        steps = max(128, widths[0])
        self.time_proj = Timesteps(steps, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(steps, temb)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            AttnDownBlock2D(
                in_channels=before,
                out_channels=width,
                num_layers=layers,
                downsample_padding=0,
                downsample_type="conv" if width is not widths[-1] else None,
                **shared,
            )
            for before, width in zip((widths[0], *widths), widths, strict=False)
        )
        self.mid_block = UNetMidBlock2D(in_channels=widths[-1], **shared)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=EPS)
        self.conv_out = nn.Conv2d(widths[-1], 8, 3, padding=1)

    def forward(self, x: Tensor, t: int) -> Tensor:
        steps = self.time_proj(torch.full((len(x),), float(t), device=x.device))
        emb = self.time_embedding(steps.to(x.dtype))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x, emb)
        x = self.mid_block(x, emb)
        return self.conv_out(nn.functional.silu(self.conv_norm_out(x)))


def build_predictor(tensors: dict[str, Tensor], source: str | Path) -> NoisePredictor:
    """Return the network of a state dict, its widths read from the tensors.

    Raises CheckpointError that names `source` and lists what does not fit.
    """
    try:
        widths = tuple(tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in (0, 1))
        layers = sum(
            1 for key in tensors if key.startswith("encoder.down_blocks.0.resnets.") and key.endswith("conv1.bias")
        )
        temb = tensors["encoder.time_embedding.linear_1.bias"].shape[0]
        with torch.device("meta"):
            network = NoisePredictor(widths, layers, temb)
    except (KeyError, IndexError, ValueError) as error:
        raise CheckpointError(f"{source} is not a whole InvSR noise predictor ({error}); download it again") from error
    wanted = network.state_dict()
    wrong = sorted(key for key in wanted.keys() ^ tensors.keys()) or sorted(
        key for key in wanted if wanted[key].shape != tensors[key].shape
    )
    if wrong:
        raise CheckpointError(f"{source} does not fit InvSR's noise predictor at: {some(wrong)}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
