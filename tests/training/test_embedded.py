"""Training of the embedded model: every phase runs a step and the file it writes is a model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from tudsr_core.backends.local import load_embedded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.training import embedded as training
from tudsr_core.training import embedded_networks, embedded_samples
from tudsr_core.training.data import PACKAGE, PHOTOGRAPHS, SIDE, Crops, read_photographs
from tudsr_core.training.drawn import draw_pictures
from tudsr_core.training.embedded_config import DataSection, EmbeddedConfig, FinishPhase, LoopedPhase, Phase
from tudsr_core.training.embedded_samples import BACKBONE, FINISH, LOOPED, POLISH, Steps, batches
from tudsr_core.training.identity import start_as_identity
from tudsr_core.training.pages import draw_pages
from tudsr_core.training.sections import ConfigError, read_sections
from tudsr_core.weights.checkpoints import embedded_path

RECIPE = Path(__file__).parents[2] / "configs" / "embedded.toml"


def test_the_card_says_the_steps_of_the_recipe():
    card = (embedded_path().parent / "README.md").read_text("utf-8")
    recipe = read_sections(EmbeddedConfig, RECIPE, {})
    for words in (
        f"{recipe.polish.steps:,} steps of polishing",
        f"{recipe.finish.steps:,} with small print",
        f"{recipe.stage_two.steps:,} of stage two",
    ):
        assert words in card


def test_sections_have_defaults_and_what_is_missing_is_named(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('output = "out"\n[data]\nwheels = "w"\n[polish]\nrate = 1\n', "utf-8")
    with pytest.raises(ConfigError, match=r"\[data\] lacks photographs$"):
        read_sections(EmbeddedConfig, recipe, {})
    recipe.write_text('report_every = 0\noutput = "out"\n[data]\nwheels = "w"\nphotographs = "p"\n', "utf-8")
    with pytest.raises(ConfigError, match="recipe.toml: .*report_every at least 1"):
        read_sections(EmbeddedConfig, recipe, {})
    recipe.write_text('output = "out"\n[data]\nwheels = "w"\nphotographs = "p"\n', "utf-8")
    assert read_sections(EmbeddedConfig, recipe, {}).finish.steps == 0


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


FONTS = [ImageFont.load_default(10).font_bytes]


@pytest.fixture
def photos(noise):
    return {"soft": resize(noise(1, 3, 20, 20), (160, 160))[0].clamp(0, 1)}


def steps_of(photos, seed=0, backbone=6, together=1, pages=0.5):
    """One step of each phase but for the backbone's; `pages` is the share that the finish has."""
    crops = Crops(photos, draw_pictures(2, 0, list(photos.values())), 0)
    looped = LoopedPhase(1, 1e-4, together=together)
    phases = {"backbone": Phase(backbone, 1e-4, 3), "polish": Phase(1, 1e-4, 3), "stage_two": looped}
    config = EmbeddedConfig(
        Path("out"), DataSection(Path(), Path()), seed, **phases, finish=FinishPhase(1, 1e-4, 16, pages)
    )
    return Steps(crops, FONTS, config, 32)


def same(one, other):
    return all(a is b is None or torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_share_of_pages_is_that_of_the_phase_and_none_changes_nothing(photos):
    for share in (0, 1):
        steps, rng = steps_of(photos, pages=share), np.random.default_rng([0, FINISH, 0])
        if share:
            rng.binomial(16, share)  # how many of the 16 are pages
        expected = draw_pages(16, 32, FONTS, rng) if share else steps.crops.batch(16, 32, rng)
        assert torch.equal(steps[FINISH, 0].sharp, expected)


def test_workers_draw_the_batches_that_none_draw(photos):
    steps = steps_of(photos)
    alone, beside = (list(batches(steps, steps.places(), workers)) for workers in (0, 2))
    assert len(alone) == len(beside) == 9 and all(map(same, alone, beside))


def test_a_batch_follows_from_seed_phase_and_step(photos):
    steps = steps_of(photos)
    run = list(batches(steps, steps.places(), 0))
    resumed = batches(steps_of(photos), steps.places()[3:], 0)
    assert same(next(resumed), run[3])
    others = [steps[BACKBONE, 2], steps[POLISH, 3], steps_of(photos, seed=1)[BACKBONE, 3]]
    assert not any(torch.equal(run[3].sharp, other.sharp) for other in others)


def test_a_batch_holds_what_its_step_needs(photos):
    steps = steps_of(photos)
    places = (BACKBONE, 0), (BACKBONE, 4), (POLISH, 0), (LOOPED, 0), (FINISH, 0)
    first, rehearsal, polish, looped, finish = (steps[at] for at in places)
    shapes = [[tuple(part.shape[1:]) for part in batch if part is not None] for batch in (first, rehearsal)]
    assert shapes == [[(3, 32, 32)] * 2, [(3, 32, 32), (3, 16, 16)]]
    assert polish.smooth.shape == (1, 3, 16, 16) and finish.smooth.shape == (8, 3, 16, 16)
    assert [tuple(part.shape) for part in looped] == [(2, 3, 64, 64), (2, 3, 32, 32), (2, 3, 16, 16)]
    batch = first.to(torch.device("meta"))
    assert batch.sharp.is_meta and batch.start.is_meta and batch.smooth is None


def test_drawn_pictures_are_the_same_for_any_number_of_workers(photos):
    palettes = list(photos.values())
    alone, beside = (draw_pictures(6, 3, palettes, 48, workers) for workers in (0, 2))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside, strict=True))
    assert torch.equal(draw_pictures(2, 3, palettes, 48)[1], alone[1])


def test_chunks_at_once_have_the_gradient_of_the_loop():
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    one, four = training._chunks(picture, 1), training._chunks(picture, 4)
    assert len(one) == 4 and torch.equal(torch.cat(one), four[0])
    assert one[1].flatten().tolist() == [2, 3, 6, 7]


def test_an_autoencoded_picture_beside_changes_nothing(noise):
    torch.manual_seed(0)
    model = training.Restorer(*training.build())
    image, coded = noise(2, 3, 16, 16), noise(1, 3, 16, 16)
    with torch.no_grad():
        restored, again = model.step_beside(image, coded, training.STAGE_TWO)
        assert (restored - model.step(image, training.STAGE_TWO)).abs().max() < 1e-5
        assert (again - model.decode(model.encode(coded))).abs().max() < 1e-5


def test_a_step_stays_on_the_device_and_reads_nothing_from_it(photos, monkeypatch):
    """The meta device refuses tensors of another one, and to say what a number is."""
    monkeypatch.setattr(embedded_networks, "resize", lambda image, size: image.new_empty(*image.shape[:2], *size))
    for module in (training, embedded_samples):
        monkeypatch.setattr(module, "rehearses", lambda step: step == 1)
    steps, meta = steps_of(photos, backbone=2, together=4), torch.device("meta")
    drawn, reports = batches(steps, steps.places(), 0), []
    vae, unet = training.build()
    model = training.Restorer(vae.to(meta), unet.to(meta))

    def report(*told):
        reports.append(told)

    for number in (BACKBONE, POLISH, FINISH):
        model = training.train_backbone(drawn, model, steps.phases[number], report, polish=number != BACKBONE)
    adapted = training.train_stage_two(drawn, model, steps.phases[LOOPED], report)
    assert len(reports) == 5 and all(loss.is_meta for _, loss, _ in reports)
    assert all(parameter.is_meta for parameter in adapted.parameters())


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"steps": -1}, {"together": 3}, {"pages": 1.5}])
def test_a_phase_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LoopedPhase(**({"steps": 1, "rate": 1e-3} | wrong))


def test_the_finish_goes_so_far_from_the_weights_before_as_it_says():
    before, after = (training.Restorer(*training.build()) for _ in range(2))
    old, new = (list(one.vae.parameters()) + list(one.unet.parameters()) for one in (before, after))
    expected = [0.3 * a + 0.7 * b for a, b in zip(old, new, strict=True)]
    mixed = training._mixed(before, after, 0.7)
    found = list(mixed.vae.parameters()) + list(mixed.unet.parameters())
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(found, expected, strict=True))
    with pytest.raises(ValueError, match="mix"):
        FinishPhase(1, 1e-3, mix=0)


def test_every_phase_runs_and_the_file_is_a_model(tmp_path, monkeypatch, photos):
    monkeypatch.setattr(training, "CHUNK", 32)
    torch.manual_seed(0)
    crops = Crops(photos, draw_pictures(2, 0, list(photos.values())), 0)
    model = training.Restorer(*training.build())
    start_as_identity(model.vae, model.unet, training.STAGE_ONE, crops.batch(8, 64))
    picture = crops.batch(1, 64)
    with torch.no_grad():
        assert (model.step(picture) - picture).abs().mean() < 0.02  # training starts at bicubic
    monkeypatch.setattr(training.data, "read_photos", lambda *_: photos)
    monkeypatch.setattr(training.data, "read_photographs", lambda _: {})
    monkeypatch.setattr(training.data, "read_fonts", lambda _: FONTS)
    one, finish, looped = (kind(1, 1e-4, pages=0.5) for kind in (Phase, FinishPhase, LoopedPhase))
    section = DataSection(tmp_path, tmp_path, drawn=2)
    output = tmp_path / "new" / "model.safetensors"
    training.train(EmbeddedConfig(output, section, 0, None, "cpu", 1, one, one, finish, looped))
    last = training.Restorer(*training.build())
    training._load(last, output.with_suffix(".finish.safetensors"))  # where a run that ended here goes on
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
