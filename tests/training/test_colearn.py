"""Co-learning in miniature: what each term trains, that nothing else moves, and that stopping changes nothing."""

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import tudsr
from conftest import LONG
from PIL import Image
from plain_stablesr import random_tensors
from safetensors.torch import save_file
from small_run import write_pictures, write_small_model

from tudsr_core.backends import load_stablesr_networks
from tudsr_core.backends.local import load_embedded
from tudsr_core.methods import StableSROptions, Zoom
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import TwoStage, UpscaleOptions
from tudsr_core.models import load_downsampler
from tudsr_core.pictures.files import PictureError
from tudsr_core.pictures.tensors import resize
from tudsr_core.training.colearn import Colearner
from tudsr_core.training.colearn_config import (
    ColearnConfig,
    CriticsConfig,
    DownConfig,
    PairsConfig,
    PhasesConfig,
    RatesConfig,
    SafeguardsConfig,
    TeacherConfig,
    WeightsConfig,
    read_colearn,
)
from tudsr_core.training.colearn_session import train_colearn
from tudsr_core.training.colearn_terms import Made
from tudsr_core.training.config import ModelConfig, RunConfig, ValidationConfig
from tudsr_core.training.sections import ConfigError, parse_toml
from tudsr_core.training.state import saved_steps
from tudsr_core.training.teacher import MethodTeacher
from tudsr_core.training.trainer import TrainingError
from tudsr_core.training.two_folders import samples
from tudsr_core.weights import CheckpointError

CONFIG = Path(__file__).parents[2] / "configs" / "colearn.toml"
NONE = {name: 0 for name in WeightsConfig.__dataclass_fields__}


@pytest.fixture
def root(tmp_path):
    """A folder with good and poor pictures and a small model."""
    write_pictures(tmp_path / "good")
    (tmp_path / "poor").mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        array = rng.normal(120, 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(array).save(tmp_path / "poor" / f"{number}.png")
    write_small_model(tmp_path / "model.safetensors")
    return tmp_path


def small(root, task="colearn", **changes):
    config = ColearnConfig(
        root / "out",
        ModelConfig(str(root / "model.safetensors")),
        PairsConfig((root / "good",), (root / "poor",), size=64, batch=2, workers=0),
        task=task,
        downsampler=DownConfig("latent", 8, 1, 4, 2),
        teacher=TeacherConfig(chain=2),
        weights=WeightsConfig(cycle_after=0),
        critics=CriticsConfig(width=4),
        safeguards=SafeguardsConfig(snapshots=2, every=2),
        phases=PhasesConfig(2, 2, 2, 4),
        optimizer=RatesConfig(1e-3, 1e-3, 1e-3),
        run=RunConfig("fp32", gradient_checkpointing=False, save_every=100, tensorboard=False),
    )
    return replace(config, **{name: replace(getattr(config, name), **change) for name, change in changes.items()})


def state(learner):
    return {f"{n}/{k}": v.detach().clone() for n, own in learner.parameters.items() for k, v in own.items()}


def moved(before, after):
    return {key.partition("/")[0] for key, value in before.items() if not torch.equal(value, after[key])}


def run(learner, report=lambda step, numbers: None):
    learner.run(report)
    return learner


def test_phases_follow_one_another(root):
    config = small(root)
    assert config.plan == (("teacher", 2), ("joint", 4)) and config.steps == 6
    assert [config.phase_at(step) for step in (0, 1, 2, 5)] == [
        ("teacher", 0),
        ("teacher", 1),
        ("joint", 0),
        ("joint", 3),
    ]
    assert small(root, "downsampler").plan == (("warm", 2), ("real", 2))
    assert small(root, teacher={"kind": "none"}).plan == (("joint", 4),)


@pytest.mark.parametrize("order", ["alternating", "joint"])
@pytest.mark.parametrize(
    ("weights", "trains"),
    [
        ({"pixel": 1.0}, {"student"}),
        ({"adversarial": 1.0}, {"student", "high"}),
        ({"distill": 1.0}, {"student"}),
        ({"inverse": 1.0}, {"student"}),
        ({"consistency": 1.0}, {"student"}),
        ({"cycle": 1.0, "down_cycle": 1.0}, {"student", "down"}),
        ({"down_cycle": 1.0}, {"down"}),
        ({"cycle": 1.0}, {"student"}),
        ({"down_adversarial": 1.0}, {"down", "low"}),
        ({"low_frequency": 1.0}, {"down"}),
        ({"diversity": 1.0}, {"down"}),
        ({"recode": 1.0}, {"down"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_each_term_trains_what_it_should_and_leaves_the_rest(root, order, weights, trains):
    config = replace(
        small(root, phases={"teacher": 0, "joint": 2, "order": order}), weights=WeightsConfig(**NONE | weights)
    )
    learner = shaken(Colearner(config))
    before = state(learner)
    run(learner)
    assert moved(before, state(learner)) == trains


def shaken(learner):
    """Give the fresh downsampler, which adds nothing yet, damage: only then do all its weights have a gradient.

    And the teacher, which begins as the student, something of its own to teach.
    """
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        if learner.networks.teacher is not None:
            bias = learner.networks.teacher.network.conv_out.bias
            bias.copy_(torch.randn(bias.shape, generator=rng))
        out = learner.networks.down.conv_out.weight
        out.copy_(torch.randn(out.shape, generator=rng) * 0.05)
    return learner


def test_the_known_truth_trains_the_downsampler_alone(root):
    config = replace(small(root, "downsampler", phases={"real": 0}), weights=WeightsConfig(**NONE | {"paired": 1.0}))
    learner = shaken(Colearner(config))
    before, seen = state(learner), []
    run(learner, lambda step, numbers: seen.append(numbers))
    assert moved(before, state(learner)) == {"down"} and seen[0].keys() == {"paired", "down_norm"}


def test_makers_leave_nothing_on_critics_and_critics_nothing_on_makers(root):
    learner = shaken(Colearner(small(root)))
    judge, networks, sample = learner.judge, learner.networks, next(samples(learner.pictures, 0))
    poor, made = judge.pairs(sample, networks.down), Made([], [])

    def touched():
        return {n for n, own in learner.parameters.items() if any(p.grad is not None for p in own.values())}

    for compute, wanted in (
        (lambda: judge.of_student(sample, poor, made), {"student"}),
        (lambda: judge.of_down(sample, None, made), {"down"}),
        (lambda: judge.of_cycle(sample, made, 0.5, False), {"student"}),
        (lambda: judge.of_cycle(sample, made, None, True), {"down"}),
        (lambda: judge.of_cycle(sample, made, 0.5, True), {"student", "down"}),
        (lambda: judge.of_high(sample, made), {"high"}),
        (lambda: judge.of_low(sample, sample.poor, made), {"low"}),
        (lambda: judge.of_teacher(sample, poor), {"teacher"}),
    ):
        learner._zero()
        sum(compute().values()).backward()
        assert touched() == wanted


def test_in_a_joint_cycle_only_the_students_share_passes_on(root):
    learner = shaken(Colearner(small(root, weights={"cycle": 0.5, "down_cycle": 2.0})))
    sample = next(samples(learner.pictures, 0))

    def gradient(name, *arguments):
        learner._zero()
        sum(learner.judge.of_cycle(sample, Made([], []), *arguments).values()).backward()
        return torch.cat([p.grad.flatten() for p in learner.parameters[name].values() if p.grad is not None])

    alone, together = gradient("student", 0.5, False), gradient("student", 0.5, True)
    assert alone.abs().max() > 0 and torch.allclose(alone, together, rtol=1e-4, atol=1e-9)
    assert torch.allclose(gradient("down", None, True), gradient("down", 0.5, True), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("task", "kind", "order", "stop"),
    [
        ("downsampler", "pixel", "joint", 1),
        ("downsampler", "latent", "joint", 3),
        ("colearn", "latent", "alternating", 1),
        ("colearn", "latent", "alternating", 5),
        ("colearn", "pixel", "joint", 4),
    ],
)
def test_stopping_and_going_on_changes_nothing(root, task, kind, order, stop):
    config = small(root, task, downsampler={"kind": kind}, phases={"order": order}, run={"ema": 0.9})
    whole = run(Colearner(replace(config, output=root / "whole")))
    first = Colearner(config)

    def report(step, numbers):
        if step == stop:
            first.interrupted = True

    assert not first.run(report)
    second = Colearner(config)
    assert second.resume() == stop and second.run(lambda step, numbers: None)
    ours, theirs = (
        {f"{n}/{k}": v for n, own in one.parts().items() for k, v in own.items()} for one in (second, whole)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert any(key.startswith("down_average/") for key in ours)
    if task == "colearn":
        assert {key.split("/")[1] for key in ours if key.startswith("replay/")} == {"0", "1"}


def test_one_phase_starts_from_the_file_of_the_one_before(root, noise):
    first = train_colearn(small(root, "downsampler"))
    assert first.finished and [file.name for file in first.files] == ["downsampler.safetensors"]
    config = replace(small(root, downsampler={"start": first.files[0], "learns": False}), output=root / "next")
    learner = Colearner(config)
    good = noise(1, 3, 64, 64)
    assert torch.equal(learner.networks.down.degrade(good), load_downsampler(first.files[0]).degrade(good))
    outcome = train_colearn(config)
    assert [file.name for file in outcome.files] == ["downsampler.safetensors", "model.safetensors"]
    assert torch.equal(load_downsampler(outcome.files[0]).degrade(good), learner.networks.down.degrade(good))


def test_the_critic_of_poor_pictures_goes_on_or_says_why_not(root):
    config = small(root, "downsampler", phases={"warm": 0, "real": 2})
    alone = run(Colearner(config))
    going_on = replace(small(root, critics={"low": config.output}), output=root / "next")
    wanted, made = (learner.networks.low.heads.state_dict() for learner in (alone, Colearner(going_on)))
    assert wanted.keys() == made.keys() and all(torch.equal(made[key], one) for key, one in wanted.items())
    fresh = Colearner(replace(small(root), output=root / "fresh")).networks.low.heads.state_dict()
    assert not torch.equal(fresh["0.bias"], wanted["0.bias"])
    with pytest.raises(ConfigError, match=r"has a D_L of another size; set \[critics\] width"):
        Colearner(replace(going_on, critics=replace(going_on.critics, width=8)))
    with pytest.raises(ConfigError, match="good holds no checkpoint with a network 'low'; name the folder"):
        Colearner(replace(going_on, critics=replace(going_on.critics, low=root / "good")))


def test_the_trained_student_is_a_model_that_everything_loads(root, noise):
    config = small(root, phases={"joint": 2})
    _, file = train_colearn(config).files
    learner = Colearner(config)
    learner.resume()
    poor = noise(1, 3, 16, 16)
    with torch.no_grad():
        wanted = learner.networks.student(resize(poor, (64, 64)).clamp(0, 1))
    bare = UpscaleOptions(color_fix="none", native_size=False)
    made, before = (
        (upscaler := TwoStage(load_embedded("cpu", path=path), bare)).run(
            poor, upscaler.plan((16, 16), Target(scale=4))
        )
        for path in (file, root / "model.safetensors")
    )
    assert (made - wanted).abs().max() < 5e-3  # float16 in the file
    assert (before - wanted).abs().max() > 1e-2


def test_any_way_of_this_pack_can_teach(root, noise):
    learner = Colearner(small(root, teacher={"kind": "none"}))
    student, poor = learner.networks.student, noise(2, 3, 16, 16)
    upscaler = TwoStage(load_embedded("cpu", path=root / "model.safetensors"), UpscaleOptions(color_fix="none"))
    z = student.encode(resize(poor, (64, 64)).clamp(0, 1))
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    made = MethodTeacher(lambda seed: upscaler, student).latents(poor, z, draws)
    wanted = student.encode(upscaler.run(poor, upscaler.plan((16, 16), Target(scale=4))))
    assert made.shape == z.shape and torch.allclose(made, wanted, atol=1e-5)


def test_multidiffusion_teaches_stable_diffusions_student(root, small_sd):
    """SD2.1 in miniature, whose latents are an eighth: an adapter as student, the light downsampler beside it."""
    model = ModelConfig(str(small_sd / "base"))
    teacher = {"kind": "zoom", "base": small_sd / "base", "sampling": 1}
    config = replace(small(root, downsampler={"kind": "pixel"}, teacher=teacher, phases={"joint": 2}), model=model)
    outcome = train_colearn(config)
    assert [f.name for f in outcome.files] == ["downsampler.safetensors", "adapter", "tudsr-stage-1.safetensors"]
    with pytest.raises(ConfigError, match="a latent downsampler needs a tudsr-model file .*; use kind shared or pixel"):
        Colearner(replace(small(root), model=model))
    with pytest.raises(ConfigError, match="a residual-shift teacher needs a tudsr-model file"):
        Colearner(replace(small(root, downsampler={"kind": "pixel"}), model=model))


@pytest.mark.parametrize("order", ["alternating", pytest.param("joint", marks=LONG)])
def test_student_and_shared_downsampler_learn_on_one_backbone(root, small_sd, order):
    """The paper's downsampler over SD2.1 in miniature: an adapter each, the backbone once, both commands."""
    model, run_config = ModelConfig(str(small_sd / "base")), {"gradient_checkpointing": True}
    down = {"kind": "shared", "rank": 2, "code": 4}
    phases = {"warm": 1, "real": 1, "joint": 2, "order": order}
    alone = small(root, "downsampler", downsampler=down, phases=phases, run=run_config)
    alone = replace(alone, model=model, output=root / "alone")
    (start,) = train_colearn(alone).files
    config = small(
        root,
        downsampler=down | {"start": start},
        teacher={"kind": "none"},
        phases=phases,
        run=run_config,
    )
    learner = Colearner(replace(config, model=model))
    student, shared = learner.networks.student, learner.networks.down
    assert shared.networks.unet is student.unet and learner.replayed.networks.unet is student.unet
    frozen = {name: one.clone() for name, one in student.named_parameters() if not one.requires_grad}
    before = state(learner)
    run(learner)
    assert moved(before, state(learner)) == {"student", "down", "high", "low"}
    assert all(torch.equal(one, frozen[name]) for name, one in student.named_parameters() if name in frozen)
    with pytest.raises(ConfigError, match="an adapter of SD2.1-base; with a tudsr-model file use kind latent"):
        Colearner(small(root, downsampler=down))


def test_stablesr_teaches_stable_diffusions_student(root, small_sd, noise):
    """It teaches what the command makes of a picture, in the student's latents; and a student learns from it."""
    save_file(random_tensors(), root / "stablesr.safetensors")
    files = {"base": small_sd / "base", "file": root / "stablesr.safetensors"}
    for path in (root / "good").iterdir():  # StableSR halves latents three times and needs more than one place then
        with Image.open(path) as image:
            image.resize((128, 128)).save(path)
    config = small(
        root,
        data={"size": 128, "batch": 1},
        downsampler={"kind": "pixel", "learns": False},
        weights={"cycle": 0.0, "adversarial": 0.0},
        teacher={"kind": "stablesr", "sampling": 1, **files},
        phases={"joint": 1},
    )
    config = replace(config, model=ModelConfig(str(small_sd / "base")))
    learner = Colearner(config)
    student, poor, draws = learner.networks.student, noise(1, 3, 32, 32), [torch.Generator().manual_seed(3)]
    made = learner.networks.teacher.latents(poor, student.encode(resize(poor, (128, 128)).clamp(0, 1)), draws)
    seed = int(torch.randint(2**31 - 1, (), generator=torch.Generator().manual_seed(3)))
    options = StableSROptions()
    options = replace(options, seed=seed, sample=replace(options.sample, steps=1))
    upscaler = Zoom(load_stablesr_networks(files["base"], files["file"], device="cpu"), options, _silent)
    wanted = student.encode(upscaler.run(poor, upscaler.plan((32, 32), Target(scale=4))))
    assert torch.allclose(made, wanted, atol=1e-5)
    before = state(learner)
    run(learner)
    assert "student" in moved(before, state(learner))


def _silent(image, plan, tick):
    return [("", "")] * len(plan.tiles)


def test_pairs_are_crops_of_the_same_place(root):
    (root / "pairs").mkdir()
    for path in (root / "good").iterdir():
        with Image.open(path) as image:
            image.resize((image.width // 4, image.height // 4), Image.Resampling.BOX).save(root / "pairs" / path.name)
    config = small(root, data={"paired": True, "poor": (root / "pairs",), "classical": 0.0})
    learner = Colearner(config)
    stream = samples(learner.pictures, 0)
    for sample in (next(stream) for _ in range(4)):
        shrunk = torch.nn.functional.avg_pool2d(sample.good, 4)
        assert (shrunk - sample.poor).abs().max() < 1.01 / 255
        assert torch.equal(learner.judge.pairs(sample, learner.networks.down), sample.poor)
    (root / "pairs" / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"0\.png has no poor picture of its name"):
        Colearner(config)
    Image.new("RGB", (30, 20)).save(root / "pairs" / "0.png")
    with pytest.raises(ConfigError, match="is not a quarter of"):
        Colearner(config)


@pytest.mark.parametrize(
    ("task", "numbers"), [("downsampler", {"damage"}), ("colearn", {"damage", "psnr", "psnr_learned"})]
)
def test_held_out_pictures_are_measured_and_shown(root, task, numbers):
    write_pictures(root / "held-out")
    config = replace(small(root, task), validation=ValidationConfig(root / "held-out", every=3, count=2))
    train_colearn(config)
    lines = [json.loads(line) for line in (config.output / "log.jsonl").read_text("utf-8").splitlines()]
    found = [line for line in lines if "damage" in line]
    assert [line["step"] for line in found] == [
        step for step in range(1, config.steps + 1) if step in (3, config.steps)
    ]
    assert all(line.keys() == numbers | {"step"} for line in found)
    shown = sorted((config.output / "validation" / "step-0000003").iterdir())
    assert len(shown) == 2
    with Image.open(shown[0]) as panels:
        assert panels.size == (3 * 64 + 8, 64)
    plain = replace(config, output=root / "plain", validation=ValidationConfig())
    files = train_colearn(plain).files
    assert all(file.read_bytes()[-1000:] == (config.output / file.name).read_bytes()[-1000:] for file in files)


def test_folders_that_cannot_be_meant_are_refused(root):
    def refused(says, **data):
        with pytest.raises(ConfigError, match=says):
            Colearner(small(root, data=data))

    (root / "empty").mkdir()
    (root / "large").mkdir()
    Image.new("RGB", (192, 160)).save(root / "large" / "a.png")
    refused("holds no pictures", poor=(root / "empty",))
    refused("does not exist; check the path", good=(root / "none",))
    refused(r"smaller \(80 px\) than poor ones \(160 px\): swap good and poor, or set any_size", poor=(root / "large",))
    refused(r"0\.png is 48 x 40, smaller than a crop of 64", good=(root / "poor",))
    Colearner(small(root, data={"poor": (root / "large",), "any_size": True}))
    refused("poor is missing", poor=())
    run(Colearner(small(root, data={"poor": ()}, weights={"cycle": 0.0}, downsampler={"learns": False})))
    run(Colearner(small(root, "downsampler", data={"poor": ()}, phases={"real": 0})))


def test_a_loss_without_a_number_keeps_the_last_good_checkpoint(root):
    config = small(root, phases={"joint": 40}, run={"save_every": 1, "patience": 3})
    learner, good = Colearner(config), []

    def report(step, numbers):
        if step == 4:
            good.append({path.name: path.read_bytes() for path in saved_steps(config)} | {"state": state(learner)})
            learner.networks.student.vae.encoder.conv_out.bias.fill_(float("nan"))

    with pytest.raises(TrainingError, match="no finite loss in 3 steps up to step 7; lower the rates"):
        learner.run(report)
    assert not moved(good[0]["state"], state(learner))
    last = Colearner(config)
    last.resume()
    assert all(value.isfinite().all() for value in state(last).values())


def test_a_damaged_picture_is_named_also_by_a_worker(root):
    whole = (root / "good" / "1.png").read_bytes()
    (root / "good" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PictureError, match=r"good/1\.png"):
        run(Colearner(small(root, "downsampler", data={"workers": 1})))


def test_what_is_no_start_is_refused(root):
    with pytest.raises(CheckpointError, match="is no downsampler .its metadata says tudsr-model/1"):
        Colearner(small(root, downsampler={"start": root / "model.safetensors"}))
    config = small(root, phases={"joint": 1})
    train_colearn(config)
    with pytest.raises(ConfigError, match="holds a training already; add --resume"):
        train_colearn(config)
    with pytest.raises(ConfigError, match=r"\[weights\] pixel changed since"):
        train_colearn(replace(config, weights=replace(config.weights, pixel=2.0)), resume=True)
    longer, began = replace(config, phases=replace(config.phases, joint=2)), []
    assert train_colearn(longer, resume=True, started=began.append).step == 4 and began == [3]


def test_the_shipped_file_says_every_setting_with_its_default():
    said, config = parse_toml(CONFIG), read_colearn(CONFIG, "colearn")
    assert said.keys() == {field.name for field in fields(ColearnConfig)} - {"task"}
    own = {"base", "good", "poor", "stage_one"}
    for section, values in said.items():
        if isinstance(values, dict):
            kind = getattr(config, section)
            assert values.keys() == {field.name for field in fields(kind)}, section
            for field in fields(kind):
                assert field.name in own or getattr(kind, field.name) == field.default, f"{section}.{field.name}"
    assert read_colearn(CONFIG, "downsampler").plan == (("warm", 1000), ("real", 4000))


TOML = """
output = "out"
[model]
base = "model.safetensors"
[data]
good = ["good"]
poor = ["poor"]
size = 64
batch = 1
workers = 0
[downsampler]
width = 8
blocks = 1
[critics]
width = 4
[phases]
warm = 1
real = 1
teacher = 1
joint = 2
[run]
precision = "fp32"
"""


def test_the_commands_train_and_say_what_is_wrong(root):
    path = root / "run.toml"
    path.write_text(TOML, encoding="utf-8")
    done = tudsr("train", "downsampler", path)
    assert done.returncode == 0 and done.stdout.splitlines() == [str(root / "out" / "downsampler.safetensors")], (
        done.stderr
    )
    out = root / "poor.png"
    done = tudsr(
        "degrade", root / "good" / "0.png", "-o", out, "--downsampler", root / "out" / "downsampler.safetensors"
    )
    assert done.returncode == 0 and out.is_file(), done.stderr
    again = tudsr("train", "downsampler", path)
    assert again.returncode == 1 and "holds a training already; add --resume" in again.stderr
    assert tudsr("train", "downsampler", path, "--resume").returncode == 0
    start = 'start = "out/downsampler.safetensors"\nblocks = 1'
    path.write_text(TOML.replace('"out"', '"next"').replace("blocks = 1", start), encoding="utf-8")
    done = tudsr("train", "colearn", path)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == str(root / "next" / "model.safetensors"), (
        done.stderr
    )
    done = tudsr("upscale", out, "-o", root / "big.png", "--model", root / "next" / "model.safetensors")
    assert done.returncode == 0, done.stderr
    for text, says in (
        (TOML.replace('"poor"', '"none"'), "none of training pictures does not exist"),
        (TOML + "[weights]\nlpips = 1\n", "[weights] has lpips, which is unknown"),
        ('task = "x"\n' + TOML, "has task, which the command says"),
        (TOML.replace("size = 64", "size = 100"), "size 100 must be a multiple of 64"),
    ):
        path.write_text(text.replace('"out"', '"third"'), encoding="utf-8")
        done = tudsr("train", "colearn", path)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
