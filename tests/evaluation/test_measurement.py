import math

import numpy as np
import pytest
import torch
from conftest import LONG, identity_model
from PIL import Image

from tudsr_core.evaluation import filter_bank
from tudsr_core.evaluation.measurement import compare, evaluate_model, lanczos, summary_rows
from tudsr_core.evaluation.metrics import psnr_y, ssim_y
from tudsr_core.pictures import degradations
from tudsr_core.pictures.degradations import clean, gaussian_blur, mild, random_mild
from tudsr_core.pictures.tensors import luma, resize
from tudsr_core.training.data import read_held_out


def test_psnr_and_ssim_of_known_pictures(noise):
    truth = noise(1, 3, 32, 32) * 0.5
    assert psnr_y(truth + 0.1, truth) == pytest.approx(-20 * math.log10(0.1 * 219 / 255), abs=1e-4)
    assert ssim_y(truth, truth) == pytest.approx(1)
    assert ssim_y(noise(1, 3, 32, 32, seed=3), truth) < 0.3


@pytest.mark.parametrize("size", [(11, 11), (37, 52)])
def test_ssim_is_scikit_images(noise, size):
    metrics = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    truth = noise(1, 3, *size)
    picture = (truth + 0.2 * noise(1, 3, *size, seed=1)).clamp(0, 1)
    theirs = metrics.structural_similarity(
        *(luma(x.double())[0, 0].numpy() for x in (picture, truth)),
        data_range=1.0,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    assert ssim_y(picture, truth) == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim_y(picture[..., :10], truth[..., :10])


def test_luma_is_the_papers_bt601():
    assert luma(torch.ones(1, 3, 1, 1)).item() == pytest.approx(235 / 255, abs=1e-6)
    assert luma(torch.zeros(1, 3, 1, 1)).item() == pytest.approx(16 / 255, abs=1e-6)


def test_lanczos_is_pillows(noise):
    small = noise(1, 3, 9, 12)
    theirs = Image.fromarray(small[0, 1].numpy()).resize((48, 36), Image.Resampling.LANCZOS)
    assert np.abs(lanczos(small, (36, 48))[0, 1].numpy() - np.asarray(theirs).clip(0, 1)).max() < 1e-6


def test_clean_and_mild_are_fixed_and_mild_is_worse(noise):
    sharp = gaussian_blur(noise(1, 3, 64, 64), 1.5)
    assert torch.equal(mild(sharp, 4), mild(sharp, 4))
    assert tuple(clean(sharp, 4).shape[-2:]) == (16, 16)
    truth = resize(sharp, (16, 16))
    assert psnr_y(mild(sharp, 4), truth) < psnr_y(clean(sharp, 4), truth) - 3
    drawn = [random_mild(sharp, 4, np.random.default_rng(seed), 0) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_noise_is_as_strong_as_said(monkeypatch):
    """On flat grey, before JPEG: 3/255 in `mild`, evenly from 0 to 6/255 when drawn; rounding adds a little."""
    monkeypatch.setattr(degradations, "jpeg", lambda image, quality: image)
    grey = torch.full((1, 3, 256, 256), 128 / 255)
    assert float(mild(grey, 4).std()) * 255 == pytest.approx(3, abs=0.15)
    drawn = [float(random_mild(grey, 4, np.random.default_rng(seed), 0).std()) * 255 for seed in range(60)]
    assert 5.5 < max(drawn) < 6.3 and min(drawn) < 0.8 and np.mean(drawn) == pytest.approx(3, abs=0.5)


def test_blur_has_the_gaussians_variance():
    point = torch.zeros(1, 1, 61, 61)
    point[..., 30, 30] = 1
    x = torch.arange(61.0) - 30
    assert (gaussian_blur(point, 3.0)[0, 0].sum(0) * x**2).sum().item() == pytest.approx(9, rel=0.02)


def test_filter_bank_finds_the_filter_that_made_the_picture(noise):
    """Pictures made by one known 9 x 9 filter of the bicubic start are reproduced by the fitted bank."""
    known = torch.randn(81, generator=torch.Generator().manual_seed(0)) * 0.02
    known[40] += 1
    pairs = []
    for seed in range(4):
        small = gaussian_blur(noise(1, 3, 16, 16, seed=seed), 0.7)
        start = resize(small, (64, 64))
        target = (filter_bank._patches(luma(start)) * known.view(1, 81, 1)).sum(1).view(1, 1, 64, 64)
        pairs.append((small, start + (target - luma(start)) * 255 / 219))
    bank = filter_bank.fit_bank(pairs, ridge=1e-9)
    small, sharp = pairs[0]
    assert (luma(filter_bank.enlarge(small, (64, 64), bank)) - luma(sharp.clamp(0, 1))).abs().mean() < 2e-3
    plain = (luma(resize(small, (64, 64))) - luma(sharp)).abs().mean()
    assert plain > 1e-2


def test_classes_follow_the_direction_of_edges():
    ramp = torch.linspace(0, 1, 40).view(1, 1, 1, 40).expand(1, 1, 40, 40)
    across, down = (int(filter_bank.classify(x).mode().values) for x in (ramp, ramp.transpose(2, 3)))
    per_angle = filter_bank.STRENGTHS * filter_bank.COHERENCES
    assert (across // per_angle - down // per_angle) % filter_bank.ANGLES == filter_bank.ANGLES // 2


def test_compare_shows_three_equal_panels(noise):
    panels = compare(noise(1, 3, 20, 30), noise(1, 3, 160, 240), crop=100)
    assert tuple(panels.shape) == (1, 3, 100, 316)


def middle(picture, height=192, width=256):
    """Return the middle of a picture `C H W`."""
    top, left = (max(0, side - most) // 2 for side, most in zip(picture.shape[1:], (height, width), strict=True))
    return picture[:, top : top + height, left : left + width]


WHOLE = (("clean x4", 0.60, 0.20), ("mild x4", 0.45, 0.15), ("clean x8", 0.50, 0.20), ("mild x8", 0.38, 0.13))
MIDDLES = (("clean x4", 0.75, 0.22), ("mild x4", 0.50, 0.17), ("clean x8", 0.55, 0.17), ("mild x8", 0.45, 0.11))


@pytest.mark.parametrize(("part", "bars"), [(middle, MIDDLES), pytest.param(lambda one: one, WHOLE, marks=LONG)])
def test_the_embedded_model_is_useful(embedded, part, bars):
    """The acceptance bars on the five public pictures, over Lanczos in PSNR-Y (never trained on)."""
    pictures = {name: part(picture) for name, picture in read_held_out().items()}
    scores = evaluate_model(embedded, pictures, methods=("lanczos", "filter bank", "ours"))

    def gains(case, over="lanczos"):
        ours, other = scores[case, "ours"], scores[case, over]
        return [ours[name][0] - other[name][0] for name in ours]

    def mean(values):
        return sum(values) / len(values)

    for case, bar, worst in bars:
        assert mean(gains(case)) >= bar, case
        assert min(gains(case)) >= worst, case
    assert mean(gains("clean x4", "filter bank")) > 0.25


def test_the_table_has_a_row_for_every_method_and_a_column_for_every_picture(noise):
    pictures = {"a": noise(3, 32, 48), "b": noise(3, 48, 32, seed=1)}
    rows = summary_rows(evaluate_model(identity_model(), pictures))
    assert {len(row) for row in rows} == {2 + 2 + 4} and {row[-1] for row in rows} == {"-"}  # no tile is smaller
    assert len(rows) == 2 * 5 + 2 * 6
    assert rows[0][:2] == ["clean x4", "bicubic"]
