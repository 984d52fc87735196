"""A training from its settings to its files: what is written, and that trainer, library and command agree on it."""

import json
import math
import os
import re
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from command import start, tudsr
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import SIZE, small_config, write_pictures, write_small_model

from tudsr_core.backends.local import AdapterOptions, load_embedded, load_sd21
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.training.config import ModelConfig, ValidationConfig
from tudsr_core.training.networks import build_stage_one, build_trained
from tudsr_core.training.sections import ConfigError
from tudsr_core.training.session import Log, train
from tudsr_core.training.trainer import Trainer

BARE = UpscaleOptions(color_fix="none", native_size=False)


@pytest.fixture
def root(tmp_path):
    write_pictures(tmp_path / "pictures")
    write_pictures(tmp_path / "held-out", 2)
    write_small_model(tmp_path / "model.safetensors")
    return tmp_path


def test_a_trained_stage_one_makes_the_same_picture_everywhere(root, small_sd, noise):
    """In the trainer, in the library from the folder and from the single file, and through the command."""
    config = small_config(
        root,
        small_sd / "base",
        optimizer={"steps": 2, "rate": 2e-2, "accumulation": 1},
        run={"ema": 0.5},
        model={"timestep": 150},
    )
    outcome = train(config, 1)
    assert outcome.finished and outcome.step == 2
    folder, file = outcome.files
    assert folder == config.output / "adapter" and file.name == "tudsr-stage-1.safetensors"
    trainer = Trainer(config, 1)
    trainer.resume()
    small = noise(1, 3, 16, 16)
    with torch.no_grad(), trainer.averaged():
        wanted = trainer.network(resize(small, (64, 64)).clamp(0, 1))
        with trainer.network.unet.disable_adapter():
            plain = trainer.network(resize(small, (64, 64)).clamp(0, 1))
    assert (wanted - plain).abs().max() > 1e-3, "the adapter has learnt nothing"
    made = upscale(small, load_sd21(small_sd / "base", file, device="cpu"), Target(scale=4), BARE)
    assert (made - wanted).abs().max() < 1e-4
    of_folder = load_sd21(small_sd / "base", folder, None, "cpu", "fp32", AdapterOptions("tudsr", 150))
    assert (upscale(small, of_folder, Target(scale=4), BARE) - wanted).abs().max() < 1e-4
    array = (small[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    Image.fromarray(array).save(root / "small.png")
    arguments = ["--model", small_sd / "base", "--stage-one", file, "--color-fix", "none", "--no-native-size"]
    done = tudsr("upscale", root / "small.png", "-o", root / "big.png", "--scale", 4, *arguments)
    assert done.returncode == 0, done.stderr
    stored = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad(), trainer.averaged():
        wanted = trainer.network(resize(stored, (64, 64)).clamp(0, 1))[0].permute(1, 2, 0).numpy()
    assert np.abs(np.asarray(Image.open(root / "big.png")) / 255 - wanted).max() < 0.51 / 255 + 1e-4


def test_the_exported_file_has_the_published_layout_and_all_settings(root, small_sd):
    config = small_config(root, small_sd / "base", optimizer={"steps": 1, "accumulation": 1}, loss={"adversarial": 0})
    folder, file = train(config, 1).files
    own = folder / "unet_lora_adapter"
    assert sorted(path.name for path in own.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    said = json.loads((own / "adapter_config.json").read_text("utf-8"))
    assert (said["peft_type"], said["r"], said["lora_alpha"], said["bias"]) == ("LORA", 4, 4, "none")
    assert set(said["target_modules"]) == set(config.lora.targets)
    keys = load_file(own / "adapter_model.safetensors")
    assert {key.rpartition(".lora_")[2] for key in keys} == {"A.weight", "B.weight"}
    assert all(key.startswith("base_model.model.") and value.dtype == torch.float32 for key, value in keys.items())
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    training = json.loads(metadata["training"])
    assert training["loss"] == {**training["loss"], "dists": 5.0, "adversarial": 0, "mae": 0.5}
    assert training["trained_steps"] == 1 and training["model"]["timestep"] == 200 and metadata["stage"] == "1"
    assert training["model"]["base"] == "base" and "/" not in json.dumps(training), "paths are nobody's business"


def test_stage_two_of_a_model_file_becomes_a_model_file(root, noise):
    config = small_config(root, root / "model.safetensors", 2, optimizer={"steps": 2, "rate": 2e-2, "accumulation": 1})
    _, file = train(config, 2).files
    assert file.name == "model.safetensors"
    trainer = Trainer(config, 2)
    trainer.resume()
    model, small = load_embedded("cpu", path=file), noise(1, 3, 8, 8)
    with torch.no_grad():
        first = trainer.first(resize(small, (32, 32)).clamp(0, 1))
        wanted = trainer.network(resize(first, (64, 64)).clamp(0, 1))
    made = upscale(small, model, Target(scale=8), BARE)
    assert (made - wanted).abs().max() < 5e-3  # float16 in the file
    before = load_embedded("cpu", path=root / "model.safetensors")
    assert (upscale(small, before, Target(scale=8), BARE) - wanted).abs().max() > 5e-2
    assert torch.equal(upscale(small, before, Target(scale=4), BARE), upscale(small, model, Target(scale=4), BARE))


def test_logs_validation_and_resume(root):
    config = replace(
        small_config(root, root / "model.safetensors", 2, optimizer={"steps": 3, "accumulation": 1}),
        validation=ValidationConfig(root / "held-out", every=2, count=2),
    )
    seen = []
    train(config, 2, report=lambda step, numbers: seen.append(step))
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text("utf-8").splitlines()]
    assert seen == [1, 2, 3] and [line["step"] for line in lines] == [1, 2, 2, 3, 3]
    assert lines[2].keys() == {"step", "psnr", "psnr_start", "seams"} and 0 < lines[2]["psnr"] < 60
    shown = sorted((config.output / "validation" / "step-0000002").iterdir())
    assert [path.name for path in shown] == ["0.png", "1.png"]
    with Image.open(shown[0]) as panels:
        assert panels.size == (3 * 2 * SIZE + 8, 2 * SIZE)
    with pytest.raises(ConfigError, match="holds a training already; add --resume"):
        train(config, 2)
    longer, began = replace(config, optimizer=replace(config.optimizer, steps=4)), []
    assert train(longer, 2, resume=True, started=began.append).step == 4 and began == [3]


def test_a_step_without_a_number_stays_json(root):
    config = small_config(root, root / "model.safetensors")
    Log(config).write(3, {"mae": math.nan, "norm": math.inf, "skipped": 1.0})
    (line,) = (config.output / "log.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 3, "mae": None, "norm": None, "skipped": 1.0}


def test_what_cannot_be_trained_is_refused(root, small_sd):
    config = small_config(root, root / "model.safetensors")
    with pytest.raises(ConfigError, match="its backbone, which has no adapter"):
        train(config, 1)
    sd = small_config(root, small_sd / "base", 2)
    with pytest.raises(ConfigError, match="stage two needs stage_one"):
        build_stage_one(sd, build_trained(sd))
    model = ModelConfig(str(root / "model.safetensors"), stage_one=small_sd / "one", timestep=50)
    embedded = replace(small_config(root, root / "model.safetensors", 2), model=model)
    with pytest.raises(ConfigError, match="leave stage_one empty"):
        build_stage_one(embedded, build_trained(embedded))
    with pytest.raises(ConfigError, match="no module of this UNet ends with one of the targets nothing"):
        build_trained(small_config(root, root / "model.safetensors", lora={"targets": ("nothing",)}))
    with pytest.raises(ConfigError, match="does not exist; check the path"):
        Trainer(replace(config, data=replace(config.data, folders=(root / "none",))), 1)
    (root / "empty").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        Trainer(replace(config, data=replace(config.data, folders=(root / "empty",))), 1)


CONFIG = """
output = "out"
[model]
base = "model.safetensors"
[data]
folders = ["pictures"]
size = 32
workers = 0
[lora]
rank = 2
[loss]
dists_features = "scratch"
[discriminator]
features = "scratch"
[optimizer]
steps = 1
accumulation = 1
[run]
precision = "fp32"
"""


def test_the_command_trains_and_says_what_is_wrong(root):
    (root / "two.toml").write_text(CONFIG, encoding="utf-8")
    done = tudsr("train", "stage-two", root / "two.toml")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(root / "out" / name) for name in ("adapter", "model.safetensors")]
    again = tudsr("train", "stage-two", root / "two.toml")
    assert again.returncode == 1 and "holds a training already; add --resume" in again.stderr
    assert tudsr("train", "stage-two", root / "two.toml", "--resume").returncode == 0
    (root / "two.toml").write_text(CONFIG.replace('"scratch"', '"vgg16"', 1), encoding="utf-8")
    done = tudsr("train", "stage-two", root / "two.toml", "--resume")
    assert done.returncode == 1 and "features vgg16 need torchvision's vgg16-397923af.pth" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has no process groups to interrupt")
def test_an_interrupt_of_the_command_and_its_workers_ends_after_the_step(root):
    """As Ctrl-C in a terminal: the whole group of processes gets it."""
    text = CONFIG.replace("workers = 0", "workers = 1").replace("steps = 1", "steps = 100000")
    (root / "two.toml").write_text(text, encoding="utf-8")
    running = start(["train", "stage-two", root / "two.toml"], [root / "out.txt", root / "err.txt"], group=True)
    log, end = root / "out" / "log.jsonl", time.monotonic() + 200
    while not log.exists() and running.is_alive() and time.monotonic() < end:
        time.sleep(0.1)
    os.killpg(running.pid, signal.SIGINT)
    running.join()
    said = (root / "err.txt").read_text("utf-8")
    assert running.exitcode == 130 and re.fullmatch(r"error: stopped at step \d+; add --resume to go on\n", said), said
    step = int(re.search(r"\d+", said)[0])
    assert (root / "out" / "checkpoints" / f"step-{step:07d}.safetensors").is_file()
    assert (root / "out" / "model.safetensors").is_file()


def test_the_command_estimates_a_timestep(root):
    arguments = ["--size", 32, "--count", 3, "--device", "cpu", "--model", root / "model.safetensors"]
    done = tudsr("timestep", root / "pictures", *arguments)
    assert done.returncode == 0 and done.stdout.startswith("t = ") and "of 3 pairs" in done.stdout, done.stderr
    two = tudsr("timestep", root / "pictures", *arguments, "--factor", 8, "--chunks", 2)
    assert two.returncode == 0 and "of 12 pairs" in two.stdout, two.stderr
    wrong = tudsr("timestep", root / "pictures", *arguments, "--stage-one", root / "x")
    assert wrong.returncode == 1 and "add --chunks 2" in wrong.stderr
