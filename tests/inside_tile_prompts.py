"""Checks of tile prompts inside ComfyUI's interpreter; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/inside_tile_prompts.py COMFYUI_PATH     prints one JSON object {check: error or null}
"""

import hashlib
import json
import math
import tempfile
from pathlib import Path

import inside_comfyui as base  # first: it makes ComfyUI importable
from inside_comfyui import NODES, HintControl, noise, part, picture, text

import comfy.k_diffusion.sampling
import comfy.latent_formats
import comfy.model_base
import comfy.sample
import comfy.samplers
import folder_paths
import torch

prompts_module = part("tudsr_core.prompts.tile_prompts")
tiles_module = part("tudsr_core.tiling.plan")
# As on a GPU: which row of a batch gets which text is what is checked here.
part("nodes.multidiffusion").batches_tiles = lambda x: True


def word_eps(x, t, context, pointwise=False):
    """eps that depends on the place inside the tile and on the text, and does not amplify rounding."""
    rows = torch.linspace(0.2, 1, x.shape[-2]).view(1, 1, -1, 1)
    columns = torch.linspace(1, 0.4, x.shape[-1])
    return torch.tanh(x) * rows + 0.3 * context.mean((1, 2)).view(-1, 1, 1, 1) * columns + t / 5000


def stub_model():
    model = base.stub_model()
    model.model.diffusion_model.eps = word_eps
    return model


class WordClip:
    """A CLIP stand-in whose embedding is a number made of the text; long texts take two windows."""

    def __init__(self):
        self.calls = []

    def tokenize(self, words):
        tokens = words.replace(",", " ,").split()
        return {"l": [tokens[i : i + 75] for i in range(0, max(1, len(tokens)), 75)]}

    def encode_from_tokens_scheduled(self, tokens, **_):
        windows = tokens["l"]
        self.calls.append(windows)
        value = word_value(" ".join(word for window in windows for word in window).replace(" ,", ","))
        return [[torch.full((1, 77 * len(windows), 8), value), {"pooled_output": torch.full((1, 3), value)}]]


def word_value(words):
    return int(hashlib.sha256(words.encode()).hexdigest()[:6], 16) / 0xFFFFFF - 0.5


def tile_prompts(plan, texts=None, **style):
    texts = texts or [f"thing {i}" for i in range(len(plan))]
    shared = prompts_module.Style(**({"prefix": "", "suffix": "8k", "negative": "blur"} | style))
    return prompts_module.TilePrompts(plan, tuple(map(prompts_module.TilePrompt, texts)), shared)


def regions(prompts, clip=None, **more):
    widgets = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    return NODES["TUDSRTilePromptsToConditioning"].execute(clip or WordClip(), prompts, **(widgets | more)).args


def tiled(model, prompts, batch=1, window="uniform", jitter=False, clip=None):
    node = NODES["TUDSRMultiDiffusion"]
    return node.execute(model, 512, 128, batch, window, jitter, prompts, clip or WordClip()).args[0]


def run(model, start, cfg, positive, negative, sigmas, sampler="ddpm", seed=3):
    """Sample and return what the model's own space holds; `start` is noise on an empty latent."""
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model,
            start,
            cfg,
            comfy.samplers.sampler_object(sampler),
            sigmas,
            positive,
            negative,
            torch.zeros_like(start),
            disable_pbar=True,
            seed=seed,
        )
    return out * 0.18215


def schedule():
    return comfy.model_base.model_sampling(type("C", (), {"sampling_settings": {}})(), comfy.model_base.ModelType.EPS)


def reference(start, plan, positive, negative, cfg, sigmas, hints=None, seed=3):
    """MultiDiffusion with a prompt per tile and ancestral DDPM steps, written out from the papers.

    Noise predictions of both halves are averaged over the tiles, then guidance (eq. 5 of
    MultiDiffusion), then DDPM's posterior (Ho et al. 2020, eq. 6 and 7) on alpha-bar.
    """
    sampling, fresh = schedule(), comfy.k_diffusion.sampling.default_noise_sampler(start, seed=seed)
    abars = [1 / (1 + float(sigma) ** 2) for sigma in sigmas]
    z = start * float(sigmas[0]) * math.sqrt(abars[0])
    for sigma, abar, before in zip(sigmas, abars, abars[1:], strict=False):
        t = sampling.timestep(sigma.view(1)).float()[0]
        sums, count = [torch.zeros_like(z), torch.zeros_like(z)], torch.zeros_like(z)
        for i, top in enumerate(plan.tops):
            for j, left in enumerate(plan.lefts):
                index = i * len(plan.lefts) + j
                box = (..., slice(top, top + plan.tile_height), slice(left, left + plan.tile_width))
                for total, words in zip(sums, (positive[index], negative[index]), strict=True):
                    context = torch.full((1, 1, 1), word_value(words))
                    total[box] += word_eps(z[box], t, context) + (0 if hints is None else hints[index])
                count[box] += 1
        with_text, without = (total / count for total in sums)
        eps = without + cfg * (with_text - without)
        alpha = abar / before
        z = (z - (1 - alpha) / math.sqrt(1 - abar) * eps) / math.sqrt(alpha)
        if before < 1:
            z = z + math.sqrt((1 - alpha) * (1 - before) / (1 - abar)) * fresh(None, None)
    return z


def ddpm_sigmas(steps):
    return comfy.samplers.calculate_sigmas(schedule(), "ddim_uniform", steps)


def whole(prompts):
    """The composed texts of all tiles and the negative for each."""
    count = len(prompts.plan)
    return [prompts.positive(i) for i in range(count)], [prompts.style.negative] * count


CASES = (((1, 4, 37, 50), 1.0), ((2, 4, 41, 29), 5.5), ((1, 4, 16, 61), 5.5))


def check_ddim_uniform_is_the_published_schedule():
    """t = 981, 961, ..., 1: what 50 "leading" DDPM steps with offset 1 are."""
    sigmas = ddpm_sigmas(50)
    assert [int(schedule().timestep(sigma.view(1))) for sigma in sigmas[:-1]] == list(range(981, 0, -20))
    assert sigmas[-1] == 0


def check_area_conditioning_equals_multidiffusion_step_by_step():
    for shape, cfg in CASES:
        plan = tiles_module.plan_tiles(*shape[-2:], 16, 6)
        prompts, start = tile_prompts(plan), noise(*shape)
        positive, negative = regions(prompts)
        for sigma in ddpm_sigmas(10)[:-1]:
            step = torch.stack([sigma, torch.zeros(())])
            ours = run(stub_model(), start, cfg, positive, negative, step)
            wanted = reference(start, plan, *whole(prompts), cfg, step)
            error = float((ours - wanted).abs().max()) / max(1.0, float(sigma))  # in the predicted noise
            assert error < 1e-5, (shape, cfg, error)


def check_area_conditioning_equals_multidiffusion_after_ten_ddpm_steps():
    for shape, cfg in CASES:
        plan = tiles_module.plan_tiles(*shape[-2:], 16, 6)
        prompts, start = tile_prompts(plan), noise(*shape)
        model = stub_model()
        ours = run(model, start, cfg, *regions(prompts), ddpm_sigmas(10))
        wanted = reference(start, plan, *whole(prompts), cfg, ddpm_sigmas(10))
        assert (ours - wanted).abs().max() < 1e-4, (shape, cfg, float((ours - wanted).abs().max()))
        sizes = {call[-2:] for call in model.model.diffusion_model.calls}
        assert sizes == {(plan.tile_height, plan.tile_width)}, sizes
        rows = sum(call[0] for call in model.model.diffusion_model.calls)
        assert rows == 10 * len(plan) * shape[0] * (1 if cfg == 1 else 2)


def check_a_plain_negative_is_repeated_per_tile():
    plan = tiles_module.plan_tiles(40, 52, 16, 6)
    prompts, start, model = tile_prompts(plan), noise(1, 4, 40, 52), stub_model()
    positive, negative = regions(prompts, negative=text(word_value("own negative")))
    assert len(positive) == len(negative) == len(plan)
    ours = run(model, start, 5.5, positive, negative, ddpm_sigmas(4))
    wanted = reference(start, plan, whole(prompts)[0], ["own negative"] * len(plan), 5.5, ddpm_sigmas(4))
    assert (ours - wanted).abs().max() < 1e-4
    assert {call[-2:] for call in model.model.diffusion_model.calls} == {(16, 16)}
    for key in ("area", "mask"):
        value = (16, 16, 0, 0) if key == "area" else torch.ones(1, 40, 52)
        try:
            regions(prompts, negative=text(0, **{key: value}))
        except ValueError as error:
            assert key in str(error)
        else:
            raise AssertionError("accepted")


class RecordingControl(HintControl):
    """Remembers which hint went with which latent; `copy` shares the list, as networks are shared."""

    def copy(self):
        made = RecordingControl(self.seen)
        self.copy_to(made)
        return made


def check_hints_are_cut_per_tile_and_shared_by_both_halves():
    height, width = 30, 44
    plan = tiles_module.plan_tiles(height, width, 16, 6)
    prompts, start, seen = tile_prompts(plan), noise(1, 4, height, width), []
    hint = torch.rand(1, height * 8, width * 8, 3, generator=torch.Generator().manual_seed(1))
    positive, negative = regions(prompts, control_net=RecordingControl(seen), hint=hint, strength=0.7)
    for one, other in zip(positive, negative, strict=True):
        assert one[1]["control"] is other[1]["control"]
    assert len({id(entry[1]["control"]) for entry in positive}) == len(plan)
    ours = run(stub_model(), start, 5.5, positive, negative, ddpm_sigmas(10))
    planes = hint.movedim(-1, 1)
    crops = [tile.cut(planes, 8) for tile in plan]
    eps = [0.7 * crop[:, :1, ::8, ::8] for crop in crops]
    wanted = reference(start, plan, *whole(prompts), 5.5, ddpm_sigmas(10), eps)
    assert (ours - wanted).abs().max() < 1e-4, float((ours - wanted).abs().max())
    assert len(seen) == 10 * len(plan), "positive and negative of a tile run as one call"
    assert {tensor.numpy().tobytes() for tensor in seen} == {crop.numpy().tobytes() for crop in crops}


def check_a_hint_of_another_size_is_scaled_then_cut():
    plan, seen = tiles_module.plan_tiles(32, 48, 16, 8), []
    small = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(2))
    positive, _ = regions(tile_prompts(plan), control_net=RecordingControl(seen), hint=small)
    large = small.movedim(-1, 1).repeat_interleave(4, -1).repeat_interleave(4, -2)
    for tile, entry in zip(plan, positive, strict=True):
        assert torch.equal(entry[1]["control"].cond_hint_original, tile.cut(large, 8))


def check_a_hint_that_is_encoded_keeps_its_pixels():
    """Controls with a VAE count one pixel per latent; the crop must still have the VAE's eight."""
    plan, control = tiles_module.plan_tiles(32, 48, 16, 8), RecordingControl([])
    control.compression_ratio, control.latent_format = 1, comfy.latent_formats.SD15()
    hint = torch.rand(1, 256, 384, 3, generator=torch.Generator().manual_seed(2))
    positive, _ = regions(tile_prompts(plan), control_net=control, hint=hint, vae=base.FoldVAE())
    for tile, entry in zip(plan, positive, strict=True):
        assert torch.equal(entry[1]["control"].cond_hint_original, tile.cut(hint.movedim(-1, 1), 8))


def check_a_control_net_without_its_picture_is_refused():
    try:
        regions(tile_prompts(tiles_module.plan_tiles(32, 32, 16, 8)), control_net=RecordingControl([]))
    except ValueError as error:
        assert "connect hint" in str(error)
    else:
        raise AssertionError("accepted")


def check_the_masks_take_no_memory():
    plan = tiles_module.plan_tiles(1024, 1024, 64, 32)
    positive, negative = regions(tile_prompts(plan, ["same"] * len(plan)))
    masks = {entry[1]["mask"].data_ptr() for entry in (*positive, *negative)}
    assert len(positive) == 961 and len(masks) == 2
    assert positive[0][1]["mask"].untyped_storage().nbytes() == 4


def check_boxes_fit_one_frame_and_videos_are_sent_elsewhere():
    """ComfyUI cuts a mask along every axis of the latent; how many frames there are is known to nobody before."""
    plan = tiles_module.plan_tiles(32, 32, 16, 8)
    entries = [entry[1] | {"model_conds": {}, "uuid": None} for entry in regions(tile_prompts(plan))[0]]

    def weights(latent):
        resolved = list(entries)
        comfy.samplers.resolve_areas_and_cond_masks_multidim(resolved, latent.shape[2:], latent.device)
        found = [comfy.samplers.get_area_and_mult(one, latent, torch.zeros(1)) for one in resolved]
        return [entry.mult for entry in found]

    for shape in ((1, 4, 32, 32), (1, 4, 1, 32, 32)):
        assert all(mult.shape[-2:] == (16, 16) and (mult == 1).all() for mult in weights(torch.zeros(shape)))
    try:
        weights(torch.zeros(1, 4, 5, 32, 32))
    except RuntimeError as error:
        assert "exceeds dimension size (1)" in str(error)
    else:
        raise AssertionError("videos work: say so in the description and the help page")
    node = NODES["TUDSRTilePromptsToConditioning"]
    page = base.PACK / "nodes" / "web" / "docs" / "TUDSRTilePromptsToConditioning.md"
    for words in (node.define_schema().description, page.read_text("utf-8")):
        assert "video" in words and "MultiDiffusion (Tiled)" in words


def check_tile_prompts_in_multidiffusion_equal_the_area_lists():
    for shape, cfg in CASES:
        plan = tiles_module.plan_tiles(*shape[-2:], 16, 6)
        prompts, start = tile_prompts(plan), noise(*shape)
        wanted = reference(start, plan, *whole(prompts), cfg, ddpm_sigmas(10))
        for batch in (1, 3, 64):
            model = stub_model()
            ours = run(tiled(model, prompts, batch), start, cfg, text(9), text(9), ddpm_sigmas(10))
            assert (ours - wanted).abs().max() < 1e-4, (shape, cfg, batch, float((ours - wanted).abs().max()))
            largest = max(call[0] for call in model.model.diffusion_model.calls)
            assert largest == shape[0] * min(batch, len(plan)) * (1 if cfg == 1 else 2), largest


def check_an_empty_negative_leaves_the_samplers():
    plan = tiles_module.plan_tiles(37, 50, 16, 6)
    prompts, start = tile_prompts(plan, negative=""), noise(1, 4, 37, 50)
    ours = run(tiled(stub_model(), prompts), start, 4.0, text(9), text(word_value("own")), ddpm_sigmas(3))
    wanted = reference(start, plan, whole(prompts)[0], ["own"] * len(plan), 4.0, ddpm_sigmas(3))
    assert (ours - wanted).abs().max() < 1e-4


def check_texts_of_different_length_share_a_batch():
    """Two windows against one: ComfyUI repeats the shorter; three against two do not fit and run alone."""
    plan = tiles_module.plan_tiles(16, 60, 16, 4)
    start, clip = noise(1, 4, 16, 60), WordClip()
    lengths = iter([1, 2, 1, 5, 2])

    def encode(tokens, **_):
        words = " ".join(word for window in tokens["l"] for word in window).replace(" ,", ",")
        count = 1 if words == "blur" else next(lengths)
        return [[torch.full((1, 77 * count, 8), word_value(words)), {}]]

    clip.encode_from_tokens_scheduled = encode
    prompts = tile_prompts(plan)
    ours = run(tiled(stub_model(), prompts, 5, clip=clip), start, 3.0, text(9), text(9), ddpm_sigmas(3))
    wanted = reference(start, plan, *whole(prompts), 3.0, ddpm_sigmas(3))
    assert (ours - wanted).abs().max() < 1e-4


def check_pooled_vectors_follow_their_rows():
    """SDXL-like models read more than cross attention; each tile's row must carry its own."""
    plan, seen = tiles_module.plan_tiles(16, 40, 16, 4), []
    prompts, start, model = tile_prompts(plan), noise(2, 4, 16, 40), stub_model()

    def forward(x, timesteps, context=None, y=None, **_):
        seen.append((context[:, 0, 0], y[:, 0]))
        return torch.zeros_like(x)

    model.model.diffusion_model.forward = forward
    model.model.encode_adm = lambda **kwargs: kwargs["pooled_output"]
    run(tiled(model, prompts, 2), start, 3.0, text(9), text(9), ddpm_sigmas(1))
    assert seen and all(torch.equal(a, b) for a, b in seen)
    values = torch.cat([a for a, _ in seen])
    assert len(set(values.tolist())) == len(plan) + 1 and len(values) == 2 * 2 * len(plan)


def check_jitter_keeps_prompts_with_their_tiles():
    plan = tiles_module.plan_tiles(60, 60, 16, 6)
    start, prompts = noise(1, 4, 60, 60), tile_prompts(plan, ["one thing"] * len(plan))
    still, moved, again = (
        run(tiled(stub_model(), prompts, 4, jitter=jitter), start, 3.0, text(9), text(9), ddpm_sigmas(3))
        for jitter in (False, True, True)
    )
    assert torch.equal(moved, again) and (moved - still).abs().max() > 1e-3


def check_controls_and_tile_texts_work_together():
    height, width = 30, 44
    plan = tiles_module.plan_tiles(height, width, 16, 6)
    prompts, start, seen = tile_prompts(plan), noise(1, 4, height, width), []
    hint = torch.rand(1, 3, height * 8, width * 8, generator=torch.Generator().manual_seed(1))
    control = HintControl(seen).set_cond_hint(hint, 0.7)
    both = [text(9, control=control) for _ in range(2)]
    ours = run(tiled(stub_model(), prompts, 4), start, 5.5, *both, ddpm_sigmas(4))
    eps = [0.7 * tile.cut(hint, 8)[:, :1, ::8, ::8] for tile in plan]
    wanted = reference(start, plan, *whole(prompts), 5.5, ddpm_sigmas(4), eps)
    assert (ours - wanted).abs().max() < 1e-4


def check_another_latent_size_is_refused():
    prompts = tile_prompts(tiles_module.plan_tiles(32, 32, 16, 8))
    try:
        run(tiled(stub_model(), prompts), noise(1, 4, 32, 40), 1.0, text(9), text(9), ddpm_sigmas(1))
    except ValueError as error:
        assert "32 x 32" in str(error) and "40" in str(error)
    else:
        raise AssertionError("accepted")


def check_prompts_matter_where_they_are():
    """One tile's words change its box alone in one step; shared words change everything."""
    plan = tiles_module.plan_tiles(40, 52, 16, 6)
    start, step = noise(1, 4, 40, 52), ddpm_sigmas(10)[-2:]
    plain = tile_prompts(plan)
    texts = [prompt.text for prompt in plain.prompts]
    texts[6] = "a red brick wall"
    tile = list(plan)[6]
    inside = torch.zeros(40, 52, dtype=torch.bool)
    tile.cut(inside)[:] = True
    for make in (
        lambda prompts: run(stub_model(), start, 5.5, *regions(prompts), step),
        lambda prompts: run(tiled(stub_model(), prompts, 4), start, 5.5, text(9), text(9), step),
    ):
        before, after, everywhere = (
            make(prompts) for prompts in (plain, plain.with_texts(texts), tile_prompts(plan, suffix="4k"))
        )
        change = (after - before).abs().amax((0, 1))
        assert (change[inside] > 1e-4).all() and (change[~inside] == 0).all()
        assert ((everywhere - before).abs().amax((0, 1)) > 1e-6).all()


def one_step_with(method, prompts, sweep_plan, start):
    """Stage one of a method with tile prompts on a latent; returns z_H."""
    stages, pipeline, sweep = (
        part("nodes.host.stages"),
        part("tudsr_core.methods.two_stage"),
        part("tudsr_core.tiling.run"),
    )
    model = stages.attach(stub_model(), stages.StageFacts("an adapter", 1, method))
    stage = stages.build_stage(model, base.FoldVAE(), text(0.1), 1, 0, prompts, WordClip())
    with torch.inference_mode():
        return pipeline.restore_latent(
            pipeline.StartLatent(start), stage, sweep.TiledRun(sweep_plan, "uniform", 2), lambda preview: None
        )


def check_one_step_methods_trained_with_tags_take_tile_prompts():
    """OSEDiff's step with a text per tile against the average of its tiles written out; other grids find their text."""
    start, plan = noise(1, 4, 30, 44), tiles_module.plan_tiles(30, 44, 16, 6)
    prompts = tile_prompts(plan)
    step = part("tudsr_core.diffusion.one_step").from_noise_level(999)
    total, count = torch.zeros_like(start), torch.zeros_like(start)
    for tile in plan:
        box = (..., slice(tile.top, tile.top + 16), slice(tile.left, tile.left + 16))
        context = torch.full((1, 77, 8), word_value(prompts.positive(tile.index)))
        total[box] += word_eps(start[box], 999.0, context)
        count[box] += 1
    ours = one_step_with("osediff", prompts, plan, start)
    wanted = step.p * start + step.q * total / count
    assert ((ours - wanted) / step.q).abs().max() < 1e-5, float(((ours - wanted) / step.q).abs().max())
    coarse = tile_prompts(tiles_module.plan_tiles(15, 22, 8, 3))  # the same picture at half the size
    assert torch.equal(one_step_with("osediff", coarse, plan, start), ours)


def check_one_step_methods_with_a_fixed_text_say_that_they_ignore_tile_prompts():
    start, plan = noise(1, 4, 20, 24), tiles_module.plan_tiles(20, 24, 16, 6)
    said = []
    log = part("nodes.host.stages").log
    log.warning, before = (lambda *words: said.append(words[0])), log.warning
    try:
        with_prompts = one_step_with("omgsr", tile_prompts(plan), plan, start)
    finally:
        log.warning = before
    assert len(said) == 1 and "ignored" in said[0], said
    assert torch.equal(with_prompts, one_step_with("omgsr", None, plan, start))


def check_the_budget_uses_the_clips_own_tokens():
    plan, clip = tiles_module.plan_tiles(16, 16, 16, 0), WordClip()
    prompts = tile_prompts(plan, [", ".join(f"w{i}" for i in range(80))], prefix="photo", suffix="clean, 8k")
    regions(prompts, clip)
    windows = clip.calls[0]
    assert len(windows) == 1 and len(windows[0]) <= 75
    assert windows[0][0] == "photo" and windows[0][-3:] == ["clean", ",", "8k"] and windows[0][2] == "w0"


def check_the_estimate_agrees_with_clips_tokenizer():
    import random

    from comfy.sd1_clip import SD1Tokenizer

    tokenizer, tags = SD1Tokenizer(), part("tudsr_core.prompts.prompters").read_tags()
    chance, kept = random.Random(0), 0
    for _ in range(400):
        words = ", ".join(chance.sample(tags, chance.randint(5, 40)))
        if prompts_module.estimate_fits(words):
            kept += 1
            assert len(tokenizer.tokenize_with_weights(words)["l"]) == 1, words
    assert kept > 100


class CountingPrompter:
    """Says how wide a tile is; counts how often it is asked."""

    asked = 0

    def describe(self, tiles, tick):
        CountingPrompter.asked += 1
        tick(len(tiles), len(tiles))
        return [prompts_module.TilePrompt(f"{tile.shape[-1]} wide") for tile in tiles]

    def fingerprint(self):
        return "counting"

    def release(self):
        pass


STYLE = {"prefix": "photo", "suffix": "8k", "negative": "blur"}


def extract(image, plan, edits="", **more):
    values = STYLE | {"context": 0.0, "edits": edits} | more
    return NODES["TUDSRExtractTilePrompts"].execute(image, plan, **values)


def check_extraction_is_edited_without_asking_again():
    plan = tiles_module.plan_tiles(64, 96, 32, 8)
    image = picture(1, 128, 192)
    CountingPrompter.asked = 0
    prompter = CountingPrompter()
    plain = extract(image, plan, prompter=prompter)
    assert [prompt.text for prompt in plain.args[0].prompts] == ["64 wide"] * len(plan)
    edited = extract(image, plan, "2: a wall\n3+ ivy\n4-", prompter=prompter)
    assert edited.args[1][:4] == ["64 wide", "a wall", "64 wide, ivy", ""]
    assert edited.args[0].positive(2) == "photo, 64 wide, ivy, 8k"
    assert CountingPrompter.asked == 1
    extract(image, plan, context=0.5, prompter=prompter)
    assert CountingPrompter.asked == 2


def check_the_editor_is_told_all_it_draws():
    plan = tiles_module.plan_tiles(64, 96, 32, 8)
    image = picture(1, 128, 192)
    facts = extract(image, plan, "2: a wall", prompter=CountingPrompter()).ui["tudsr_tiles"][0]
    json.dumps(facts)
    saved = Path(folder_paths.get_temp_directory()) / facts["picture"]["subfolder"] / facts["picture"]["filename"]
    assert saved.is_file()
    assert len(facts["boxes"]) == len(facts["found"]) == len(facts["prompts"]) == len(plan)
    assert facts["boxes"][0] == [0, 0, round(32 / 96, 5), 0.5] and facts["boxes"][-1][2:] == [1, 1]
    assert facts["found"][1] == "64 wide" and facts["prompts"][1] == "photo, a wall, 8k"
    assert facts["edits"] == "2: a wall" and facts["header"].startswith("# grid 64x96, tile 32x32")
    later = tiles_module.plan_tiles(128, 192, 64, 16)  # the same places of a larger picture
    kept = extract(image, later, f"{facts['header']}\n2: a wall").ui["tudsr_tiles"][0]
    assert kept["edits"] == "2: a wall" and kept["prompts"][1] == "photo, a wall, 8k"
    other = extract(image.flip(2), plan, f"{facts['header']}\n2: a wall").ui["tudsr_tiles"][0]
    assert other["edits"] == ""


def check_several_pictures_are_refused():
    try:
        extract(picture(2, 64, 64), tiles_module.plan_tiles(32, 32, 16, 4))
    except ValueError as error:
        assert "one picture, got 2" in str(error)
    else:
        raise AssertionError("accepted")


def check_strings_of_captioners_become_tile_prompts():
    plan = tiles_module.plan_tiles(32, 48, 16, 0)
    node = NODES["TUDSRTilePromptsFromStrings"]
    style = {key: [value] for key, value in STYLE.items()}
    for strings in (["a", "b", "c", "d", "e", "f"], [["a", "b", "c", "d", "e", "f"]], ["a\nb\nc\nd\ne\nf"]):
        out = node.execute(strings, [plan], edits=["6+ g"], **style)
        assert out.args[1] == ["a", "b", "c", "d", "e", "f, g"]
        assert out.ui["tudsr_tiles"][0]["picture"] is None


def check_tile_plan_counts_before_the_run():
    node = NODES["TUDSRTilePlan"]
    for side, tiles, calls in ((2048, 49, 2450), (4096, 225, 11250), (8192, 961, 48050)):
        out = node.execute(4.0, 0, 0, 512, 256, "stride", 50, image=torch.rand(1, side // 4, side // 4, 3))
        assert len(out.args[0]) == tiles and out.args[3] == calls
        assert f"= {tiles} tiles of 512 x 512 px" in out.args[2] and f"{calls:,} tile calls" in out.args[2]
        assert f"{2 * calls:,} network calls" in out.args[2]  # what `tudsr zoom` counts
        assert max(out.args[1].shape[1:3]) == 1024
    latent = {"samples": torch.zeros(1, 4, 37, 50)}
    plan = node.execute(4.0, 0, 0, 128, 48, "even", 1, image=torch.rand(1, 9, 9, 3), latent=latent).args[0]
    assert (plan.height, plan.width) == (37, 50)
    assert node.execute(1.0, 400, 296, 128, 48, "even", 1).args[0] == plan
    for wrong in (dict(tile=512, overlap=-8, width=64, height=64), dict(tile=512, overlap=0, width=64, height=0)):
        try:
            node.execute(1.0, spacing="even", steps=1, **wrong)
        except ValueError:
            continue
        raise AssertionError("accepted")


def check_tile_images_are_the_plans_tiles():
    plan = tiles_module.plan_tiles(37, 50, 16, 6)
    image = picture(1, 61, 93)
    batch, singles = NODES["TUDSRTileImages"].execute(image, plan, 0.0, 0).args
    cuts = prompts_module.cut_tiles(image[0].movedim(-1, 0), plan)
    assert len(batch) == len(singles) == len(plan)
    assert tuple(batch.shape[1:3]) == tuple(max(cut.shape[axis] for cut in cuts) for axis in (1, 2))
    for one, cut in zip(singles, cuts, strict=True):
        if one.shape[1:3] == cut.shape[1:]:
            assert torch.equal(one[0].movedim(-1, 0), cut)
    assert max(NODES["TUDSRTileImages"].execute(image, plan, 0.0, 384).args[0].shape[1:3]) == 384


def small_clip():
    """A real ComfyUI CLIP, three layers of 32, with random weights."""
    import sd_stand_in

    space = {}
    exec(compile(sd_stand_in.PACK, "tests_pack", "exec"), space)  # noqa: S102
    clip = comfy.sd.CLIP(comfy.supported_models_base.ClipTarget(space["Tokens"], space["Clip"]))
    weights = {key.removeprefix("cond_stage_model.model."): v for key, v in sd_stand_in.text_weights().items()}
    converted = comfy.utils.clip_text_transformers_convert(
        {f"clip_h.{key}": value for key, value in weights.items()}, "clip_h.", "clip_h.transformer."
    )
    clip.load_sd(converted, full_model=True)
    return clip


def small_vision(width=32):
    import comfy.clip_vision

    config = dict(hidden_act="gelu", hidden_size=64, image_size=28, intermediate_size=64, layer_norm_eps=1e-5)
    config |= dict(model_type="clip_vision_model", num_attention_heads=2, num_channels=3, num_hidden_layers=2)
    config |= dict(patch_size=14, projection_dim=width)
    path = Path(tempfile.mkdtemp()) / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    vision = comfy.clip_vision.ClipVisionModel(str(path))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in vision.model.state_dict().items():
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator) * 0.2
            tensor.copy_(1 + 0 * value if "norm" in name and name.endswith("weight") else value)
    return vision


def check_words_are_embedded_as_comfyui_would_one_by_one():
    prompters, clip = part("nodes.prompters"), small_clip()
    words = [f"thing number {i}" for i in range(40)]
    ours = prompters.embed_words(clip, words)
    for index in (0, 1, 31, 32, 39):
        tokens = clip.tokenize(prompters.TEMPLATE.format(words[index]))
        wanted = clip.encode_from_tokens(tokens, return_pooled=True)[1]
        assert (ours[index] - wanted[0]).abs().max() < 1e-5
    assert (ours[0] - ours[1]).abs().max() > 1e-4


def check_clip_tags_run_on_comfyuis_own_models():
    clip, vision, node = small_clip(), small_vision(), NODES["TUDSRClipTagPrompter"]
    plan, image = tiles_module.plan_tiles(64, 96, 32, 8), picture(1, 129, 195)
    folder_paths.set_user_directory(tempfile.mkdtemp())
    prompter = node.execute(clip, vision, "(built-in list)", "my subject, other", 5, 1.5, 0.5).args[0]
    assert prompter.names[-2:] == ("my subject", "other")
    first = extract(image, plan, prompter=prompter).args[0]
    words = prompter.embed_tags()
    kept = list((Path(folder_paths.get_user_directory()) / "tudsr").glob("tags-*.safetensors"))
    assert len(kept) == 1
    tiles = prompts_module.cut_tiles(image[0].movedim(-1, 0), plan)
    pictures = torch.cat([vision.encode_image(t.movedim(0, -1)[None], crop=False)["image_embeds"] for t in tiles])
    core = part("tudsr_core.prompts.prompters")
    wanted = core.choose_tags(pictures, words, prompter.names, core.TagChoice(5, 1.5, 0.5))
    assert [one.text for one in wanted] == [one.text for one in first.prompts]
    assert any(one.tags for one in first.prompts)
    again = node.execute(clip, vision, "(built-in list)", "", 3, 1.5, 0.5).args[0]
    assert again.fingerprint() != prompter.fingerprint()
    wrong = node.execute(clip, small_vision(24), "(built-in list)", "my subject, other", 5, 1.5, 0.5).args[0]
    try:
        wrong.describe(tiles, lambda *_: None)
    except ValueError as error:
        assert "32 numbers" in str(error) and "24" in str(error) and "ViT-H-14" in str(error)
    else:
        raise AssertionError("accepted")


def check_taggers_and_captioners_are_listed_and_load():
    """A converted tagger and a captioner's folder are found by what they hold, not by their names."""
    import safetensors.torch

    taggers, root = part("nodes.taggers"), Path(tempfile.mkdtemp())
    (root / "blip").mkdir()
    (root / "blip" / "config.json").write_text('{"model_type": "blip"}', encoding="utf-8")
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    one = {"x": torch.zeros(1)}
    safetensors.torch.save_file(one, root / "tagger.safetensors", {"format": taggers.TAGGER_FORMAT})
    safetensors.torch.save_file(one, root / "adapter.safetensors", {"format": "else"})
    folder_paths.add_model_folder_path("tudsr", str(root))
    assert "tagger.safetensors" in taggers.list_taggers() and "adapter.safetensors" not in taggers.list_taggers()
    assert "blip" in taggers.list_captioners() and "other" not in taggers.list_captioners()


def check_dape_tags_tiles_through_comfyuis_model_management():
    dape, ram, swin = (part(f"tudsr_core.models.{name}") for name in ("dape", "ram", "swin"))
    config = ram.RamConfig(
        swin.SwinConfig(image_px=64, width=8, depths=(2, 2, 2), heads=(1, 2, 4), window=4),
        labels=30,
        token_width=16,
        width=24,
    )
    network = ram.RamTagger(config)
    generator = torch.Generator().manual_seed(0)
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    labels = tuple(f"thing {i}" for i in range(30))
    root = Path(tempfile.mkdtemp())
    dape.write_tagger(root / "small.safetensors", dape.DapeTagger(network, labels, (0.5,) * 30, "small"))
    folder_paths.add_model_folder_path("tudsr", str(root))
    node = NODES["TUDSRLoadDape"]
    assert "small.safetensors" in node.define_schema().inputs[0].options
    prompter = node.execute("small.safetensors").args[0]
    plan, image = tiles_module.plan_tiles(32, 48, 16, 4), picture(1, 64, 96)
    made = extract(image, plan, prompter=prompter).args[0]
    tagger = dape.load_tagger(root / "small.safetensors")
    cuts = prompts_module.cut_tiles(image[0].movedim(-1, 0), plan)
    assert [prompt.text for prompt in made.prompts] == [tagger.tags(cut[None])[0] for cut in cuts]
    assert any(prompt.text for prompt in made.prompts)


if __name__ == "__main__":
    base.main(globals())
