"""Checks of what nodes refuse, and where files may lie, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_refusals.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import json
import tempfile
from pathlib import Path

import inside as base  # first: it makes ComfyUI importable
from inside import (
    NODES,
    OPTIONS,
    FoldVAE,
    embedded,
    noise,
    part,
    picture,
    refused,
    small_vae,
    stub_model,
    text,
    upscale,
)

import folder_paths
import torch
from safetensors.torch import save_file

VAE_OPTIONS = (64, "host", "exact")


def models(*names):
    """A new folder of models, registered under `names`, and one outside it for links to lead to."""
    inside, outside = (Path(tempfile.mkdtemp()) for _ in range(2))
    for name in names:
        folder_paths.add_model_folder_path(name, str(inside))
    return inside, outside


def check_adapters_behind_links_are_offered_and_found():
    loaders = part("nodes.loaders")
    inside, outside = models("tudsr")
    (outside / "peft" / "unet_lora_adapter").mkdir(parents=True)
    config = outside / "peft" / "unet_lora_adapter" / "adapter_config.json"
    config.write_text("{}", encoding="utf-8")
    (outside / "one.safetensors").write_bytes(b"")
    (inside / "linked.safetensors").symlink_to(outside / "one.safetensors")
    (inside / "far").symlink_to(outside, target_is_directory=True)
    (inside / "parts").mkdir()
    (inside / "parts" / "unet_lora_adapter").symlink_to(outside / "peft" / "unet_lora_adapter")
    (inside / "gone.safetensors").symlink_to(outside / "nothing")
    for name in ("linked.safetensors", "far/one.safetensors", "far/peft", "parts"):
        assert name in loaders.list_adapters(), loaders.list_adapters()
        assert loaders.find_adapter(name) == inside / name
        assert NODES["TUDSRLoadAdapter"].validate_inputs(name) is True
    before = NODES["TUDSRLoadAdapter"].fingerprint_inputs("parts")
    config.write_text('{"r": 4}', encoding="utf-8")
    assert NODES["TUDSRLoadAdapter"].fingerprint_inputs("parts") != before
    for name in ("gone.safetensors", "../nothing", "\0", "x" * 5000, "\x1b[2J"):
        message = NODES["TUDSRLoadAdapter"].validate_inputs(name)
        assert str(inside) in message and message.isprintable(), message


def check_names_do_not_leave_the_models_folder():
    model_files = part("nodes.host.model_files")
    inside, outside = models("tudsr")
    (outside / "secret.txt").write_text("x", encoding="utf-8")
    for name in (f"../{outside.name}/secret.txt", str(outside / "secret.txt"), f"a/../../{outside.name}/secret.txt"):
        refused(lambda name=name: model_files.find_below([inside], name), "was not found in", str(inside))


def check_taggers_captioners_and_tags_behind_links_are_offered_and_found():
    taggers, prompters = part("nodes.taggers"), part("nodes.clip_tags")
    inside, outside = models("tudsr", "LLM")
    (outside / "words.txt").write_text("a tree", encoding="utf-8")
    (outside / taggers.RAM_FILE).write_bytes(b"")
    (outside / "config.json").write_text(json.dumps({"model_type": "blip"}), encoding="utf-8")
    save_file({}, outside / "dape.safetensors", {"format": taggers.TAGGER_FORMAT})
    (inside / "far").symlink_to(outside, target_is_directory=True)
    assert {"far", "far/dape.safetensors"} <= set(taggers.list_taggers()), taggers.list_taggers()
    assert "far" in taggers.list_captioners() and "far/words.txt" in prompters.list_tag_files()
    for name in ("far", "far/dape.safetensors", "far/words.txt"):
        assert taggers.find_below([inside], name) == inside / name


def check_weights_that_lie_in_the_folder_itself_are_found():
    taggers = part("nodes.taggers")
    inside, _ = models("tudsr")
    (inside / taggers.RAM_FILE).write_bytes(b"")
    assert "." in taggers.list_taggers()
    assert taggers.find_below([inside], ".") == inside


def check_pictures_without_a_latent_are_refused():
    vae = small_vae(torch.float32)
    for size in ((1, 3, 90), (1, 90, 1)):
        refused(
            lambda size=size: NODES["TUDSRVAEEncode"].execute(picture(*size), vae, *VAE_OPTIONS),
            "smaller than one latent of this VAE (4 px)",
        )
    assert NODES["TUDSRVAEEncode"].execute(picture(1, 4, 5), vae, *VAE_OPTIONS).args[0]["samples"].shape[-2:] == (1, 1)


def check_pictures_of_wrong_channels_are_refused():
    vae, image = small_vae(torch.float32), picture(1, 16, 16, 4)
    encode, decode, colour = (NODES[f"TUDSR{name}"].execute for name in ("VAEEncode", "VAEDecode", "ColorFix"))
    assert torch.equal(*(encode(one, vae, *VAE_OPTIONS).args[0]["samples"] for one in (image, image[..., :3])))
    plan = NODES["TUDSRTilePlan"].execute(1.0, 64, 64, 64, 16, "even", 1).args[0]
    calls = (
        lambda one: encode(one, vae, *VAE_OPTIONS),
        lambda one: upscale(4, one),
        lambda one: colour(one, image, "wavelet"),
        lambda one: colour(image, one, "none"),
        lambda one: NODES["TUDSRTileImages"].execute(one, plan, 0.0, 0),
        lambda one: NODES["TUDSRExtractTilePrompts"].execute(one, plan, "", "", "", 0.0, ""),
        lambda one: NODES["TUDSRTilePlan"].execute(1.0, 64, 64, 64, 16, "even", 1, one),
        lambda one: NODES["TUDSRPlan"].execute(one, *embedded()[0:3:2], 4.0, 0, 0, 512, 128, 1),
    )
    for wrong in (image[..., :1], image[..., :2], torch.cat([image, image], -1), image[0], image[:0], image[:, :0]):
        for call in calls:
            refused(lambda call=call, wrong=wrong: call(wrong), "picture")
    for latent in (noise(1, 16, 4, 4), noise(1, 4, 2, 4, 4), noise(4, 4, 4), noise(1, 4, 0, 4)):
        refused(lambda latent=latent: decode({"samples": latent}, vae, *VAE_OPTIONS), "decodes pictures of 4 channels")


def check_masks_must_be_one_or_one_for_each_picture():
    image = picture(3, 8, 8)
    for masks in (torch.zeros(2, 8, 8), torch.zeros(4, 64, 64)):
        refused(lambda masks=masks: upscale(2, image, mask=masks), f"3 pictures but {len(masks)} masks")
    refused(lambda: upscale(2, image, mask=torch.zeros(0, 8, 8)), "this mask is empty")
    for masks in (torch.zeros(8, 8), torch.zeros(1, 8, 8), torch.zeros(3, 64, 64), torch.zeros(3, 1, 8, 8)):
        assert upscale(2, image, mask=masks).args[1].shape == (3, 16, 16)


def check_choices_that_do_not_exist_are_refused():
    vae, image = small_vae(torch.float32), picture(1, 16, 16)
    encode, decode = NODES["TUDSRVAEEncode"].execute, NODES["TUDSRVAEDecode"].execute
    choices = {"planes": (64, "gpu", "exact"), "attention": (64, "auto", "none"), "tile": (0, "auto", "exact")}
    for name, choice in choices.items():
        refused(lambda choice=choice: encode(image, vae, *choice), f"{name} ")
        refused(lambda choice=choice: decode({"samples": noise(1, 4, 4, 4)}, vae, *choice), f"{name} ")
    for stage in ("three", "", "1"):
        refused(lambda stage=stage: base.load_published("omgsr", stage=stage), "stage is", "from file, one, two")
    refused(lambda: base.load_published("omgsr", method="new"), "method 'new' is not known")
    for name in ("window", "color_fix"):
        refused(lambda name=name: upscale(4, image, **{name: "new"}), "is 'new'; use")
    refused(lambda: NODES["TUDSRTilePlan"].execute(1.0, 640, 640, 64, 16, "new", 1), "spacing is 'new'")


def check_a_conditioning_that_does_nothing_is_refused():
    """ComfyUI would leave the network out without a word."""
    first, second, vae, conditioning = embedded()
    image, (tensor, _) = picture(1, 40, 40), conditioning[0]
    refused(lambda: upscale(4, image, (first, second, vae, [])), "CONDITIONING is empty")
    for options in ({"area": (8, 8, 0, 0), "strength": 1.0}, {"start_percent": 0.0, "end_percent": 0.01}):
        refused(lambda options=options: upscale(4, image, (first, second, vae, [[tensor, options]])), "in effect")
    plan = NODES["TUDSRTilePlan"].execute(1.0, 64, 64, 64, 16, "even", 1).args[0]
    refused(lambda: part("nodes.regions").spread([], len(plan)), "CONDITIONING is empty")


def check_a_model_without_an_adapter_is_refused():
    model, vae, image = stub_model(), FoldVAE(), picture(1, 8, 8)
    words = text(0.1)
    stage = {"factor": 2.0, "timestep": 0} | OPTIONS
    for call in (
        lambda: NODES["TUDSRUpscale"].execute(image, model, vae, words, 4.0, 0, 0, **OPTIONS),
        lambda: upscale(8, image, (embedded()[0], model, embedded()[2], embedded()[3])),
        lambda: NODES["TUDSRStageOne"].execute(image, model, vae, words, **stage),
        lambda: NODES["TUDSRStageTwo"].execute(image, model, vae, words, **stage),
        lambda: NODES["TUDSRPlan"].execute(image, model, vae, 4.0, 0, 0, 512, 128, 1),
        lambda: NODES["TUDSROneStepSigmas"].execute(model, 0),
        lambda: NODES["TUDSROneStepLatent"].execute({"samples": noise(1, 4, 8, 8)}, model, 0),
    ):
        refused(call, "no one-step adapter", "Load TUDSR Adapter")


def check_a_merged_checkpoint_runs_at_the_timestep_that_is_given():
    model, vae, image = stub_model(), FoldVAE(), picture(1, 8, 8)
    for name in ("TUDSRStageOne", "TUDSRStageTwo"):
        made = NODES[name].execute(image, model, vae, text(0.1), 2.0, 200, **OPTIONS).args[0]
        assert made.shape == (1, 16, 16, 3) and made.std() > 0
    assert len(NODES["TUDSROneStepSigmas"].execute(model, 200).args[0]) == 2


def check_plans_without_end_are_refused():
    plan, image = NODES["TUDSRTilePlan"].execute, picture(1, 8, 8)
    for scale in (float("inf"), float("nan"), 1e9, 0.0, -1.0):
        refused(lambda scale=scale: plan(scale, 0, 0, 64, 16, "even", 1, image), "scale", "is not possible")
    refused(lambda: plan(1.0, 65536, 65536, 512, 128, "even", 1), "more than 1,073,741,824 pixels")
    refused(lambda: plan(1.0, 32768, 32768, 64, 56, "even", 1), "16,719,921 tiles", "raise the tile")


if __name__ == "__main__":
    base.main(globals())
