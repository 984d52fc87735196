"""Checks of StableSR on ComfyUI's own networks and samplers, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_stablesr.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import math

from inside import (  # first: it makes ComfyUI importable
    NODES,
    PUBLISHED,
    main,
    noise,
    part,
    picture,
    published_model,
    refused,
    small_vae,
)

import comfy.controlnet
import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy_extras.nodes_model_advanced
import torch
from plain_stablesr import LEVEL_OF, PLACES, encode, transform
from safetensors.torch import load_file

HOST, MULTI = part("nodes.host.stablesr"), part("nodes.multidiffusion")
SIDE, OVERLAP, SEED = 16, 8, 11
TENSORS = load_file(PUBLISHED / "stablesr.safetensors")
GIVEN = load_file(PUBLISHED / "inputs.safetensors")
TIMESTEPS = (999, 666, 333, 0)


def stablesr():
    return HOST.ManagedStableSR(PUBLISHED / "stablesr.safetensors")


def words(value):
    return [[noise(1, 77, 32, seed=value), {}]]


def model_of(kind="eps", dtype=torch.float32):
    model = published_model()[0]
    model.model.diffusion_model.to(dtype).dtype = dtype
    discrete = comfy_extras.nodes_model_advanced.ModelSamplingDiscrete
    return discrete().patch(model, "v_prediction", False)[0] if kind == "v" else model


def in_tiles(model, batch=1, **more):
    return MULTI.in_tiles(model, 8 * SIDE, 8 * OVERLAP, batch, "centred", **more)


def sample(model, z, positive, negative, cfg=1.0, sampler="ddpm", steps=4, start=None):
    sigmas = NODES["TUDSRStableSRSigmas"].execute(model, steps, 1.0).args[0]
    start = noise(*z.shape, seed=5).to(z) if start is None else start
    sampler = comfy.samplers.sampler_object(sampler)
    latent = z / 0.18215
    made = comfy.sample.sample_custom(
        model, start, cfg, sampler, sigmas, positive, negative, latent, disable_pbar=True, seed=SEED
    )
    return made * 0.18215


def steer_comfyui(unet, low, t):
    """Replace the forward of ComfyUI's residual blocks by one with SFT written out."""
    features = encode(TENSORS, low, t)
    for place, level in zip(PLACES, LEVEL_OF, strict=True):
        block = unet.get_submodule(place)

        def forward(x, emb, block=block, place=place, level=level):
            h = block.in_layers(x) + block.emb_layers(emb)[:, :, None, None]
            return block.skip_connection(x) + transform(TENSORS, place, block.out_layers(h), features[level])

        block._forward = forward


def slow_output(unet, x, low, t, texts, cfg):
    """Return the UNet's blended output; every tile at every place alone, encoder and guidance included."""

    def even(length):
        count = math.ceil((length - SIDE) / 8) + 1
        return [i * (length - SIDE) // max(1, count - 1) for i in range(count)]

    bell = torch.tensor([math.exp(-(((i - (SIDE - 1) / 2) / SIDE) ** 2) / 0.02) for i in range(SIDE)]).double()
    weights, total, count = bell[:, None] * bell, torch.zeros_like(x).double(), torch.zeros(x.shape[-2:]).double()
    for left in even(x.shape[-1]):
        for top in even(x.shape[-2]):
            box = (..., slice(top, top + SIDE), slice(left, left + SIDE))
            steer_comfyui(unet, low[box], t)
            out, other = (unet(x[box], torch.tensor([float(t)]), context=text[0][0]) for text in texts)
            total[box] += weights * (other + cfg * (out - other))
            count[box[1:]] += weights
    return (total / count).to(x)


def slow_sampling(kind, low, texts, cfg, drawn):
    """StableSR's chain, one line per equation; `drawn` is the dtype in which fresh noise is drawn."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abars, unet = torch.cumprod(1 - betas, 0), model_of(dtype=low.dtype).model.diffusion_model
    abar = float(abars[999])
    x = abar**0.5 * low + (1 - abar) ** 0.5 * noise(*low.shape, seed=5)
    fresh = comfy.k_diffusion.sampling.default_noise_sampler(x.to(drawn), seed=SEED)
    for t, later in zip(TIMESTEPS, (*TIMESTEPS[1:], None), strict=True):
        abar, before = float(abars[t]), 1.0 if later is None else float(abars[later])
        out = slow_output(unet, x, low, t, texts, cfg)
        x0 = abar**0.5 * x - (1 - abar) ** 0.5 * out if kind == "v" else (x - (1 - abar) ** 0.5 * out) / abar**0.5
        beta = 1 - abar / before
        mean = beta * before**0.5 / (1 - abar) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - abar) * x
        variance = beta * (1 - before) / (1 - abar)
        x = mean if later is None else mean + variance**0.5 * fresh(None, None)
    return x


def check_a_steered_unet_equals_diffusers():
    model, network, wanted = model_of(), stablesr().patcher.model, load_file(PUBLISHED / "wanted.safetensors")
    comfy.model_management.load_models_gpu([model])
    unet = model.model.diffusion_model
    for t in (0, 333, 999):
        steps = torch.full((2,), float(t))
        with network.steering(HOST.blocks_of(unet), GIVEN["z"].flip(0), steps):
            ours = unet(GIVEN["z"], steps, context=GIVEN["text"])
        error = (ours - wanted[f"stablesr.{t}"]).abs().max() / ours.abs().max()
        assert error < 1e-4, (t, float(error))


def check_aggregation_sampling_is_the_slow_loop():
    """In float64, because guidance of 7 multiplies what two networks round differently.

    Newer ComfyUI (0.33) keeps the latent in float32 whatever the networks compute in, and draws fresh noise so.
    """
    allowed = {torch.float64: 1e-5, torch.float32: 1e-4}
    texts = [[[text[0][0].double(), {}]] for text in (words(1), words(2))]
    for kind in ("eps", "v"):
        managed = stablesr()
        managed.patcher.model.double()
        model = in_tiles(managed.apply(model_of(kind, torch.float64)))
        for size in ((16, 16), (24, 40), (20, 33)):
            low = noise(1, 4, *size, seed=3).double()
            conditions = [HOST.with_picture(text, low) for text in texts]
            for cfg in (1.0, 7.0):
                ours = sample(model, low, *conditions, cfg)
                truths = ((most, slow_sampling(kind, low, texts, cfg, drawn)) for drawn, most in allowed.items())
                errors = ((most, (ours - truth).abs().max() / truth.abs().max()) for most, truth in truths)
                assert any(error < most for most, error in errors), (kind, size, cfg)


def check_the_model_without_stablesr_is_as_before():
    base, low = model_of(), noise(1, 4, 16, 24, seed=3)
    texts = words(1), words(2)
    before = sample(base, low, *texts, 3.0)
    steered = stablesr().apply(base)
    made = sample(steered, low, *(HOST.with_picture(text, low) for text in texts), 3.0)
    assert (made - before).abs().max() > 1e-2
    assert not any(module._forward_hooks for module in base.model.diffusion_model.modules())
    assert torch.equal(sample(base, low, *texts, 3.0), before)
    # A condition that carries a picture does nothing to a MODEL without StableSR.
    assert torch.equal(sample(base, low, *(HOST.with_picture(text, low) for text in texts), 3.0), before)


def check_a_cancelled_run_leaves_nothing():
    base, low = model_of(), noise(1, 4, 16, 16, seed=3)
    managed = stablesr()
    steered = managed.apply(base)
    conditions = [HOST.with_picture(words(i), low) for i in (1, 2)]

    def stop(*args, **kwargs):
        raise comfy.model_management.InterruptProcessingException()

    handle = base.model.diffusion_model.time_embed.register_forward_pre_hook(stop)
    try:
        sample(steered, low, *conditions)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("was not cancelled")
    handle.remove()
    assert not any(module._forward_hooks for module in base.model.diffusion_model.modules())
    assert managed.patcher.model._last is None


def check_the_networks_are_loaded_and_counted_with_the_model():
    managed, low, seen = stablesr(), noise(1, 4, 16, 16, seed=3), []
    original = comfy.model_management.load_models_gpu

    def spy(models, *args, **kwargs):
        seen.extend(models)
        return original(models, *args, **kwargs)

    comfy.model_management.load_models_gpu = spy
    try:
        sample(managed.apply(model_of()), low, *(HOST.with_picture(words(i), low) for i in (1, 2)))
    finally:
        comfy.model_management.load_models_gpu = original
    assert any(one.model is managed.patcher.model for one in seen)
    assert managed.patcher.model_size() == sum(x.nbytes for x in TENSORS.values())


class MiddleControl(comfy.controlnet.ControlBase):
    """Adds its hint, shrunk to the middle block's grid, there."""

    def get_control(self, x_noisy, t, cond, batched_number, transformer_options=None):
        assert tuple(self.cond_hint_original.shape[-2:]) == tuple(side * 8 for side in x_noisy.shape[-2:])
        small = torch.nn.functional.avg_pool2d(self.cond_hint_original[:, :1], 64)
        return {"input": [], "middle": [small.expand(len(x_noisy), 128, -1, -1)], "output": []}


def _tile_prompts(height, width):
    """Return tile prompts whose encodings are known, and the CLIP that knows them."""
    tiling, prompts = part("tudsr_core.tiling"), part("tudsr_core.prompts")
    plan = tiling.plan_tiles(height, width, SIDE, OVERLAP)
    texts = tuple(prompts.TilePrompt(f"word{index}") for index in range(len(plan)))

    class Clip:
        def tokenize(self, text):
            return {"l": [[text]]}

        def encode_from_tokens_scheduled(self, tokens, show_pbar=False):
            return words(len(tokens["l"][0][0]) + sum(map(ord, tokens["l"][0][0])))

    return prompts.TilePrompts(plan, texts, prompts.Style("", "", "")), Clip()


def check_pictures_tiles_prompts_and_a_controlnet_each_meet_their_own():
    """Two pictures, tile prompts and a hint: at every tile and picture as if it were sampled alone, rows not mixed."""
    size, cfg = (24, 24), 4.0
    low, x = noise(2, 4, *size, seed=3), noise(2, 4, *size, seed=4)
    tile_prompts, clip = _tile_prompts(*size)
    control = MiddleControl()
    control.set_cond_hint(noise(1, 3, *(8 * side for side in size), seed=9))

    def conditions(pictures):
        return [HOST.with_picture([[words(i)[0][0], {"control": control}]], pictures) for i in (1, 2)]

    steered = stablesr().apply(model_of())
    model = in_tiles(steered, tile_prompts=tile_prompts, clip=clip)
    made = sample(model, low, *conditions(low), cfg, steps=1, start=x)
    unet = published_model()[0].model.diffusion_model
    plan = tile_prompts.plan
    bell = torch.tensor([math.exp(-(((i - 7.5) / 16) ** 2) / 0.02) for i in range(16)])
    abar = 0.00466009508818388
    start = abar**0.5 * low + (1 - abar) ** 0.5 * x
    for row in range(2):
        total, count = torch.zeros(4, *size), torch.zeros(size)
        for tile in plan:
            steer_comfyui(unet, tile.cut(low[row : row + 1]), 999)
            hint = torch.nn.functional.avg_pool2d(tile.cut(control.cond_hint_original, 8)[:, :1], 64)
            text = clip.encode_from_tokens_scheduled({"l": [[f"word{tile.index}"]]})[0][0]
            eps = []
            for context in (text, words(2)[0][0]):
                extra = {"middle": [hint.expand(1, 128, -1, -1).clone()], "input": [], "output": []}
                part_of = tile.cut(start[row : row + 1])
                eps.append(unet(part_of, torch.tensor([999.0]), context=context, control=extra))
            weights = bell[:, None] * bell
            tile.cut(total).add_(weights * (eps[1] + cfg * (eps[0] - eps[1]))[0])
            tile.cut(count).add_(weights)
        truth = (start[row] - (1 - abar) ** 0.5 * total / count) / abar**0.5
        error = (made[row] - truth).abs().max() / truth.abs().max()
        assert error < 1e-4, (row, float(error))
    wrong = sample(model, low, *conditions(low.flip(0)), cfg, steps=1, start=x)
    assert (wrong - made).abs().amax((1, 2, 3)).min() > 1e-2, "pictures that change places must be seen"


def check_tiles_that_run_together_are_steered_row_by_row():
    """As on a GPU, where tiles are computed together: two pictures, three tiles at once, each its own prompt."""
    size = (24, 32)
    low, calls = noise(2, 4, *size, seed=3), []
    tile_prompts, clip = _tile_prompts(*size)
    conditions = [HOST.with_picture(words(i), low) for i in (1, 2)]
    steered = stablesr().apply(model_of())
    unet = steered.model.diffusion_model
    handle = unet.time_embed.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    original, made = MULTI.batches_tiles, []
    for together in (False, True):
        MULTI.batches_tiles = lambda x, together=together: together
        try:
            for given in ({}, dict(tile_prompts=tile_prompts, clip=clip)):
                made.append(sample(in_tiles(steered, batch=3, **given), low, *conditions, 4.0, steps=2))
        finally:
            MULTI.batches_tiles = original
    handle.remove()
    assert max(calls) >= 3 * 2, "tiles did not run together"
    for single, batched in zip(made[:2], made[2:], strict=True):
        assert (single - batched).abs().max() < 1e-4 * single.abs().max()


def check_each_picture_is_encoded_once_per_tile_and_step():
    low, seen, managed = noise(2, 4, 24, 24, seed=3), [], stablesr()
    encoder = managed.patcher.model.get_submodule("structcond_stage_model")
    handle = encoder.register_forward_hook(lambda module, args, made: seen.append(len(args[0])))
    conditions = [HOST.with_picture(words(i), low) for i in (1, 2)]
    sample(in_tiles(managed.apply(model_of())), low, *conditions, 4.0, steps=2)
    handle.remove()
    assert seen == [2] * (2 * 4), seen


def check_any_sampler_runs():
    low = noise(1, 4, 20, 24, seed=3)
    model = in_tiles(stablesr().apply(model_of()))
    conditions = [HOST.with_picture(words(i), low) for i in (1, 2)]
    for sampler in ("euler", "dpmpp_2m", "heun", "dpmpp_2m_sde"):
        made = sample(model, low, *conditions, 3.0, sampler)
        assert made.shape == low.shape and made.isfinite().all()


def check_what_cannot_be_is_said_in_one_line():
    low = noise(1, 4, 16, 16, seed=3)
    steered, carried = stablesr().apply(model_of()), HOST.with_picture(words(1), low)
    refused(lambda: sample(steered, low, carried, words(2), 3.0), "CONDITIONINGs does not")
    refused(lambda: sample(steered, low, words(1), words(2)), "CONDITIONINGs does not")
    wide = noise(1, 4, 16, 24, seed=3)
    refused(lambda: sample(steered, wide, carried, carried), "16 x 16 latents", "24 x 16")
    managed = stablesr()
    managed.patcher.model.prediction = "v_prediction"
    refused(lambda: managed.apply(model_of()), "predicts epsilon", "SD2.1 for 768v")
    managed.apply(model_of("v"))
    managed.patcher.model.prediction = "epsilon"
    refused(lambda: managed.apply(model_of("v")), "predicts v_prediction", "SD2.1-base")
    refused(lambda: managed.apply(part("nodes.loaders").LoadEmbedded.execute().args[0]), "does not fit this MODEL")
    config = published_model()[0]
    config.model.model_config.unet_config["context_dim"] = 768
    refused(lambda: stablesr().apply(config), "1.x", "SD2.1-base")


def check_the_nodes_run_from_file_to_picture():
    import folder_paths

    folder_paths.add_model_folder_path("tudsr", str(PUBLISHED))
    node, vae = NODES["TUDSRApplyStableSR"], small_vae(torch.float32, ch_mult=[1, 2, 2, 2])
    loader = NODES["TUDSRLoadStableSR"]
    assert "stablesr.safetensors" in part("nodes.host.model_files").list_weights("stablesr")
    network = loader.execute("stablesr.safetensors").args[0]
    image = picture(2, 19, 30)
    options = dict(scale=5.5, width=0, height=0, tile=64, overlap=32, tile_batch=1, window="centred")
    out = node.execute(model_of(), network, words(1), words(2), image, vae, **options)
    model, positive, negative, latent, enlarged = out.args
    assert tuple(enlarged.shape) == (2, round(19 * 5.5), 165, 3)
    assert tuple(latent["samples"].shape) == (2, 4, 13, 21)
    said = "168 x 104 px: 5 x 3 = 15 tiles of 64 x 64 px\n15 network calls for each step and picture, twice"
    assert out.ui.as_dict()["text"][0].startswith(said), out.ui.as_dict()
    z = latent["samples"] * 0.18215
    made = sample(model, z, positive, negative, 7.0)
    decoded = NODES["TUDSRCFWDecode"].execute({"samples": made / 0.18215}, vae, enlarged, 0.0, "wavelet", 64, "host")
    assert decoded.args[0].shape == enlarged.shape and decoded.args[0].isfinite().all()
    wide = small_vae(torch.float32, ch_mult=[1, 2, 2, 2])
    wide.latent_channels = 16
    start = model_of(), network
    refused(lambda: node.execute(*start, words(1), words(2), image, wide, **options), "16 latent channels")
    refused(lambda: node.execute(*start, words(1), [], image, vae, **options), "CONDITIONING is empty")
    refused(lambda: node.execute(*start, words(1), words(2), image * torch.nan, vae, **options), "NaN")
    refused(lambda: part("nodes.host.model_files").find_weights("lost.ckpt", "stablesr"), "lost.ckpt", "press R")


def check_sigmas_are_those_of_the_timesteps():
    model, node = model_of(), NODES["TUDSRStableSRSigmas"]
    sampling = model.get_model_object("model_sampling")
    for steps, strength, wanted in ((4, 1.0, TIMESTEPS), (4, 0.5, (333, 0)), (1, 1.0, (999,)), (10, 0.01, (0,))):
        sigmas = node.execute(model, steps, strength).args[0]
        assert sampling.timestep(sigmas[:-1]).tolist() == list(wanted) and sigmas[-1] == 0


if __name__ == "__main__":
    main(globals())
