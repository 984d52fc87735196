"""Settings from TOML: the two files that are shipped say every default, and what cannot be is refused by name."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tudsr_core.training.config import STAGE_DEFAULTS, TrainingConfig, read_config
from tudsr_core.training.sections import ConfigError, parse_toml

CONFIGS = Path(__file__).parents[2] / "configs"
LEAST = 'output = "out"\n[model]\nbase = "sd21"\n[data]\nfolders = ["photos"]\n'


def written(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("stage", "name"), [(1, "stage-one"), (2, "stage-two")])
def test_the_shipped_files_say_every_setting_with_its_default(stage, name):
    path = CONFIGS / f"{name}.toml"
    said, config = parse_toml(path), read_config(path, stage)
    assert said.keys() == {field.name for field in fields(TrainingConfig)}
    own = {"base", "stage_one", "folders", "dists_weights", "dists_balance", "weights"}  # paths, everybody's own
    for section, values in said.items():
        if not isinstance(values, dict):
            continue
        kind = getattr(config, section)
        assert values.keys() == {field.name for field in fields(kind)}, section
        for field in fields(kind):
            default = STAGE_DEFAULTS[stage].get(section, {}).get(field.name, field.default)
            if field.name not in own:
                assert default is not MISSING and getattr(kind, field.name) == default, f"{section}.{field.name}"


def test_the_defaults_are_the_papers(tmp_path):
    one, two = (read_config(written(tmp_path, LEAST), 1), read_config(written(tmp_path, LEAST), 2))
    assert (one.model.timestep, two.model.timestep) == (200, 50)
    assert (one.optimizer.steps, two.optimizer.steps) == (5100, 3500)
    assert (one.data.size, one.data.chunks, one.data.factor) == (512, 1, 4)
    assert (two.data.size, two.data.chunks, two.data.factor) == (512, 2, 8)
    assert (one.loss.dists, one.loss.adversarial, one.loss.mae) == (5, 0.5, 0.5)
    assert (one.optimizer.rate, one.optimizer.accumulation, one.lora.rank, one.data.batch) == (5e-5, 4, 32, 1)
    assert (one.discriminator.real_label, one.discriminator.fake_label) == (0.8, 0)
    assert (one.chunks_per_step, two.chunks_per_step) == (4, 16)


def test_paths_are_taken_from_the_files_folder(tmp_path):
    config = read_config(written(tmp_path, LEAST + '[loss]\ndists_weights = "w.pth"\n'), 1)
    assert config.output == tmp_path / "out" and config.data.folders == (tmp_path / "photos",)
    assert config.model.base == str(tmp_path / "sd21") and config.loss.dists_weights == tmp_path / "w.pth"
    assert config.loss.dists_balance is None
    shipped = read_config(written(tmp_path, LEAST.replace("sd21", "embedded")), 2)
    assert shipped.model.base == "embedded"


WRONG = {
    "a section": ("[optimiser]\nrate = 1\n", "has optimiser, which is unknown; known are: output, model"),
    "a setting": ("[optimizer]\nratee = 1\n", r"\[optimizer\] has ratee, which is unknown; known are: steps, rate"),
    "a text": ('[optimizer]\nrate = "fast"\n', r"\[optimizer\]: 'rate' is fast, it must be a number"),
    "half a step": ("[optimizer]\nsteps = 1.5\n", "'steps' is 1.5, it must be a whole number"),
    "a choice": ('[run]\nprecision = "fp16"\n', "precision is fp16; it must be one of: fp32, bf16"),
    "a number for a flag": ("[run]\ntensorboard = 1\n", "tensorboard is 1; it must be true or false"),
    "two for a pair": ("[optimizer]\nbetas = [0.9]\n", "betas is a list; it must be a list of 2"),
    "out of range": ("[lora]\nrank = 0\n", r"\[lora\]: rank 0 must be from 1 to 1024"),
    "chunks in stage one": (
        "[discriminator]\naugment = true\n[validation]\ncount = 0\n",
        "every and count must be 1 or more",
    ),
    "no TOML": ("[data\n", "is no TOML"),
}


@pytest.mark.parametrize(("text", "says"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_by_name(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        read_config(written(tmp_path, LEAST + text), 1)


def test_what_is_missing_and_what_is_of_the_other_stage(tmp_path):
    for text, says in (
        (LEAST.replace('output = "out"\n', ""), "run.toml lacks output$"),
        (LEAST.replace('base = "sd21"\n', ""), "base is missing"),
        (LEAST.replace('folders = ["photos"]\n', ""), "folders is missing"),
        (LEAST + "chunks = 2\n", "chunks and stage_one belong to stage two"),
        (LEAST + "size = 100\n", "size 100 must be a multiple of 8"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_config(written(tmp_path, text), 1)
    with pytest.raises(ConfigError, match="stage two needs chunks of 2 or more"):
        read_config(written(tmp_path, LEAST + "chunks = 1\n"), 2)
    with pytest.raises(ConfigError, match=r"none.toml does not exist"):
        read_config(tmp_path / "none.toml", 1)
