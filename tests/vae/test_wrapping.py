"""StableSR's CFW on a tiled decoder: its real blocks with few channels, against the modules on the whole picture."""

from fractions import Fraction

import pytest
import torch
from conftest import LONG
from live_bytes import LiveBytes, device_peak
from small_vae import contents, make_vae, run_fused, target, tiled_vae

from tudsr_core.models import FeatureWrapping
from tudsr_core.vae import VAETiling, wrapping
from tudsr_core.vae.feature_maps import FeatureMap
from tudsr_core.vae.fusion import with_fusions
from tudsr_core.vae.graph import Local, read_layers
from tudsr_core.vae.memory_estimate import tile_bytes
from tudsr_core.vae.stream import run_layers

LEVELS = ["level 1", "level 2"]
SIZES = {"random": (19, 27), "halves": (8, 8), "constant": (9, 15), "gradient": (31, 8)}


def nothing():
    pass


def make_wrapping(dtype=torch.float32, widths=(16, 16), growth=4, groups=4):
    torch.manual_seed(5)
    network = FeatureWrapping(widths, growth, groups).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.to(dtype)


def untiled(vae, network, pixels, z, weight):
    """Return pixels of `z`, fused by the modules themselves."""
    fusions = {}
    for level, part in zip(LEVELS, (network.fusion_layer_1, network.fusion_layer_2), strict=True):
        fusions[level] = lambda features, x, part=part: x + weight * part(features, x)
    pairs = zip(pixels.split(1), z.split(1), strict=True)
    return torch.cat([run_fused(vae, fusions, *pair) for pair in pairs])


@pytest.mark.parametrize("tile", [64, 136, 320])
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_tiled_equals_untiled(dtype, most, tile):
    vae, network, weight = make_vae(dtype), make_wrapping(dtype), 0.5
    ours, fuse = tiled_vae(vae), wrapping(network, weight)
    for name, (height, width) in SIZES.items():
        pixels, z = contents(3, 8 * height, 8 * width, 1)[name].sigmoid(), contents(4, height, width, 1)["random"]
        pixels, z = pixels.to(dtype), z.to(dtype)
        truth = untiled(vae, network, pixels, z, weight)
        plain = vae.decode(z).sample / 2 + 0.5
        assert (truth - plain).abs().mean() > 100 * most, "a fusion that does nothing proves nothing"
        tiling = VAETiling(tile, "device" if name == "random" else "host")
        made = ours.decode(z, nothing, tiling, fuse, ours.features(pixels, LEVELS, nothing, tiling))
        assert (made - truth).abs().max() <= most, (name, float((made - truth).abs().max()))


def read_whole(feature_map):
    size = 1, feature_map.channels, feature_map.height, feature_map.width
    into = torch.empty(size, dtype=feature_map.dtype)
    return feature_map.read((0, size[2]), (0, size[3]), into)


@pytest.mark.parametrize(
    ("levels", "dtype"), [(["level 1"], torch.float64), (LEVELS, torch.bfloat16), (["level 3"], torch.float64)]
)
def test_features_alone_are_those_of_the_whole_encoder(levels, dtype):
    vae, ticks = make_vae(dtype), []
    ours, pixels, tiling = tiled_vae(vae), contents(3, 152, 104)["random"].sigmoid(), VAETiling(64, "host")
    _, wanted = ours.encode_with_features(pixels, levels, nothing, tiling)
    vae.encoder.mid_block.attentions[0].to_q = None  # what is after them is not computed
    features = ours.features(pixels, levels, lambda: ticks.append(1), tiling)
    assert list(features) == levels
    for level in levels:
        for one, other in zip(features[level], wanted[level], strict=True):
            assert one.dtype == other.dtype and one.device == other.device
            assert torch.equal(read_whole(one), read_whole(other))
            assert all(torch.equal(a, b) for a, b in zip(one.moments(4), other.moments(4), strict=True))
    assert len(ticks) == 2 * ours.count("encoder", (152, 104), tiling, keep=levels)
    assert len(ticks) < 2 * ours.count("encoder", (152, 104), tiling)


def decoder_peak(vae, network, side, tile, monkeypatch):
    """Return the most bytes alive at once on the device while latents of `side` are decoded with features."""
    features = {}
    for number, level in ((1, "level 1"), (2, "level 2")):
        values = torch.randn(2, 8 * side >> number, 8 * side >> number)
        features[level] = FeatureMap.of(values)
        features[level].add(FeatureMap.measure(values[None]))
    z, where = torch.randn(1, 4, side, side), target(torch.float32)
    layers = with_fusions(read_layers(vae, "decoder"), wrapping(network, 0.5))
    assert any(isinstance(layer, Local) for layer in layers)
    given = [z, *(one.bands[0] for one in features.values())]

    def run():
        run_layers(layers, Fraction(1, 8), z, where, VAETiling(tile, "host"), nothing, features)

    return device_peak(run, given, monkeypatch)


@pytest.mark.parametrize("tile", [256, pytest.param(512, marks=LONG)])
def test_device_memory_does_not_grow_from_4_to_8_tiles_a_side(monkeypatch, tile):
    narrow = dict(block_out_channels=(2,) * 4, norm_num_groups=1, layers_per_block=0, mid_block_add_attention=False)
    vae, network = make_vae(torch.float32, **narrow), make_wrapping(widths=(2, 2), growth=2, groups=1)
    small, large = (decoder_peak(vae, network, side, tile, monkeypatch) for side in (tile // 2, tile))
    assert large <= 1.1 * small
    assert small < (4 * tile) ** 2 * 2 * 4, "not even one whole feature map"


def test_the_estimate_covers_the_dense_blocks():
    """What a tile of the finest level with CFW takes, its margins included."""
    network, tiling, side = make_wrapping(widths=(64, 64), growth=8, groups=8), VAETiling(128), 128 + 2 * 15
    wide = dict(block_out_channels=(8, 64, 64, 64), norm_num_groups=8, layers_per_block=1)
    plain = read_layers(make_vae(torch.float32, **wide), "decoder")
    fused = with_fusions(plain, wrapping(network, 1.0))
    without, estimate = (tile_bytes(layers, Fraction(1, 8), tiling, torch.float32) for layers in (plain, fused))
    with LiveBytes() as live:
        network.fusion_layer_1.encode_enc_2[0](torch.zeros(1, 64, side, side))
    assert max(without, 0.8 * estimate) < live.peak <= estimate
