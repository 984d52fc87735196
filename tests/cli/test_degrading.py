"""`tudsr degrade`, from files to pictures and to what is said about them."""

import json

import numpy as np
import pytest
import torch
from command import tudsr
from PIL import Image

from tudsr_core.cli.degrading import RECIPE_NAMES
from tudsr_core.models import Downsampler, DownsamplerConfig, downsampler_path, load_downsampler, write_downsampler
from tudsr_core.pictures import RECIPES, clean, read_picture


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a downsampler of random weights, two pictures in a folder, and a style."""
    folder = tmp_path_factory.mktemp("degrade")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Downsampler(DownsamplerConfig("pixel", 8, 1, 4, 2))
        torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    write_downsampler(folder / "down.safetensors", network)
    (folder / "good").mkdir()
    y, x = np.mgrid[0:57, 0:74]
    for name, step in (("a", 3), ("b", 5)):
        array = np.dstack([np.sin(x / step) * 90 + 120, np.cos(y / 4) * 80 + 120, x + y]).astype(np.uint8)
        Image.fromarray(array).save(folder / "good" / f"{name}.png")
    Image.fromarray(np.dstack([array, array[..., :1]])).save(folder / "alpha.png")
    Image.fromarray(array).save(folder / "style.jpg", quality=20)
    return folder


def said(path):
    return json.loads(path.with_suffix(".degraded.json").read_text("utf-8"))


def test_a_folder_of_pictures_with_what_was_done_to_each(files, tmp_path):
    down = "--downsampler", files / "down.safetensors"
    done = tudsr("degrade", files / "good", "-o", tmp_path / "poor", *down, "--seed", 5, "--factor", 3)
    assert done.returncode == 0, done.stderr
    network = load_downsampler(files / "down.safetensors")
    for number, name in enumerate("ab"):
        made = read_picture(tmp_path / "poor" / f"{name}.png").pixels
        wanted = network.degrade(read_picture(files / "good" / f"{name}.png").pixels, 3.0, 5 + number)
        assert made.shape == (1, 3, 19, 25) and (made - wanted).abs().max() < 0.51 / 255
        facts = said(tmp_path / "poor" / f"{name}.png")
        assert (facts["how"], facts["factor"], facts["seed"], facts["strength"]) == ("learned", 3.0, 5 + number, 1.0)
        assert (facts["source"], facts["width"], facts["height"]) == (f"{name}.png", 25, 19)
        assert facts["downsampler"] == "down.safetensors" and len(facts["sha256"]) == 64
    assert str(files) not in json.dumps(facts), "paths are nobody's business"


def test_strength_style_and_seed_matter_and_the_same_words_make_the_same_bytes(files, tmp_path):
    def run(name, *more):
        arguments = "--downsampler", files / "down.safetensors", *more
        done = tudsr("degrade", files / "good" / "a.png", "-o", tmp_path / f"{name}.png", *arguments)
        assert done.returncode == 0, done.stderr
        return (tmp_path / f"{name}.png").read_bytes()

    plain = run("plain")
    assert plain == run("again")
    styled = run("styled", "--style", files / "style.jpg")
    assert len({plain, styled, run("seed", "--seed", 1), run("strong", "--strength", 1.5)}) == 4
    assert said(tmp_path / "styled.png")["style"] == "style.jpg"
    run("nothing", "--strength", 0)
    low = clean(read_picture(files / "good" / "a.png").pixels, 4)
    assert torch.equal(read_picture(tmp_path / "nothing.png").pixels, low)


def test_the_shipped_downsampler_is_the_default(files, tmp_path):
    done = tudsr("degrade", files / "good" / "a.png", "-o", tmp_path / "a.png")
    assert done.returncode == 0, done.stderr
    assert said(tmp_path / "a.png")["downsampler"] == "downsampler.safetensors"
    wanted = load_downsampler(downsampler_path()).degrade(read_picture(files / "good" / "a.png").pixels)
    assert (read_picture(tmp_path / "a.png").pixels - wanted).abs().max() < 0.51 / 255


def test_the_shipped_downsampler_is_small_and_damages_as_its_card_says():
    """Noise, no shift of colour: on a grey picture, whose damage is all there is to see."""
    assert downsampler_path().stat().st_size <= 3_000_000
    grey = torch.full((1, 3, 512, 512), 0.5)
    damage = load_downsampler(downsampler_path()).degrade(grey) - 0.5
    assert damage.mean((0, 2, 3)).abs().max() < 1 / 255 and 4 / 255 < damage.std() < 24 / 255


def test_the_classical_damage_says_all_that_was_drawn(files, tmp_path):
    done = tudsr("degrade", files / "alpha.png", "-o", tmp_path / "c.png", "--recipe", "omgsr", "--seed", 2)
    assert done.returncode == 0 and "transparency is left out" in done.stdout, done.stderr
    facts = said(tmp_path / "c.png")
    assert (facts["how"], facts["recipe"]) == ("classical", "omgsr") and 60 <= facts["drawn"]["first"]["quality"] <= 95
    assert read_picture(tmp_path / "c.png").pixels.shape == (1, 3, 14, 18)


def test_what_cannot_be_done_is_said_in_one_line(files, tmp_path):
    good, out = files / "good" / "a.png", ("-o", tmp_path / "x.png")
    down = "--downsampler", files / "down.safetensors"
    for arguments, says in (
        ((*down, "--recipe", "omgsr"), "leave one of them out"),
        ((*down, "--factor", 9), "--factor 9 must be from 1 to 8"),
        ((*down, "--strength", 3), "strength 3 must be from 0 to 1.5"),
        (("--recipe", "omgsr", "--strength", 1), "belong to learned damage"),
        (("--downsampler", good), "cannot be read safely"),
        (("--downsampler", tmp_path / "none.safetensors"), "does not exist"),
    ):
        done = tudsr("degrade", good, *out, *arguments)
        assert done.returncode == 1 and says in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "x.degraded.json").write_text("{}", encoding="utf-8")
    done = tudsr("degrade", good, *out, *down)
    assert done.returncode == 1 and "x.degraded.json already exists; use --force" in done.stderr
    assert tudsr("degrade", good, *out, *down, "--force").returncode == 0 and said(tmp_path / "x.png")["seed"] == 0


def test_every_recipe_can_be_asked_for():
    assert set(RECIPE_NAMES) == set(RECIPES)


def test_inspect_names_a_downsampler(files):
    done = tudsr("inspect", files / "down.safetensors")
    assert done.returncode == 0 and "learned downsampler (pixels alone)" in done.stdout
