"""Checks of tiled sampling inside ComfyUI's interpreter; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_tiled.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import inside as base  # first: it makes ComfyUI importable
from inside import (
    memory_asked_for,
    NODES,
    HintControl,
    multidiffusion,
    noise,
    part,
    picture,
    refused,
    sample,
    slow_reference,
    stub_model,
    text,
)

import comfy.conds
import comfy.controlnet
import comfy.latent_formats
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.supported_models
import torch

FLOW = torch.tensor([0.9, 0.6, 0.2, 0.0])
VIDEO = comfy.latent_formats.Wan21


def inner(model, latent):
    """Undo what ComfyUI and `sample` do to a latent on its way out."""
    return model.model.process_latent_in(latent / 0.18215)


def check_latents_of_video_are_tiled():
    for frames in (1, 3):
        for batch in (1, 2):
            start, model = noise(batch, 16, frames, 37, 50), stub_model(latents=VIDEO)
            ours = inner(model, sample(multidiffusion(model, batch=2), start, 4.5))
            assert ours.shape == start.shape
            assert (ours - slow_reference(start, 16, 6, 4.5)).abs().max() < 1e-4
            assert {shape[-2:] for shape in model.model.diffusion_model.calls} == {(16, 16)}


def check_masks_areas_and_concatenated_latents_of_video_are_cut():
    start = noise(1, 16, 3, 40, 52)
    mask = torch.zeros(1, 40, 52)
    mask[:, 5:17, 9:40] = 1
    # A flat area is of all frames; the longer form has frames and the first one before rows and columns.
    for area in ((20, 11, 7, 33), (2, 20, 11, 1, 7, 3)):
        conds = text(0.9, mask=mask, mask_strength=1.0) + text(0.5, area=area, strength=0.7) + text(-0.4)
        whole = sample(stub_model(True, VIDEO), start, 1.0, conds)
        model = stub_model(True, VIDEO)
        assert (sample(multidiffusion(model), start, 1.0, conds) - whole).abs().max() < 1e-5
        assert max(shape[-1] for shape in model.model.diffusion_model.calls) == 16
    bounded = text(0.9, mask=mask, mask_strength=1.0, set_area_to_bounds=True) + text(-0.4)
    whole = sample(stub_model(True), start[:, :4, 0], 1.0, bounded)
    assert (sample(multidiffusion(stub_model(True)), start[:, :4, 0], 1.0, bounded) - whole).abs().max() < 1e-5


def check_hints_of_video_are_cut():
    start, seen = noise(1, 16, 1, 30, 44), []
    hint = torch.rand(1, 3, 30 * 8, 44 * 8, generator=torch.Generator().manual_seed(1))
    control, model = HintControl(seen).set_cond_hint(hint, 0.7), stub_model(latents=VIDEO)
    both = [text(value, control=control) for value in (0.3, -0.2)]
    ours = inner(model, sample(multidiffusion(model), start, 2.0, *both))
    assert (ours - slow_reference(start, 16, 6, 2.0, hint[:, :1, None, ::8, ::8] * 0.7)).abs().max() < 1e-4
    assert {tuple(one.shape[-2:]) for one in seen} == {(128, 128)}


def filled(model, seed=0):
    """Fill a real network's uninitialised weights with small random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.model.diffusion_model.named_parameters():
        values = torch.randn(weight.shape, generator=generator) / max(8, weight.shape[-1]) ** 0.5
        weight.data = values + 1 if "norm" in name and name.endswith("weight") else values
    return model


def real_model(config):
    """A MODEL of few channels and layers with ComfyUI's own network."""
    config.set_inference_dtype(torch.float32, None)
    return filled(
        comfy.model_patcher.ModelPatcher(
            config.get_model({}, "", device="cpu"), load_device=torch.device("cpu"), offload_device=torch.device("cpu")
        )
    )


def wan(kind="t2v", **more):
    shape = {"image_model": "wan2.1", "model_type": kind, "dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 1}
    config = {"t2v": comfy.supported_models.WAN21_T2V, "i2v": comfy.supported_models.WAN21_I2V}[kind]
    return real_model(config(shape | {"text_dim": 8, "freq_dim": 16} | more))


def qwen_image():
    shape = {"image_model": "qwen_image", "num_layers": 1, "attention_head_dim": 12, "num_attention_heads": 2}
    shape |= {"joint_attention_dim": 8, "axes_dims_rope": (4, 4, 4), "in_channels": 64}
    return real_model(comfy.supported_models.QwenImage(shape))


def tiles_of(shape):
    """Boxes of 16 x 16 latents that overlap by 4 or more, evenly spread."""

    def offsets(length):
        count = -(-(length - 16) // 12) + 1
        return [i * (length - 16) // (count - 1) for i in range(count)]

    return [(..., slice(y, y + 16), slice(x, x + 16)) for y in offsets(shape[-2]) for x in offsets(shape[-1])]


def euler_over_tiles(model, start, conditions):
    """Euler steps on the plain average of the network's own answers for each tile, written out."""
    x = start * FLOW[0]
    model.model.current_patcher = model
    for sigma, after in zip(FLOW, FLOW[1:], strict=False):
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for box in tiles_of(x.shape):
            own = {name: value[box] if name == "c_concat" else value for name, value in conditions.items()}
            total[box] += model.model.apply_model(x[box], sigma.view(1), **own, transformer_options={})
            count[box] += 1
        x = x + (x - total / count) / sigma * (after - sigma)
    return x


def check_real_qwen_image_and_wan_are_tiled():
    for build, frames in ((qwen_image, 1), (wan, 1), (wan, 2)):
        model, start = build(), noise(1, 16, frames, 24, 38)
        with torch.inference_mode():
            ours = inner(model, sample(multidiffusion(model, 128, 32, 2), start, sigmas=FLOW))
            wanted = euler_over_tiles(model, start, {"c_crossattn": text(0.3)[0][0]})
            plain = inner(model, sample(model, start, sigmas=FLOW))
        assert (ours - wanted).abs().max() < 1e-4 * float(wanted.abs().max()), build.__name__
        assert (ours - plain).abs().max() > 1e-3, "the network must see the tile's border"


def check_the_start_picture_of_a_real_video_model_is_cut():
    model, start = wan("i2v", in_dim=36), noise(1, 16, 2, 24, 38)
    frame, mask = noise(1, 16, 2, 24, 38, seed=1), torch.zeros(1, 1, 2, 24, 38)
    mask[:, :, 1] = 1
    positive = [[text(0.3)[0][0], {"concat_latent_image": frame, "concat_mask": mask}]]
    ours = inner(model, sample(multidiffusion(model, 128, 32), start, positive=positive, sigmas=FLOW))
    concat = model.model.concat_cond(
        noise=start, device=start.device, concat_latent_image=frame, concat_mask=mask, denoise_mask=None
    )
    wanted = euler_over_tiles(model, start, {"c_crossattn": text(0.3)[0][0], "c_concat": concat})
    assert (ours - wanted).abs().max() < 1e-4 * float(wanted.abs().max())


def check_planes_that_only_some_models_have_are_cut():
    """Masks and poses of video models are plain conditions of the latent's sides."""
    conds, whole = part("nodes.host.conditions"), noise(1, 16, 3, 24, 38)
    pose, words = noise(1, 7, 3, 24, 38, seed=1), noise(1, 24, 38, seed=2)
    given = {"pose": comfy.conds.CONDRegular(pose), "words": comfy.conds.CONDCrossAttn(words)}
    given |= {"strength": comfy.conds.CONDConstant(0.5), "pictures": comfy.conds.CONDList([whole])}
    entry = {"model_conds": given}
    tile = part("tudsr_core.tiling.plan").Tile(0, 8, 20, 16, 16)
    assert conds.is_spatial([[entry]], whole.shape)
    (cut,) = conds.crop_conds([entry], tile, whole, {})
    assert torch.equal(cut["model_conds"]["pose"].cond, pose[..., 8:24, 20:36])
    assert all(cut["model_conds"][name] is given[name] for name in ("words", "strength", "pictures"))
    assert not conds.is_spatial([[{"model_conds": given | {"pose": given["strength"]}}]], whole.shape)


def check_latents_without_rows_are_refused():
    class Sound(comfy.latent_formats.LatentFormat):
        latent_channels, latent_dimensions = 4, 1

    model = multidiffusion(stub_model(True, Sound))
    refused(lambda: sample(model, noise(1, 4, 300)), "MultiDiffusion", "(1, 4, 300)")


def check_a_control_picture_inside_the_model_is_refused():
    class DiffSynthCnetPatch:
        encoded_image_size = (64, 64)

        def __call__(self, kwargs):
            return kwargs

    model = multidiffusion(stub_model(latents=VIDEO))
    model.set_model_double_block_patch(DiffSynthCnetPatch())
    refused(lambda: sample(model, noise(1, 16, 1, 40, 40)), "DiffSynthCnetPatch", "ControlNet")


AREAS = (
    (24, 40, 6, 11),  # height, width, top, left: fades on all sides
    (40, 24, 0, 30),  # flush with two borders
    (6, 50, 17, 0),  # a fade of one row
    (3, 3, 20, 20),  # too small to fade
    (100, 100, 20, 33),  # beyond the picture
)


def check_an_areas_fade_does_not_depend_on_the_grid():
    start = noise(1, 4, 41, 54)
    for area in AREAS:
        conds = text(0.9, area=area, strength=0.8) + text(-0.4)
        whole = sample(stub_model(True), start, 1.0, conds)
        assert (whole - sample(stub_model(True), start, 1.0, text(-0.4))).abs().max() > 1e-2
        for tile, overlap, window in ((128, 48, "uniform"), (128, 0, "uniform"), (192, 64, "gaussian")):
            tiled = sample(multidiffusion(stub_model(True), tile, overlap, window=window), start, 1.0, conds)
            assert (tiled - whole).abs().max() < 1e-5, (area, tile, overlap, float((tiled - whole).abs().max()))


def check_an_areas_fade_in_percent_and_under_other_areas():
    start = noise(1, 4, 41, 54)
    conds = text(0.9, area=("percentage", 0.4, 0.7, 0.2, 0.1), strength=0.8) + text(0.1, area=(41, 54, 0, 0))
    conds += text(0.5, area=(20, 20, 3, 9), strength=0.3)
    whole = sample(stub_model(True), start, 2.0, conds, text(-0.2, area=(30, 30, 11, 24)) + text(0.0))
    tiled = sample(multidiffusion(stub_model(True)), start, 2.0, conds, text(-0.2, area=(30, 30, 11, 24)) + text(0.0))
    assert (tiled - whole).abs().max() < 1e-5


class HintReader(torch.nn.Module):
    """In the place of a ControlNet's network: answers with the hint it was given."""

    dtype = torch.float32

    def forward(self, x, hint, timesteps, context):
        step = hint.shape[-1] // x.shape[-1]
        assert tuple(hint.shape[-2:]) == tuple(side * step for side in x.shape[-2:])
        return {
            "input": [],
            "middle": [hint[..., ::step, ::step].mean(1, keepdim=True).repeat(1, 4, 1, 1)],
            "output": [],
        }


class Halver:
    """A VAE of scale 2 for hints."""

    def spacial_compression_encode(self):
        return 2

    def encode(self, pixels):
        return torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 2)


def check_hints_and_their_masks_have_the_controls_own_scale():
    """ComfyUI's ControlNet, from hints of any size, at 4 and 8 pixels per latent and encoded; with an inpaint mask."""
    start = noise(1, 4, 30, 44)
    for ratio, vae in ((4, None), (8, None), (1, Halver())):
        for size in ((30 * 8, 44 * 8), (77, 90), (30, 44)):
            control = comfy.controlnet.ControlNet(
                HintReader(),
                compression_ratio=ratio,
                load_device=torch.device("cpu"),
                latent_format=vae and comfy.latent_formats.LatentFormat(),
                concat_mask=True,
            )
            hint, mask = torch.rand(1, 3, *size), torch.rand(1, 1, 60, 50)
            control.set_cond_hint(hint, 0.7, vae=vae, extra_concat=[mask])
            conds = text(0.3, control=control)
            whole = sample(stub_model(True), start, 1.0, conds)
            tiled = sample(multidiffusion(stub_model(True)), start, 1.0, conds)
            assert (whole - sample(stub_model(True), start)).abs().max() > 1e-2
            assert (tiled - whole).abs().max() < 1e-5, (ratio, size, float((tiled - whole).abs().max()))


class LongSums(torch.nn.Module):
    """eps from sums long enough that their order, and so their last bits, changes with the batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first, self.last = (
            torch.nn.Conv2d(4, 320, 3, padding=1),
            torch.nn.Linear(320, 1280),
            torch.nn.Linear(1280, 4),
        )

    def forward(self, x, t, context, pointwise):
        inside = torch.nn.functional.silu(self.first(torch.nn.functional.silu(self.conv(x)).mean((2, 3))))
        return torch.tanh(x) + (self.last(inside) + context.mean((1, 2))[:, None])[..., None, None]


def check_tile_batch_changes_no_bit():
    model, start = stub_model(), noise(1, 4, 40, 52)
    model.model.diffusion_model.eps = LongSums()
    outs = [sample(multidiffusion(model, batch=batch), start, 3.0) for batch in (1, 2, 5)]
    assert all(torch.equal(outs[0], out) for out in outs), [float((outs[0] - out).abs().max()) for out in outs]


def check_tile_batch_of_the_upscaler_changes_no_bit():
    image = picture(1, 60, 80)
    outs = [base.upscale(4.0, image, tile=64, overlap=16, tile_batch=batch)[0] for batch in (1, 3, 5)]
    assert all(torch.equal(outs[0], out) for out in outs), [float((outs[0] - out).abs().max()) for out in outs]


def check_memory_is_estimated_for_a_tile_of_all_frames_and_pictures():
    with memory_asked_for() as seen:
        model = multidiffusion(stub_model(latents=VIDEO), batch=2)
        sample(model, noise(3, 16, 5, 12, 200), sigmas=torch.tensor([1.0, 0.0]))
    assert seen == [(6, 16, 5, 12, 16)], seen


def check_tiles_are_pixels_of_the_models_own_latents():
    """One source for the sampler and for the plan: the MODEL."""
    plans, formats = NODES["TUDSRTilePlan"], comfy.latent_formats
    known = [(base.embedded()[0], 4), (stub_model(), 8), (stub_model(latents=formats.Wan22), 16)]
    known += [(stub_model(latents=formats.HunyuanImage21), 32), (stub_model(latents=formats.LTXV), 32)]
    known += [(stub_model(latents=formats.Flux2), 16)] if hasattr(formats, "Flux2") else []
    for model, unit in known:
        (wrapped,) = multidiffusion(model, 512, 128).wrappers["calc_cond_batch"]["tudsr_multidiffusion"]
        assert (wrapped.tile, wrapped.overlap) == (512 // unit, 128 // unit)
        out = plans.execute(4.0, 0, 0, 512, 128, "even", 1, image=picture(1, 160, 192), model=model).args
        assert (out[0].height, out[0].width) == (640 // unit, 768 // unit)
        assert (out[0].tile_height, out[0].overlap) == (512 // unit, 128 // unit)
        assert "768 x 640 px: 2 x 2 = 4 tiles of 512 x 512 px" in out[2], out[2]
        latent = {"samples": torch.zeros(1, 4, 640 // unit, 768 // unit)}
        assert plans.execute(1.0, 0, 0, 512, 128, "even", 1, latent=latent, model=model).args[0] == out[0]


SAMPLERS = ("euler", "heun", "dpmpp_2m", "dpm_2", "ddim", "uni_pc", "euler_ancestral", "lcm")


def sampled(model, start, name, positive):
    """As comfy.sample does it, from noise and over steps, without guidance and with."""
    sigmas = torch.tensor([6.0, 3.0, 1.2, 0.4, 0.0])
    return [
        comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object(name),
            sigmas,
            positive,
            text(-0.2),
            torch.zeros_like(start),
            disable_pbar=True,
            seed=5,
        )
        for cfg in (1.0, 4.5)
    ]


def check_one_tile_is_comfyuis_own_sampling_to_the_bit():
    """And many tiles of a network that sees one point at a time are, but for rounding."""
    start, mask = noise(2, 4, 24, 30), torch.zeros(1, 24, 30)
    mask[:, 5:17, 9:] = 1
    cases = {
        "words": text(0.3),
        "areas and masks": text(0.9, area=(12, 20, 3, 4)) + text(0.5, mask=mask, mask_strength=0.7) + text(-0.4),
    }
    for kind, positive in cases.items():
        for name in SAMPLERS:
            plain = sampled(stub_model(), start, name, positive)
            tiled = sampled(multidiffusion(stub_model(), 256, 64), start, name, positive)
            assert all(torch.equal(a, b) for a, b in zip(plain, tiled, strict=True)), (kind, name)
            plain = sampled(stub_model(True), start, name, positive)
            tiled = sampled(multidiffusion(stub_model(True), 128, 64), start, name, positive)
            errors = [float((a - b).abs().max() / a.abs().max()) for a, b in zip(plain, tiled, strict=True)]
            assert max(errors) < 1e-5, (kind, name, errors)


def check_gligens_boxes_are_moved_into_the_tile():
    """Boxes are `(embedding, height, width, top, left)`; one outside the tile is left out."""
    conds, whole = part("nodes.host.conditions"), noise(1, 4, 24, 38)
    tile = part("tudsr_core.tiling.plan").Tile(0, 8, 20, 16, 16)
    entry = {"gligen": ("position", "network", [("inside", 6, 10, 10, 15), ("outside", 4, 4, 0, 0)])}
    assert conds.is_spatial([[entry]], whole.shape)
    (cut,) = conds.crop_conds([entry], tile, whole, {})
    assert cut["gligen"] == ("position", "network", [("inside", 6, 5, 2, 0)]), cut["gligen"]


if __name__ == "__main__":
    base.main(globals())
