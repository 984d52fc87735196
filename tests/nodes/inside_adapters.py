"""Checks of published adapters on ComfyUI's own networks, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_adapters.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import shutil
from pathlib import Path

from inside import (  # first: it makes ComfyUI importable
    NODES,
    OPTIONS,
    PUBLISHED,
    FoldVAE,
    load_published,
    main,
    noise,
    part,
    picture,
    published_model,
    stub_model,
    upscale,
)

import comfy.model_management
import comfy.sd
import torch
from safetensors.torch import load_file, save_file


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
    formats = {"omgsr": 273, "hypir_sd2": 200, "osediff": 999, "pisa_sr": 1, "kohya": 200, "diffusers": 200}
    for name, t in formats.items():
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


def check_a_trained_adapter_gives_the_trainers_picture():
    """From the single file and from the peft folder that training writes."""
    base, vae = published_model()
    words = [[load_file(PUBLISHED / "inputs.safetensors")["text"][:1], {}]]
    image, pictures = picture(1, 24, 32), []
    for name in ("trained", "trained-folder"):
        model, _, _ = load_published(name, base, vae)
        options = OPTIONS | {"tile": 0, "overlap": 128, "native_size": False}
        made = NODES["TUDSRStageOne"].execute(image, model, vae, words, 4.0, 0, **options)
        pictures.append(made.args[0])
        error = (pictures[-1] - wanted("trained").movedim(1, -1)).abs().max()
        assert error < 1e-4, (name, float(error))
    assert torch.equal(*pictures)


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
        sweep = part("tudsr_core.tiling.out_of_memory").TiledRun(tiles.plan_tiles(16, 24, 64, 16))
        z = pipeline.restore_latent(pipeline.StartLatent(given["z"]), stage, sweep, lambda preview: None)
        eps = fidelity * pix + detail * (full - pix)
        assert (z - (given["z"] - eps)).abs().max() < 5e-5, (
            fidelity,
            detail,
            float((z - given["z"] + eps).abs().max()),
        )
        assert stage.evaluations == (2 if fidelity != detail and detail else 1)


def check_the_dial_turns_what_the_method_has():
    stages = part("nodes.host.stages")
    given = load_file(PUBLISHED / "inputs.safetensors")

    def stage(name, inventive, **own):
        model, vae, _ = load_published(name, **own)
        vae.downscale_ratio = vae.upscale_ratio = 8
        return stages.build_stage(model, vae, [[given["text"], {}]], 1, 0, inventive=inventive)

    turned, own = stage("pisa_sr", 0.8), stage("pisa_sr", 0.5, detail=1.3)
    assert [weight for weight, _ in turned.branches] == [weight for weight, _ in own.branches] and own.branches
    assert turned.how.endswith("inventive 0.8 (detail 1.3)") and not own.dial
    assert len(stage("noise_predictor", 1.0).steps) == 5 and stage("noise_predictor", 0.0).strength == 0.5
    assert stage("omgsr", 0.7).strength == 1.2
    for name, setting in (("pisa_sr", {"fidelity": 0.5}), ("noise_predictor", {"steps": 2})):
        try:
            stage(name, 0.8, **setting)
        except ValueError as error:
            assert "and the dial 'inventive' set the same thing" in str(error), error
        else:
            raise AssertionError(name)


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
    update = adapters.LoRAWeights(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    try:
        ours.apply(stub_model(), adapters.WeightDelta({"nowhere.to_q": update}), {}, "foreign", "UNet")
    except part("tudsr_core.weights.tensor_files").CheckpointError as error:
        assert "foreign" in str(error) and "nowhere.to_q" in str(error)
    else:
        raise AssertionError("accepted")


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


def check_half_the_strength_is_half_the_change():
    base, vae = published_model()
    load_published("osediff", base, vae)  # makes the folder known
    found = {}
    for strength in (0.0, 0.5, 1.0):
        model, patched, _ = NODES["TUDSRLoadAdapter"].execute(base, "osediff.pkl", "one", strength, vae).args
        comfy.model_management.load_models_gpu([model, patched.patcher], force_patch_weights=True)
        weights = model.model.diffusion_model.state_dict() | patched.first_stage_model.state_dict()
        found[strength] = {key: value.clone().float() for key, value in weights.items()}
    for prefix, present in (("UNet", model.model.diffusion_model), ("VAE", patched.first_stage_model)):
        keys = list(present.state_dict())
        assert any(not torch.equal(found[0.0][key], found[1.0][key]) for key in keys), prefix
        for key in keys:
            middle = (found[0.0][key] + found[1.0][key]) / 2
            assert (found[0.5][key] - middle).abs().max() < 1e-5, (prefix, key)


if __name__ == "__main__":
    main(globals())
