"""The dial from faithful to inventive: neutral to the bit, its equation, and each method's own dial."""

from dataclasses import replace

import pytest
import torch
from conftest import IdentityNetworks

from tudsr_core.backends.local import AdapterOptions, Backbone, adapted_stage, load_embedded
from tudsr_core.diffusion.one_step import euler, from_noise_level
from tudsr_core.methods.dial import NEUTRAL, fusion_weight, turned
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.published import METHODS
from tudsr_core.methods.stages import Stage, TwoStageModel, UpscaleOptions
from tudsr_core.methods.two_stage import StartLatent, plan_for, restore_latent, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.tiling.out_of_memory import TiledRun
from tudsr_core.tiling.plan import plan_tiles
from tudsr_core.weights.checkpoints import read_adapter


def test_at_neutral_own_dials_stay_and_pixels_too(embedded, noise):
    for about in (None, *METHODS.values()):
        dials = turned(NEUTRAL, about, 3, 0.7, 1.2)
        assert (dials.strength, dials.count, dials.fidelity, dials.detail, dials.words) == (1, 3, 0.7, 1.2, "")
    image, target = noise(1, 3, 12, 16), Target(scale=8)
    assert torch.equal(
        upscale(image, load_embedded("cpu", inventive=NEUTRAL), target), upscale(image, embedded, target)
    )


@pytest.mark.parametrize("steps", [(from_noise_level(273),), euler((199, 99, 49))], ids=["one step", "three steps"])
def test_the_change_of_the_latent_is_scaled(steps, noise):
    stage = Stage(IdentityNetworks(steps[0].t, torch.sin), tuple(replace(step, b=0.0) for step in steps))
    z = noise(1, 4, 16, 24)
    run = TiledRun(plan_tiles(16, 24, 16, 4))

    def restored(strength):
        return restore_latent(StartLatent(z), replace(stage, strength=strength), run, lambda preview: None)

    change = restored(1.0) - z
    for strength in (0.5, 0.8, 1.5):
        assert (restored(strength) - (z + strength * change)).abs().max() < 1e-6


def test_the_embedded_model_goes_evenly_away_from_plain_enlargement(noise):
    image = resize(noise(1, 3, 8, 8), (24, 24)).clamp(0, 1)
    options = UpscaleOptions(color_fix="none")
    far = []
    for inventive in (0.0, 0.3, 0.5, 0.7, 1.0):
        made = upscale(image, load_embedded("cpu", inventive=inventive), Target(scale=4), options)
        far.append(float((made - resize(image, (96, 96)).clamp(0, 1)).square().mean()))
    assert far == sorted(far) and far[-1] > 1.5 * far[0]


def published_stage(files, name, **options):
    import published

    unet, vae = published.networks()
    backbone = Backbone(vae, unet, lambda *texts: torch.zeros(1, 77, 32), torch.device("cpu"), torch.float32)
    adapter = read_adapter(files[name].path, stage=1)
    return adapted_stage(backbone, adapter, AdapterOptions(**options))


def test_pisa_turns_its_detail(published_files):
    for inventive, detail in ((0.0, 0.0), (0.25, 0.5), (0.8, 1.3), (1.0, 1.5)):
        stage = published_stage(published_files, "pisa", inventive=inventive)
        own = published_stage(published_files, "pisa", detail=detail)
        assert [weight for weight, _ in stage.branches] == pytest.approx([weight for weight, _ in own.branches])
        assert (stage.strength, stage.evaluations) == (1, own.evaluations)
        assert stage.how == f"PiSA-SR at t = 1, inventive {inventive:g} (detail {detail:g})"


def test_invsr_takes_more_steps_or_less_of_its_change(published_files):
    for inventive, count in ((0.75, 3), (1.0, 5)):
        stage = published_stage(published_files, "invsr", inventive=inventive)
        assert (len(stage.steps), stage.strength) == (count, 1)
    stage = published_stage(published_files, "invsr", inventive=0.1, steps=3)
    assert (len(stage.steps), stage.strength) == (3, 0.6)


@pytest.mark.parametrize("name", ["omgsr", "hypir", "osediff"])
def test_the_others_scale_what_their_step_changes(published_files, name):
    stage = published_stage(published_files, name, inventive=0.75)
    assert stage.strength == 1.25 and stage.how.endswith("inventive 0.75 (x1.25 of what it changes)")
    assert stage.steps == published_stage(published_files, name).steps


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("pisa", {"inventive": 0.7, "detail": 1.2}, "fidelity and detail of PiSA-SR and the dial 'inventive' set"),
        ("invsr", {"inventive": 0.7, "steps": 3}, "steps of InvSR and the dial 'inventive' set the same"),
        ("omgsr", {"inventive": 1.2}, "inventive 1.2 must be from 0 (faithful) to 1 (inventive)"),
        ("omgsr", {"inventive": float("nan")}, "inventive nan must be from 0"),
        ("omgsr", {"inventive": 0.7, "detail": 0.5}, "has no dials for fidelity and detail"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(published_files, name, options, says):
    with pytest.raises(ValueError) as error:
        published_stage(published_files, name, **options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_the_plan_says_what_the_dial_did():
    model = load_embedded("cpu", inventive=0.8)
    (line,) = [
        line for line in plan_for(model, (20, 30), Target(scale=4), UpscaleOptions()).describe() if "stage" in line
    ]
    assert line.endswith("one tile, inventive 0.8 (x1.3 of its sharpening, which invents nothing)")
    stage = replace(model.first, about=METHODS["omgsr"], dial="inventive 0 (x0.5 of what it changes)")
    plan = plan_for(TwoStageModel(stage, None, StageLimits()), (20, 30), Target(scale=2), UpscaleOptions())
    assert "inventive 0 (x0.5 of what it changes)" in "\n".join(plan.describe())


def test_stablesr_keeps_more_of_the_picture_the_more_faithful():
    assert [fusion_weight(place) for place in (0.0, NEUTRAL, 1.0)] == [1.0, 0.5, 0.0]
