"""Checks of tile prompts inside samplers and one-step methods, in ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_tile_texts.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

from inside import memory_asked_for, FoldVAE, HintControl, main, noise, part, text  # first: it makes ComfyUI importable
from inside_words import (
    CASES,
    WordClip,
    ddpm_sigmas,
    prompts_module,
    reference,
    regions,
    run,
    stub_model,
    tile_prompts,
    tiled,
    tiles_module,
    whole,
    word_eps,
    word_value,
)

import torch


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
        part("tudsr_core.tiling.out_of_memory"),
    )
    model = stages.attach(stub_model(), stages.StageFacts("an adapter", 1, method))
    stage = stages.build_stage(model, FoldVAE(), text(0.1), 1, 0, prompts, WordClip())
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


def check_memory_is_estimated_for_the_plans_tiles():
    """The plan's tiles take the place of the node's own."""
    plan = tiles_module.plan_tiles(40, 52, 16, 6)
    with memory_asked_for() as seen:
        model = tiled(stub_model(), tile_prompts(plan), batch=2)
        run(model, noise(1, 4, 40, 52), 1.0, text(9), text(9), ddpm_sigmas(2))
    assert seen == [(2, 4, 16, 16)], seen


if __name__ == "__main__":
    main(globals())
