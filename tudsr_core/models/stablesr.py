"""StableSR's two trained networks in plain torch, under their published key names: 376 tensors, 105.5 M parameters.

A time-aware encoder looks at the latent of the low-resolution picture, and spatial feature transforms (SFT) let what
it sees steer every residual block of Stable Diffusion 2.1's UNet (Wang et al. 2024, "Exploiting Diffusion Prior for
Real-World Image Super-Resolution", section 3.1). The UNet is not touched: `StableSR.steering` hooks its blocks for as
long as one call takes, whoever built it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..weights import TELLTALE, CheckpointError, prediction_of, stream
from .fill_weights import fill
from .unet_blocks import timestep_waves

UNET, ENCODER, SFT = "model.diffusion_model", "structcond_stage_model", "spade"
HEADS, GROUPS = 4, 32
LEVELS = 4
# The UNet's residual blocks in the order they run, and the level of resolution on which each works.
PLACES = {
    **{f"input_blocks.{3 * level + block}.0": level for level in range(LEVELS) for block in (1, 2)},
    **{f"middle_block.{block}": LEVELS - 1 for block in (0, 2)},
    **{f"output_blocks.{index}.0": LEVELS - 1 - index // 3 for index in range(3 * LEVELS)},
}


class GroupNorm(nn.GroupNorm):
    """Group normalisation, computed at least in float32."""

    def __init__(self, channels: int) -> None:
        super().__init__(GROUPS, channels, 1e-5)

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return F.group_norm(x.to(wide), GROUPS, self.weight.to(wide), self.bias.to(wide), self.eps).to(x.dtype)


class ResBlock(nn.Module):
    """skip(x) + out_layers(in_layers(x) + emb_layers(time))."""

    def __init__(self, channels: int, out_channels: int, time_width: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), _conv(channels, out_channels))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_width, out_channels))
        # An identity where training has dropout, so that keys keep their numbers.
        last = _conv(out_channels, out_channels)
        self.out_layers = nn.Sequential(GroupNorm(out_channels), nn.SiLU(), nn.Identity(), last)
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        hidden = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(hidden)


class AttentionBlock(nn.Module):
    """x + proj_out(softmax(q k^T / sqrt(d)) v) over all positions; q, k and v of one head lie together."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.qkv(self.norm(x.flatten(2)))
        # Contiguous, without which torch takes the slow way with all scores in memory.
        q, k, v = tokens.unflatten(1, (HEADS, 3, -1)).transpose(-1, -2).contiguous().unbind(2)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2).flatten(1, 2)
        return x + self.proj_out(mixed).reshape(x.shape)


class Halving(nn.Module):
    """A 3 x 3 convolution of stride 2: sides shrink to their half, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.ModuleList):
    """Layers one after the other, those that take the time embedding with it."""

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, time) if isinstance(layer, ResBlock) else layer(x)
        return x


class TimeAwareEncoder(nn.Module):
    """The first half of a small UNet, over the latent of the low-resolution picture and the timestep.

    `widths`: channels of the four levels; `width`: of the features that come out.
    """

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.waves, time = widths[0], 4 * widths[0]
        self.time_embed = nn.Sequential(nn.Linear(self.waves, time), nn.SiLU(), nn.Linear(time, time))
        self.input_blocks = nn.ModuleList([Block([_conv(4, widths[0])])])
        before = widths[0]
        for level, channels in enumerate(widths):
            for _ in range(2):
                attention = [AttentionBlock(channels)] if level < LEVELS - 1 else []
                self.input_blocks.append(Block([ResBlock(before, channels, time), *attention]))
                before = channels
            if level < LEVELS - 1:
                self.input_blocks.append(Block([Halving(channels)]))
        middle = ResBlock(before, before, time), AttentionBlock(before), ResBlock(before, before, time)
        self.middle_block = Block(middle)
        self.fea_tran = nn.ModuleList(ResBlock(channels, width, time) for channels in widths)

    def forward(self, z: Tensor, t: Tensor) -> list[Tensor]:
        """Return features `B width h w` of four levels, each half the one before (rounded up).

        `z`: scaled latents `B 4 h w`; `t`: their timesteps `B`, 0..999.
        """
        time, seen = self.time_embed(timestep_waves(t, self.waves, z)), []
        for block in self.input_blocks:
            if isinstance(block[0], Halving):
                seen.append(z)
            z = block(z, time)
        seen.append(self.middle_block(z, time))
        return [transform(x, time) for transform, x in zip(self.fea_tran, seen, strict=True)]


class FeatureTransform(nn.Module):
    """SFT: norm(x) (1 + gamma(s)) + beta(s), gamma and beta convolved from the features s (eq. 2)."""

    def __init__(self, channels: int, features: int, hidden: int) -> None:
        super().__init__()
        self.param_free_norm = GroupNorm(channels)  # its published name; it has parameters
        self.mlp_shared = nn.Sequential(_conv(features, hidden), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = _conv(hidden, channels), _conv(hidden, channels)

    def forward(self, x: Tensor, features: Tensor, rows: Tensor) -> Tensor:
        """Return `x` steered: its row i by row `rows[i]` of `features`, of the same height and width."""
        if features.shape[-2:] != x.shape[-2:]:
            raise ValueError(
                f"StableSR's features are {tuple(features.shape[-2:])} where the UNet works on {tuple(x.shape[-2:])}; "
                "the low-resolution latent must have the size of the one being sampled"
            )
        shared, wide = self.mlp_shared(features), _wide(x)
        gamma, beta = (layer(shared).to(wide)[rows] for layer in (self.mlp_gamma, self.mlp_beta))
        return torch.addcmul(beta, self.param_free_norm(x.to(wide)), gamma.add_(1)).to(x.dtype)


class StableSR(nn.Module):
    """The encoder and the 22 transforms of one file; a state dict of it has the published keys.

    `prediction`: what the UNet that it was trained with predicts, "epsilon", "v_prediction" or "" if
    the file does not say.
    """

    def __init__(self, widths: Sequence[int], width: int, hidden: int, channels: Mapping[str, int]) -> None:
        super().__init__()
        self.prediction = ""
        self.add_module(ENCODER, TimeAwareEncoder(widths, width))
        for place, count in channels.items():
            _add(self, f"{UNET}.{place}.{SFT}", FeatureTransform(count, width, hidden))
        self._last: tuple[Tensor, Tensor, list[Tensor]] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return next(self.parameters()).dtype

    def transform(self, place: str) -> FeatureTransform:
        """Return the transform at one of PLACES."""
        return self.get_submodule(f"{UNET}.{place}.{SFT}")

    def features(self, z: Tensor, t: Tensor) -> list[Tensor]:
        """Return the encoder's features for latents `B 4 h w` at timesteps `B`.

        The last ones are kept: with guidance, or more than one evaluation of a step, the same are asked for again.
        """
        if self._last and all(map(_same, self._last[:2], (z, t))):
            return self._last[2]
        first = next(self.parameters())
        made = self.get_submodule(ENCODER)(z.to(first.device, first.dtype), t.to(first.device))
        self._last = z, t, made
        return made

    def forget(self) -> None:
        """Let the last features go."""
        self._last = None

    @contextmanager
    def steering(self, blocks: Mapping[str, nn.Module], z: Tensor, t: Tensor) -> Iterator[None]:
        """Steer a UNet's calls inside this context by the low-resolution latents `z` at the timesteps `t`.

        `blocks`: for each of PLACES the module whose output, before the block's own residual is added, is steered.
        `z` and `t` have one row for each of the UNet's; rows that are equal are encoded once.
        """
        kept, rows = distinct_rows(z, t)
        features = self.features(z[kept], t[kept])
        rows = torch.tensor(rows, device=features[0].device)

        def steer(place: str, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
            return self.transform(place)(output, features[PLACES[place]].to(output.device), rows)

        with ExitStack() as hooks:
            for place, block in blocks.items():
                handle = block.register_forward_hook(partial(steer, place))
                hooks.callback(handle.remove)
            yield

    def misfit(self, blocks: Mapping[str, nn.Module], prediction: str) -> str:
        """Say how a UNet differs from the one this was trained with, "" if it does not.

        `blocks`: its convolutions by place; `prediction`: "epsilon" or "v_prediction".
        """
        if self.prediction not in ("", prediction):
            return f"it predicts {prediction}, and this was trained with {self.prediction}"
        if len(blocks) != len(PLACES):
            return f"it has {len(blocks)} residual blocks, not {len(PLACES)}"
        for place in PLACES:
            wanted = self.transform(place).param_free_norm.num_channels
            if blocks[place].out_channels != wanted:
                return f"{place} has {blocks[place].out_channels} channels, not {wanted}"
        return ""


def distinct_rows(z: Tensor, t: Tensor) -> tuple[list[int], list[int]]:
    """Return the rows of `z` and `t` that equal none before, and for every row which of those it is."""
    kept: list[int] = []
    rows = []
    for row in range(len(z)):
        same = (at for at, known in enumerate(kept) if t[known] == t[row] and torch.equal(z[known], z[row]))
        at = next(same, len(kept))
        if at == len(kept):
            kept.append(row)
        rows.append(at)
    return kept, rows


def load_stablesr(path: Path) -> StableSR:
    """Return the networks of any published StableSR file, the whole checkpoint or the 376 tensors alone.

    Raises CheckpointError for a file without them, with other shapes, or damaged.
    """
    path = Path(path)
    prediction, tensors = "", {}
    for key, value in stream(path, (f"{UNET}.", f"{ENCODER}.")):
        if key.startswith(f"{ENCODER}.") or f".{SFT}." in key:
            tensors[key] = value.clone()
        elif key == TELLTALE:
            prediction = prediction_of(value)
    if not tensors:
        raise CheckpointError(
            f"{path} has none of StableSR's tensors ({ENCODER}.*, *.{SFT}.*); get stablesr_000117.ckpt or the file "
            "made for webui (webui_768v_139.ckpt)"
        )
    network = fill(_build(path, tensors), tensors, path, "StableSR", "download it again")
    network.prediction = prediction or ("v_prediction" if "768v" in path.name else "")
    return network


def _build(path: Path, tensors: Mapping[str, Tensor]) -> StableSR:
    """Return the network on the meta device, its sizes read from the tensors."""

    def rows(key: str) -> int:
        return tensors[key].shape[0]

    try:
        widths = [rows(f"{ENCODER}.input_blocks.{3 * level + 1}.0.in_layers.2.bias") for level in range(LEVELS)]
        width = rows(f"{ENCODER}.fea_tran.0.out_layers.3.bias")
        hidden = rows(f"{UNET}.middle_block.0.{SFT}.mlp_shared.0.bias")
        channels = {place: rows(f"{UNET}.{place}.{SFT}.mlp_gamma.bias") for place in PLACES}
        with torch.device("meta"):
            return StableSR(widths, width, hidden, channels)
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a whole StableSR file ({error}): {len(tensors)} of 376 tensors; download it again"
        ) from error


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device and torch.equal(a, b)


def _add(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` at a dotted path below `root`."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(name, module)
