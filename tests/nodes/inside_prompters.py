"""Checks of prompters on ComfyUI's own models, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_prompters.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import json
import tempfile
from pathlib import Path

from inside import NODES, main, part, picture  # first: it makes ComfyUI importable
from inside_words import extract, prompts_module, tiles_module

import comfy.clip_vision
import comfy.sd
import comfy.supported_models_base
import comfy.utils
import folder_paths
import sd_stand_in
import torch


def small_clip():
    """A real ComfyUI CLIP, three layers of 32, with random weights."""
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
    prompters, clip = part("nodes.clip_tags"), small_clip()
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
    main(globals())
