import pytest
import torch
from live_bytes import LiveBytes

from tudsr_core.cli.console import ColorName
from tudsr_core.pictures import color
from tudsr_core.pictures.color import COLOR_FIXES, adain, low_frequencies, match_color, wavelet
from tudsr_core.pictures.srgb import from_lab, from_linear, to_lab, to_linear


def slow_blur(plane, levels):
    """The a trous blur one pixel at a time: 3 x 3 kernel [1 2 1] x [1 2 1] / 16, edges repeated."""
    height, width = plane.shape
    weights = {-1: 0.25, 0: 0.5, 1: 0.25}
    for level in range(levels):
        reach, out = 2**level, torch.zeros_like(plane)
        for y in range(height):
            for x in range(width):
                for i, a in weights.items():
                    for j, b in weights.items():
                        yy = min(max(y + i * reach, 0), height - 1)
                        xx = min(max(x + j * reach, 0), width - 1)
                        out[y, x] += a * b * plane[yy, xx]
        plane = out
    return plane


def test_low_frequencies_equal_the_slow_blur(noise):
    plane = noise(1, 1, 11, 14).double()
    assert (low_frequencies(plane, 3)[0, 0] - slow_blur(plane[0, 0], 3)).abs().max() < 1e-12


def test_wavelet_is_high_bands_of_the_picture_plus_low_band_of_the_source(noise):
    image, source = noise(1, 3, 40, 30), noise(1, 3, 40, 30, seed=1)
    high, low = torch.zeros_like(image), image
    for level in range(1, 6):
        blurred = low_frequencies(image, level)
        high, low = high + (low - blurred), blurred
    assert (wavelet(image, source) - (high + low_frequencies(source))).abs().max() < 1e-6


def test_adain_gives_the_moments_of_the_source(noise):
    image, source = noise(2, 3, 16, 16) * 0.3, noise(2, 3, 16, 16, seed=1) * 0.6 + 0.2
    out = adain(image, source)
    assert torch.allclose(out.mean((2, 3)), source.mean((2, 3)), atol=1e-6)
    wanted = (source.var((2, 3)) + 1e-5).sqrt() / (image.var((2, 3)) + 1e-5).sqrt() * image.std((2, 3))
    assert torch.allclose(out.std((2, 3)), wanted, atol=1e-6)


def test_adain_divides_by_one_less_than_the_pixels():
    """Two pixels, whose variance is then (a - b)^2 / 2; beside the 1e-5 in the root it shows which one is taken."""
    image, source = (torch.tensor([0.5, 0.5 + step]).expand(1, 3, 1, 2) for step in (0.004, 0.02))
    ratio = ((0.02**2 / 2 + 1e-5) / (0.004**2 / 2 + 1e-5)) ** 0.5
    wanted = torch.tensor([0.51 - 0.002 * ratio, 0.51 + 0.002 * ratio])
    assert (adain(image, source) - wanted).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["adain", "wavelet", "lab", "none"])
def test_a_picture_matched_to_itself_stays(method, noise):
    for size in ((33, 21), (1, 1), (1, 40)):
        image = noise(1, 3, *size)
        assert (match_color(image, image, method) - image).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["adain", "wavelet", "lab"])
def test_a_colour_cast_is_removed(method, noise):
    source = noise(1, 3, 64, 64) * 0.5 + 0.25
    cast = source * 0.9 + torch.tensor([0.1, 0.0, -0.05]).view(1, 3, 1, 1)
    before = (cast.mean((2, 3)) - source.mean((2, 3))).abs().max()
    after = (match_color(cast, source, method).mean((2, 3)) - source.mean((2, 3))).abs().max()
    assert before > 0.04
    assert after < (1e-2 if method == "lab" else 2e-3)  # a mean in CIELAB is none in RGB


def slow_lab(rgb):
    """L*, a*, b* of one sRGB colour, from the standards' text; D50 through Bradford's matrix."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    rows = ((0.4360747, 0.3850649, 0.1430804), (0.2225045, 0.7168786, 0.0606169), (0.0139322, 0.0971045, 0.7141733))
    roots = []
    for row, white in zip(rows, (0.96422, 1.0, 0.82521), strict=True):
        ratio = sum(a * b for a, b in zip(row, linear, strict=True)) / white
        roots.append(ratio ** (1 / 3) if ratio > 216 / 24389 else (24389 / 27 * ratio + 16) / 116)
    return [116 * roots[1] - 16, 500 * (roots[0] - roots[1]), 200 * (roots[1] - roots[2])]


def slow_labs(image):
    return [slow_lab(color) for color in image[0].flatten(1).T.tolist()]


def test_cielab_is_the_standards(noise):
    image = noise(1, 3, 9, 11).double()
    ours = to_lab(image)[0].flatten(1).T
    assert (ours - torch.tensor(slow_labs(image), dtype=torch.float64)).abs().max() < 0.01
    assert (from_lab(to_lab(image)) - image).abs().max() < 1e-9
    values = torch.linspace(-3, 40, 1001, dtype=torch.float64)
    assert (from_linear(to_linear(values)) - values).abs().max() < 1e-6
    assert to_linear(torch.tensor([0.5, 1.0])).tolist() == pytest.approx([0.2140411, 1.0])


def test_lab_gives_lightness_and_colour_the_moments_of_the_source(noise, monkeypatch):
    image, source = noise(1, 3, 13, 12) * 0.2 + 0.3, noise(1, 3, 13, 12, seed=1) * 0.3 + 0.4
    made = match_color(image, source, "lab")
    own, wanted, got = (torch.tensor(slow_labs(one), dtype=torch.float64) for one in (image, source, made))
    ratio = ((wanted.var(0) + 0.1) / (own.var(0) + 0.1)).sqrt()
    assert (got - ((own - own.mean(0)) * ratio + wanted.mean(0))).abs().max() < 0.01
    monkeypatch.setattr(color, "STRIP_ROWS", 3)
    assert (match_color(image, source, "lab") - made).abs().max() < 1e-6


@pytest.mark.parametrize("method", ["adain", "wavelet", "lab"])
def test_grey_black_and_white_stay_what_they_are(method, noise):
    grey, other = (noise(1, 1, 24, 20, seed=seed).expand(1, 3, 24, 20) for seed in (0, 1))
    made = match_color(grey, other, method)
    assert (made.amax(1) - made.amin(1)).max() < 1e-5
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    for one in (black, white):
        assert (match_color(noise(1, 3, 8, 8) * 1e-6 + one, one, method) - one).abs().max() < 1e-4
        assert torch.isfinite(match_color(one, 1 - one, method)).all()


def test_unknown_method_and_unequal_sizes_are_refused(noise):
    with pytest.raises(ValueError, match="colour fix is 'hsv'"):
        match_color(noise(1, 3, 4, 4), noise(1, 3, 4, 4), "hsv")
    with pytest.raises(ValueError, match="equal sizes"):
        match_color(noise(1, 3, 4, 4), noise(1, 3, 4, 5), "none")


@pytest.mark.parametrize("size", [(70, 131), (32, 33), (5, 90)])
def test_tiles_of_the_wavelet_fix_change_not_one_bit(size, noise, monkeypatch):
    image, source = noise(2, 3, *size), noise(2, 3, *size, seed=1)
    whole = image + low_frequencies(source - image)
    for tile in (7, 31, 64):
        monkeypatch.setattr(color, "TILE_PX", tile)
        assert torch.equal(wavelet(image, source), whole), tile


def test_the_command_line_offers_every_fix():
    assert tuple(ColorName.__members__) == COLOR_FIXES


def test_memory_of_the_wavelet_fix_does_not_grow_with_the_picture(monkeypatch):
    """Beyond the result, live tensors are those of one tile."""
    monkeypatch.setattr(color, "TILE_PX", 32)
    extra = {}
    for side in (128, 256):
        image = torch.rand(1, 3, side, side)
        with LiveBytes() as live:
            live.count(image, 0)
            wavelet(image, torch.zeros_like(image))
        extra[side] = live.peak - 2 * image.nbytes
    assert 0 < extra[256] <= 1.1 * extra[128]
