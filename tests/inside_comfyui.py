"""Checks that run inside ComfyUI's own interpreter; `test_comfyui_inside.py` starts this file.

    COMFYUI_PYTHON tests/inside_comfyui.py COMFYUI_PATH FILES    prints one JSON object {check: error or null}

FILES is a folder that the test has filled: adapters of every published format, and what peft makes of them.

Plain functions and asserts, because pytest is not installed beside ComfyUI.
"""

import asyncio
import copy
import importlib.util
import json
import math
import shutil
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
import comfy.ldm.models.autoencoder
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import sd_stand_in
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from safetensors.torch import load_file, save_file

PUBLISHED = Path(sys.argv[2])


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
    return torch.sin(x * 0.7) * ramp + context.mean((1, 2)).view(-1, *[1] * (x.ndim - 1)) * torch.cos(x) + t / 5000


def stub_model(pointwise=False, latents=comfy.latent_formats.SD15):
    class Config(comfy.supported_models_base.BASE):
        unet_extra_config = {}
        latent_format = latents

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
    local, pipeline, plan = (
        part(f"tudsr_core.{name}") for name in ("backends.local", "methods.two_stage", "methods.plan")
    )
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


def check_stock_torch_compile_compiles_each_stage_once():
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    first, second, vae, conditioning = embedded()
    small, large = picture(1, 32, 32), picture(1, 40, 56)
    wanted = upscale(8, large, (first, second, vae, conditioning)).args[0]
    compiled = [model.clone() for model in (first, second)]
    for model in compiled:
        set_torch_compile_wrapper(model, backend=count)
    models = (*compiled, vae, conditioning)
    upscale(8, small, models)
    once = len(graphs)
    assert once
    assert torch.equal(upscale(8, large, models).args[0], wanted)
    assert len(graphs) == once, (once, len(graphs))


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
    stages = part("nodes.host.stages")
    try:
        stages.build_stage(model, FoldVAE(), text(0), 1, 200)
    except ValueError as error:
        assert "SD2.1-base" in str(error)
    else:
        raise AssertionError("accepted")


def check_a_vae_or_text_of_another_model_is_refused():
    stages = part("nodes.host.stages")
    first, _, vae, conditioning = embedded()
    wide = stub_model()
    wide.model.model_config.unet_config["context_dim"] = 1024
    for model, autoencoder, words, says in (
        (first, FoldVAE(), conditioning, "VAE makes 4 latent channels"),
        (wide, FoldVAE(), text(0), "8 wide, but the MODEL wants 1024"),
    ):
        try:
            stages.build_stage(model, autoencoder, words, 1, 200)
        except ValueError as error:
            assert says in str(error), error
        else:
            raise AssertionError("accepted")


class FoldVAE:
    """A VAE stand-in that folds pixels into four channels; exact both ways."""

    latent_channels, vae_dtype, device = 4, torch.float32, torch.device("cpu")
    first_stage_model = torch.nn.Sequential(torch.nn.GroupNorm(1, 1))

    class patcher:
        model_size = staticmethod(lambda: 0)
        get_attachment = staticmethod(lambda key: None)

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
    stages, pipeline = part("nodes.host.stages"), part("tudsr_core.methods.two_stage")
    plan = part("tudsr_core.methods.plan")
    image, outs = picture(1, 64, 64).movedim(-1, 1), []
    for fail_at in (None, 3):
        model = stub_model(True)
        model.model.diffusion_model.fail_at = fail_at
        stage = stages.build_stage(model, FoldVAE(), text(0.1), 1, 200)
        alone = stages.combine(stage, None, plan.StageLimits(single_up_to=4))
        options = pipeline.UpscaleOptions(128, 32, color_fix="none", native_size=False)
        outs.append(pipeline.upscale(image, alone, plan.Target(scale=4), options))
        sizes = {shape[-1] for shape in model.model.diffusion_model.calls}
        assert sizes == ({16} if fail_at is None else {16, 8}), sizes
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def check_control_acts_in_the_upscaler():
    stages, pipeline, plan = (
        part(name) for name in ("nodes.host.stages", "tudsr_core.methods.two_stage", "tudsr_core.methods.plan")
    )
    image, seen = picture(1, 32, 40).movedim(-1, 1), []
    hint = torch.rand(1, 3, 128, 160)
    control = HintControl(seen).set_cond_hint(hint)
    outs = []
    for tile in (64, 512):
        seen.clear()
        stage = stages.build_stage(stub_model(True), FoldVAE(), text(0.1, control=control), 1, 200)
        alone = stages.combine(stage, None, plan.StageLimits(single_up_to=4))
        options = pipeline.UpscaleOptions(tile, 16, color_fix="none", native_size=False)
        outs.append(pipeline.upscale(image, alone, plan.Target(scale=4), options))
        assert len(seen) == (9 if tile == 64 else 1), len(seen)
    assert (outs[0] - outs[1]).abs().max() < 1e-5


def published_model():
    """The networks of `published.networks()`, loaded by ComfyUI from the original checkpoints' layout."""
    scope = {}
    exec(sd_stand_in.PACK, scope)  # registers the small SD2 with ComfyUI, as the test pack does
    tensors = load_file(PUBLISHED / "base.safetensors")
    unet = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    model = comfy.sd.load_diffusion_model_state_dict(unet)
    converted = {key.removeprefix("first_stage_model."): v for key, v in tensors.items() if key.startswith("first_")}
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    vae = comfy.sd.VAE(sd=converted, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2
    return model, vae


def load_published(name, model=None, vae=None, stage="one", **options):
    """Run Load TUDSR Adapter on a written file; returns (MODEL, VAE, CONDITIONING)."""
    import folder_paths

    folder_paths.add_model_folder_path("tudsr", str(PUBLISHED))
    path = next(path.name for path in PUBLISHED.iterdir() if path.stem == name)
    base_model, base_vae = published_model()
    node = NODES["TUDSRLoadAdapter"]
    return node.execute(model or base_model, path, stage, 1.0, vae or base_vae, **options).args


def comfy_eps(model, t):
    given = load_file(PUBLISHED / "inputs.safetensors")
    comfy.model_management.load_models_gpu([model], force_patch_weights=True)
    steps = torch.full((len(given["z"]),), float(t))
    return model.model.diffusion_model(given["z"], timesteps=steps, context=given["text"])


def wanted(name):
    return load_file(PUBLISHED / "wanted.safetensors")[name]


def check_every_published_adapter_equals_peft_through_comfyui():
    base, vae = published_model()
    plain = comfy_eps(base, 200)
    for name, t in (("omgsr", 273), ("osediff", 999), ("pisa_sr", 1), ("kohya", 200), ("diffusers", 200)):
        model, patched, _ = load_published(name, base, vae)
        ours, theirs = comfy_eps(model, t), wanted(f"{name}.eps")
        assert (ours - theirs).abs().max() < 2e-5, (name, float((ours - theirs).abs().max()))
        if name in ("omgsr", "osediff"):
            pixels = load_file(PUBLISHED / "inputs.safetensors")["pixels"]
            latent = patched.encode((pixels / 2 + 0.5).movedim(1, -1))
            error = (latent - wanted(f"{name}.latent")).abs().max()
            assert error < 2e-5 * max(1, wanted(f"{name}.latent").abs().max()), (name, float(error))
            assert (vae.encode((pixels / 2 + 0.5).movedim(1, -1)) - latent).abs().max() > 1e-2
    assert torch.equal(comfy_eps(base, 200), plain)


def check_each_stage_has_its_adapters_vae_as_on_the_command_line():
    """Two adapters that change the VAE encoder differently, however the VAE is wired, against the library's picture."""
    base, vae = published_model()
    words = [[load_file(PUBLISHED / "inputs.safetensors")["text"][:1], {}]]
    image = picture(1, 24, 32)
    (first, vae_one, _), (second, vae_two, _) = (
        load_published(name, base, vae, stage) for name, stage in (("omgsr", "one"), ("second", "two"))
    )
    for one in (vae, vae_one, vae_two):
        made = upscale(4, image, (first, second, one, words), tile=0, overlap=128, native_size=False).args[0]
        error = (made - wanted("two stages").movedim(1, -1)).abs()
        assert error.max() < 1e-3, (float(error.max()), float(error.mean()))


def check_the_adapters_vae_is_found_where_it_is_needed():
    base, vae = published_model()
    first, vae_one, _ = load_published("omgsr", base, vae)
    change, adapters = part("nodes.host.stages").facts_of(first).vae, part("nodes.host.adapters")
    assert adapters.with_change(vae_one, change) is vae_one and adapters.with_change(vae_one, None) is vae
    again = adapters.with_change(vae, change)
    pixels = (load_file(PUBLISHED / "inputs.safetensors")["pixels"] / 2 + 0.5).movedim(1, -1)
    assert torch.equal(again.encode(pixels), vae_one.encode(pixels))
    assert part("nodes.host.stages").facts_of(load_published("pisa_sr", base, vae)[0]).vae is None
    import folder_paths

    folder_paths.add_model_folder_path("tudsr", str(PUBLISHED))
    blocked = NODES["TUDSRLoadAdapter"].execute(base, "omgsr", "one", 1.0).args[1]
    assert "VAE" in blocked.message and "Load TUDSR Adapter" in blocked.message


def check_pisa_dials_through_comfyui():
    stages, pipeline = part("nodes.host.stages"), part("tudsr_core.methods.two_stage")
    tiles = part("tudsr_core.tiling.plan")
    given = load_file(PUBLISHED / "inputs.safetensors")
    pix, full = wanted("pisa_sr.pix"), wanted("pisa_sr.eps")
    for fidelity, detail in ((1.0, 1.0), (0.6, 1.3), (1.0, 0.0)):
        model, vae, _ = load_published("pisa_sr", fidelity=fidelity, detail=detail)
        vae.downscale_ratio = vae.upscale_ratio = 8
        stage = stages.build_stage(model, vae, [[given["text"], {}]], 1, 0)
        sweep = part("tudsr_core.tiling.run").TiledRun(tiles.plan_tiles(16, 24, 64, 16))
        z = pipeline.restore_latent(pipeline.StartLatent(given["z"]), stage, sweep, lambda preview: None)
        eps = fidelity * pix + detail * (full - pix)
        assert (z - (given["z"] - eps)).abs().max() < 5e-5, (
            fidelity,
            detail,
            float((z - given["z"] + eps).abs().max()),
        )
        assert stage.evaluations == (2 if fidelity != detail and detail else 1)


def check_adapters_work_with_another_lora_stacked():
    """Another LoRA on the same weights, before or after ours: both act, exactly."""
    base, vae = published_model()
    other = {"diffusion_model.input_blocks.0.0.weight": ("diff", (0.1 * noise(32, 4, 3, 3),))}
    reference = base.clone()
    reference.add_patches(other)
    ours = load_published("osediff", reference, vae)[0]
    after = load_published("osediff", base, vae)[0].clone()
    after.add_patches(other)
    assert (comfy_eps(ours, 999) - comfy_eps(after, 999)).abs().max() < 2e-5
    assert (comfy_eps(ours, 999) - comfy_eps(load_published("osediff", base, vae)[0], 999)).abs().max() > 1e-3


def check_adapters_work_on_offloaded_weights():
    """Low VRAM: weights stay offloaded and are patched as they are cast."""
    base, vae = published_model()
    model = load_published("osediff", base, vae)[0]
    whole = comfy_eps(model, 999)
    comfy.model_management.unload_all_models()
    model.load(torch.device("cpu"), lowvram_model_memory=1, force_patch_weights=False, full_load=False)
    assert model.model.model_lowvram or getattr(model.model, "lowvram_patch_counter", 0)
    given = load_file(PUBLISHED / "inputs.safetensors")
    steps = torch.full((len(given["z"]),), 999.0)
    offloaded = model.model.diffusion_model(given["z"], timesteps=steps, context=given["text"])
    assert (offloaded - whole).abs().max() < 2e-5, float((offloaded - whole).abs().max())
    model.detach()


def check_adapters_work_on_an_fp8_base():
    """The patch is added before rounding to fp8, so the result is near the adapter on the rounded base."""
    tensors = load_file(PUBLISHED / "base.safetensors")
    unet = {key: value for key, value in tensors.items() if key.startswith("model.diffusion_model.")}
    published_model()
    model = comfy.sd.load_diffusion_model_state_dict(unet, model_options={"dtype": torch.float8_e4m3fn})
    assert model.model.diffusion_model.input_blocks[1][0].in_layers[2].weight.dtype == torch.float8_e4m3fn
    plain = comfy_eps(model, 999)
    patched = comfy_eps(load_published("osediff", model)[0], 999)
    change, wanted_change = patched - plain, wanted("osediff.eps") - wanted("plain.eps")
    likeness = torch.nn.functional.cosine_similarity(change.flatten(), wanted_change.flatten(), 0)
    assert likeness > 0.9, float(likeness)


def check_invsr_equals_its_formulas_written_out():
    """InvSR through Load TUDSR Adapter and the upscaler against its formulas written out, 1 and 3 steps."""
    stages, pipeline, plan = (
        part(name) for name in ("nodes.host.stages", "tudsr_core.methods.two_stage", "tudsr_core.methods.plan")
    )
    given, image = load_file(PUBLISHED / "inputs.safetensors"), picture(1, 24, 32).movedim(-1, 1)
    for count in (1, 3):
        model, _, _ = load_published("noise_predictor", steps=count)
        stage = stages.build_stage(model, FoldVAE(), [[given["text"][:1], {}]], 1, 0)
        assert [step.t for step in stage.steps] == ([199] if count == 1 else [199, 99, 49])
        alone = stages.combine(stage, None, plan.StageLimits(single_up_to=4))
        options = pipeline.UpscaleOptions(color_fix="none", seed=5, native_size=False)
        made = pipeline.upscale(image, alone, plan.Target(scale=4), options)
        theirs = wanted(f"invsr.{count}")
        assert (made - theirs).abs().max() < 1e-4, (count, float((made - theirs).abs().max()))
        assert made.std() > 0.05


def check_a_stock_sampler_refuses_what_it_cannot_do():
    model = load_published("pisa_sr")[0]
    try:
        NODES["TUDSROneStepSigmas"].execute(model, 0)
    except ValueError as error:
        assert "PiSA-SR" in str(error)
    else:
        raise AssertionError("accepted")


def check_the_loader_refuses_by_name():
    for name, options, says in (
        ("omgsr", {"steps": 3}, "cannot run in 3 steps"),
        ("omgsr", {"fidelity": 0.5}, "no dials"),
        ("osediff", {"method": "omgsr"}, "adapter of OSEDiff, not of OMGSR"),
    ):
        try:
            load_published(name, **options)
        except ValueError as error:
            assert says in str(error), error
        else:
            raise AssertionError(says)


def check_the_methods_prompt_comes_from_the_users_clip():
    class Words:
        def tokenize(self, text):
            return text

        def encode_from_tokens_scheduled(self, tokens):
            return [[tokens, {}]]

    methods = part("tudsr_core.methods.published")
    assert load_published("noise_predictor", clip=Words())[2] == [[methods.INVSR_PROMPT, {}]]
    assert load_published("omgsr", clip=Words())[2] == [["", {}]]
    blocked = load_published("omgsr")[2]
    assert "CLIP" in blocked.message


def small_vae(dtype=torch.float64, **config):
    """A real ComfyUI VAE of SD's topology with few channels, weights random, none at its default."""
    torch.manual_seed(3)
    shape = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 32}
    shape |= {"ch_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0} | config
    network = comfy.ldm.models.autoencoder.AutoencoderKL(ddconfig=shape, embed_dim=4)
    state = {key: value for key, value in network.state_dict().items() if value.ndim}
    weights = {key: torch.randn(value.shape) / max(9.0, value[0].numel()) ** 0.5 for key, value in state.items()}
    weights |= {key: value + 1 for key, value in weights.items() if "norm" in key and key.endswith("weight")}
    vae = comfy.sd.VAE(sd=weights, config={"params": {"ddconfig": shape, "embed_dim": 4}}, dtype=torch.float32)
    vae.downscale_ratio = vae.upscale_ratio = 2 ** (len(shape["ch_mult"]) - 1)
    vae.first_stage_model.to(dtype)
    vae.vae_dtype = dtype
    return vae


def vae_nodes(vae, image, tile=64, planes="host", attention="exact"):
    latent = NODES["TUDSRVAEEncode"].execute(image, vae, tile, planes, attention).args[0]["samples"]
    return latent, NODES["TUDSRVAEDecode"].execute({"samples": latent}, vae, tile, planes, attention).args[0]


def check_exact_tiled_vae_equals_comfyuis_own():
    # Four channels to a group, as in SD: a group of one has no variance at all on a constant picture.
    vae = small_vae(ch=128, ch_mult=[1, 1])
    tiling, exact = part("tudsr_core.vae.settings").VAETiling, part("nodes.host.exact_vae").ExactVAE(vae)
    halves = torch.zeros(2, 38, 54, 3)
    halves[:, :, 27:] = 1
    for image in (picture(2, 38, 54), torch.full((1, 38, 54, 3), 0.3), halves, noise(1, 38, 54, 3).sigmoid()):
        pixels, network = image.movedim(-1, 1), vae.first_stage_model
        latent = network.encode(vae.process_input(pixels).double())
        truth = network.decode(latent)
        for tile in (16, 32, 34, 80):
            ours = exact.encode(pixels, lambda: None, tiling(tile, "host"))
            assert (ours - latent).abs().max() < 1e-12, (tile, float((ours - latent).abs().max()))
            out = exact.decode(latent, lambda: None, tiling(tile, "host"))
            assert (out - vae.process_output(truth)).abs().max() < 1e-12, tile
    assert exact.tiled.layers, "must not have fallen back to the whole picture"


def check_exact_vae_nodes_equal_stock_nodes():
    vae = small_vae(torch.float32)
    image = picture(2, 75, 110)
    latent, decoded = vae_nodes(vae, image)
    wanted = vae.encode(image)
    assert latent.shape == wanted.shape and (latent - wanted).abs().max() < 5e-5 * max(1, float(wanted.abs().max()))
    assert (decoded - vae.decode(latent)).abs().max() < 5e-5
    whole, windowed = (vae_nodes(vae, image, attention=kind)[0] for kind in ("exact", "windowed"))
    assert (whole - windowed).abs().max() > 1e-4


def check_exact_vae_sees_patched_and_cast_weights():
    """An adapter on the VAE encoder, weights cast per call, and weights left for loading per call."""
    vae = small_vae(torch.float32)
    plain, image = vae.encode(picture(1, 48, 64)), picture(1, 48, 64)
    patched = copy.copy(vae)
    patched.patcher = vae.patcher.clone()
    keys = [key for key in vae.first_stage_model.state_dict() if key.startswith("encoder") and key.endswith("weight")]
    patched.patcher.add_patches(
        {key: (torch.full_like(comfy.utils.get_attr(vae.first_stage_model, key), 0.02),) for key in keys}
    )
    ours = vae_nodes(patched, image)[0]
    wanted = patched.encode(image)
    assert (ours - wanted).abs().max() < 5e-5 * max(1, float(wanted.abs().max()))
    assert (ours - plain).abs().max() > 1e-2
    assert (vae_nodes(vae, image)[0] - plain).abs().max() < 5e-5 * max(1, float(plain.abs().max()))
    for module in vae.first_stage_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True
    vae.first_stage_model.to(torch.bfloat16)
    assert (vae_nodes(vae, image)[0] - vae.encode(image)).abs().max() < 5e-5 * max(1, float(plain.abs().max()))


def check_exact_vae_asks_for_a_tiles_memory():
    vae, seen = small_vae(torch.float32), []
    vae_nodes(vae, picture(1, 64, 64))  # tries the steps on a small picture first, once
    load = comfy.model_management.load_models_gpu

    def spy(models, memory_required=0, **more):
        seen.append(memory_required)
        return load(models, memory_required=memory_required, **more)

    comfy.model_management.load_models_gpu = spy
    try:
        for side in (64, 256):
            vae_nodes(vae, picture(1, side, side))
    finally:
        comfy.model_management.load_models_gpu = load
    assert len(set(seen)) == 1 and seen[0] > 64 * 64 * 32 * 4, seen


def check_an_unknown_vae_runs_whole_and_says_so():
    import logging

    for change in ("tanh", "forward"):
        vae, lines = small_vae(torch.float32), []
        network = vae.first_stage_model
        if change == "tanh":
            network.decoder.tanh_out = True
        else:  # the same modules in another order: only running them shows it
            network.encoder.forward = lambda x, forward=network.encoder.forward: forward(x.flip(-1))
        handler = logging.Handler()
        handler.emit = lambda record, lines=lines: lines.append(record.getMessage())
        logging.getLogger().addHandler(handler)
        try:
            latent, decoded = vae_nodes(vae, picture(1, 48, 64))
        finally:
            logging.getLogger().removeHandler(handler)
        assert torch.equal(latent, vae.encode(picture(1, 48, 64)))
        assert change == "forward" or torch.equal(decoded, vae.decode(latent))
        assert any("whole picture" in line for line in lines), lines


def check_a_video_vae_is_refused():
    vae = small_vae(torch.float32)
    vae.latent_dim = 3
    try:
        vae_nodes(vae, picture(1, 48, 64))
    except ValueError as error:
        assert "video" in str(error)
    else:
        raise AssertionError("accepted")


def check_cancel_stops_the_vae_within_a_tile():
    vae, seen = small_vae(torch.float32), []
    original = comfy.model_management.throw_exception_if_processing_interrupted

    def stop():
        seen.append(1)
        if len(seen) == 7:
            raise comfy.model_management.InterruptProcessingException()

    comfy.model_management.throw_exception_if_processing_interrupted = stop
    try:
        vae_nodes(vae, picture(1, 128, 128))
    except comfy.model_management.InterruptProcessingException:
        assert len(seen) == 7
    else:
        raise AssertionError("was not cancelled")
    finally:
        comfy.model_management.throw_exception_if_processing_interrupted = original


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
    except part("tudsr_core.weights.tensor_files").CheckpointError as error:
        assert "models" in str(error) or str(extra) in str(error)
    else:
        raise AssertionError("left the models folder")


def check_an_adapter_for_another_unet_is_refused():
    ours, adapters = part("nodes.host.adapters"), part("tudsr_core.weights.adapters")
    low = adapters.LoRAWeights(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    try:
        ours.apply(stub_model(), adapters.WeightDelta({"nowhere.to_q": low}), {}, "foreign", "UNet")
    except part("tudsr_core.weights.tensor_files").CheckpointError as error:
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


def check_the_plan_is_drawn_by_a_pillow_without_sizes():
    """ComfyUI asks for any Pillow; before 10.1 its own font has one size."""
    module = part("nodes.plan")
    own = module.ImageFont.load_default
    module.ImageFont.load_default = lambda: own()
    try:
        first, _, vae, _ = embedded()
        plan = NODES["TUDSRPlan"].execute(picture(1, 100, 150), first, vae, 8.0, 0, 0, 512, 128, 1)
    finally:
        module.ImageFont.load_default = own
    assert plan.args[0].shape[-1] == 3


def check_a_peft_folder_that_lacks_a_module_is_refused():
    for part_folder, module, network in (
        ("unet_lora_adapter", "mid_block.resnets.0.conv1", "UNet"),
        ("vae_encoder_lora_adapter", "mid_block.attentions.0.to_out.0", "VAE"),
    ):
        folder = shutil.copytree(PUBLISHED / "omgsr", PUBLISHED / f"lacking_{network}", dirs_exist_ok=True)
        file = folder / part_folder / "adapter_model.safetensors"
        save_file({key: value for key, value in load_file(file).items() if f".{module}." not in key}, file)
        try:
            load_published(folder.name)
        except ValueError as error:
            assert f"lacks 1 of the {network}'s modules that it says it changes" in str(error), error
            assert module in str(error)
        else:
            raise AssertionError("accepted")
        finally:
            shutil.rmtree(folder)


def check_plan_shows_the_tiles_of_the_methods_own_script():
    for name, method, size, tiles in (
        ("pisa_sr", "from file", (300, 200), "800 x 1200, 4 tiles of 768 x 768 as published"),
        ("omgsr", "omgsr", (150, 200), "800 x 600, 6 tiles of 512 x 512 as published"),
    ):
        model, vae, _ = load_published(name, method=method)
        out = NODES["TUDSRPlan"].execute(picture(1, *size), model, vae, 4.0, 0, 0, 128, 8, 1, published=True)
        assert tiles in out.args[1], out.args[1]
    first, _, vae, _ = embedded()
    try:
        NODES["TUDSRPlan"].execute(picture(1, 16, 16), first, vae, 4.0, 0, 0, 0, 128, 1, published=True)
    except ValueError as error:
        assert "this model has no published tiles" in str(error)
    else:
        raise AssertionError("accepted")


def check_small_pictures_are_enlarged_to_the_native_size_first():
    model, image, mask = stub_model(True), picture(1, 44, 60), torch.zeros(1, 44, 60)
    mask[:, :, 30:] = 1
    run = NODES["TUDSRStageOne"].execute
    made, alpha = run(image, model, FoldVAE(), text(0.1), 4.0, 200, mask=mask, **OPTIONS).args
    assert {shape[-2:] for shape in model.model.diffusion_model.calls} == {(16, 16)}
    assert len(model.model.diffusion_model.calls) == 5 * 7, len(model.model.diffusion_model.calls)
    assert made.shape == (1, 176, 240, 3) and alpha[0, 80, 60] < 0.01 and alpha[0, 80, 200] > 0.99
    made = run(image, model, FoldVAE(), text(0.1), 4.0, 200, **OPTIONS).args[0]
    resize = part("tudsr_core.pictures.tensors").resize
    large = resize(image.movedim(-1, 1), (128, 174)).clamp(0, 1).movedim(1, -1)
    wanted = run(large, model, FoldVAE(), text(0.1), 4.0, 200, **OPTIONS).args[0]
    assert (made - resize(wanted.movedim(-1, 1), (176, 240)).clamp(0, 1).movedim(1, -1)).abs().max() < 1e-5
    plan, words = load_published("omgsr", method="omgsr"), {}
    for native in (True, False):
        out = NODES["TUDSRPlan"].execute(image, *plan[:2], 4.0, 0, 0, 0, 128, 1, native_size=native)
        words[native] = out.args[1]
    assert "enlarged to 174 x 128 first" in words[True] and "then shrunk to 240 x 176" in words[True]
    assert "to 240 x 176, one tile" in words[False], words


def check_widget_defaults_are_the_librarys():
    options = part("tudsr_core.methods.two_stage").UpscaleOptions()
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
            "published": options.published,
            "native_size": options.native_size,
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
