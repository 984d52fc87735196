"""Captions by local transformers models: a tiny BLIP with random weights, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from tudsr_core.prompts.captions import CaptionPrompter, caption_kind

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "dog", "grass", "sky", "wall", "red"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"))
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    text = small | dict(vocab_size=len(WORDS), encoder_hidden_size=16, max_position_embeddings=64)
    text |= dict(bos_token_id=5, sep_token_id=3, eos_token_id=3, pad_token_id=0)
    config = transformers.BlipConfig(
        text_config=text, vision_config=small | dict(image_size=32, patch_size=16), projection_dim=16
    )
    torch.manual_seed(0)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_each_tile_gets_a_caption_of_its_own_pixels(blip):
    assert caption_kind(blip) == "blip"
    generator, ticks = torch.Generator().manual_seed(0), []
    tiles = [torch.rand(3, 20, 30, generator=generator) for _ in range(3)]
    prompter = CaptionPrompter(blip)
    made = [one.text for one in prompter.describe(tiles, lambda *at: ticks.append(at))]
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    assert all(made) and made[0] == CaptionPrompter(blip).describe(tiles[:1], lambda *at: None)[0].text
    assert set(" ".join(made).split()) <= set(WORDS)
    prompter.release()


def test_the_host_places_the_model_and_keeps_it(blip):
    placed = []
    prompter = CaptionPrompter(blip, place=lambda model: placed.append(model) or torch.device("cpu"))
    prompter.describe([torch.rand(3, 8, 8)], lambda *at: None)
    assert len(placed) == 1
    assert prompter.fingerprint() == CaptionPrompter(blip).fingerprint()
    assert prompter.fingerprint() != CaptionPrompter(blip, "<DETAILED_CAPTION>").fingerprint()


def test_other_folders_and_pickled_weights_are_refused(blip, tmp_path):
    with pytest.raises(ValueError, match="no BLIP or Florence-2"):
        CaptionPrompter(tmp_path)
    for file in blip.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    prompter = CaptionPrompter(tmp_path)
    with pytest.raises(ValueError, match="safetensors weights"):
        prompter.describe([torch.rand(3, 8, 8)], lambda *at: None)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "llava"}), encoding="utf-8")
    assert caption_kind(tmp_path) is None


@pytest.mark.parametrize(
    "wrong", [{"text_config": 3}, {"vision_config": [1]}, {"text_config": {"hidden_size": "x\x1b"}}]
)
def test_settings_of_wrong_types_are_one_line(blip, tmp_path, wrong):
    for file in blip.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | wrong), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be loaded by transformers") as caught:
        CaptionPrompter(tmp_path).describe([torch.rand(3, 8, 8)], lambda *at: None)
    assert str(caught.value).isprintable() and str(tmp_path) in str(caught.value)


def changed(blip, folder, name, **changes):
    """A copy of the model whose settings in one file are others, tables inside merged."""
    for file in blip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / name).read_text("utf-8"))
    for key, value in changes.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    (folder / name).write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("part", "values", "says"),
    [
        (
            "text_config",
            {"vocab_size": 40_000_000},
            "config.json: vocab_size is too large, no captioner has over 131,072",
        ),
        ("vision_config", {"intermediate_size": 2**24}, "config.json: intermediate_size is too large"),
        ("vision_config", {"intermediate_size": 2**17}, "its config.json asks for .* weights, its files hold"),
        ("vision_config", {"num_hidden_layers": 2}, r"lacks weights that its config.json asks for: .*layers\.1\."),
    ],
)
def test_networks_that_the_weights_do_not_fill_are_refused(blip, tmp_path, part, values, says):
    with pytest.raises(ValueError, match=says) as caught:
        CaptionPrompter(changed(blip, tmp_path, "config.json", **{part: values})).describe(
            [torch.rand(3, 8, 8)], lambda *at: None
        )
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"size": {"height": 9000, "width": 9000}}, "size: '(height|width)' is 9000, it must be from 1 to 2048"),
        ({"size": "x"}, "size: 'size' is x, it must be a number"),
        ({"image_mean": "x"}, "'image_mean' is x, it must be a list of numbers"),
        ({"image_std": [0.5]}, "image_std must be three numbers"),
        ({"size": {"height": 64, "width": 64}}, "cannot caption: .*; its settings do not belong together"),
        ({"rescale_factor": "x"}, "cannot caption: "),
    ],
)
def test_settings_of_the_processor_are_checked(blip, tmp_path, values, says):
    old = (blip / "preprocessor_config.json").is_file()  # newer transformers keep them in processor_config.json
    name, changes = (
        ("preprocessor_config.json", values) if old else ("processor_config.json", {"image_processor": values})
    )
    with pytest.raises(ValueError, match=says) as caught:
        CaptionPrompter(changed(blip, tmp_path, name, **changes)).describe([torch.rand(3, 8, 8)], lambda *at: None)
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


def test_a_full_memory_is_not_the_folders_fault(blip, monkeypatch):
    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(CaptionPrompter, "_generate", full)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        CaptionPrompter(blip).describe([torch.rand(3, 8, 8)], lambda *at: None)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_settings_of_a_million_layers_are_refused(blip, tmp_path, part):
    config = json.loads((blip / "config.json").read_text("utf-8"))
    config[part]["num_hidden_layers"] = 10**6
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(
        ValueError, match="config.json: num_hidden_layers has too many layers, no captioner has over 500"
    ):
        CaptionPrompter(tmp_path).describe([torch.rand(3, 8, 8)], lambda *at: None)
