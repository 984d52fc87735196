"""StableSR written out from its published tensors, a line for a line of the paper; and random files of any size.

Knows nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL = dict(widths=(32, 32, 64, 64), width=32, hidden=16)
FULL = dict(widths=(256, 256, 512, 512), width=256, hidden=128)
UNET_CHANNELS = {"small": (32, 64, 64, 64), "stand-in": (32, 64, 128, 128), "full": (320, 640, 1280, 1280)}
PLACES = [
    *(f"input_blocks.{index}.0" for index in (1, 2, 4, 5, 7, 8, 10, 11)),
    *("middle_block.0", "middle_block.2"),
    *(f"output_blocks.{index}.0" for index in range(12)),
]
LEVEL_OF = [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 3, 2, 2, 2, 1, 1, 1, 0, 0, 0]

Tensors = Mapping[str, Tensor]


def channels_of(levels: tuple[int, ...]) -> dict[str, int]:
    """Return the channels of a UNet's 22 residual blocks, as SD2.1 has them for these `levels`."""
    return {place: levels[level] for place, level in zip(PLACES, LEVEL_OF, strict=True)}


def shapes_of(widths: tuple[int, ...], width: int, hidden: int, unet: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a file."""
    made, time = {}, 4 * widths[0]

    def layer(key: str, *shape: int) -> None:
        made.update({f"{key}.weight": shape, f"{key}.bias": shape[:1]})

    def res(key: str, before: int, after: int) -> None:
        layer(f"{key}.in_layers.0", before)
        layer(f"{key}.in_layers.2", after, before, 3, 3)
        layer(f"{key}.emb_layers.1", after, time)
        layer(f"{key}.out_layers.0", after)
        layer(f"{key}.out_layers.3", after, after, 3, 3)
        if before != after:
            layer(f"{key}.skip_connection", after, before, 1, 1)

    def attend(key: str, channels: int) -> None:
        layer(f"{key}.norm", channels)
        layer(f"{key}.qkv", 3 * channels, channels, 1)
        layer(f"{key}.proj_out", channels, channels, 1)

    encoder = "structcond_stage_model"
    layer(f"{encoder}.time_embed.0", time, widths[0])
    layer(f"{encoder}.time_embed.2", time, time)
    layer(f"{encoder}.input_blocks.0.0", widths[0], 4, 3, 3)
    before = widths[0]
    for level, channels in enumerate(widths):
        for index in (3 * level + 1, 3 * level + 2):
            res(f"{encoder}.input_blocks.{index}.0", before, channels)
            before = channels
            if level < 3:
                attend(f"{encoder}.input_blocks.{index}.1", channels)
        if level < 3:
            layer(f"{encoder}.input_blocks.{3 * level + 3}.0.op", channels, channels, 3, 3)
        res(f"{encoder}.fea_tran.{level}", channels, width)
    for index in (0, 2):
        res(f"{encoder}.middle_block.{index}", before, before)
    attend(f"{encoder}.middle_block.1", before)
    for place, channels in channels_of(unet).items():
        key = f"model.diffusion_model.{place}.spade"
        layer(f"{key}.param_free_norm", channels)
        layer(f"{key}.mlp_shared.0", hidden, width, 3, 3)
        layer(f"{key}.mlp_gamma", channels, hidden, 3, 3)
        layer(f"{key}.mlp_beta", channels, hidden, 3, 3)
    return made


def random_tensors(unet: str = "small", seed: int = 0, **sizes) -> dict[str, Tensor]:
    """Return the 376 tensors of a file, none at its default and none zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=generator) * 0.5 * math.prod(shape[1:]) ** -0.5
        + (len(shape) == 1 and key.endswith("weight"))
        for key, shape in shapes_of(**(SMALL | sizes), unet=UNET_CHANNELS[unet]).items()
    }


def norm(tensors: Tensors, key: str, x: Tensor) -> Tensor:
    batch, channels = x.shape[:2]
    grouped = x.reshape(batch, 32, -1)
    mean, variance = grouped.mean(-1, keepdim=True), grouped.var(-1, unbiased=False, keepdim=True)
    plain = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    shape = (1, channels) + (1,) * (x.ndim - 2)
    return plain * tensors[f"{key}.weight"].reshape(shape) + tensors[f"{key}.bias"].reshape(shape)


def conv(tensors: Tensors, key: str, x: Tensor, stride: int = 1) -> Tensor:
    weight = tensors[f"{key}.weight"]
    return F.conv2d(x, weight, tensors[f"{key}.bias"], stride=stride, padding=weight.shape[-1] // 2)


def linear(tensors: Tensors, key: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{key}.weight"].T + tensors[f"{key}.bias"]


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def res_block(tensors: Tensors, key: str, x: Tensor, time: Tensor) -> Tensor:
    h = conv(tensors, f"{key}.in_layers.2", silu(norm(tensors, f"{key}.in_layers.0", x)))
    h = h + linear(tensors, f"{key}.emb_layers.1", silu(time))[:, :, None, None]
    h = conv(tensors, f"{key}.out_layers.3", silu(norm(tensors, f"{key}.out_layers.0", h)))
    skip = f"{key}.skip_connection"
    return (conv(tensors, skip, x) if f"{skip}.weight" in tensors else x) + h


def attention(tensors: Tensors, key: str, x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    flat = x.reshape(batch, channels, -1)
    qkv = F.conv1d(norm(tensors, f"{key}.norm", flat), tensors[f"{key}.qkv.weight"], tensors[f"{key}.qkv.bias"])
    q, k, v = qkv.reshape(batch * 4, 3 * channels // 4, -1).split(channels // 4, 1)
    scores = torch.einsum("bct,bcs->bts", q, k) / (channels // 4) ** 0.5
    mixed = torch.einsum("bts,bcs->bct", scores.softmax(-1), v).reshape(batch, channels, -1)
    out = F.conv1d(mixed, tensors[f"{key}.proj_out.weight"], tensors[f"{key}.proj_out.bias"])
    return x + out.reshape(x.shape)


def encode(tensors: Tensors, z: Tensor, t: int) -> list[Tensor]:
    """Return the encoder's four features of `z` at timestep t."""
    own = {key.removeprefix("structcond_stage_model."): x.to(z) for key, x in tensors.items() if "structcond" in key}
    size = own["time_embed.0.weight"].shape[1]
    frequencies = [math.exp(-math.log(10000) * i / (size // 2)) for i in range(size // 2)]
    waves = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
    time = linear(own, "time_embed.0", torch.tensor([waves]).to(z).expand(len(z), -1))
    time = linear(own, "time_embed.2", silu(time))
    h, taps = conv(own, "input_blocks.0.0", z), []
    for index in range(1, 12):
        if index in (3, 6, 9):
            taps.append(h)
            h = conv(own, f"input_blocks.{index}.0.op", h, stride=2)
            continue
        h = res_block(own, f"input_blocks.{index}.0", h, time)
        if index < 9:
            h = attention(own, f"input_blocks.{index}.1", h)
    h = res_block(own, "middle_block.0", h, time)
    h = res_block(own, "middle_block.2", attention(own, "middle_block.1", h), time)
    return [res_block(own, f"fea_tran.{level}", x, time) for level, x in enumerate([*taps, h])]


def transform(tensors: Tensors, place: str, h: Tensor, s: Tensor) -> Tensor:
    """Return SFT of `h` by the features `s`."""
    prefix = f"model.diffusion_model.{place}.spade."
    own = {key.removeprefix(prefix): x.to(h) for key, x in tensors.items() if key.startswith(prefix)}
    shared = conv(own, "mlp_shared.0", s).clamp(min=0)
    plain = norm(own, "param_free_norm", h)
    return plain * (1 + conv(own, "mlp_gamma", shared)) + conv(own, "mlp_beta", shared)


def steer_diffusers(unet: nn.Module, tensors: Tensors, z: Tensor, t: int) -> None:
    """Replace the forward of diffusers' residual blocks by one with SFT for the latents `z` at t, row by row."""
    features = encode(tensors, z, t)
    blocks = [block for part in (*unet.down_blocks, unet.mid_block, *unet.up_blocks) for block in part.resnets]
    for block, place, level in zip(blocks, PLACES, LEVEL_OF, strict=True):

        def forward(x, temb, block=block, place=place, level=level):
            h = block.conv1(silu(block.norm1(x))) + block.time_emb_proj(silu(temb))[:, :, None, None]
            h = block.conv2(silu(block.norm2(h)))
            return (x if block.conv_shortcut is None else block.conv_shortcut(x)) + transform(
                tensors, place, h, features[level]
            )

        block.forward = forward
