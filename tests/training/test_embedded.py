"""Training of the embedded model: every phase runs a step and the file it writes is a model."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tudsr_core.backends.local import load_embedded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.training import embedded as training
from tudsr_core.training.config import read_sections
from tudsr_core.training.data import PACKAGE, PHOTOGRAPHS, SIDE, Crops, draw_pictures, read_photographs
from tudsr_core.training.embedded_config import DataSection, EmbeddedConfig, Phase
from tudsr_core.training.identity import start_as_identity
from tudsr_core.weights.checkpoints import embedded_path

RECIPE = Path(__file__).parents[2] / "configs" / "embedded.toml"


def test_the_card_says_the_steps_of_the_recipe():
    card = (embedded_path().parent / "README.md").read_text("utf-8")
    recipe = read_sections(EmbeddedConfig, RECIPE, {})
    assert f"{recipe.polish.steps:,} steps of polishing" in card and f"{recipe.stage_two.steps:,} of stage two" in card


def test_every_photograph_is_in_the_card_with_its_licence():
    card = (embedded_path().parent / "README.md").read_text("utf-8")
    for photo in PHOTOGRAPHS:
        assert f"| {photo.path} | {PACKAGE} | {photo.licence} |" in card


def test_photographs_are_shrunk_and_a_missing_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no {PHOTOGRAPHS[0].path} .*apt-get download {PACKAGE}"):
        read_photographs(tmp_path)
    for photo in PHOTOGRAPHS:
        Image.new("RGB", (2 * SIDE, SIDE // 2), "teal").save(tmp_path / photo.path)
    photos = read_photographs(tmp_path)
    assert {tuple(photo.shape) for photo in photos.values()} == {(3, SIDE // 4, SIDE)}


def test_both_phases_run_and_the_file_is_a_model(tmp_path, monkeypatch, noise):
    monkeypatch.setattr(training, "CHUNK", 32)
    torch.manual_seed(0)
    photos = {"soft": resize(noise(1, 3, 20, 20), (160, 160))[0].clamp(0, 1)}
    crops = Crops(photos, draw_pictures(2, 0, list(photos.values())), 0)
    model = training.Restorer(*training.build())
    start_as_identity(model.vae, model.unet, training.STAGE_ONE, crops.batch(8, 64))
    picture = crops.batch(1, 64)
    with torch.no_grad():
        assert (model.step(picture) - picture).abs().mean() < 0.02  # training starts at bicubic
    monkeypatch.setattr(training.data, "read_photos", lambda *_: photos)
    monkeypatch.setattr(training.data, "read_photographs", lambda _: {})
    one = Phase(1, 1e-4)
    section = DataSection(tmp_path, tmp_path, drawn=2)
    output = tmp_path / "new" / "model.safetensors"
    training.train(EmbeddedConfig(output, section, 0, None, one, one, one))
    last = training.Restorer(*training.build())
    training._load(last, output.with_suffix(".polish.safetensors"))  # where a run that ended here goes on
    loaded = load_embedded("cpu", path=output)
    enlarged = upscale(picture[..., :16, :16], loaded, Target(scale=8))
    assert enlarged.shape == (1, 3, 128, 128) and enlarged.isfinite().all()
    assert loaded.second.steps[0].t == training.STAGE_TWO.t
    again = training.Restorer(*training.build())
    training._load(again, output)
    with torch.no_grad():
        assert (again.step(picture) - last.step(picture)).abs().max() < 2e-3  # kept in float16
    update = next(iter(loaded.second.networks.unet_delta.updates.values()))
    assert update.alpha == pytest.approx(training.LORA_RANK)
