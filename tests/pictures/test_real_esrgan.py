"""Real-ESRGAN's degradation against slow versions written from the formulas, and what is drawn over 10,000 draws."""

import collections
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn, idctn
from scipy.special import j1

from tudsr_core.pictures import real_esrgan as module
from tudsr_core.pictures.blur_kernels import Kernel
from tudsr_core.pictures.real_esrgan import (
    MODES,
    RECIPES,
    Degradation,
    Noise,
    Pass,
    add_noise,
    blur,
    degrade,
    interpolate,
    sample_degradation,
)
from tudsr_core.pictures.soft_jpeg import CHROMA_TABLE, LUMA_TABLE, soft_jpeg

KERNELS = [
    Kernel("iso", 7, (0.9, 0.9)),
    Kernel("aniso", 9, (2.5, 0.7), 0.6),
    Kernel("generalized_iso", 11, (1.3, 1.3), 0, 0.6),
    Kernel("generalized_aniso", 9, (0.8, 2.0), -1.1, 3.0),
    Kernel("plateau_iso", 7, (1.4, 1.4), 0, 1.7),
    Kernel("plateau_aniso", 21, (3.0, 0.5), 2.0, 1.0),
    Kernel("sinc", 13, cutoff=1.9),
]


def slow_kernel(kernel):
    """Weights one by one, Sigma inverted as a matrix."""
    size, middle = kernel.size, kernel.size // 2
    turn = np.array(
        [[math.cos(kernel.angle), -math.sin(kernel.angle)], [math.sin(kernel.angle), math.cos(kernel.angle)]]
    )
    inverse = np.linalg.inv(turn @ np.diag(np.square(kernel.sigmas)) @ turn.T)
    weights = np.zeros((size, size))
    for row in range(size):
        for column in range(size):
            place = np.array([column - middle, row - middle], float)
            q, radius = place @ inverse @ place, math.hypot(*place)
            if kernel.kind == "sinc":
                w = kernel.cutoff
                weights[row, column] = w * j1(w * radius) / (2 * math.pi * radius) if radius else w**2 / (4 * math.pi)
            elif kernel.kind.startswith("plateau"):
                weights[row, column] = 1 / (1 + q**kernel.beta)
            else:
                weights[row, column] = math.exp(-(q**kernel.beta) / 2)
    return weights / weights.sum()


def slow_blur(image, kernel):
    """One pixel at a time, `H W` of float64, mirrored without repeating the border."""
    weights, half = slow_kernel(kernel), kernel.size // 2
    padded = np.pad(image, half, mode="reflect")
    return np.array(
        [
            [(padded[r : r + kernel.size, c : c + kernel.size] * weights).sum() for c in range(image.shape[1])]
            for r in range(image.shape[0])
        ]
    )


def taps(length, out, mode, scale):
    """The matrix `out length` of one axis: where each new pixel looks, and how much it takes."""
    matrix = np.zeros((out, length))
    for i in range(out):
        if mode == "area":
            begin, end = math.floor(i * length / out), math.ceil((i + 1) * length / out)
            matrix[i, begin:end] = 1 / (end - begin)
            continue
        place = (i + 0.5) * scale - 0.5
        if mode == "bilinear":
            place = max(0, place)
        base = math.floor(place)
        for near in range(base - 1, base + 3):
            d = abs(place - near)
            if mode == "bilinear":
                weight = max(0, 1 - d)
            elif d <= 1:
                weight = 1.25 * d**3 - 2.25 * d**2 + 1  # Keys' cubic with a = -0.75
            else:
                weight = -0.75 * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0
            matrix[i, min(max(near, 0), length - 1)] += weight
    return matrix


def slow_resize(image, size, mode, scale=None):
    down, across = (
        taps(length, out, mode, 1 / scale if scale else length / out)
        for length, out in zip(image.shape, size, strict=True)
    )
    return down @ image @ across.T


def slow_jpeg(image, quality):
    """`3 H W` in 0..1: block by block with scipy's DCT, the textbook way."""
    height, width = image.shape[1:]
    factor = 50 / quality if quality < 50 else 2 - quality / 50
    full = np.zeros((3, -(-height // 16) * 16, -(-width // 16) * 16))
    full[:, :height, :width] = image * 255
    r, g, b = full
    planes = [
        0.299 * r + 0.587 * g + 0.114 * b,
        -0.168736 * r - 0.331264 * g + 0.5 * b + 128,
        0.5 * r - 0.418688 * g - 0.081312 * b + 128,
    ]
    done = []
    for plane, table in zip(planes, (LUMA_TABLE, CHROMA_TABLE, CHROMA_TABLE), strict=True):
        if table is CHROMA_TABLE:
            plane = plane.reshape(plane.shape[0] // 2, 2, plane.shape[1] // 2, 2).mean((1, 3))
        out = np.zeros_like(plane)
        for y in range(0, plane.shape[0], 8):
            for x in range(0, plane.shape[1], 8):
                steps = np.array(table) * factor
                numbers = np.round(dctn(plane[y : y + 8, x : x + 8] - 128, norm="ortho") / steps)
                out[y : y + 8, x : x + 8] = idctn(numbers * steps, norm="ortho") + 128
        done.append(out if table is LUMA_TABLE else np.kron(out, np.ones((2, 2))))
    luma, blue, red = done[0], done[1] - 128, done[2] - 128
    rgb = np.stack([luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue])
    return rgb.clip(0, 255)[:, :height, :width] / 255


def slow_noise(image, noise):
    """`3 H W` in 0..1 with the same draws, levels counted by hand."""
    generator = torch.Generator().manual_seed(noise.seed)
    if noise.kind == "gaussian":
        shape = (1, 1 if noise.grey else 3, *image.shape[1:])
        drawn = torch.randn(shape, generator=generator)[0].numpy() * noise.strength / 255
        return (image + drawn).clip(0, 1)
    if noise.grey:
        counted = (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None]
    else:
        counted = image
    counted = np.round(counted.clip(0, 1) * 255) / 255
    levels = 2 ** math.ceil(math.log2(len({round(float(v) * 255) for v in counted.flat})))
    rates = torch.from_numpy(counted * levels).float()[None]
    drawn = torch.poisson(rates, generator=generator)[0].numpy()
    return (image + (drawn / levels - counted) * noise.strength).clip(0, 1)


def on_planes(function, image, *arguments):
    return np.stack([function(plane, *arguments) for plane in image])


def picture(height=40, width=52):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([np.sin(x / 3) * np.cos(y / 5), np.cos(x * y / 90), np.sin((x + y) / 4)]) * 0.45 + 0.5


def close(made, wanted, most=1e-5):
    return np.abs(made[0].double().numpy() - wanted).max() < most


def tensor(array):
    return torch.from_numpy(array)[None].float()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.kind)
def test_kernels_and_blurs_are_the_papers(kernel):
    assert np.abs(kernel.weights().numpy() - slow_kernel(kernel)).max() < 1e-7
    assert close(blur(tensor(picture()), kernel), on_planes(slow_blur, picture(), kernel))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [0.37, 0.8, 1.3])
def test_resizing_aliases_as_the_original_does(mode, scale):
    size = (int(40 * scale), int(52 * scale))
    made = interpolate(tensor(picture()), size, mode, scale)
    assert close(made, on_planes(slow_resize, picture(), size, mode, scale))
    made = interpolate(tensor(picture()), size, mode)
    assert close(made, on_planes(slow_resize, picture(), size, mode))


@pytest.mark.parametrize("quality", [30.0, 47.3, 61.8, 94.6])
@pytest.mark.parametrize("size", [(32, 48), (40, 52), (17, 9)])
def test_jpeg_is_the_textbooks(quality, size):
    made, wanted = soft_jpeg(tensor(picture(*size)), quality)[0].numpy(), slow_jpeg(picture(*size), quality)
    # A coefficient at exactly half a step may round either way; it moves one 8 x 8 block.
    assert (np.abs(made - wanted) < 1e-5).mean() > 0.99


def test_jpeg_is_close_to_a_real_codec():
    """On grey, since decoders smooth chroma, at 50, where libjpeg's rounded tables are ours; it rounds pixels."""
    grey = (picture(64, 80)[2] * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(grey).convert("RGB").save(file, "JPEG", quality=50, subsampling="4:2:0")
    real = np.asarray(Image.open(file)).astype(float)[..., 0] / 255
    ours = soft_jpeg(torch.from_numpy(grey).expand(1, 3, -1, -1).float() / 255, 50)[0, 0].numpy()
    damage = np.abs(real - grey / 255).mean()
    assert np.abs(ours - real).mean() < 0.6 / 255 < 0.3 * damage


def test_jpeg_of_best_quality_changes_nothing_where_chroma_is_flat():
    grey = tensor(np.repeat(picture()[:1], 3, 0))
    assert (soft_jpeg(grey, 100) - grey).abs().max() < 1e-4


@pytest.mark.parametrize("grey", [False, True])
@pytest.mark.parametrize(("kind", "strength"), [("gaussian", 12.0), ("poisson", 1.7)])
def test_noise_is_as_strong_as_said_and_seeded(kind, strength, grey):
    noise = Noise(kind, strength, grey, 5)
    made = add_noise(tensor(picture()), noise)
    assert close(made, slow_noise(picture(), noise))
    flat = torch.full((1, 3, 64, 64), 0.5)
    drawn = add_noise(flat, noise) - flat
    assert (drawn[:, 0] == drawn[:, 1]).all() == grey
    if kind == "gaussian":
        assert float(drawn.std()) * 255 == pytest.approx(12, rel=0.05)
    else:  # one value only: one level, so x v is 0.5
        assert float(drawn.abs().min()) == pytest.approx(0.5 if strength > 1 else 0.5 * strength, rel=0.01)


@pytest.mark.parametrize("jpeg_last", [False, True])
@pytest.mark.parametrize("factor", [4, 8])
def test_the_whole_way_with_given_numbers(factor, jpeg_last):
    first = Pass(KERNELS[1], 0.83, "bicubic", Noise("gaussian", 6.0, False, 1), 71.3)
    second = Pass(KERNELS[4], 1.15, "bilinear", Noise("poisson", 0.6, True, 2), 83.4)
    drawn = Degradation(factor, first, second, Kernel("sinc", 7, cutoff=2.2), "area", jpeg_last, "bicubic")
    image = picture(96, 112)
    x = on_planes(slow_blur, image, first.blur)
    x = on_planes(slow_resize, x, (79, 92), "bicubic", 0.83)
    x = slow_jpeg(slow_noise(x, first.noise), 71.3)
    x = on_planes(slow_blur, x, second.blur)
    x = on_planes(slow_resize, x, (int(96 / factor * 1.15), int(112 / factor * 1.15)), "bilinear")
    x = slow_noise(x, second.noise)
    x = x if jpeg_last else slow_jpeg(x, 83.4)
    x = on_planes(slow_resize, x, (96 // factor, 112 // factor), "area")
    x = on_planes(slow_blur, x, drawn.last)
    x = slow_jpeg(x.clip(0, 1), 83.4) if jpeg_last else x
    made = degrade(tensor(image), drawn)[0].double().numpy() * 255
    assert made.shape == x.shape and np.abs(made - made.round()).max() < 1e-3
    # Rounding to 8 bit may go either way where a value lies between two steps.
    assert np.abs(made - x.clip(0, 1) * 255).max() < 0.51


def test_the_same_draw_gives_the_same_bytes_and_another_seed_others():
    image = tensor(picture(64, 64))
    made = [degrade(image, sample_degradation(np.random.default_rng(seed), RECIPES["omgsr"], 4)) for seed in (3, 3, 4)]
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (25, 31)])
@pytest.mark.parametrize("factor", [1, 4, 8.5])
def test_small_and_odd_pictures_come_through(size, factor):
    for seed in range(8):
        drawn = sample_degradation(np.random.default_rng(seed), RECIPES["real-esrgan"], factor)
        made = degrade(torch.full((1, 3, *size), 0.5), drawn)
        assert tuple(made.shape[-2:]) == tuple(max(1, int(side // factor)) for side in size)
        assert 0 <= made.min() and made.max() <= 1
        assert f"1/{factor:g}" in drawn.describe()


def test_enlarging_is_refused():
    with pytest.raises(ValueError, match="factor 0.5 would enlarge"):
        sample_degradation(np.random.default_rng(0), RECIPES["omgsr"], 0.5)


@pytest.mark.parametrize(("name", "factor", "count"), [("real-esrgan", 4, 10_000), ("omgsr", 8, 1_500)])
def test_many_draws_keep_to_the_published_shares_and_ranges(name, factor, count):
    rng, recipe = np.random.default_rng(0), RECIPES[name]
    draws = [sample_degradation(rng, recipe, factor) for _ in range(count)]

    def share(values, wanted, of=count):
        """Within four deviations: one honest share in 16,000 is not."""
        found = sum(values)
        assert abs(found - wanted * of) < 4 * math.sqrt(of * wanted * (1 - wanted)) + 1e-9, (found, wanted, of)

    least, most = (7, 21) if factor == 4 else (11, 41)
    for order, passes in ((recipe.first, [d.first for d in draws]), (recipe.second, [d.second for d in draws])):
        blurs = [one.blur for one in passes if one.blur.kind != "none"]
        share([one.blur.kind != "none" for one in passes], order.blur_share)
        kinds = collections.Counter(kernel.kind for kernel in blurs)
        for kind, wanted in {**{k: v * 0.9 for k, v in module.KINDS.items()}, "sinc": 0.1}.items():
            share([1] * kinds[kind], wanted, len(blurs))
        for size in range(least, most + 1, 2):
            share([kernel.size == size for kernel in blurs], 1 / len(range(least, most + 1, 2)), len(blurs))
        bells = [kernel for kernel in blurs if kernel.kind != "sinc"]
        assert all(order.sigma[0] <= sigma <= order.sigma[1] for kernel in bells for sigma in kernel.sigmas)
        assert all(
            k.sigmas[0] == k.sigmas[1] and k.angle == 0 for k in bells if k.kind.endswith("iso") and "an" not in k.kind
        )
        general = [k.beta for k in bells if k.kind.startswith("generalized")]
        share([beta < 1 for beta in general], 0.5, len(general))
        assert 0.5 <= min(general) < 0.55 and 3.7 < max(general) <= 4
        flat = [k.beta for k in bells if k.kind.startswith("plateau")]
        share([beta == 1 for beta in flat], 0.5, len(flat))
        assert max(flat) <= 2
        split = 13 if factor == 4 else 25
        sincs = [k for k in blurs if k.kind == "sinc"]
        assert all(k.cutoff >= math.pi / (3 if k.size < split else 5) for k in sincs)
        assert min(k.cutoff for k in sincs) < math.pi / 4 and max(k.cutoff for k in sincs) <= math.pi
        up, down, keep = order.up_down_keep
        share([one.scale > 1 for one in passes], up)
        share([one.scale < 1 for one in passes], down)
        share([one.scale == 1 for one in passes], keep)
        gaussian = [one.noise for one in passes if one.noise.kind == "gaussian"]
        share([1] * len(gaussian), 0.5)
        share([one.noise.grey for one in passes], 0.4)
        for values, (low, high) in (
            ([one.scale for one in passes], order.scale),
            ([one.strength for one in gaussian], order.gaussian),
            ([one.noise.strength for one in passes if one.noise.kind == "poisson"], order.poisson),
            ([one.quality for one in passes], order.quality),
        ):
            spread = high - low
            assert low <= min(values) < low + 0.02 * spread and high - 0.02 * spread < max(values) <= high
        for mode in MODES:
            share([one.mode == mode for one in passes], 1 / 3)
    share([d.last.kind == "sinc" for d in draws], 0.8)
    share([d.jpeg_last for d in draws], 0.5)
    for mode in MODES:
        share([d.last_mode == mode for d in draws], 1 / 3)
        share([d.enlarge_mode == mode for d in draws], 1 / 3)
    assert len({one.noise.seed for d in draws for one in (d.first, d.second)}) > 1.99 * count


def test_both_published_sets_are_as_published():
    """The numbers that differ, from the table of the two configuration files."""
    strong, mild = RECIPES["real-esrgan"], RECIPES["omgsr"]
    assert (strong.first.scale, mild.first.scale) == ((0.15, 1.5), (0.3, 1.5))
    assert (strong.first.gaussian, mild.first.gaussian) == ((1, 30), (1, 15))
    assert (strong.first.poisson, mild.first.poisson) == ((0.05, 3), (0.05, 2))
    assert (strong.first.quality, mild.first.quality) == ((30, 95), (60, 95))
    assert (strong.second.blur_share, mild.second.blur_share) == (0.8, 0.5)
    assert (strong.second.scale, mild.second.scale) == ((0.3, 1.2), (0.6, 1.2))
    assert (strong.second.gaussian, mild.second.gaussian) == ((1, 25), (1, 12))
    assert (strong.second.poisson, mild.second.poisson) == ((0.05, 2.5), (0.05, 1))
    assert (strong.second.quality, mild.second.quality) == ((30, 95), (60, 100))
