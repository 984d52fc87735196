import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch import nn

from tudsr_core.vae.graph import UnknownTree
from tudsr_core.vae.layers import attend, double, read_affine, read_doubling


def test_the_affine_of_a_norm_is_what_its_call_uses():
    """Also where the module changes its weights on the way, as casting and patching layers do."""

    class Doubling(nn.GroupNorm):
        def forward(self, x):
            return nn.functional.group_norm(x, self.num_groups, self.weight * 2, self.bias + 1, self.eps)

    norm = Doubling(4, 8, eps=1e-3)
    nn.init.normal_(norm.weight)
    plain = copy.deepcopy(norm)
    weight, bias, groups, eps = read_affine(norm, torch.empty(0))
    assert torch.equal(weight, plain.weight * 2) and torch.equal(bias, plain.bias + 1)
    assert (groups, eps) == (4, 1e-3)

    class Silent(nn.GroupNorm):
        def forward(self, x):
            return x

    with pytest.raises(UnknownTree, match="Silent"):
        read_affine(Silent(4, 8), torch.empty(0))


@pytest.mark.parametrize("size", [(2, 2), (2, 5), (7, 4)])
def test_doubling_is_the_convolution_of_doubled_pixels(size):
    torch.manual_seed(0)
    sampler = Upsample2D(6, use_conv=True, out_channels=5).double()
    x = torch.randn(1, 6, *size, dtype=torch.float64)
    kernels, bias = read_doubling(sampler, 6, torch.empty(0, dtype=torch.float64))
    border = [(True, True)] * 2
    assert (double(x, kernels, bias, border) - sampler(x)).abs().max() < 1e-13
    inner = double(x, kernels, bias, [(True, False), (True, False)])
    assert (inner - sampler(x)[..., : 2 * size[0] - 2, : 2 * size[1] - 2]).abs().max() < 1e-13
    assert (double(x[..., :1, :1], kernels, bias, border) - sampler(x[..., :1, :1])).abs().max() < 1e-13


def test_doubling_takes_the_weights_that_the_call_uses():
    class Cast(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight * 2, self.bias)

    sampler = Upsample2D(4, use_conv=True)
    sampler.conv = Cast(4, 4, 3, padding=1)
    x = torch.randn(1, 4, 3, 3)
    assert torch.allclose(double(x, *read_doubling(sampler, 4, x), [(True, True)] * 2), sampler(x), atol=1e-5)


def test_a_sampler_that_does_more_than_one_convolution_is_left_as_it_is():
    class LowRank(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base_layer, self.down, self.up = inner, nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 4, 1)

        def forward(self, x):
            return self.base_layer(x) + self.up(self.down(x))

    class Louder(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.base_layer = inner

        def forward(self, x):
            return self.base_layer(x) * 2

    for wrapper in (LowRank, Louder):
        sampler = Upsample2D(4, use_conv=True)
        sampler.conv = wrapper(sampler.conv)
        assert read_doubling(sampler, 4, torch.empty(0)) is None


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_attention_in_chunks_is_softmax_over_all_keys(chunk):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 8, generator=generator).double() * 4 for n in (5, 64, 64))
    scores = (q @ k.mT) / 8**0.5
    wanted = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v
    assert (attend(q, k, v, chunk) - wanted).abs().max() < 1e-12
