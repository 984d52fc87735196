"""Checks of tile prompts as area lists for stock samplers, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_regions.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

from inside import NODES, PACK, FoldVAE, main, noise, text  # first: it makes ComfyUI importable
from inside_words import (
    CASES,
    RecordingControl,
    ddpm_sigmas,
    reference,
    regions,
    run,
    schedule,
    stub_model,
    tile_prompts,
    tiles_module,
    whole,
    word_value,
)

import comfy.latent_formats
import comfy.samplers
import torch


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
    positive, _ = regions(tile_prompts(plan), control_net=control, hint=hint, vae=FoldVAE())
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
    page = PACK / "nodes" / "web" / "docs" / "TUDSRTilePromptsToConditioning.md"
    for words in (node.define_schema().description, page.read_text("utf-8")):
        assert "video" in words and "MultiDiffusion (Tiled)" in words


def check_the_control_acts_in_its_range():
    plan = tiles_module.plan_tiles(32, 32, 16, 8)
    widgets = {"strength": 0.7, "start_percent": 0.2, "end_percent": 0.8}
    hint = torch.rand(1, 256, 256, 3)
    for entries in regions(tile_prompts(plan), control_net=RecordingControl([]), hint=hint, **widgets):
        controls = [entry[1]["control"] for entry in entries]
        assert {(one.strength, one.timestep_percent_range) for one in controls} == {(0.7, (0.2, 0.8))}


if __name__ == "__main__":
    main(globals())
