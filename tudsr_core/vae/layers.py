"""What single layers of an autoencoder compute, in a form that tiles can use: norms, doubling, attention.

A module's weights are overheard in a call of it, never read from it, so that casting, patching and
offloading stay its own business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from .graph import UnknownTree

EPS = 1e-5  # a batch norm refuses to add nothing to the variance


def read_affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor, int, float]:
    """Return weight, bias, groups and eps that `norm` uses on `like`'s device and dtype; raises UnknownTree."""
    found = []

    def keep(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
        found.append((weight.detach().clone(), bias.detach().clone(), groups, eps))
        return x

    _overhear(nn.functional.group_norm, keep, norm, norm.num_channels, like)
    if len(found) != 1:
        raise UnknownTree(f"{type(norm).__name__} does not call group_norm")
    return found[0]


def read_doubling(sampler: nn.Module, channels: int, like: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Return what `sampler` does, a 3 x 3 convolution of pixels doubled, as four 2 x 2 convolutions of x itself.

    Where a 3 x 3 window sees a pixel twice, its weights add up: output row 2 y + p is a convolution
    of rows y - 1 + p and y + p, and so along columns. That takes 16 multiplications per pixel of x
    instead of 36. Returns kernels `2 2 O I 2 2`, by p along rows and columns, and the bias; None if
    `sampler` does more than one convolution (a LoRA that is not merged, say).
    """
    found = []

    def keep(x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: object, **kwargs: object) -> Tensor:
        y = conv2d(x, weight, bias, *args, **kwargs)
        found.append((weight.detach().clone(), None if bias is None else bias.detach().clone(), y))
        return y

    output = _overhear(conv2d, keep, sampler, channels, like)
    if len(found) != 1 or found[0][2] is not output:
        return None
    weight, bias, _ = found[0]
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return _fold(_fold(wide, 2, 0), 4, 1).to(weight.dtype), bias


def double(part: Tensor, kernels: Tensor, bias: Tensor | None, rims: Sequence[tuple[bool, bool]]) -> Tensor:
    """Return the doubled tile `1 O 2h 2w` of `read_doubling`.

    `part` is `1 I h w` with one more pixel on each side that is not the picture's border; `rims` says
    which sides of the rows, then of the columns, are.
    """
    (above, below), (left, right) = rims
    part = pad(part, (int(left), int(right), int(above), int(below)))
    height, width = part.shape[2] - 2, part.shape[3] - 2
    size = 1, kernels.shape[2], 2 * height, 2 * width
    y = torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)
    for p in (0, 1):
        for q in (0, 1):
            seen = part[..., p : p + height + 1, q : q + width + 1]
            y[..., p::2, q::2] = conv2d(seen, kernels[p, q], bias)
    return y


def scale_and_shift(affine: tuple[Tensor, Tensor], part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return scale x + shift per channel of `1 C h w`, computed in the affine's dtype, for a network of `dtype`."""
    scale, shift = affine
    narrow = torch.promote_types(part.dtype, dtype)
    if part.is_cuda and narrow != scale.dtype:
        # One pass that reads and writes half types and computes in float32: what GroupNorm itself does there.
        # torch's own kernel (the last argument): cuDNN's takes twice the time.
        mean, variance = torch.zeros_like(scale), torch.full_like(scale, 1 - EPS)
        return torch.batch_norm(part.to(narrow), scale, shift, mean, variance, False, 0.0, EPS, False)
    scale, shift = (values.view(1, -1, 1, 1) for values in affine)
    return torch.addcmul(shift, part.to(scale.dtype), scale)


def attend(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v for `heads n d` against `heads N d`, exact whatever `chunk`.

    Keys are brought to q's device `chunk` at a time, and partial results merged by their maximum
    and sum (online softmax, Milakov and Gimelshein 2018).
    """
    if k.shape[1] <= chunk:
        return scaled_dot_product_attention(q[None], k.to(q.device)[None], v.to(q.device)[None])[0]
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled = q.to(wide) * q.shape[-1] ** -0.5
    top = scaled.new_full((*q.shape[:2], 1), -torch.inf)
    total, mixed = torch.zeros_like(top), torch.zeros_like(scaled)
    for keys, values in zip(k.split(chunk, 1), v.split(chunk, 1), strict=True):
        logits = scaled @ keys.to(q.device, wide).mT
        higher = torch.maximum(top, logits.amax(-1, keepdim=True))
        weights = logits.sub_(higher).exp_()
        fade = (top - higher).exp_()
        total = total * fade + weights.sum(-1, keepdim=True)
        mixed = mixed * fade + weights @ values.to(q.device, wide)
        top = higher
    return (mixed / total).to(q.dtype)


def _fold(kernels: Tensor, dim: int, at: int) -> Tensor:
    """Return the two taps of both phases for the three along `dim`, phases along a new dimension `at`."""
    first, middle, last = kernels.unbind(dim)
    return torch.stack([torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)], at)


def _overhear(function: Callable, answer: Callable, module: nn.Module, channels: int, like: Tensor) -> Tensor:
    """Return `module`'s output for one pixel, with `answer` in place of `function`.

    So weights are seen after whatever the module does to them first (casting, patching, fetching).
    They should be cloned: a caster may reuse its buffers after the call.
    """
    with _Instead(function, answer), torch.no_grad():
        return module(torch.zeros(1, channels, 1, 1, device=like.device, dtype=like.dtype))


class _Instead(TorchFunctionMode):
    def __init__(self, function: Callable, answer: Callable) -> None:
        super().__init__()
        self.function, self.answer = function, answer

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (self.answer if function is self.function else function)(*args, **(kwargs or {}))
