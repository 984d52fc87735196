"""`published` against the procedure of the methods' own scripts, written out slowly from their description."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import IdentityNetworks
from typer.testing import CliRunner

from tudsr_core.cli.app import app
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.published import METHODS
from tudsr_core.methods.two_stage import Stage, TwoStageModel, UpscaleOptions, plan_for, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.tiling.windows import window

# Latents of a tile's side and of its overlap, how far the window's middle lies too low, and abar of the step.
SCRIPTS = {
    "tudsr": (64, 32, 0.5, 0.753692),
    "omgsr": (64, 32, 0.5, 0.635743),
    "hypir": (64, 32, 0.5, 0.753692),
    "osediff": (96, 32, 0.5, 0.004660095),
    "pisa-sr": (96, 32, 0.0, None),
}
# One tile by area though longer than a tile, a tile's own size, several tiles, a short side below a tile.
SIZES = [(48, 80), (64, 64), (72, 100), (106, 130), (56, 170), (164, 68)]
PUBLISHED = UpscaleOptions(color_fix="none", published=True, native_size=False)


def starts(length, side, overlap):
    """Where tiles begin: one after the other until one reaches the end, which is then drawn back to lie flush."""
    found = [0]
    while found[-1] + side < length:
        found.append(found[-1] + side - overlap)
    return [*found[:-1], length - side]


def boxes(height, width, tile, overlap):
    if height * width <= tile * tile:
        return [(0, 0, height, width)]
    side = min(tile, height, width)
    return [(y, x, side, side) for y in starts(height, side, overlap) for x in starts(width, side, overlap)]


def density(i, side, middle):
    return math.exp(-(((i - middle) / side) ** 2) / (2 * 0.01)) / math.sqrt(2 * math.pi * 0.01)


def mask(height, width, low):
    rows = [density(y, height, (height - 1) / 2 + low) for y in range(height)]
    columns = [density(x, width, (width - 1) / 2) for x in range(width)]
    return torch.tensor([[row * column for column in columns] for row in rows], dtype=torch.float64)


def ramp(height, width):
    """A factor in 0..1 that depends on the place in the tile, so that every offset and weight shows."""
    rows, columns = torch.linspace(0, 1, height)[:, None], torch.linspace(1, 0, width)
    return (rows + 3 * columns) / 4


def slow_picture(image, size, name, network):
    """What the script makes of `image`: `network(z)` is a tile's whole prediction."""
    tile, overlap, low, abar = SCRIPTS[name]
    z = torch.nn.functional.pixel_unshuffle(resize(image, tuple(8 * side for side in size)).clamp(0, 1), 8).double()
    above, below = torch.zeros_like(z), torch.zeros(size, dtype=torch.float64)
    for y, x, height, width in boxes(*size, tile, overlap):
        box = (..., slice(y, y + height), slice(x, x + width))
        weight = mask(height, width, low)
        above[box] += network(z[box].float()).double() * weight
        below[box] += weight
    eps = above / below
    z = z - eps if abar is None else (z - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
    return torch.nn.functional.pixel_shuffle(z, 8).clamp(0, 1).float()


def recording(eps, seen):
    networks = IdentityNetworks(200, eps)
    predict = networks.predict

    def record(z, tiles):
        seen.extend((tile.top, tile.left, tile.height, tile.width) for tile in tiles)
        return predict(z, tiles)

    networks.predict = record
    return networks


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", SCRIPTS)
def test_published_is_the_scripts_procedure(name, size, noise):
    tile, overlap, _, abar = SCRIPTS[name]
    image, seen = noise(1, 3, 2 * size[0], 2 * size[1]), []
    about = METHODS[name]
    if abar is None:  # PiSA-SR, fidelity 0.6 and detail 1.3: two predictions of every tile
        pixel, full = (lambda z, part=part: z * part * ramp(*z.shape[-2:]) for part in (0.3, 0.5))
        branches = ((1.3, recording(full, seen)), (-0.7, recording(pixel, [])))

        def network(z):
            return 0.6 * pixel(z) + 1.3 * (full(z) - pixel(z))
    else:

        def network(z):  # z_H is the ramp times z
            return z * (1 - math.sqrt(abar) * ramp(*z.shape[-2:])) / math.sqrt(1 - abar)

        branches = ((1.0, recording(network, seen)),)
    stage = Stage(branches[0][1], about.steps(), branches=branches, about=about)
    model = TwoStageModel(stage, None, StageLimits(single_up_to=4))
    ours = upscale(image, model, Target(scale=4), PUBLISHED)
    assert seen == boxes(*size, tile, overlap)
    assert (ours - slow_picture(image, size, name, network)).abs().max() < 2e-5
    # What is not used must not matter.
    odd = replace(PUBLISHED, tile_px=128, overlap_px=16, window="uniform")
    assert torch.equal(ours, upscale(image, model, Target(scale=4), odd))


@pytest.mark.parametrize(("kind", "low"), [("published", 0.5), ("centred", 0.0)])
@pytest.mark.parametrize("side", [64, 96, 57])
def test_published_weights_are_the_scripts(kind, low, side):
    ours = torch.outer(window(side, 32, kind, "y"), window(side, 32, kind, "x"))
    assert (ours - mask(side, side, low)).abs().max() < 1e-12


def model_of(about, second=None):
    stages = [Stage(IdentityNetworks(200), METHODS["tudsr"].steps(), about=row) for row in (about, second or about)]
    return TwoStageModel(*stages, StageLimits())


def test_each_stage_has_its_own_methods_tiles():
    plan = plan_for(model_of(METHODS["omgsr"], METHODS["osediff"]), (150, 200), Target(scale=8), PUBLISHED)
    first, second = plan.stages
    assert (first.tiles.tile_width, first.tiles.lefts) == (64, (0, 32, 36))
    assert (second.tiles.tile_width, second.tiles.lefts) == (96, (0, 64, 104))
    lines = plan.describe()
    assert lines[1] == "stage 1: x4 to 800 x 600, 6 tiles of 512 x 512 as published, OMGSR at t = 200"
    assert lines[2] == "stage 2: x2 to 1600 x 1200, 6 tiles of 768 x 768 as published, OSEDiff at t = 200"


def test_a_short_side_within_the_overlap_ends():
    """The scripts' loop never ends there, so nothing is reproduced: half the tile overlaps."""
    plan = plan_for(model_of(METHODS["omgsr"]), (50, 3000), Target(scale=2), PUBLISHED)
    tiles = plan.stages[0].tiles
    assert (tiles.tile_height, tiles.tile_width, tiles.overlap) == (13, 13, 6)


def test_memory_that_runs_out_still_makes_tiles_smaller(noise, caplog):
    model = model_of(METHODS["omgsr"])
    networks = model.first.networks
    plain = networks.eps

    def eps(z):
        if z.shape[-1] > 32:
            raise torch.OutOfMemoryError("simulated")
        return plain(z)

    networks.eps = eps
    image = noise(2, 3, 300, 260)
    ours = upscale(image, model, Target(scale=2), replace(PUBLISHED, tile_px=1024))
    assert (ours - resize(image, (600, 520)).clamp(0, 1)).abs().max() < 1e-4
    assert caplog.messages == ["out of memory: tiles lowered to 256 px"]


@pytest.mark.parametrize(("about", "who"), [(None, "this model"), (METHODS["invsr"], "InvSR")])
def test_methods_without_published_tiles_say_so(about, who):
    with pytest.raises(ValueError, match=f"{who} has no published tiles"):
        plan_for(model_of(about), (64, 64), Target(scale=2), PUBLISHED)


def test_the_command_has_one_choice(tmp_path, noise):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    command = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "b.png"), "--dry-run", "--published"]
    done = CliRunner().invoke(app, [*command, "--tile", "256"])
    assert done.exit_code == 1 and "leave out --tile, --overlap and --window" in done.output
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1 and "this model has no published tiles of the latent" in done.output
