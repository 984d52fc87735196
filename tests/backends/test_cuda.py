"""The core on an NVIDIA GPU against the same on the CPU; skipped where there is none."""

import copy
import sys
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

from tudsr_core.backends.local import Backbone, load_embedded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.pictures import match_color
from tudsr_core.vae import VAETiling
from tudsr_core.weights.checkpoints import DTYPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")

DEVICE = "cuda"
MEAN_OF_HALF = 2e-3  # of pixels in 0..1


@pytest.fixture(autouse=True)
def exact_float32(monkeypatch):
    """TensorFloat-32, torch's default for convolutions, is no more exact than float16."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@contextmanager
def limited_to(gigabytes):
    """Leave this process so much more memory than it has now, whose holes are filled."""
    torch.cuda.empty_cache()
    total, held = torch.cuda.get_device_properties(0).total_memory, []
    try:
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)
        for size in (2**26, 2**23, 2**20):
            with suppress(torch.OutOfMemoryError):
                while True:
                    held.append(torch.empty(size, dtype=torch.uint8, device=DEVICE))
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + gigabytes * 1e9) / total)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def say(line):
    """Show a figure under `pytest -s`."""
    sys.stdout.write(line + "\n")


@pytest.fixture(scope="module")
def full_size():
    """UNet and VAE of SD2.1's shapes with random weights, float32."""
    from bench.full_size import CONFIGS

    torch.manual_seed(0)
    with torch.device(DEVICE):
        unet, vae = (kind.from_config(config).eval().requires_grad_(False) for kind, config in CONFIGS.values())
    for norm in (module for module in vae.modules() if isinstance(module, nn.GroupNorm)):
        norm.weight.add_(torch.randn_like(norm.weight) * 0.1)
        norm.bias.add_(torch.randn_like(norm.bias) * 0.1)
    return unet, vae


def backbone_of(vae, dtype):
    return Backbone(copy.deepcopy(vae), nn.Identity(), lambda *words: None, torch.device(DEVICE), DTYPES[dtype])


def noise(*size):
    return torch.rand(size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("dtype", "most", "mean"), [("fp32", 1e-3, 1e-4), ("fp16", 1, MEAN_OF_HALF), ("bf16", 1, 1e-2)]
)
def test_the_embedded_model_makes_the_cpus_picture(dtype, most, mean):
    picture = noise(1, 3, 7, 9)
    picture = nn.functional.interpolate(picture, size=(70, 90), mode="bicubic").clamp(0, 1)
    for scale in (4, 8):
        truth = upscale(picture, load_embedded("cpu"), Target(scale=scale))
        error = (upscale(picture, load_embedded(DEVICE, dtype), Target(scale=scale)) - truth).abs()
        say(f"embedded x{scale} {dtype}: max {error.max():.1e} mean {error.mean():.1e}")
        assert error.max() <= most and error.mean() <= mean


@pytest.mark.parametrize(("dtype", "bound"), [("fp32", 1e-4), ("fp16", 3e-3), ("bf16", 2e-2)])
def test_the_unet_is_the_cpus(full_size, dtype, bound):
    unet = copy.deepcopy(full_size[0])
    z, text = (
        torch.randn(size, generator=torch.Generator().manual_seed(1)) for size in ((1, 4, 64, 64), (1, 77, 1024))
    )
    there = nn.Module.to(unet, DTYPES[dtype])(
        z.to(DEVICE, DTYPES[dtype]), 200, encoder_hidden_states=text.to(DEVICE, DTYPES[dtype])
    ).sample
    truth = nn.Module.to(unet, "cpu", torch.float32)(z, 200, encoder_hidden_states=text).sample
    if dtype != "fp32":
        truth = full_size[0](z.to(DEVICE), 200, encoder_hidden_states=text.to(DEVICE)).sample.cpu()
    error = (there.float().cpu() - truth).abs()
    say(f"unet {dtype}: max {error.max():.1e} mean {error.mean():.1e} of {truth.std():.2g}")
    assert error.mean() <= bound * truth.std()


@pytest.mark.parametrize("planes", ["device", "host"])
@pytest.mark.parametrize("size", [(264, 328), (512, 200), (8, 2000)])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_tiled_autoencoder_is_the_untiled_one(full_size, dtype, size, planes):
    """In half types: no further from float32's truth than the untiled network in the same type."""
    exact, own = full_size[1], backbone_of(full_size[1], dtype)
    pixels, z = noise(1, 3, *size), noise(1, 4, *(side // 8 for side in size)) * 6 - 3
    wide = torch.float32 if dtype == "fp32" else DTYPES[dtype]
    ours = own.tiled_vae, VAETiling(96, planes)
    for name, made, untiled in (
        (
            "encode",
            ours[0].encode(pixels, lambda: None, ours[1]),
            lambda vae, t: own.latents(vae, (pixels * 2 - 1).to(t)),
        ),
        ("decode", ours[0].decode(z, lambda: None, ours[1]), lambda vae, t: vae.decode(z.to(t)).sample / 2 + 0.5),
    ):
        truth = untiled(exact, torch.empty(0, device=DEVICE)).float().cpu()
        error = (made - truth).abs().mean() / truth.std()
        plain = (untiled(own.vae, torch.empty(0, device=DEVICE, dtype=wide)).float().cpu() - truth).abs().mean()
        assert len(own.tiled_vae.layers) == 2  # else the network itself was called
        say(f"vae {name} {dtype} {size} {planes}: ours {error:.1e}, untiled {plain / truth.std():.1e}")
        assert error <= (1e-5 if dtype == "fp32" else 1.2 * plain / truth.std())


def test_a_picture_of_one_tile_is_left_to_the_network_itself(full_size):
    own, ticks, pixels = backbone_of(full_size[1], "fp16"), [], noise(1, 3, 256, 248)
    z = own.tiled_vae.encode(pixels, lambda: ticks.append(1), VAETiling(256))
    assert len(ticks) == own.tiled_vae.count("encoder", (256, 248), VAETiling(256)) == 1
    truth = own.latents(own.vae, (pixels * 2 - 1).to(DEVICE, torch.float16)).float().cpu()
    assert (z - truth).abs().max() <= 1e-3 * truth.abs().max()
    own.tiled_vae.encode(pixels, lambda: ticks.append(1), VAETiling(128))
    assert len(ticks) == 1 + own.tiled_vae.count("encoder", (256, 248), VAETiling(128)) > 2


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_embedded_autoencoders_tiles_are_as_wide_as_in_float32(dtype):
    own, exact = (load_embedded(DEVICE, kind).first.networks.backbone.tiled_vae for kind in (dtype, "fp32"))
    say(f"receptive fields {dtype}: {own.receptive_fields}, fp32 {exact.receptive_fields}")
    for half, full in zip(own.receptive_fields, exact.receptive_fields, strict=True):
        assert half.scale == full.scale and abs(half.halo - full.halo) <= 4 * max(1, full.scale)


def test_the_wavelet_fix_is_the_cpus():
    image, source = noise(2, 3, 700, 530), noise(2, 3, 700, 530).flip(3)
    error = (match_color(image, source, "wavelet", torch.device(DEVICE)) - match_color(image, source, "wavelet")).abs()
    assert error.max() < 1e-6


def test_the_tile_batch_hardly_changes_the_picture(full_size):
    unet, vae = full_size
    made = {}
    for dtype in ("fp16", "fp32"):
        model = stages(vae, unet, dtype)
        for batch in (1, 2, 5):
            options = UpscaleOptions(tile_batch=batch, tile_px=256, overlap_px=64, native_size=False)
            made[batch] = upscale(noise(1, 3, 120, 152), model, Target(scale=4), options)
        off = {batch: (one - made[1]).abs() for batch, one in made.items()}
        say(f"tile batch {dtype}: " + ", ".join(f"{b}: max {e.max():.1e} mean {e.mean():.1e}" for b, e in off.items()))
        again = upscale(noise(1, 3, 120, 152), model, Target(scale=4), options)
        assert torch.equal(again, made[5])  # and the same settings give the same bytes
        assert max(error.mean() for error in off.values()) < (5e-3 if dtype == "fp16" else 1e-4)


def stages(vae, unet, dtype):
    from bench.full_size import two_stages

    return two_stages(copy.deepcopy(unet), copy.deepcopy(vae), torch.zeros(1, 77, 1024), DEVICE, dtype)


def test_a_device_that_is_too_small_makes_the_same_picture(full_size, caplog):
    """As long as the UNet's tile fits: batches shrink, activations go to host memory, VAE tiles are halved."""
    unet, vae = full_size
    model, picture = stages(vae, unet, "fp16"), noise(1, 3, 192, 256)
    options = UpscaleOptions(tile_batch=8, color_fix="none")
    truth = upscale(picture, model, Target(scale=8), options)
    heard = []
    for above in (4, 2, 1):
        caplog.clear()
        with limited_to(above):
            made = upscale(picture, model, Target(scale=8), options)
        error = (made - truth).abs()
        said = sorted({record.message for record in caplog.records})
        heard += said
        say(f"{above} GB above the weights: max {error.max():.1e} mean {error.mean():.1e}; {said}")
        shrunk = any("tiles lowered" in one for one in said)
        assert error.mean() < MEAN_OF_HALF or shrunk
    assert any("out of memory" in one for one in heard)


def test_cancelling_gives_the_memory_back(full_size):
    vae = backbone_of(full_size[1], "fp16")
    z, before = noise(1, 4, 64, 64), torch.cuda.memory_allocated()
    for planes in ("device", "host"):
        ticks = []

        def cancel(ticks=ticks):
            ticks.append(1)
            if len(ticks) == 20:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            vae.tiled_vae.decode(z, cancel, VAETiling(128, planes))
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() - before < 2**20
        assert vae.tiled_vae.decode(z, lambda: None, VAETiling(128, planes)).isfinite().all()
