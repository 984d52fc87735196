"""Losses against slow versions, and augmentation with given numbers."""

import math

import numpy as np
import pytest
import torch

from tudsr_core.models.features import Scratch, Vgg16
from tudsr_core.training.augment import Augment, draw_augment
from tudsr_core.training.losses import (
    Dists,
    edge_aware_dists,
    edges,
    mean_absolute_error,
    read_balance,
    soft_label_loss,
)
from tudsr_core.weights.tensor_files import CheckpointError


def slow_dists(dists, x, y):
    """Channel by channel in float64."""
    total, place = 1.0, 0
    with torch.no_grad():
        maps = zip([x, *dists.features(x)], [y, *dists.features(y)], strict=True)
    for a, b in maps:
        for channel in range(a.shape[1]):
            p, q = (z[0, channel].double().numpy() for z in (a, b))
            s1 = (2 * p.mean() * q.mean() + 1e-6) / (p.mean() ** 2 + q.mean() ** 2 + 1e-6)
            s2 = (2 * ((p - p.mean()) * (q - q.mean())).mean() + 1e-6) / (p.var() + q.var() + 1e-6)
            total -= float(dists.alpha[place]) * s1 + float(dists.beta[place]) * s2
            place += 1
    return total


@pytest.mark.parametrize("features", [Scratch(), Vgg16()], ids=["scratch", "vgg16"])
def test_dists_is_the_papers(features, noise):
    torch.manual_seed(0)
    count = 3 + sum(features.channels)
    dists = Dists(features.eval().requires_grad_(False), (torch.rand(count) + 0.1, torch.rand(1, count, 1, 1) + 0.1))
    x, y = noise(2, 3, 16, 16), noise(2, 3, 16, 16, seed=4)
    made = dists(x, y)
    assert made.shape == (2,)
    for number in range(2):
        assert float(made[number]) == pytest.approx(
            slow_dists(dists, x[number : number + 1], y[number : number + 1]), abs=1e-5
        )
    assert dists(x, x).abs().max() < 1e-5
    wanted = x.clone().requires_grad_()
    dists(wanted, y).sum().backward()
    assert 0 < wanted.grad.abs().max() and wanted.grad.isfinite().all()


def test_edges_are_sobels_with_repeated_borders(noise):
    picture = noise(1, 3, 6, 7)
    grey = np.pad((picture[0].numpy() * np.array([0.2989, 0.587, 0.114]).reshape(3, 1, 1)).sum(0), 1, mode="edge")
    made = edges(picture)
    assert made.shape == (1, 1, 6, 7)
    for r in range(6):
        for c in range(7):
            near = grey[r : r + 3, c : c + 3]
            across = near[:, 2] @ [1, 2, 1] - near[:, 0] @ [1, 2, 1]
            down = near[2] @ [1, 2, 1] - near[0] @ [1, 2, 1]
            assert float(made[0, 0, r, c]) == pytest.approx(math.sqrt(across**2 + down**2 + 1e-6), abs=1e-5)
    single = torch.zeros(1, 3, 4, 4)
    single[:, 1, :, 2:] = 1
    assert edges(single, "rgb")[0, 1].max() == pytest.approx(4, abs=1e-5) and edges(single, "rgb")[0, 0].max() < 2e-3
    assert edges(torch.ones(1, 3, 5, 5)).max() < 2e-3  # no frame


def test_edge_aware_dists_adds_the_distance_of_the_edges(noise):
    dists, x, y = Dists(Scratch()), noise(1, 3, 32, 32), noise(1, 3, 32, 32, seed=2)
    drawn = [edges(z).expand(-1, 3, -1, -1) for z in (x, y)]
    assert torch.allclose(edge_aware_dists(dists, x, y), (dists(x, y) + dists(*drawn)).mean())
    assert edge_aware_dists(dists, x, x).abs() < 2e-5
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert edge_aware_dists(dists, blurred, x) > edge_aware_dists(dists, x + 0.001, x)


def test_a_balance_of_other_features_is_refused(tmp_path):
    torch.save({"alpha": torch.rand(1, 1475, 1, 1), "beta": torch.rand(1, 1475, 1, 1)}, tmp_path / "weights.pt")
    balance = read_balance(tmp_path / "weights.pt")
    assert Dists(Vgg16(), balance).alpha.shape == (1475,)
    with pytest.raises(ValueError, match="have 1475 values, these features 195 channels"):
        Dists(Scratch(), balance)
    torch.save({"alpha": torch.rand(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match="is not DISTS' weights.pt"):
        read_balance(tmp_path / "other.pt")


def test_soft_labels_are_summed_over_heads_and_best_at_their_logit():
    wanted = math.log(0.8 / 0.2)
    logits = [torch.full((2, 1, 1, 1), wanted, requires_grad=True), torch.full((2, 1, 3, 3), wanted)]
    loss = soft_label_loss(logits, 0.8)
    entropy = -(0.8 * math.log(0.8) + 0.2 * math.log(0.2))
    assert float(loss.detach()) == pytest.approx(2 * entropy, abs=1e-6)
    loss.backward()
    assert logits[0].grad.abs().max() < 1e-7
    assert float(soft_label_loss([torch.zeros(1)], 0.0)) == pytest.approx(math.log(2))


def test_the_absolute_error_is_of_minus_one_to_one():
    assert float(mean_absolute_error(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2))) == 2


def given(brightness=0.0, saturation=1.0, contrast=1.0, shift=(0, 0), hole=(100, 100)):
    values = [torch.tensor([value]) for value in (brightness, saturation, contrast)]
    return Augment(*values, torch.tensor([shift]), torch.tensor([hole]))


def test_augmentation_does_what_its_numbers_say(noise):
    x = noise(1, 3, 8, 12) * 2 - 1
    assert torch.allclose(given()(x), x, atol=1e-6)
    assert torch.allclose(given(brightness=0.3)(x), x + 0.3, atol=1e-6)
    grey = x.mean(1, keepdim=True).expand_as(x)
    assert torch.allclose(given(saturation=0.0)(x), grey, atol=1e-6)
    assert torch.allclose(given(contrast=0.5)(x), (x + x.mean()) / 2, atol=1e-6)
    moved = given(shift=(2, -3))(x)
    assert torch.allclose(moved[..., 2:, :-3], x[..., :-2, 3:], atol=1e-6)
    assert not moved[..., :2, :].any() and not moved[..., -3:].any()
    cut = given(hole=(0, 12))(x)  # a square of half each side around the upper right corner: a quarter of it is inside
    assert not cut[..., :2, 9:].any() and torch.allclose(cut[..., 2:, :], x[..., 2:, :], atol=1e-6)
    assert torch.allclose(cut[..., :9], x[..., :9], atol=1e-6)


def test_draws_are_seeded_and_in_range(noise):
    drawn = draw_augment(4000, (512, 64), torch.Generator().manual_seed(0))
    again = draw_augment(4000, (512, 64), torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(vars(drawn).values(), vars(again).values(), strict=True))
    for values, (low, high) in (
        (drawn.brightness, (-0.5, 0.5)),
        (drawn.saturation, (0, 2)),
        (drawn.contrast, (0.5, 1.5)),
    ):
        assert low <= values.min() < low + 0.01 and high - 0.01 < values.max() <= high
    assert drawn.shifts.amin(0).tolist() == [-64, -8] and drawn.shifts.amax(0).tolist() == [64, 8]
    assert drawn.holes.amin(0).tolist() == [0, 0] and drawn.holes.amax(0).tolist() == [512, 64]
    pictures = noise(2, 3, 16, 16).requires_grad_()
    draw_augment(2, (16, 16), torch.Generator().manual_seed(1))(pictures).sum().backward()
    assert pictures.grad.abs().sum() > 0
