"""Checks of MultiDiffusion on latents of pictures, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_multidiffusion.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

from inside import (  # first: it makes ComfyUI importable
    memory_asked_for,
    HintControl,
    main,
    multidiffusion,
    noise,
    sample,
    slow_reference,
    stub_model,
    text,
)

import comfy.patcher_extension
import comfy.sampler_helpers
import torch


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
    with memory_asked_for() as seen:
        sample(multidiffusion(stub_model(), batch=2), noise(1, 4, 200, 200), sigmas=torch.tensor([1.0, 0.0]))
    assert seen == [(2, 4, 16, 16)], seen


def check_the_last_of_two_multidiffusions_decides():
    start = noise(1, 4, 40, 40)
    model, twice = stub_model(), stub_model()
    wanted = sample(multidiffusion(model), start)
    ours = sample(multidiffusion(multidiffusion(twice, 256, 64, window="gaussian")), start)
    assert torch.equal(ours, wanted)
    assert twice.model.diffusion_model.calls == model.model.diffusion_model.calls


if __name__ == "__main__":
    main(globals())
