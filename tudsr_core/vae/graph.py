"""A Stable Diffusion autoencoder's encoder or decoder as one flat list of layers, whoever built its modules.

Reads the module trees of diffusers (`AutoencoderKL`) and of ComfyUI (`AutoencoderKL`,
`AutoencodingEngine`). Modules are only named here, never copied: weights, patches and offloading
stay theirs. Running the layers is `stream`'s work. A tree that differs in anything that would
change the result raises `UnknownTree`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from torch import Tensor, nn


class UnknownTree(ValueError):
    """The module tree is not a Stable Diffusion encoder or decoder as known here; the message says where."""


@dataclass(frozen=True)
class Conv:
    """y = module(silu(norm(x))), and the two ends of a residual block.

    `resample`: "up" doubles (nearest) before the convolution, "down" halves with a zero row below
    and a zero column right of the true border; both are inside `module`. `skip`: "open" puts x
    (through `shortcut`, a 1 x 1 convolution, if there is one) aside, "close" adds it and divides by
    `divide`. `level`: the name of the level whose blocks end here (see `read_layers`), "" elsewhere.
    """

    module: nn.Module
    norm: nn.Module | None = None
    resample: Literal["", "up", "down"] = ""
    skip: Literal["", "open", "close"] = ""
    shortcut: nn.Module | None = None
    divide: float = 1.0
    level: str = ""

    @property
    def halo(self) -> int:
        """Real neighbours that the convolution needs on each side, on its input's grid."""
        return _kernel(self.module) // 2

    @property
    def channels(self) -> tuple[int, int]:
        """Channels in and out."""
        base = _base(self.module)
        return base.in_channels, base.out_channels


@dataclass(frozen=True)
class Attention:
    """y = (x + out(softmax(q k^T / sqrt(d)) v)) / divide over all positions, q, k, v of norm(x).

    `flat`: the projections take `B N C` (linear layers) instead of `B C H W` (1 x 1 convolutions).
    """

    norm: nn.Module
    q: nn.Module
    k: nn.Module
    v: nn.Module
    out: nn.Module
    heads: int
    flat: bool
    divide: float = 1.0
    level: str = ""

    @property
    def channels(self) -> tuple[int, int]:
        """Channels in and out."""
        return self.norm.num_channels, self.norm.num_channels


@dataclass(frozen=True)
class Local(Conv):
    """y = module(x) for any module of stride 1 that looks `radius` pixels far and sees zeros beyond the picture.

    No norm and no attention inside: those are layers of their own. `width`: channels in and out. `held`:
    channels of its input's size that it needs memory for at once, input and output included.
    """

    radius: int = 0
    width: tuple[int, int] = (0, 0)
    held: int = 0

    @property
    def halo(self) -> int:
        """Real neighbours that the module needs on each side."""
        return self.radius

    @property
    def channels(self) -> tuple[int, int]:
        """Channels in and out."""
        return self.width


@dataclass(frozen=True)
class Join:
    """y = cat([features, x], 1), the encoder's activations at `level` and the decoder's; x is put aside for `Add`."""

    level: str
    channels: tuple[int, int]


@dataclass(frozen=True)
class Add:
    """y = what `Join` put aside + weight * x."""

    weight: float
    channels: tuple[int, int]


Layer = Conv | Attention | Join | Add
Side = Literal["encoder", "decoder"]


def read_layers(vae: nn.Module, side: Side) -> list[Layer]:
    """Return the layers of `vae.encoder` with its quant_conv, or of `vae.decoder` with its post_quant_conv.

    The encoder's result are moments (mean and log variance). On both sides the layer before a level
    changes size carries the level's name: "level 0" is the picture's size, "level 1" half of it, and
    so on. Raises UnknownTree.
    """
    tree = getattr(vae, side, None)
    if not isinstance(tree, nn.Module):
        raise UnknownTree(f"{type(vae).__name__} has no {side}")
    try:
        layers = list(_read_encoder(tree) if side == "encoder" else _read_decoder(tree))
    except AttributeError as absent:
        raise UnknownTree(str(absent)) from absent
    name = "quant_conv" if side == "encoder" else "post_quant_conv"
    extra = getattr(vae, name, None)
    if extra is None:
        return layers
    pointwise = Conv(_conv(extra, 1))
    return [*layers, pointwise] if side == "encoder" else [pointwise, *layers]


def run_untiled(vae: nn.Module, side: Side, x: Tensor) -> Tensor:
    """Return what the modules themselves give for x `B C H W`: the truth that the layers must equal."""
    if side == "encoder":
        moments = vae.encoder(x)
        quant = getattr(vae, "quant_conv", None)
        return moments if quant is None else quant(moments)
    post = getattr(vae, "post_quant_conv", None)
    return vae.decoder(x if post is None else post(x))


def grids(layers: Iterable[Layer], start: Fraction) -> Iterator[tuple[Layer, Fraction]]:
    """Yield each layer with the scale of its output's grid; `start` is that of the input."""
    factor = {"": Fraction(1), "up": Fraction(2), "down": Fraction(1, 2)}
    for layer in layers:
        start *= factor[getattr(layer, "resample", "")]
        yield layer, start


def _read_encoder(tree: nn.Module) -> Iterator[Layer]:
    yield Conv(_conv(tree.conv_in, 3))
    if hasattr(tree, "down_blocks"):
        _expect(tree, "conv_in down_blocks mid_block conv_norm_out conv_act conv_out")
        levels = [_level(block, "downsamplers") for block in tree.down_blocks]
    else:
        _expect(tree, "conv_in down mid norm_out conv_out")
        levels = [_level_ldm(level, "downsample") for level in tree.down]
    yield from _read_levels(levels, "down")
    yield from _read_middle(tree)
    yield _read_end(tree)


def _read_decoder(tree: nn.Module) -> Iterator[Layer]:
    yield Conv(_conv(tree.conv_in, 3))
    yield from _read_middle(tree)
    if hasattr(tree, "up_blocks"):
        _expect(tree, "conv_in up_blocks mid_block conv_norm_out conv_act conv_out")
        levels = [_level(block, "upsamplers") for block in tree.up_blocks]
    else:
        _expect(tree, "conv_in up mid norm_out conv_out")
        if getattr(tree, "give_pre_end", False) or getattr(tree, "tanh_out", False):
            raise UnknownTree("this decoder ends without its last convolution or with tanh")
        levels = [_level_ldm(level, "upsample") for level in reversed(tree.up)]
    yield from _read_levels(levels, "up")
    yield _read_end(tree)


Level = tuple[list[nn.Module], list[nn.Module], list[nn.Module]]


def _level(block: nn.Module, samplers: str) -> Level:
    _expect(block, "resnets", f"attentions {samplers}")
    return list(block.resnets), list(getattr(block, "attentions", None) or ()), list(getattr(block, samplers) or ())


def _level_ldm(level: nn.Module, sampler: str) -> Level:
    _expect(level, "block", f"attn {sampler}")
    return list(level.block), list(level.attn), [getattr(level, sampler)] if hasattr(level, sampler) else []


def _read_levels(levels: list[Level], resample: Literal["up", "down"]) -> Iterator[Layer]:
    for number, (resnets, attentions, samplers) in enumerate(levels):
        if attentions and len(attentions) != len(resnets):
            raise UnknownTree("attentions and residual blocks do not pair up")
        layers = list(_read_blocks(resnets, attentions))
        if layers:
            depth = number if resample == "down" else len(levels) - 1 - number
            layers[-1] = replace(layers[-1], level=f"level {depth}")
        yield from layers
        for sampler in samplers:
            yield _read_sampler(sampler, resample)


def _read_blocks(resnets: list[nn.Module], attentions: list[nn.Module]) -> Iterator[Layer]:
    for number, block in enumerate(resnets):
        yield from read_resnet(block)
        if attentions:
            yield _read_attention(attentions[number])


def _read_middle(tree: nn.Module) -> Iterator[Layer]:
    if hasattr(tree, "mid_block"):
        _expect(tree.mid_block, "resnets", "attentions")
        first, *rest = tree.mid_block.resnets
        attentions = list(tree.mid_block.attentions)
    else:
        _expect(tree.mid, "block_1 attn_1 block_2")
        first, rest, attentions = tree.mid.block_1, [tree.mid.block_2], [tree.mid.attn_1]
    if len(rest) != len(attentions):
        raise UnknownTree("the middle block has another order")
    yield from read_resnet(first)
    for attention, block in zip(attentions, rest, strict=True):
        if attention is not None:
            yield _read_attention(attention)
        yield from read_resnet(block)


def _read_end(tree: nn.Module) -> Layer:
    if hasattr(tree, "conv_act") and not isinstance(tree.conv_act, nn.SiLU):
        raise UnknownTree(f"activation {type(tree.conv_act).__name__}")
    return Conv(_conv(tree.conv_out, 3), _norm(getattr(tree, "conv_norm_out", None) or tree.norm_out))


def read_resnet(block: nn.Module) -> Iterator[Layer]:
    """Yield the two layers of a residual block, diffusers', ComfyUI's or StableSR's; raises UnknownTree."""
    _expect(block, "norm1 conv1 norm2 conv2", "dropout nonlinearity swish conv_shortcut nin_shortcut conv_out")
    activation = getattr(block, "nonlinearity", None) or getattr(block, "swish", None)
    if activation is not None and not isinstance(activation, nn.SiLU):
        raise UnknownTree(f"activation {type(activation).__name__}")
    if getattr(block, "upsample", None) is not None or getattr(block, "downsample", None) is not None:
        raise UnknownTree("a residual block that resamples")
    names = ("conv_shortcut", "nin_shortcut", "conv_out")
    shortcut = next((found for name in names if (found := getattr(block, name, None)) is not None), None)
    first = Conv(_conv(block.conv1, 3), _norm(block.norm1), skip="open")
    yield first if shortcut is None else replace(first, shortcut=_conv(shortcut, 1))
    divide = float(getattr(block, "output_scale_factor", 1.0))
    yield Conv(_conv(block.conv2, 3), _norm(block.norm2), skip="close", divide=divide)


def read_dense_blocks(block: nn.Module) -> Local:
    """Return three dense blocks of five convolutions (an RRDB, as ESRGAN names its parts) as one layer.

    Raises UnknownTree.
    """
    _expect(block, "rdb1 rdb2 rdb3")
    convs = []
    for dense in (block.rdb1, block.rdb2, block.rdb3):
        _expect(dense, "conv1 conv2 conv3 conv4 conv5")
        convs += [_base(_conv(conv, 3)) for conv in dense.children()]
    channels, widest = convs[0].in_channels, max(conv.in_channels for conv in convs)
    # The block's and the dense block's inputs, what the dense block has put together so far, and that once more.
    return Local(block, radius=len(convs), width=(channels, channels), held=2 * (channels + widest))


def _read_attention(block: nn.Module) -> Attention:
    if hasattr(block, "to_q"):
        _expect(block, "group_norm to_q to_k to_v to_out", "to_qkv processor")
        plain = block.residual_connection and not block.fused_projections and not block.is_cross_attention
        if not plain or block.scale != (block.inner_dim // block.heads) ** -0.5:
            raise UnknownTree("an attention that is not plain self-attention")
        projections = block.to_q, block.to_k, block.to_v, block.to_out[0]
        return Attention(_norm(block.group_norm), *projections, block.heads, True, float(block.rescale_output_factor))
    _expect(block, "norm q k v proj_out")
    projections = [_conv(module, 1) for module in (block.q, block.k, block.v, block.proj_out)]
    return Attention(_norm(block.norm), *projections, 1, False)


def _read_sampler(sampler: nn.Module, resample: Literal["up", "down"]) -> Conv:
    _expect(sampler, "conv", "Conv2d_0")
    if getattr(sampler, "norm", None) is not None or getattr(sampler, "scale_factor", 2.0) != 2.0:
        raise UnknownTree(f"{type(sampler).__name__} with a norm or another factor")
    if resample == "up":
        _conv(sampler.conv, 3)
    else:
        _conv(sampler.conv, 3, stride=2, padding=0)
    return Conv(sampler, resample=resample)


def _expect(module: nn.Module, needed: str, optional: str = "") -> None:
    names = {name for name, _ in module.named_children()}
    missing, foreign = set(needed.split()) - names, names - set(needed.split()) - set(optional.split())
    if missing or foreign:
        where = type(module).__name__
        raise UnknownTree(f"{where} lacks {sorted(missing)} or has unknown {sorted(foreign)}")


def _norm(module: nn.Module | None) -> nn.Module:
    if not isinstance(module, nn.GroupNorm) or not module.affine:
        raise UnknownTree(f"{type(module).__name__} where a GroupNorm is expected")
    return module


def _conv(module: nn.Module, kernel: int, stride: int = 1, padding: int | None = None) -> nn.Module:
    base, padding = _base(module), kernel // 2 if padding is None else padding
    wanted = (kernel, kernel), (stride, stride), (padding, padding), (1, 1), "zeros"
    if (
        not isinstance(base, nn.Conv2d)
        or (base.kernel_size, base.stride, base.padding, base.dilation, base.padding_mode) != wanted
    ):
        raise UnknownTree(f"{base} where a {kernel} x {kernel} convolution of stride {stride} is expected")
    return module


def _base(module: nn.Module) -> nn.Module:
    """The convolution inside a resampler or a low-rank wrapper."""
    inner = module if isinstance(module, nn.Conv2d) else getattr(module, "conv", module)
    return getattr(inner, "base_layer", inner)


def _kernel(module: nn.Module) -> int:
    return _base(module).kernel_size[0]
