"""Small pictures: the arithmetic of the methods' own scripts, written out with Pillow from their description."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IdentityNetworks, identity_model
from PIL import Image
from typer.testing import CliRunner

from tudsr_core.cli.app import app
from tudsr_core.methods.plan import MAX_GROWN, StageLimits, Target, grown
from tudsr_core.methods.published import METHODS
from tudsr_core.methods.two_stage import Stage, TwoStageModel, UpscaleOptions, count_ticks, plan_for, upscale
from tudsr_core.pictures.color import adain
from tudsr_core.pictures.tensors import resize

PLAIN = UpscaleOptions(color_fix="none")


def model_of(method, stages=1, t=200, **options):
    """A model whose networks answer like `method`'s, at sizes that can be asked for afterwards."""
    about = METHODS[method]
    model = identity_model(**options)
    first, second = (replace(stage, about=about) for stage in (model.first, model.second))
    return (
        TwoStageModel(first, second, StageLimits())
        if stages == 2
        else TwoStageModel(first, None, StageLimits(single_up_to=4))
    )


def script_sizes(width, height, upscale=4, process=512):
    """Return what the scripts make of a picture: the size their network sees, and the size they save."""
    grown_width, grown_height = width, height
    if min(width, height) < process // upscale:
        factor = (process // upscale) / min(width, height)
        grown_width, grown_height = int(factor * width), int(factor * height)
    seen = grown_width * upscale, grown_height * upscale
    return tuple(side - side % 8 for side in seen), (upscale * width, upscale * height)


@pytest.mark.parametrize("method", ["tudsr", "omgsr", "hypir", "osediff", "pisa-sr"])
@pytest.mark.parametrize("factor", [2, 3, 4])
def test_sizes_are_those_of_the_methods_scripts(method, factor):
    """All sizes up to 150 px; where their float product falls short of a whole number, they lose a pixel."""
    model, lost = model_of(method), 0
    for width, height in [(w, h) for w in range(1, 150, 7) for h in range(1, 150, 11)]:
        plan = plan_for(model, (height, width), Target(scale=factor), PLAIN)
        (seen_width, seen_height), saved = script_sizes(width, height, factor)
        made = plan.stages[-1].size
        assert plan.size == saved[::-1]
        if min(width, height) * max(width, height) * factor**2 > MAX_GROWN // 512 * min(width, height):
            continue
        # Theirs is squeezed to a multiple of 8, ours is padded to one.
        if (made[0] // 8 * 8, made[1] // 8 * 8) != (seen_height, seen_width):
            lost += 1
            assert abs(made[0] - seen_height) <= factor + 8 and abs(made[1] - seen_width) <= factor + 8
    assert lost < 12


def test_a_small_picture_is_enlarged_processed_and_shrunk_as_with_pillow():
    """OMGSR's way at x4 with AdaIN, in float: grow, enlarge, network, colours of what it saw, shrink."""
    image = torch.rand(1, 3, 44, 60, generator=torch.Generator().manual_seed(3)) * 0.6 + 0.2

    def pillow(planes, width, height):
        made = [np.array(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC)) for p in planes]
        return np.stack(made).clip(0, 1)

    seen = pillow(pillow(image[0].numpy(), 174, 128), 696, 512)
    z = torch.nn.functional.pixel_unshuffle(torch.from_numpy(seen)[None], 8)
    abar = 0.753692
    z = (z - (1 - abar) ** 0.5 * torch.sin(z)) / abar**0.5
    output = torch.nn.functional.pixel_shuffle(z, 8).clamp(0, 1)
    output = adain(output, torch.from_numpy(seen)[None]).clamp(0, 1)
    wanted = pillow(output[0].numpy(), 240, 176)

    model = model_of("omgsr", eps=torch.sin)
    made = upscale(image, model, Target(scale=4), UpscaleOptions(tile_px=1024, color_fix="adain"))
    assert model.first.networks.shapes == [(1, 192, 64, 87)]
    assert (made - torch.from_numpy(wanted)).abs().max() < 1e-5
    small = upscale(image, model, Target(scale=4), UpscaleOptions(color_fix="adain", native_size=False))
    assert (small - made).abs().mean() > 1e-3


def test_the_plan_tells_sizes_tiles_calls_and_memory_of_the_enlarged_picture():
    model, small, large = model_of("tudsr", 2), (30, 40), (64, 85)
    plan, same = (plan_for(model, size, Target(scale=8), PLAIN) for size in (small, large))
    assert (plan.size, plan.start) == ((240, 320), large)
    assert plan.stages == same.stages and plan.calls == same.calls
    assert (plan.host_bytes, plan.device_bytes) == (same.host_bytes, same.device_bytes)
    assert plan.describe()[1] == (
        "a small picture: enlarged to 85 x 64 first, so that the result is about 512 px as in training, "
        "then shrunk to 320 x 240"
    )
    assert len(same.describe()) == len(plan.describe()) - 1
    ticks = []
    upscale(torch.rand(1, 3, *small), model, Target(scale=8), PLAIN, lambda *one: ticks.append(one[:2]))
    assert ticks[-1] == (count_ticks(model, plan),) * 2 and len(ticks) == ticks[-1][0]


@pytest.mark.parametrize("target", [Target(scale=3.14), Target(width=203), Target(long_edge=190), Target(scale=1)])
def test_the_size_asked_for_is_exact_and_alpha_follows(target):
    image = torch.rand(2, 4, 37, 51, generator=torch.Generator().manual_seed(4))
    made = upscale(image, model_of("pisa-sr"), target, UpscaleOptions())
    size = target.size_for((37, 51))
    assert tuple(made.shape) == (2, 4, *size)
    assert (made[:, 3:] - resize(image[:, 3:], size).clamp(0, 1)).abs().max() < 1e-6
    assert made.min() >= 0 and made.max() <= 1


def test_nothing_changes_for_the_embedded_model_for_large_pictures_and_when_switched_off():
    cases = [(identity_model(), (9, 12), PLAIN), (model_of("omgsr"), (128, 140), PLAIN)]
    cases += [(model_of("omgsr"), (9, 12), replace(PLAIN, native_size=False))]
    for model, size, options in cases:
        plan = plan_for(model, size, Target(scale=4), options)
        assert plan.start == size and plan.stages[-1].size == plan.size and not plan.note


def test_the_docs_table_of_stages_is_what_the_plan_makes():
    page = (Path(__file__).parents[2] / "docs" / "differences.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) px, x(\d+) \| ([\dx ]+) \| .*?([\d, ]+) px(?:, shrunk|:| \|)", page, re.M)
    assert len(rows) == 5
    for side, factor, stages, sizes in rows:
        plan = plan_for(model_of("tudsr", 2), (int(side),) * 2, Target(scale=int(factor)), PLAIN)
        made = [stage.size[0] for stage in plan.stages]
        assert made == [int(size) for size in sizes.split(", ")]
        factors = [after // before for before, after in zip([plan.start[0], *made], made, strict=False)]
        assert factors == [int(number) for number in stages.split(" x ")]


def test_narrow_strips_do_not_become_huge():
    assert grown((1, 1), 4, 512) == (128, 128)
    for source in ((2, 30000), (1, 1000), (30000, 2)):
        start = grown(source, 8, 512)
        assert start[0] * start[1] * 64 <= max(MAX_GROWN, source[0] * source[1] * 64)
        assert min(start) >= min(source)


class Predictor:
    """Noise that is the picture itself, one pixel in two; remembers what it saw."""

    def __init__(self):
        self.seen = []

    def __call__(self, pixels, t):
        self.seen.append(pixels)
        mean = pixels[:, :1, ::2, ::2].expand(-1, 192, -1, -1)
        return mean, torch.ones_like(mean)


def invsr(predictor):
    about = METHODS["invsr"]
    networks = IdentityNetworks(199, eps=torch.zeros_like)
    return TwoStageModel(
        Stage(networks, about.steps(), "stage one", predictor=predictor, about=about), None, StageLimits(4, 2, 4)
    )


def test_invsr_mirrors_small_pictures_up_to_its_patch():
    """Its script reflects to 128 px before x4, again and again; ours does it at the right and the bottom."""
    image, predictor = torch.rand(1, 3, 50, 70), Predictor()
    plan = plan_for(invsr(predictor), (50, 70), Target(scale=4), PLAIN)
    assert plan.stages[0].padded == (512, 512) and plan.start == (50, 70)
    assert "its borders are mirrored to 512 x 512" in plan.describe()[1]
    assert upscale(image, invsr(predictor), Target(scale=4), PLAIN).shape == (1, 3, 200, 280)
    seen = predictor.seen[0]
    assert seen.shape == (1, 3, 128, 128)
    rows, columns = ([min(i % (2 * n - 2), 2 * n - 2 - i % (2 * n - 2)) for i in range(128)] for n in (50, 70))
    assert torch.equal(seen, image[..., rows, :][..., columns])


def test_invsr_pads_each_axis_by_its_own_length():
    image, predictor = torch.rand(1, 3, 129, 142), Predictor()
    upscale(image, invsr(predictor), Target(scale=4), replace(PLAIN, tile_px=1024))
    assert predictor.seen[0].shape == (1, 3, 130, 142)
    assert torch.equal(predictor.seen[0][..., :129, :], image)


def test_invsrs_predictor_sees_pixels_from_0_to_1():
    """At x3 they are made by bicubic, which overshoots at a hard edge."""
    image, predictor = torch.zeros(1, 3, 200, 200), Predictor()
    image[..., 100:] = 1
    upscale(image, invsr(predictor), Target(scale=3), PLAIN)
    assert predictor.seen[0].shape[-1] < 200
    assert all(seen.min() >= 0 and seen.max() <= 1 for seen in predictor.seen)


def test_invsrs_noise_is_the_mean_plus_the_deviation_times_that_of_the_seed():
    class Half(Predictor):
        def __call__(self, pixels, t):
            mean, deviation = super().__call__(pixels, t)
            return mean, deviation * pixels[:, 1:2, ::2, ::2] / 2

    image, step = torch.rand(1, 3, 128, 128), METHODS["invsr"].steps()[0]
    made = upscale(image, invsr(Half()), Target(scale=4), replace(PLAIN, seed=7, tile_px=512))
    z = torch.nn.functional.pixel_unshuffle(resize(image, (512, 512)).clamp(0, 1), 8)
    drawn = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
    noise = image[:, :1, ::2, ::2] + image[:, 1:2, ::2, ::2] / 2 * drawn
    wanted = torch.nn.functional.pixel_shuffle(step.p * (step.a * z + step.b * noise), 8).clamp(0, 1)
    assert (made - wanted).abs().max() < 1e-5


def test_every_picture_of_a_batch_has_a_seed_of_its_own():
    image, model = torch.rand(1, 3, 128, 128), invsr(Predictor())
    two = upscale(image.expand(2, -1, -1, -1), model, Target(scale=4), PLAIN)
    assert not torch.equal(two[0], two[1])
    assert torch.equal(upscale(image, model, Target(scale=4), replace(PLAIN, seed=1))[0], two[1])


def test_evaluations_are_counted_for_each_stage():
    model = identity_model()
    second = replace(model.second, branches=((0.5, model.second.networks), (0.5, model.second.networks)))
    plan = plan_for(replace(model, second=second), (64, 64), Target(scale=16), PLAIN)
    assert [stage.evaluations for stage in plan.stages] == [1, 2, 2]


def test_sizes_between_stages_are_rounded_not_cut():
    plan = plan_for(identity_model(), (33, 50), Target(width=275), PLAIN)
    assert [stage.size for stage in plan.stages] == [(91, 138), (182, 275)]
    plan = plan_for(model_of("omgsr"), (44, 60), Target(width=202), PLAIN)
    assert (plan.start, plan.stages[-1].size) == ((152, 207), (512, 697)), "152 x 3.3667 = 511.7, 207 x 3.3667 = 696.9"


def test_the_command_line_switches_it(monkeypatch, tmp_path):
    """The plan is that of a base model with OMGSR's adapter, whose loading is left out."""
    Image.new("RGB", (60, 44)).save(tmp_path / "a.png")
    monkeypatch.setattr("tudsr_core.cli.upscaling.load_model", lambda *_: model_of("omgsr"))
    command = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "--dry-run"]
    on, off = (CliRunner().invoke(app, [*command, *more]).output for more in ([], ["--no-native-size"]))
    assert "enlarged to 174 x 128 first" in on and "to 696 x 512" in on
    assert "first" not in off and "to 240 x 176, one tile" in off
