"""`tudsr upscale --method stablesr`, from small files to a picture."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command import tudsr
from models.test_cfw import small
from PIL import Image
from plain_stablesr import random_tensors
from safetensors.torch import save_file
from typer.testing import CliRunner

from tudsr_core.backends import load_stablesr_networks
from tudsr_core.cli.app import app
from tudsr_core.methods import StableSROptions, Target, Zoom, fixed
from tudsr_core.pictures import read_picture
from tudsr_core.prompts import Style
from tudsr_core.weights import CheckpointError


@pytest.fixture(scope="module")
def files(tmp_path_factory, small_sd):
    """Return a folder with a base model, StableSR's file, CFW's and a picture."""
    folder = tmp_path_factory.mktemp("stablesr")
    shutil.copytree(small_sd / "base", folder / "base")
    save_file(random_tensors(), folder / "stablesr.safetensors")
    own = {f"decoder.{key}": value.contiguous() for key, value in small(widths=(32, 32), growth=8).state_dict().items()}
    torch.save({"state_dict": own}, folder / "vqgan_cfw_00011.ckpt")
    y, x = np.mgrid[0:19, 0:30]
    array = np.dstack([np.sin(x / 3) * 90 + 120, np.cos(y / 4) * 80 + 120, (x + y) * 3]).astype(np.uint8)
    Image.fromarray(array).save(folder / "in.png")
    return folder


def run(files, *more):
    """Run the command in this process, where what it imports is loaded already."""
    steps = ("--steps", 2, "--tile", 128, "--overlap", 64, "--scale", 6.2)
    words = "upscale", files / "in.png", "--model", files / "base", *steps, "--force", *more
    done = CliRunner().invoke(app, [str(word) for word in words])
    return SimpleNamespace(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


def test_a_picture_from_the_published_files(files, tmp_path):
    def made(name, *more):
        done = run(files, "-o", tmp_path / name, "--stablesr", files / "stablesr.safetensors", *more)
        assert done.returncode == 0, (name, done.stderr)
        return (tmp_path / name).read_bytes()

    plain = made("plain.png", "--method", "stablesr")
    assert read_picture(tmp_path / "plain.png").pixels.shape == (1, 3, 118, 186)
    assert made("batch.png", "--tile-batch", 4) == plain
    cfw = "--cfw", files / "vqgan_cfw_00011.ckpt"
    assert made("off.png", *cfw, "--fidelity", 0) == made("free.png", *cfw, "--inventive", 1) == plain
    assert made("half.png", *cfw, "--inventive", 0.5) == made("cfw.png", *cfw)
    assert len({plain, made("cfw.png", *cfw), made("guided.png", "--guidance", 7, "--seed", 4)}) == 3


def test_the_plan_is_shown_before_anything_runs(files, tmp_path):
    own = "--stablesr", files / "stablesr.safetensors", "--guidance", 7
    own += "--cfw", files / "vqgan_cfw_00011.ckpt", "--inventive", 0.2
    done = run(files, "-o", tmp_path / "a.png", *own, "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "a.png").exists()
    text = " ".join(done.stdout.split())
    assert "30 x 19 to 186 x 118, 8 network calls" in text and "2 tiles (2 x 1) of 128 x 120, 2 steps" in text
    assert "inventive 0.2 (CFW's weight 0.8)" in text


def test_what_cannot_be_is_one_line(files, tmp_path):
    out = "-o", tmp_path / "a.png"
    own = "--stablesr", files / "stablesr.safetensors"
    for more, says in (
        (("--method", "stablesr"), "needs --model with SD2.1-base and --stablesr"),
        ((*own, "--stage-one", files / "one"), "does not have --stage-one"),
        ((*own, "--detail", 2), "does not have --detail"),
        ((*own, "--cfw", files / "stablesr.safetensors"), "CFW"),
        (("--stablesr", files / "vqgan_cfw_00011.ckpt"), "none of StableSR's tensors"),
        ((*own, "--cfw", files / "vqgan_cfw_00011.ckpt", "--fidelity", 1.5), "fidelity 1.5"),
        ((*own, "--inventive", 0.2), "--inventive turns the weight of --cfw; add that"),
        ((*own, "--cfw", "x", "--fidelity", 0.5, "--inventive", 0.2), "--inventive and --fidelity are one dial here"),
        (("--stage-one", files / "one", "--steps", 1, "--guidance", 7), "does not have --guidance"),
    ):
        done = run(files, *out, *more)
        line = done.stderr.strip()
        assert done.returncode == 1 and says in line and line.count("\n") == 0, (more, line)
    done = tudsr("upscale", files / "in.png", *out, *own)
    assert done.returncode == 1 and "needs --model" in done.stderr


def test_the_library_gives_the_commands_picture(files, tmp_path):
    done = run(files, "-o", tmp_path / "a.png", "--stablesr", files / "stablesr.safetensors", "--prompt", "a b")
    assert done.returncode == 0, done.stderr
    networks = load_stablesr_networks(files / "base", files / "stablesr.safetensors")
    options = StableSROptions()
    options = StableSROptions(128, 64, sample=type(options.sample)(2, guidance=1, window="centred", respacing="whole"))
    upscaler = Zoom(networks, options, fixed("a b", Style("", "", "")))
    image = read_picture(files / "in.png").pixels
    made = upscaler.run(image, upscaler.plan((19, 30), Target(scale=6.2)))
    assert (read_picture(tmp_path / "a.png").pixels - made).abs().max() <= 0.5 / 255 + 1e-6
    assert networks.facts.weight_bytes > sum(p.nbytes for p in networks.backbone.unet.parameters())


def test_inspect_says_what_the_files_are(files, tmp_path):
    torch.save({"state_dict": random_tensors()}, tmp_path / "webui_768v_139.ckpt")
    for path, says in (
        (files / "stablesr.safetensors", ("StableSR: encoder and feature transforms", "does not say", "376 tensors")),
        (tmp_path / "webui_768v_139.ckpt", ("SD2.1 (768, v prediction)", "S-Lab 1.0 (non-commercial)")),
        (files / "vqgan_cfw_00011.ckpt", ("CFW", "156 tensors")),
    ):
        done = tudsr("inspect", path)
        assert done.returncode == 0 and all(word in done.stdout for word in says), (done.stdout, done.stderr)


def test_files_of_other_models_are_refused(files, tmp_path):
    save_file(random_tensors("stand-in"), tmp_path / "wide.safetensors")
    with pytest.raises(CheckpointError, match="does not fit the UNet"):
        load_stablesr_networks(files / "base", tmp_path / "wide.safetensors")
    torch.save(random_tensors(), tmp_path / "webui_768v_139.ckpt")
    with pytest.raises(
        CheckpointError, match="predicts epsilon, and this was trained with v_prediction; use SD2.1-base, or"
    ):
        load_stablesr_networks(files / "base", tmp_path / "webui_768v_139.ckpt")
