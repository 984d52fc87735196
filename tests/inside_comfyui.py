"""Checks that run inside ComfyUI's own interpreter; `test_comfyui_inside.py` starts this file.

    COMFYUI_PYTHON tests/inside_comfyui.py COMFYUI_PATH      prints one JSON object {check: error or null}

Plain functions and asserts, because pytest is not installed beside ComfyUI.
"""

import asyncio
import importlib.util
import json
import math
import sys
import traceback
from pathlib import Path

PACK = Path(__file__).parent.parent
sys.path.insert(0, sys.argv[1])

import comfy.cli_args

comfy.cli_args.args.cpu = True

import comfy.conds
import comfy.controlnet
import comfy.diffusers_convert
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import torch


def load_pack(name="custom_nodes/a-folder-with.dots"):
    """Load the pack the way ComfyUI does, under a path-like module name."""
    name = name.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    extension = asyncio.run(module.comfy_entrypoint())
    nodes = {node.GET_SCHEMA().node_id: node for node in asyncio.run(extension.get_node_list())}
    return name, nodes


NAME, NODES = load_pack()


def part(path):
    return importlib.import_module(f"{NAME}.{path}")


class StubUNet(torch.nn.Module):
    """eps that depends on the place inside the tile (unless pointwise), on the text and on control."""

    def __init__(self, pointwise=False, device=None, operations=None):
        super().__init__()
        self.pointwise, self.dtype, self.calls, self.fail_at = pointwise, torch.float32, [], None
        self.eps = stub_eps
        self.scale = torch.nn.Parameter(torch.ones(1))

    def forward(self, x, timesteps, context=None, control=None, **_):
        self.calls.append(tuple(x.shape))
        if len(self.calls) == self.fail_at:
            raise comfy.model_management.OOM_EXCEPTION("simulated")
        extra = control["middle"][0] if control else 0
        return self.eps(x, timesteps[0], context, self.pointwise) * self.scale + extra


def stub_eps(x, t, context, pointwise):
    ramp = 1 if pointwise else torch.linspace(0.2, 1, x.shape[-2]).view(1, 1, -1, 1)
    return torch.sin(x * 0.7) * ramp + context.mean((1, 2)).view(-1, 1, 1, 1) * torch.cos(x) + t / 5000


def stub_model(pointwise=False):
    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = comfy.latent_formats.SD15

        def inpaint_model(self):
            return False

    base = comfy.model_base.BaseModel(
        Config({"pointwise": pointwise}), comfy.model_base.ModelType.EPS, unet_model=StubUNet
    )
    return comfy.model_patcher.ModelPatcher(base, torch.device("cpu"), torch.device("cpu"))


def text(value, **more):
    return [[torch.full((1, 4, 8), float(value)), dict(more)]]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SIGMAS = torch.tensor([3.0, 1.2, 0.4, 0.0])


def sample(model, start, cfg=1.0, positive=None, negative=None, sigmas=SIGMAS):
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object("euler"),
            sigmas,
            positive or text(0.3),
            negative or text(-0.2),
            torch.zeros_like(start),
            disable_pbar=True,
        )
    return out * 0.18215


def multidiffusion(model, tile=128, overlap=48, batch=1, window="uniform", jitter=False):
    return NODES["TUDSRMultiDiffusion"].execute(model, tile, overlap, batch, window, jitter).args[0]


def slow_reference(start, tile, overlap, cfg, hint=None):
    """Euler steps on the plain average over tiles, written out; no code of the pack."""
    height, width = start.shape[-2:]

    def offsets(length):
        if length <= tile:
            return [0]
        count = math.ceil((length - tile) / (tile - overlap)) + 1
        return [i * (length - tile) // (count - 1) for i in range(count)]

    schedule = comfy.model_base.model_sampling(
        type("C", (), {"sampling_settings": {}})(), comfy.model_base.ModelType.EPS
    )
    x = start * SIGMAS[0]
    for sigma, after in zip(SIGMAS, SIGMAS[1:], strict=False):
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        t = schedule.timestep(sigma.view(1)).float()[0]
        for top in offsets(height):
            for left in offsets(width):
                box = (..., slice(top, top + tile), slice(left, left + tile))
                inner = x[box] / (sigma**2 + 1) ** 0.5
                extra = 0 if hint is None else hint[box]
                outs = [
                    x[box] - sigma * (stub_eps(inner, t, torch.full((1, 4, 8), value), False) + extra)
                    for value in (0.3, -0.2)
                ]
                total[box] += outs[1] + cfg * (outs[0] - outs[1])
                count[box] += 1
        x = x + (x - total / count) / sigma * (after - sigma)
    return x


def check_multidiffusion_equals_a_slow_average():
    for shape in ((2, 4, 37, 50), (1, 4, 16, 61)):
        for cfg in (1.0, 4.5):
            start = noise(*shape)
            ours = sample(multidiffusion(stub_model()), start, cfg)
            error = (ours - slow_reference(start, 16, 6, cfg)).abs().max()
            assert error < 1e-5, (shape, cfg, float(error))


def check_tile_batch_changes_nothing():
    start = noise(1, 4, 40, 52)
    outs = [sample(multidiffusion(stub_model(), batch=batch), start, 3.0) for batch in (1, 2, 5)]
    assert max((outs[0] - out).abs().max() for out in outs) < 1e-6


def check_pointwise_model_tiled_equals_untiled():
    start = noise(1, 4, 41, 50)
    whole = sample(stub_model(True), start, 3.0)
    for window in ("uniform", "gaussian", "published"):
        for jitter in (False, True):
            tiled = sample(multidiffusion(stub_model(True), window=window, jitter=jitter), start, 3.0)
            assert (tiled - whole).abs().max() < 1e-5, (window, jitter)


def check_jitter_moves_the_grid_and_is_repeatable():
    start = noise(1, 4, 64, 64)
    still, moved, again = (sample(multidiffusion(stub_model(), jitter=jitter), start) for jitter in (False, True, True))
    assert (still - moved).abs().max() > 1e-4
    assert torch.equal(moved, again)


class HintControl(comfy.controlnet.ControlBase):
    """Adds its hint, shrunk to latents, to eps, and remembers what it was given."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        assert tuple(self.cond_hint_original.shape[-2:]) == tuple(side * 8 for side in x_noisy.shape[-2:])
        self.seen.append(self.cond_hint_original.clone())
        small = self.cond_hint_original[:, :1, ::8, ::8] * self.strength
        return {"input": [], "middle": [small.expand_as(x_noisy)], "output": []}


def check_control_hints_are_cut_per_tile():
    start, seen = noise(1, 4, 30, 44), []
    hint = torch.rand(1, 3, 30 * 8, 44 * 8, generator=torch.Generator().manual_seed(1))
    control = HintControl(seen).set_cond_hint(hint, 0.7)
    both = [text(value, control=control) for value in (0.3, -0.2)]
    ours = sample(multidiffusion(stub_model()), start, 2.0, *both)
    wanted = slow_reference(start, 16, 6, 2.0, hint[:, :1, ::8, ::8] * 0.7)
    assert (ours - wanted).abs().max() < 1e-5
    assert {tuple(one.shape[-2:]) for one in seen} == {(128, 128)}
    assert torch.equal(control.cond_hint_original, hint)


def check_masks_are_cut_per_tile():
    start = noise(1, 4, 40, 40)
    mask = torch.zeros(1, 40, 40)
    mask[:, :, :17] = 1
    conds = text(0.9, mask=mask, mask_strength=1.0) + text(-0.4, mask=1 - mask, mask_strength=1.0)
    whole = sample(stub_model(True), start, 1.0, conds)
    tiled = sample(multidiffusion(stub_model(True)), start, 1.0, conds)
    assert (tiled - whole).abs().max() < 1e-5


def check_areas_reach_only_their_tiles():
    start = noise(1, 4, 64, 64)
    left = [text(0.9, area=(64, 32, 0, 0), strength=1.0)[0], text(0.0)[0]]
    with_area = sample(multidiffusion(stub_model(True), 128, 0), start, 1.0, left)
    plain = sample(multidiffusion(stub_model(True), 128, 0), start, 1.0, text(0.0))
    assert (with_area - plain)[..., 40:].abs().max() < 1e-6
    assert (with_area - plain)[..., :20].abs().max() > 1e-2


def check_another_packs_wrapper_still_acts():
    calls = []

    def other(executor, model, conds, x_in, timestep, model_options):
        calls.append(tuple(x_in.shape))
        return [out + 0.1 for out in executor(model, conds, x_in, timestep, model_options)]

    start, sigmas = noise(1, 4, 40, 40), torch.tensor([1.0, 0.0])
    plain = sample(multidiffusion(stub_model()), start, sigmas=sigmas)
    for ours_first in (True, False):
        calls.clear()
        model = multidiffusion(stub_model()) if ours_first else stub_model().clone()
        model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "other_pack", other)
        model = model if ours_first else multidiffusion(model)
        both = sample(model, start, sigmas=sigmas)
        assert (both - plain - 0.1).abs().max() < 1e-5
        assert len(calls) in (1, 16), calls


def check_memory_is_estimated_for_a_tile():
    seen = []
    original = comfy.sampler_helpers.estimate_memory

    def spy(model, noise_shape, conds):
        seen.append(tuple(noise_shape))
        return original(model, noise_shape, conds)

    comfy.sampler_helpers.estimate_memory = spy
    try:
        sample(multidiffusion(stub_model(), batch=2), noise(1, 4, 200, 200), sigmas=torch.tensor([1.0, 0.0]))
    finally:
        comfy.sampler_helpers.estimate_memory = original
    assert seen == [(2, 4, 16, 16)], seen


def embedded():
    return NODES["TUDSRLoadEmbedded"].execute().args


OPTIONS = dict(tile=128, overlap=32, tile_batch=1, window="gaussian", color_fix="none", sample_posterior=False, seed=0)


def upscale(scale, image, models=None, **changes):
    first, second, vae, conditioning = models or embedded()
    with torch.inference_mode():
        return NODES["TUDSRUpscale"].execute(
            image, first, vae, conditioning, scale, 0, 0, stage_two=second, **(OPTIONS | changes)
        )


def picture(batch, height, width, channels=3):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    planes = [(x * y / (i + 1)).sin() * 0.4 + 0.5 for i in range(channels)]
    return torch.stack([torch.stack(planes, -1).roll(i, 0) for i in range(batch)])


def library(scale, image, **changes):
    """The same through the core's diffusers backend; wants and gives B H W C."""
    local, pipeline, plan = (part(f"tudsr_core.{name}") for name in ("local", "pipeline", "plan"))
    options = pipeline.UpscaleOptions(128, 32, color_fix="none", **changes)
    out = pipeline.upscale(image.movedim(-1, 1), local.load_embedded("cpu"), plan.Target(scale=scale), options)
    return out.movedim(1, -1)


def check_nodes_equal_the_library():
    for scale, shape in ((4, (1, 40, 56)), (8, (1, 40, 56)), (3.3, (1, 31, 47)), (8, (3, 16, 24))):
        image = picture(*shape)
        error = (upscale(scale, image).args[0] - library(scale, image)).abs().max()
        assert error < 1 / 255, (scale, shape, float(error))


def check_alpha_equals_the_library():
    image = picture(1, 24, 32)
    mask = torch.zeros(1, 24, 32)
    mask[:, :, 20:] = 1
    made, out_mask = upscale(4, image, mask=mask).args
    wanted = library(4, torch.cat([image, 1 - mask[..., None]], -1))
    assert (made - wanted[..., :3]).abs().max() < 1 / 255
    assert (out_mask - (1 - wanted[..., 3])).abs().max() < 1 / 255
    assert (upscale(4, image, mask=torch.zeros(1, 64, 64)).args[1]).abs().max() < 1e-6


def check_stage_one_then_two_equals_upscale():
    models, image = embedded(), picture(1, 24, 20)
    first, second, vae, conditioning = models
    with torch.inference_mode():
        middle = NODES["TUDSRStageOne"].execute(image, first, vae, conditioning, 4.0, 0, **OPTIONS).args[0]
        end = NODES["TUDSRStageTwo"].execute(middle, second, vae, conditioning, 2.0, 0, **OPTIONS).args[0]
    assert (end - upscale(8, image, models).args[0]).abs().max() < 1e-5


def check_stage_switch_is_bit_exact_and_shares_weights():
    models, image = embedded(), picture(1, 16, 16)
    assert models[0].model is models[1].model
    key = "diffusion_model.unet.conv_in.weight"
    base = comfy.utils.get_attr(models[0].model, key).clone()
    one = upscale(4, image, models).args[0]
    upscale(8, image, models)
    assert torch.equal(upscale(4, image, models).args[0], one)
    comfy.model_management.unload_all_models()
    assert torch.equal(comfy.utils.get_attr(models[0].model, key), base)


def check_swapped_stages_are_refused_by_name():
    first, second, vae, conditioning = embedded()
    try:
        upscale(8, picture(1, 8, 8), (second, first, vae, conditioning))
    except ValueError as error:
        assert "stage-two adapter" in str(error) and "connected as stage one" in str(error), error
    else:
        raise AssertionError("accepted")


def check_v_prediction_is_refused():
    model = stub_model()
    model.model.model_sampling = comfy.model_base.model_sampling(
        model.model.model_config, comfy.model_base.ModelType.V_PREDICTION
    )
    stages = part("nodes.stages")
    try:
        stages.build_stage(model, FoldVAE(), text(0), 1, 0)
    except ValueError as error:
        assert "SD2.1-base" in str(error)
    else:
        raise AssertionError("accepted")


def check_a_vae_or_text_of_another_model_is_refused():
    stages = part("nodes.stages")
    first, _, vae, conditioning = embedded()
    wide = stub_model()
    wide.model.model_config.unet_config["context_dim"] = 1024
    for model, autoencoder, words, says in (
        (first, FoldVAE(), conditioning, "VAE makes 4 latent channels"),
        (wide, FoldVAE(), text(0), "8 wide, but the MODEL wants 1024"),
    ):
        try:
            stages.build_stage(model, autoencoder, words, 1, 0)
        except ValueError as error:
            assert says in str(error), error
        else:
            raise AssertionError("accepted")


class FoldVAE:
    """A VAE stand-in that folds pixels into four channels; exact both ways."""

    latent_channels, vae_dtype = 4, torch.float32
    first_stage_model = torch.nn.Sequential(torch.nn.GroupNorm(1, 1))

    class patcher:
        @staticmethod
        def model_size():
            return 0

    def spacial_compression_encode(self):
        return 8

    def memory_used_decode(self, shape, dtype):
        return 0

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool2d(pixels.movedim(-1, 1), 8)
        return torch.cat([small, small[:, :1]], 1)

    def decode(self, z):
        return z[:, :3].repeat_interleave(8, -1).repeat_interleave(8, -2).movedim(1, -1)


def check_out_of_memory_gives_the_same_picture_with_smaller_tiles():
    stages, pipeline = part("nodes.stages"), part("tudsr_core.pipeline")
    plan = part("tudsr_core.plan")
    image, outs = picture(1, 64, 64).movedim(-1, 1), []
    for fail_at in (None, 3):
        model = stub_model(True)
        model.model.diffusion_model.fail_at = fail_at
        stage = stages.build_stage(model, FoldVAE(), text(0.1), 1, 200)
        alone = stages.combine(stage, None, plan.StageLimits(single_up_to=4))
        options = pipeline.UpscaleOptions(128, 32, color_fix="none")
        outs.append(pipeline.upscale(image, alone, plan.Target(scale=4), options))
        sizes = {shape[-1] for shape in model.model.diffusion_model.calls}
        assert sizes == ({16} if fail_at is None else {16, 8}), sizes
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def check_control_acts_in_the_upscaler():
    stages, pipeline, plan = (part(name) for name in ("nodes.stages", "tudsr_core.pipeline", "tudsr_core.plan"))
    image, seen = picture(1, 32, 40).movedim(-1, 1), []
    hint = torch.rand(1, 3, 128, 160)
    control = HintControl(seen).set_cond_hint(hint)
    outs = []
    for tile in (64, 512):
        seen.clear()
        stage = stages.build_stage(stub_model(True), FoldVAE(), text(0.1, control=control), 1, 200)
        alone = stages.combine(stage, None, plan.StageLimits(single_up_to=4))
        options = pipeline.UpscaleOptions(tile, 16, color_fix="none")
        outs.append(pipeline.upscale(image, alone, plan.Target(scale=4), options))
        assert len(seen) == (9 if tile == 64 else 1), len(seen)
    assert (outs[0] - outs[1]).abs().max() < 1e-5


SMALL_VAE = dict(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    layers_per_block=1,
    latent_channels=4,
)


def check_encoder_adapters_equal_diffusers():
    """Every kind of encoder module, the attention's linear layers among them, through a real ComfyUI VAE."""
    from diffusers import AutoencoderKL

    loaders, checkpoints, local = (part(f) for f in ("nodes.loaders", "tudsr_core.checkpoints", "tudsr_core.local"))
    torch.manual_seed(0)
    theirs = AutoencoderKL(**SMALL_VAE).eval()
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    converted = comfy.diffusers_convert.convert_vae_state_dict(theirs.state_dict())
    vae = comfy.sd.VAE(sd=converted, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    vae.downscale_ratio = 2
    lows, modules = {}, dict(theirs.encoder.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            down, up = (
                module.weight[:3].clone().normal_() * 0.2,
                module.weight.new_empty(len(module.weight), 3).normal_(),
            )
            lows[name] = checkpoints.Low(down, up * 0.2, 6.0)
    adapter = checkpoints.Adapter("test", {}, lows)
    image = picture(1, 16, 24)
    plain = vae.encode(image)
    patched = loaders._patch_encoder(vae, adapter, "test", 1.0)
    ours = patched.encode(image)
    slot = local.LoraSlot(theirs.encoder, "VAE encoder")
    slot.use(lows)
    wanted = theirs.encode(image.movedim(-1, 1) * 2 - 1).latent_dist.mode()
    assert any("to_q" in name for name in lows) and len(lows) >= 14
    assert (ours - wanted).abs().max() < 2e-5 * max(1, float(wanted.abs().max())), float((ours - wanted).abs().max())
    assert (ours - plain).abs().max() > 1e-2
    assert torch.equal(vae.encode(image), plain)


def check_extra_model_folders_are_searched():
    import tempfile

    import folder_paths

    loaders = part("nodes.loaders")
    extra = Path(tempfile.mkdtemp())
    (extra / "sub").mkdir()
    (extra / "sub" / "mine.safetensors").write_bytes(b"")
    folder_paths.add_model_folder_path("tudsr", str(extra))
    assert "sub/mine.safetensors" in loaders.list_adapters()
    assert loaders.find_adapter("sub/mine.safetensors") == extra / "sub" / "mine.safetensors"
    (extra.parent / "outside.safetensors").write_bytes(b"")
    try:
        loaders.find_adapter("../outside.safetensors")
    except part("tudsr_core.checkpoints").CheckpointError as error:
        assert "models" in str(error) or str(extra) in str(error)
    else:
        raise AssertionError("left the models folder")


def check_an_adapter_for_another_unet_is_refused():
    loaders, checkpoints = part("nodes.loaders"), part("tudsr_core.checkpoints")
    low = checkpoints.Low(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    try:
        loaders.as_patches({"nowhere.to_q": low}, {}, "foreign", "UNet")
    except checkpoints.CheckpointError as error:
        assert "foreign" in str(error) and "nowhere.to_q" in str(error)
    else:
        raise AssertionError("accepted")


def check_previews_look_like_the_picture():
    first, _, vae, _ = embedded()
    latent = vae.encode(picture(1, 64, 64))
    kind = first.model.latent_format
    colors = torch.tensor(kind.latent_rgb_factors), torch.tensor(kind.latent_rgb_factors_bias)
    preview = (latent[0].movedim(0, -1) @ colors[0] + colors[1]) / 2 + 0.5
    small = torch.nn.functional.avg_pool2d(picture(1, 64, 64).movedim(-1, 1), 4)[0].movedim(0, -1)
    assert (preview - small).abs().mean() < 0.05, float((preview - small).abs().mean())


def check_plan_speaks_and_draws():
    first, _, vae, _ = embedded()
    out = NODES["TUDSRPlan"].execute(picture(1, 100, 150), first, vae, 8.0, 0, 0, 512, 128, 1)
    grid, words, calls = out.args
    assert "150 x 100 to 1200 x 800" in words
    assert calls == 2 + 6
    assert tuple(grid.shape[:1]) == (1,) and grid.shape[-1] == 3


def check_widget_defaults_are_the_librarys():
    options = part("tudsr_core.pipeline").UpscaleOptions()
    for name in ("TUDSRUpscale", "TUDSRStageOne", "TUDSRStageTwo"):
        defaults = {one.id: getattr(one, "default", None) for one in NODES[name].GET_SCHEMA().inputs}
        wanted = {
            "tile": options.tile_px,
            "overlap": options.overlap_px,
            "tile_batch": options.tile_batch,
            "window": options.window,
            "color_fix": options.color_fix,
            "sample_posterior": options.sample_posterior,
            "seed": options.seed,
        }
        assert {key: defaults[key] for key in wanted} == wanted


def main(checks):
    results = {}
    with torch.inference_mode():
        for name, check in list(checks.items()):
            if name.startswith("check_"):
                try:
                    check()
                    results[name] = None
                except Exception:
                    results[name] = traceback.format_exc()
    sys.stdout.write("\n" + json.dumps(results))


if __name__ == "__main__":
    main(globals())
