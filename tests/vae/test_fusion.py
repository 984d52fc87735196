"""A decoder fused with the encoder's activations, tiled, against the modules themselves on the whole picture."""

import pytest
import torch
from small_vae import Shy, contents, make_fusions, make_vae, run_fused, tiled_vae

from tudsr_core.backends.local import Backbone, LocalNetworks
from tudsr_core.vae import Fuse, VAETiling
from tudsr_core.vae.graph import read_layers

LEVELS = ("level 1", "level 2")
SIZES = {"random": (19, 27), "halves": (8, 8), "constant": (9, 15), "gradient": (31, 8)}


def nothing():
    pass


def fused(vae, fusions, pixels, z, tiling, on_tile=nothing):
    """Return the tiled decode of `z` with the features of `pixels`."""
    ours = tiled_vae(vae)
    _, features = ours.encode_with_features(pixels, [level for level in fusions], on_tile, tiling)
    fuse = {level: one.fuse for level, one in fusions.items()}
    return ours.decode(z, on_tile, tiling, fuse, features)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-12), (torch.float32, 5e-5)])
def test_fused_equals_untiled(dtype, most):
    vae, fusions = make_vae(dtype), make_fusions(LEVELS, dtype)
    for name, (height, width) in SIZES.items():
        pixels, z = contents(3, 8 * height, 8 * width)[name].sigmoid(), contents(4, height, width)["random"]
        pixels, z = pixels.to(dtype), z.to(dtype)
        # One picture at a time: in float32, untiled, a batch is itself off by 1e-4 on constant pictures.
        pairs = zip(pixels.split(1), z.split(1), strict=True)
        truth = torch.cat([run_fused(vae, fusions, *pair) for pair in pairs])
        plain = vae.decode(z).sample / 2 + 0.5
        assert (truth - plain).abs().mean() > 100 * most, "a fusion that does nothing proves nothing"
        for tile, planes in ((64, "host"), (136, "host"), (320, "host"), (136, "device")):
            if planes == "host" or name == "random":
                error = (fused(vae, fusions, pixels, z, VAETiling(tile, planes)) - truth).abs().max()
                assert error <= most, (name, tile, planes, float(error))


@pytest.mark.parametrize("level", ["level 0", "level 3"])
def test_the_finest_and_the_coarsest_level(level):
    vae, fusions = make_vae(), make_fusions([level], torch.float64)
    pixels, z = contents(3, 72, 104, 1)["random"].sigmoid(), contents(4, 9, 13, 1)["random"]
    ours = fused(vae, fusions, pixels, z, VAETiling(48))
    assert (ours - run_fused(vae, fusions, pixels, z)).abs().max() < 1e-12


def test_the_pictures_latents_do_not_change_and_features_are_the_encoders():
    vae = make_vae()
    ours, pixels = tiled_vae(vae), contents(3, 152, 104)["random"].sigmoid()
    seen = []
    hook = vae.encoder.down_blocks[1].resnets[-1].register_forward_hook(lambda *call: seen.append(call[2]))
    z, features = ours.encode_with_features(pixels, ["level 1"], nothing, VAETiling(64))
    assert torch.equal(z, ours.encode(pixels, nothing, VAETiling(64)))
    seen.clear()
    vae.encode(pixels * 2 - 1)
    hook.remove()
    assert [(one.channels, one.height, one.width) for one in features["level 1"]] == [(16, 76, 52)] * 2
    for kept, wanted in zip(features["level 1"], seen[0], strict=True):
        part = kept.read((0, 76), (0, 52), torch.empty(1, 16, 76, 52, dtype=torch.float64))
        assert (part[0] - wanted).abs().max() < 1e-12


def test_a_weight_of_zero_is_the_plain_decode():
    vae, z = make_vae(torch.float32), contents(4, 9, 13)["random"].float()
    ours, fuse = tiled_vae(vae), {level: Fuse(one.fuse.layers, 0) for level, one in make_fusions(LEVELS).items()}
    plain = ours.decode(z, nothing, VAETiling(48))
    assert torch.equal(ours.decode(z, nothing, VAETiling(48), fuse), plain)
    assert ours.count("decoder", (72, 104), fuse=fuse) == ours.count("decoder", (72, 104))


def test_every_tile_ticks_once():
    vae, fusions, ticks = make_vae(torch.float32), make_fusions(LEVELS), []
    pixels, z, tiling = torch.rand(1, 3, 72, 104), torch.randn(1, 4, 9, 13), VAETiling(48)
    ours, fuse = tiled_vae(vae), {level: one.fuse for level, one in fusions.items()}
    tiled_vae(vae).decode(z, nothing, tiling)
    _, features = ours.encode_with_features(pixels, LEVELS, lambda: ticks.append(1), tiling)
    assert len(ticks) == ours.count("encoder", (72, 104), tiling)
    first = ours.decode(z, lambda: ticks.append(1), tiling, fuse, features)
    assert len(ticks) == sum(ours.count(side, (72, 104), tiling, fuse) for side in ("encoder", "decoder"))
    assert torch.equal(ours.decode(z, nothing, tiling, fuse, features), first), "features can be used again"


def test_memory_that_runs_out_in_a_fusion_halves_its_tiles():
    vae, fusions = make_vae(), make_fusions(["level 1"], torch.float64)
    pixels, z = contents(3, 152, 216, 1)["random"].sigmoid(), contents(4, 19, 27, 1)["random"]
    truth, block = run_fused(vae, fusions, pixels, z), fusions["level 1"].blocks[0]
    shy = block.conv2 = Shy(block.conv2, 30 * 40)
    fusions["level 1"].read()
    ours = tiled_vae(vae)
    ours.target = type(ours.target)(ours.target.device, torch.float64, lambda error: "simulated" in str(error))
    _, features = ours.encode_with_features(pixels, ["level 1"], nothing, VAETiling(64))
    fuse = {"level 1": fusions["level 1"].fuse}
    assert (ours.decode(z, nothing, VAETiling(96), fuse, features) - truth).abs().max() < 1e-12
    fits = [size[0] * size[1] <= 30 * 40 for size in shy.calls]
    assert not fits[0] and fits == sorted(fits), "the following tiles must begin small"
    shy.most = 4
    with pytest.raises(MemoryError, match="smallest tiles"):
        ours.decode(z, nothing, VAETiling(96), fuse, features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_to_the_truth_as_untiled(dtype):
    exact, rough = (make_vae(kind) for kind in (torch.float64, dtype))
    pixels, z = contents(3, 72, 104, 1)["random"].sigmoid(), contents(4, 9, 13, 1)["random"]
    truth = run_fused(exact, make_fusions(LEVELS, torch.float64), pixels, z)
    fusions = make_fusions(LEVELS, dtype)
    plain = run_fused(rough, fusions, pixels.to(dtype), z.to(dtype))
    ours = fused(rough, fusions, pixels.to(dtype), z.to(dtype), VAETiling(48, "host"))
    assert (ours - truth).square().mean() < 1.5 * (plain - truth).square().mean()


def test_what_does_not_fit_is_refused_in_one_line():
    vae, ours = make_vae(torch.float32), tiled_vae(make_vae(torch.float32))
    pixels, z = torch.rand(2, 3, 64, 64), torch.randn(2, 4, 8, 8)
    fuse = {level: one.fuse for level, one in make_fusions(LEVELS).items()}
    _, features = ours.encode_with_features(pixels, LEVELS, nothing)
    other = ours.encode_with_features(pixels[..., :48], LEVELS, nothing)[1]
    swapped = dict(zip(LEVELS, reversed(list(features.values())), strict=True))
    few = {level: maps[:1] for level, maps in features.items()}
    for given in ({}, None, {"level 1": features["level 1"]}, other, swapped, few):
        with pytest.raises(ValueError, match="needs the encoder's activations at level") as refused:
            ours.decode(z, nothing, fuse=fuse, features=given)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="no level 4; its levels are level 0, level 1"):
        ours.encode_with_features(pixels, ["level 4"], nothing)
    with pytest.raises(ValueError, match="no level 4"):
        ours.decode(z, nothing, fuse={"level 4": fuse["level 1"]}, features=features)
    for layers in (fuse["level 1"].layers[1:], read_layers(vae, "decoder")):
        with pytest.raises(ValueError, match="does not fit the 16 of level 1"):
            ours.decode(z, nothing, fuse={"level 1": Fuse(layers)}, features=features)
    vae.decoder.extra = torch.nn.Identity()
    with pytest.raises(ValueError, match="decoder are not known"):
        tiled_vae(vae).decode(z, nothing, fuse=fuse, features=features)


def test_estimates_count_features_and_what_the_fusion_puts_aside():
    wide = make_vae(torch.float32, block_out_channels=(128, 256, 512, 512), norm_num_groups=32, layers_per_block=1)
    ours = tiled_vae(wide)
    fuse = {level: one.fuse for level, one in make_fusions(LEVELS, channels=(256, 512)).items()}
    features = 256 / 4 + 512 / 16
    assert ours.feature_map_bytes(1, "encoder", fuse) == 4 * 256, "the encoder needs most before it keeps any"
    assert ours.feature_map_bytes(1, "decoder", fuse) == 4 * (256 + features)
    assert ours.feature_map_bytes(1, fuse=fuse) == 4 * (256 + features)


def test_networks_encode_with_features_only_where_something_is_fused():
    vae, fusions = make_vae(torch.float32), make_fusions(LEVELS)
    pixels = contents(3, 72, 104, 1)["random"].float().sigmoid()
    backbone = Backbone(vae, torch.nn.Identity(), lambda *texts: None, torch.device("cpu"), torch.float32)
    plain, ticks = LocalNetworks(backbone), []
    assert plain.encode(pixels, None, nothing).features == {}
    fuse = {level: one.fuse for level, one in fusions.items()}
    backbone = Backbone(vae, torch.nn.Identity(), lambda *texts: None, torch.device("cpu"), torch.float32, fusion=fuse)
    networks = LocalNetworks(backbone)
    encoded = networks.encode(pixels, None, lambda: ticks.append(1))
    assert set(encoded.features) == set(LEVELS)
    decoded = networks.decode(encoded, lambda: ticks.append(1))
    assert len(ticks) == networks.vae_calls((72, 104)) > plain.vae_calls((72, 104))
    truth = run_fused(vae, fusions, pixels, encoded.z / vae.config.scaling_factor)
    assert (decoded - truth).abs().max() < 5e-5
    assert networks.facts.plane_bytes_per_pixel > plain.facts.plane_bytes_per_pixel
