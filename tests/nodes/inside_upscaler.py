"""Checks of the upscalers and of Plan, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_upscaler.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

from inside import (  # first: it makes ComfyUI importable
    cancelled_at,
    memory_asked_for,
    NODES,
    OPTIONS,
    FoldVAE,
    HintControl,
    embedded,
    load_published,
    main,
    part,
    picture,
    stub_model,
    text,
    upscale,
)

import comfy.model_base
import comfy.model_management
import comfy.sampler_helpers
import comfy.utils
import numpy as np
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper


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


def check_previews_look_like_the_picture():
    first, _, vae, _ = embedded()
    latent = vae.encode(picture(1, 64, 64))
    kind = first.model.latent_format
    colors = torch.tensor(kind.latent_rgb_factors), torch.tensor(kind.latent_rgb_factors_bias)
    preview = (latent[0].movedim(0, -1) @ colors[0] + colors[1]) / 2 + 0.5
    small = torch.nn.functional.avg_pool2d(picture(1, 64, 64).movedim(-1, 1), 4)[0].movedim(0, -1)
    assert (preview - small).abs().mean() < 0.05, float((preview - small).abs().mean())


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


def check_plan_speaks_and_draws():
    first, _, vae, _ = embedded()
    out = NODES["TUDSRPlan"].execute(picture(1, 100, 150), first, vae, 8.0, 0, 0, 512, 128, 1)
    grid, words, calls, tiles = out.args
    assert (tiles.height, tiles.width) == (200, 300), "of the last stage, in latents"
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


def check_degrading_is_the_librarys_and_counts_the_seed_up():
    module, image = part("tudsr_core.pictures.real_esrgan"), picture(2, 40, 64, 4)
    made, what = NODES["TUDSRDegradeImage"].execute(image, "omgsr", 4.0, 7, False).args
    drawn = module.sample_degradation(np.random.default_rng(8), module.RECIPES["omgsr"], 4)
    assert made.shape == (2, 10, 16, 3) and what.splitlines()[1] == drawn.describe()
    assert torch.equal(made[1:], module.degrade(image[1:, ..., :3].movedim(-1, 1), drawn).movedim(1, -1))
    large = NODES["TUDSRDegradeImage"].execute(image, "omgsr", 4.0, 7, True).args[0]
    assert large.shape == (2, 40, 64, 3) and large.min() >= 0 and large.max() <= 1


def check_memory_is_estimated_for_all_tiles_at_once():
    with memory_asked_for() as seen:
        upscale(4, picture(1, 60, 80), tile=64, overlap=16, tile_batch=3)
    assert seen == [(3, 32, 16, 16)], seen


def check_free_memory_counts_the_weights_that_wait():
    first, _, vae, conditioning = embedded()
    networks = part("nodes.host.networks").ComfyNetworks(first, vae, conditioning)
    management = comfy.model_management
    original = management.is_device_cpu, management.get_free_memory
    management.unload_all_models()
    management.is_device_cpu, management.get_free_memory = lambda device: False, lambda device: 10**9
    try:
        assert networks.facts.free_bytes == 10**9 - first.model_size()
    finally:
        management.is_device_cpu, management.get_free_memory = original


def check_cancel_stops_the_upscaler_within_a_tile():
    cancelled_at(4, lambda: upscale(4, picture(1, 60, 80), tile=64, overlap=16))


if __name__ == "__main__":
    main(globals())
