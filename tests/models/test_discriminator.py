"""The discriminator's heads: their layout at 512 pixels, BlurPool and spectral norms written out."""

import pytest
import torch
from torch import nn

from tudsr_core.models.discriminator import BlurPool, Discriminator, PatchCritic, make_head
from tudsr_core.models.features import Scratch

# Of OMGSR's heads at 512: side and channels of a map, then the widths and strides of the convolutions.
LAYOUTS = [
    ((128, 192), [96, 96, 96], [2, 2, 2]),
    ((64, 384), [192, 96, 96], [1, 2, 2]),
    ((32, 768), [384, 192, 96], [1, 1, 2]),
    ((256, 192), [96, 96, 96, 96], [1, 2, 2, 2]),
    ((4, 64), [64], [1]),
    ((2, 40), [], []),
]


@pytest.mark.parametrize(("map_of", "widths", "strides"), LAYOUTS)
def test_heads_have_the_published_layout_and_one_logit(map_of, widths, strides, noise):
    side, channels = map_of
    head = make_head(channels, side).eval()
    convs = [layer for layer in head if isinstance(layer, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == [*widths, 1]
    assert [conv.stride[0] for conv in convs] == [*strides, 1]
    assert [type(layer) for layer in head[:3]] == (
        [BlurPool, convs[0].__class__, nn.LeakyReLU] if widths else [BlurPool, convs[0].__class__]
    )
    with torch.no_grad():
        assert head(noise(1, channels, side, side)).shape == (1, 1, 1, 1)
    if side == 32:
        # 768 x 384 + 384 x 192 + 192 x 96 times 9, and a vector of 96; biases.
        assert sum(p.numel() for p in head.parameters()) == 9 * (768 * 384 + 384 * 192 + 192 * 96) + 96 + 384 + 192 + 97


def test_blur_pool_is_the_binomial_of_four(noise):
    x = noise(1, 2, 6, 8)
    padded, row = torch.nn.functional.pad(x, (1, 1, 1, 1)), torch.tensor([1.0, 3, 3, 1]) / 8
    made = BlurPool()(x)
    assert made.shape == (1, 2, 3, 4)
    for r in range(3):
        for c in range(4):
            wanted = (padded[..., 2 * r : 2 * r + 4, 2 * c : 2 * c + 4] * row.outer(row)).sum((2, 3))
            assert torch.allclose(made[..., r, c], wanted, atol=1e-6)


def test_a_map_of_one_place_is_refused():
    with pytest.raises(ValueError, match="too small for the discriminator"):
        Discriminator(Scratch(), 8)


def test_spectral_norms_are_one_and_move_only_when_refreshed(noise):
    torch.manual_seed(0)
    critic = Discriminator(Scratch(), 32).train()
    pictures, conv = noise(2, 3, 32, 32) * 2 - 1, critic.heads[2][1]

    @torch.no_grad()
    def excess():
        return abs(float(torch.linalg.matrix_norm(conv.weight.flatten(1), 2)) - 1)

    before, first = critic(pictures), excess()
    assert 1e-4 < first < 0.1
    assert all(map(torch.equal, before, critic(pictures)))  # a pass changes nothing
    for _ in range(20):
        critic.refresh()
    assert not torch.equal(before[2], critic(pictures)[2])
    assert excess() < first / 2


def test_only_heads_train_but_the_picture_gets_a_gradient(noise):
    critic = Discriminator(Scratch(), 32)
    assert {name.partition(".")[0] for name, p in critic.named_parameters() if p.requires_grad} == {"heads"}
    picture = noise(1, 3, 32, 32).requires_grad_()
    sum(x.sum() for x in critic(picture)).backward()
    assert picture.grad.abs().sum() > 0


def test_the_patch_critic_sees_34_pixels_at_every_place_and_has_norms_of_one(noise):
    torch.manual_seed(0)
    critic = PatchCritic(4)
    pictures = noise(1, 3, 96, 96).requires_grad_()
    (logits,) = critic(pictures)
    logits[0, 0, 12, 12].backward()
    seen = pictures.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [42, 42]
    for _ in range(30):
        critic.refresh()
    weights = [module.weight.detach() for module in critic.heads if isinstance(module, torch.nn.Conv2d)]
    assert all(float(torch.linalg.matrix_norm(one.flatten(1), 2)) == pytest.approx(1, abs=1e-2) for one in weights)
    before = [value.clone() for value in critic.state_dict().values()]
    critic.train()(pictures)
    assert all(torch.equal(a, b) for a, b in zip(before, critic.state_dict().values(), strict=True))
    assert critic(noise(1, 3, 16, 16))[0].shape == (1, 1, 4, 4)
