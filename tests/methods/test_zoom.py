import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from command import tudsr
from conftest import IdentityNetworks
from models.test_dape import published  # noqa: F401 - a fixture
from models.test_dape import read as read_small
from PIL import Image
from typer.testing import CliRunner

from tudsr_core.cli.app import app
from tudsr_core.methods.networks import Encoded
from tudsr_core.methods.plan import Target
from tudsr_core.methods.prompt_sources import described, fixed, from_file, read_prompts, saved, write_prompts
from tudsr_core.methods.sampling import SampleOptions
from tudsr_core.methods.zoom import Zoom, ZoomOptions, plan_zoom, zoom
from tudsr_core.models.dape import load_tagger, write_tagger
from tudsr_core.pictures.tensors import resize
from tudsr_core.prompts.prompters import TaggerPrompter
from tudsr_core.prompts.tile_prompts import Style

STYLE = Style()


class KnowingNetworks(IdentityNetworks):
    """Its eps always leads to the latent that was encoded, so sampling must return the picture."""

    def __init__(self, **options):
        super().__init__(200, **options)
        self.texts = []

    def encode(self, pixels, seed, on_tile):
        self.known = super().encode(pixels, seed, on_tile).z
        return Encoded(self.known)

    def conditions(self, texts):
        self.texts.append(list(texts))
        return list(texts)

    def denoise(self, z, t, condition, part, body):
        from tudsr_core.diffusion.schedule import scaled_linear

        abar = scaled_linear().abar_at(t)

        def predict(parts, tiles):
            self.calls += 1
            if self.calls == self.fail_at:
                raise torch.OutOfMemoryError("simulated")
            x0 = torch.cat([tile.cut(self.known) for tile in tiles])
            return (parts - abar**0.5 * x0) / (1 - abar) ** 0.5

        return body(predict)


def options(steps=4, strength=1.0, **kwargs):
    chosen = dict(tile_px=64, overlap_px=32, color_fix="none") | kwargs
    return ZoomOptions(**chosen, sample=SampleOptions(steps, strength))


@pytest.mark.parametrize(("height", "width", "scale"), [(23, 37, 4), (5, 90, 3), (64, 64, 2), (1, 1, 4)])
@pytest.mark.parametrize(("start", "strength"), [("picture", 1.0), ("picture", 0.5), ("noise", 1.0)])
def test_a_model_that_knows_the_picture_returns_it(height, width, scale, start, strength, noise):
    image, networks = noise(1, 3, height, width), KnowingNetworks()
    plan = plan_zoom((height, width), Target(scale=scale), networks.facts, options(strength=strength, start=start))
    made = zoom(image, networks, plan, [("a", "b")] * len(plan.tiles))
    assert (made - resize(image, plan.size).clamp(0, 1)).abs().max() < 1e-4


def test_ticks_are_what_the_plan_says(noise):
    networks, ticks = KnowingNetworks(), []
    plan = plan_zoom((30, 50), Target(scale=4), networks.facts, options())
    tiles = len(plan.tiles)
    zoom(noise(2, 4, 30, 50), networks, plan, [("a", "b")] * tiles, lambda *state: ticks.append(state[:2]))
    total = 2 * (2 + plan.calls)
    assert plan.calls == tiles * 4 * 2 == networks.calls // 2
    assert ticks == [(done, total) for done in range(1, total + 1)]
    assert f"{plan.calls} network calls" in plan.describe()[0]
    assert f"{tiles} tiles (6 x 3) of 64 x 64, 4 steps" in plan.describe()[1]


def test_a_part_of_the_chain_is_announced():
    plan = plan_zoom((64, 64), Target(scale=4), KnowingNetworks.facts, ZoomOptions(sample=SampleOptions(strength=0.3)))
    assert (plan.calls, plan.describe()[1]) == (
        30,
        "1 tiles (1 x 1) of 256 x 256, 15 of 50 steps, each with its positive and its negative prompt",
    )
    with pytest.raises(ValueError, match="whole chain"):
        options(strength=0.5, start="noise")


def test_published_sizes_need_the_published_number_of_tiles():
    facts = KnowingNetworks.facts
    for side, tiles in ((1024, 9), (2048, 49), (4096, 225), (8192, 961)):
        plan = plan_zoom((side // 4, side // 4), Target(scale=4), facts, ZoomOptions())
        assert (len(plan.tiles), plan.calls) == (tiles, tiles * 50 * 2)


def test_tiles_lie_evenly_or_at_every_stride():
    facts = KnowingNetworks.facts
    for spacing, lefts in (("even", (0, 18, 36)), ("stride", (0, 32, 36))):
        plan = plan_zoom((200, 200), Target(scale=4), facts, ZoomOptions(spacing=spacing))
        assert plan.tiles.lefts == plan.tiles.tops == lefts


def test_the_seed_decides(noise):
    class Rough(KnowingNetworks):
        def denoise(self, z, t, condition, part, body):
            return body(lambda parts, tiles: torch.tanh(parts))

    image = noise(1, 3, 16, 24)

    def run(seed, count=1):
        plan = plan_zoom((16, 24), Target(scale=4), KnowingNetworks.facts, options(seed=seed))
        return zoom(image.expand(count, -1, -1, -1), Rough(), plan, [("a", "b")] * len(plan.tiles))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, 2), torch.cat([run(1), run(2)])), "the next picture has the next seed"


@pytest.mark.parametrize("fail_at", [1, 5, 20])
def test_out_of_memory_goes_on_with_smaller_tiles_each_under_its_places_prompt(noise, fail_at):
    """Wherever memory runs out, smaller tiles take over, and a tile speaks the words of the planned tile it lies in."""
    said = []

    class Heard(KnowingNetworks):
        def denoise(self, z, t, condition, part, body):
            def heard(predict):
                def predict_and_note(parts, tiles):
                    said.extend((tile, condition[tile.index]) for tile in tiles)
                    return predict(parts, tiles)

                return body(predict_and_note)

            return super().denoise(z, t, condition, part, heard)

    image, ticks = noise(1, 3, 40, 40), []
    plan = plan_zoom((40, 40), Target(scale=4), KnowingNetworks.facts, options(tile_px=128, overlap_px=64))
    assert len(plan.tiles) == 4
    prompts = [(f"yes {index}", f"no {index}") for index in range(4)]
    smaller = Heard(fail_at=fail_at)
    made = zoom(image, smaller, plan, prompts, lambda *state: ticks.append(state[:2]))
    whole = zoom(image, KnowingNetworks(), plan, prompts)
    assert (made - whole).abs().max() < 1e-4
    assert {tile.height for tile, _ in said} == {16, 8}
    small = [(tile, text) for tile, text in said if tile.height == 8]
    for tile, text in small:
        home = plan.tiles.tile(int(text.split()[1]))
        assert home.top <= tile.top and tile.top + 8 <= home.top + home.height, "the prompt of a tile elsewhere"
        assert home.left <= tile.left and tile.left + 8 <= home.left + home.width
    assert {text.split()[0] for _, text in small} == {"yes", "no"}
    assert ticks[-1][0] == ticks[-1][1], "progress ends at its total"


def test_no_smaller_tile_is_a_clear_error(noise):
    class Small(KnowingNetworks):
        def predict(self, z, tiles):
            raise torch.OutOfMemoryError("simulated")

        def denoise(self, z, t, condition, part, body):
            return body(self.predict)

    plan = plan_zoom((30, 50), Target(scale=4), KnowingNetworks.facts, options())
    with pytest.raises(MemoryError, match="out of memory even with tiles of 64 px"):
        zoom(noise(1, 3, 30, 50), Small(), plan, [("a", "b")] * len(plan.tiles))


def test_an_upscaler_plans_and_runs_and_writes_down_its_prompts(noise, tmp_path):
    """The Upscaler protocol: the plan of a size, and a run that asks the source once for that plan."""
    asked, networks, image = [], KnowingNetworks(), noise(2, 4, 30, 50)

    def source(picture, plan, tick):
        asked.append((tuple(picture.shape), len(plan.tiles)))
        return [("a", "b")] * len(plan.tiles)

    upscaler = Zoom(networks, options(), saved(source, tmp_path / "prompts.json"))
    plan = upscaler.plan((30, 50), Target(scale=4))
    made = upscaler.run(image, plan)
    assert asked == [((1, 3, 30, 50), len(plan.tiles))]
    assert read_prompts(tmp_path / "prompts.json", "") == [("a", "b")] * len(plan.tiles)
    assert torch.equal(made, zoom(image, KnowingNetworks(), plan, [("a", "b")] * len(plan.tiles)))
    with pytest.raises(ValueError, match="the plan is for 50 x 30, the picture is 30 x 30"):
        upscaler.run(image[..., :30], plan)


class Brightness:
    """A tagger that says how bright a tile is."""

    def tags(self, images):
        return [f"level {round(float(image.mean()) * 10)}" for image in images]

    def fingerprint(self):
        return "brightness"

    def release(self):
        self.released = True


def test_every_tile_is_described_by_what_it_shows(noise):
    """A ramp of steps: the tags must follow the tiles' place, and flat tiles get the style alone."""
    image = torch.zeros(1, 3, 16, 48) + noise(1, 3, 16, 48) * 0.2
    image[..., 32:] += 0.8
    image[..., :8] = 0.5
    facts, tagger, ticks = KnowingNetworks.facts, Brightness(), []
    plan = plan_zoom((16, 48), Target(scale=4), facts, options(tile_px=64, overlap_px=0))
    source = described(TaggerPrompter(tagger), STYLE)
    pairs = source(image, plan, lambda done, total, preview: ticks.append((done, total)))
    assert [text for text, _ in pairs] == [f"level {n}, clean, high-resolution, 8k" for n in (3, 1, 9)]
    assert {text for _, text in pairs} == {STYLE.negative}
    assert ticks == [(1, 3), (2, 3), (3, 3)] and tagger.released
    image[..., :16] = 0.5
    assert source(image, plan, None)[0][0] == "clean, high-resolution, 8k"


def test_fixed_prompts_and_files(tmp_path):
    plan = plan_zoom((16, 32), Target(scale=4), KnowingNetworks.facts, options(overlap_px=0))
    assert len(plan.tiles) == 2
    assert fixed("a cat", STYLE)(None, plan, None) == [("a cat, clean, high-resolution, 8k", STYLE.negative)] * 2
    pairs = [("sea, boat", "noise"), ("sky – ⛅", "")]
    write_prompts(tmp_path / "p.json", pairs)
    assert from_file(tmp_path / "p.json", "x")(None, plan, None) == pairs
    (tmp_path / "p.txt").write_text("sea\n\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt", "bad") == [("sea", "bad")]
    (tmp_path / "p.txt").write_text("sea\n\nsky\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt", "bad") == [("sea", "bad"), ("", "bad"), ("sky", "bad")]
    with pytest.raises(ValueError, match=r"p.txt has 3 prompts, but the plan has 2 tiles"):
        from_file(tmp_path / "p.txt", "bad")(None, plan, None)
    for content in ("{", "{}", '[["a"]]', '["a", 3]', "[" * 100_000):
        (tmp_path / "bad.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="bad.json"):
            read_prompts(tmp_path / "bad.json", "")


def test_prompts_survive_a_machine_whose_text_is_not_utf_8(tmp_path):
    script = (
        "import locale, sys; from pathlib import Path;"
        "from tudsr_core.methods.prompt_sources import read_prompts, write_prompts;"
        "pairs = [('caf\\xe9 \\u65e5\\u672c', '')]; path = Path(sys.argv[1]); write_prompts(path, pairs);"
        "print(locale.getpreferredencoding(False), read_prompts(path, '') == pairs)"
    )
    other = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", script, str(tmp_path / "prompts.json")]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=other)
    assert done.returncode == 0, done.stderr
    encoding, same = done.stdout.split()
    assert encoding.lower() not in ("utf-8", "utf8") and same == "True"


@pytest.fixture
def photo(tmp_path):
    y, x = np.mgrid[0:16, 0:20]
    array = np.dstack([np.sin(x / 3) * 90 + 120, np.cos(y / 4) * 80 + 120, (x + y) * 3]).astype(np.uint8)
    Image.fromarray(array).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


SHORT = ("--scale", 4, "--tile", 64, "--overlap", 48, "--steps", 2, "--device", "cpu")


def run(*words):
    """The command inside this process, which is quicker to start."""
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_runs_the_recipe(small_sd, published, photo, tmp_path):  # noqa: F811
    base = ("--model", small_sd / "base", *SHORT)
    done = run("zoom", photo, "-o", tmp_path / "dry.png", *base, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "80 x 64, 8 network calls" in done.stdout and "2 tiles (2 x 1) of 64 x 64, 2 steps" in done.stdout
    assert not (tmp_path / "dry.png").exists()
    done = tudsr("zoom", photo, "-o", tmp_path / "a.png", *base, "--prompt", "b a", "--save-prompts")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as made:
        assert made.size == (80, 64)
    prompts = json.loads((tmp_path / "a.prompts.json").read_text("utf-8"))
    assert prompts == [["b a, clean, high-resolution, 8k", STYLE.negative]] * 2
    again = ("--tile-prompts", tmp_path / "a.prompts.json", "--tile-batch", 2)
    done = run("zoom", photo, "-o", tmp_path / "b.png", *base, *again)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    write_tagger(tmp_path / "dape.safetensors", read_small(published))
    done = run(
        "zoom", photo, "-o", tmp_path / "d.png", *base, "--dape", tmp_path / "dape.safetensors", "--save-prompts"
    )
    assert done.exit_code == 0, done.output
    tagged = json.loads((tmp_path / "d.prompts.json").read_text("utf-8"))
    with Image.open(photo) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    tagger = load_tagger(tmp_path / "dape.safetensors")
    seen = [STYLE.compose(tagger.tags(part[None])[0]) for part in (pixels[..., :16], pixels[..., 4:])]
    assert "thing " in seen[0] and tagged == [[text, STYLE.negative] for text in seen]
    prompts[1] = ["a a a", "b"]
    (tmp_path / "edited.json").write_text(json.dumps(prompts), encoding="utf-8")
    done = run("zoom", photo, "-o", tmp_path / "c.png", *base, "--tile-prompts", tmp_path / "edited.json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "c.png").read_bytes()


def test_wishes_that_cannot_be_met_are_one_line(small_sd, photo, tmp_path):
    (tmp_path / "one.txt").write_text("a\n", encoding="utf-8")
    for wrong, says in (
        (("--prompt", "a", "--tile-prompts", tmp_path / "one.txt"), "only one of"),
        (("--tile-prompts", tmp_path / "one.txt"), "has 1 prompts, but the plan has 2 tiles"),
        (("--dape", tmp_path / "none.safetensors"), "does not exist"),
        (("--dape", tmp_path), "ram_tag_list.txt"),
        (("--steps", 0), "0 steps"),
    ):
        done = run("zoom", photo, "-o", tmp_path / "x.png", "--model", small_sd / "base", *SHORT, *wrong)
        assert done.exit_code == 1, wrong
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "x.png").exists()
