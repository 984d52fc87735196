import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
from command import TUDSR, WIDE, tudsr
from PIL import Image

from tudsr_core import __version__


@pytest.fixture
def photo(tmp_path):
    y, x = np.mgrid[0:20, 0:28]
    array = np.dstack([np.sin(x / 3) * 90 + 120, np.cos(y / 4) * 80 + 120, (x + y) * 3]).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(array).save(path, dpi=(300, 300))
    return path


def pictures(folder):
    """Names of what a run left in its output folder, but for its own record."""
    return sorted(path.name for path in folder.iterdir() if path.name != "tudsr-run.jsonl")


def size(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def test_one_picture_twice_gives_the_same_bytes(photo, tmp_path):
    for name, batch in (("a.png", 1), ("b.png", 5)):
        done = tudsr(
            "upscale", photo, "-o", tmp_path / name, "--scale", 8, "--tile", 128, "--overlap", 32, "--tile-batch", batch
        )
        assert done.returncode == 0, done.stderr
        assert "224 x 160 written in" in done.stdout
    assert size(tmp_path / "a.png") == (224, 160)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_folder_and_files_together(photo, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.open(photo).convert("L").save(folder / "grey.jpg")
    Image.open(photo).convert("RGBA").save(folder / "alpha.webp")
    (folder / "notes.txt").write_text("no picture", encoding="utf-8")
    done = tudsr("upscale", folder, photo, "-o", tmp_path / "out", "--long-edge", 56)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "out") == ["alpha.webp", "grey.jpg", "photo.png"]
    assert {size(tmp_path / "out" / name) for name in pictures(tmp_path / "out")} == {(56, 40)}


def test_one_bad_picture_does_not_stop_the_others_and_finished_ones_are_kept(photo, tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(photo.read_bytes()[:-70])
    tall = tmp_path / "tall.tif"  # a hundred bytes that claim half a gigabyte
    tall.write_bytes(
        b"II*\0\x08\0\0\0\x03\0"
        + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in ((256, 17), (257, 8388621), (273, 8)))
        + bytes(40)
    )
    done = tudsr("upscale", bad, tall, photo, "-o", tmp_path / "out", "--scale", 2)
    assert done.returncode == 1
    assert [line[:7] for line in done.stderr.splitlines()] == ["error: "] * 2, done.stderr
    assert f"error: {bad} is damaged" in done.stderr and f"error: {tall}: its 17 x 8388621 pixels" in done.stderr
    assert done.stdout.splitlines()[-1].startswith("3 pictures: 1 written, 2 failed (bad.png, tall.tif), in ")
    assert pictures(tmp_path / "out") == ["photo.png"]
    made = (tmp_path / "out" / "photo.png").read_bytes()
    again = tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 2)
    assert (again.returncode, again.stderr) == (0, "")
    other = tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 4)
    assert other.returncode == 1 and "were made with other settings (scale 2.0, now 4.0)" in other.stderr
    assert (tmp_path / "out" / "photo.png").read_bytes() == made
    assert tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 4, "--force").returncode == 0
    assert size(tmp_path / "out" / "photo.png") == (112, 80)


@pytest.mark.parametrize(
    "arguments",
    [
        ["upscale", "", "-o", "out"],
        ["upscale", " ", "-o", "out"],
        ["upscale", "x.png", "-o", ""],
        ["upscale", "x.png", "-o", "out", "--stage-one", ""],
        ["zoom", "", "-o", "out", "--model", "sd21"],
        ["zoom", "x.png", "-o", "out", "--model", ""],
        ["evaluate", ""],
        ["demo", "-o", ""],
        ["inspect", ""],
        ["convert", "x", "-o", ""],
        ["download", "x", "--to", ""],
    ],
)
def test_an_empty_argument_is_not_the_current_folder(arguments, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from tudsr_core.cli.app import app

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("a.png")
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 2 and f"it is empty ({' ' if ' ' in arguments else ''!r})" in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_the_size_limit_is_an_option(photo, tmp_path):
    done = tudsr("upscale", photo, "-o", tmp_path / "x.png", "--scale", 2, "--max-megapixels", 0.0005)
    assert done.returncode == 1
    assert "tudsr reads up to 0.0005: crop or shrink it, or raise --max-megapixels" in done.stderr


def test_16_bit_with_alpha_and_profile_survives_the_whole_way(tmp_path):
    import torch

    from tudsr_core.pictures.files import Picture
    from tudsr_core.pictures.reading import read_picture
    from tudsr_core.pictures.writing import write_picture

    pixels = torch.linspace(0.1, 0.9, 4 * 12 * 16).view(1, 4, 12, 16)
    write_picture(tmp_path / "deep.png", Picture(pixels, bits=16, icc=b"profile", dpi=(240, 240)))
    done = tudsr("upscale", tmp_path / "deep.png", "-o", tmp_path / "out.tif", "--scale", 4)
    assert done.returncode == 0, done.stderr
    made = read_picture(tmp_path / "out.tif")
    assert (made.size, made.bits, made.has_alpha, made.icc) == ((48, 64), 16, True, b"profile")
    assert made.dpi == pytest.approx((240, 240), abs=0.1)
    assert len(torch.unique((made.pixels[:, 3] * 65535).round())) > 1000


def test_the_dial_changes_the_picture_and_a_folder_remembers_it(photo, tmp_path):
    made = {}
    for name, place in (("none", ()), ("half", ("--inventive", 0.5)), ("high", ("--inventive", 0.9))):
        done = tudsr("upscale", photo, "-o", tmp_path / f"{name}.png", "--scale", 2, *place)
        assert done.returncode == 0, done.stderr
        made[name] = (tmp_path / f"{name}.png").read_bytes()
    assert "inventive 0.9 (x1.4 of its sharpening, which invents nothing)" in done.stdout
    assert made["none"] == made["half"] != made["high"]
    assert tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 2, "--inventive", 0.9).returncode == 0
    again = tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 2)
    assert again.returncode == 1 and "inventive 0.9, now not set" in again.stderr


def test_openexr_in_and_out(photo, tmp_path):
    import OpenEXR

    light = np.full((12, 16, 3), 0.2, np.float16)
    light[4:8, 4:8] = 20
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    (tmp_path / "in").mkdir()
    with OpenEXR.File(header, {"RGB": light}) as file:
        file.write(str(tmp_path / "in" / "scene.exr"))
    done = tudsr("upscale", tmp_path / "in", photo, "-o", tmp_path / "out", "--scale", 4)
    assert done.returncode == 0, done.stderr
    assert pictures(tmp_path / "out") == ["photo.png", "scene.exr"]
    with OpenEXR.File(str(tmp_path / "out" / "scene.exr")) as file:
        made = file.channels()["RGB"].pixels
    assert made.dtype == np.float16 and made.shape == (48, 64, 3)
    assert abs(made[24, 24].astype(float) - 20).max() < 0.5 and abs(made[:8, 40:].astype(float) - 0.2).max() < 0.03
    done = tudsr("upscale", tmp_path / "in" / "scene.exr", "-o", tmp_path / "x.png", "--scale", 2)
    assert "light above 1 and below 0 is cut off, because PNG holds none; .exr keeps it" in done.stdout, done.stderr
    assert size(tmp_path / "x.png") == (32, 24)
    done = tudsr("upscale", photo, "-o", tmp_path / "y.exr", "--scale", 2, "--bits", 32)
    assert done.returncode == 0, done.stderr
    with OpenEXR.File(str(tmp_path / "y.exr")) as file:
        assert file.channels()["RGB"].pixels.dtype == np.float32
    done = tudsr("upscale", photo, "-o", tmp_path / "y.png", "--scale", 2, "--bits", 32)
    assert done.returncode == 1 and "PNG cannot hold floats; use .tif or .exr" in done.stderr
    done = tudsr("upscale", tmp_path / "in" / "scene.exr", "-o", tmp_path / "b.tif", "--scale", 2, "--blocks")
    assert done.returncode == 1 and "light above 1 or below 0, which is not carried from block to block" in done.stderr


def test_float_tiffs_hold_light_if_asked(tmp_path):
    light = np.full((12, 16, 3), 0.2, np.float32)
    light[4:8, 4:8] = 20
    tifffile.imwrite(tmp_path / "in.tif", light, photometric="rgb")
    scale = "--scale", 2, "--bits", 32
    done = tudsr("upscale", tmp_path / "in.tif", "-o", tmp_path / "a.tif", *scale, "--linear")
    assert done.returncode == 0, done.stderr
    made = tifffile.imread(tmp_path / "a.tif")
    assert made.dtype == np.float32 and abs(made[12, 12] - 20).max() < 0.5 and abs(made[:6, 24:] - 0.2).max() < 0.03
    done = tudsr("upscale", tmp_path / "in.tif", "-o", tmp_path / "b.tif", "--scale", 2)
    assert "those above 1 are cut off" in done.stdout


def test_dry_run_shows_the_plan_and_writes_nothing(photo, tmp_path):
    done = tudsr("upscale", photo, "-o", tmp_path / "out", "--scale", 8, "--dry-run")
    assert done.returncode == 0
    assert "28 x 20 to 224 x 160" in done.stdout
    assert "stage 2: x2" in done.stdout
    assert not (tmp_path / "out").exists()


BAD = {
    "scale 0": (["--scale", 0], "scale 0 is not a size"),
    "scale -1": (["--scale", -1], "scale -1 is not a size"),
    "scale 1e9": (["--scale", 1e9], "too large; the limit is 64"),
    "smaller": (["--width", 10], "smaller than the picture"),
    "two targets": (["--scale", 2, "--width", 99], "exactly one"),
    "tile": (["--tile", 100], "tile 100 must be a multiple of 8"),
    "bits": (["--bits", 12], "--bits 12"),
    "adapter without base": (["--stage-one", "x"], "add --model"),
    "missing base": (["--model", "none.ckpt", "--stage-one", "x"], "none.ckpt does not exist"),
    "missing model": (["--model", "none.safetensors"], "none.safetensors does not exist"),
    "cuda": (["--device", "cuda"], "'cuda' is not available"),
    "inventive": (["--inventive", 2], "inventive 2 must be from 0 (faithful) to 1 (inventive)"),
}


@pytest.mark.parametrize("name", BAD)
def test_impossible_wishes_are_one_line(name, photo, tmp_path):
    options, says = BAD[name]
    import torch

    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    done = tudsr("upscale", photo, "-o", tmp_path / "out.png", *options)
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out.png").exists()


def test_wrong_adapter_and_model_files_are_one_line(photo, tmp_path):
    from tudsr_core.weights.checkpoints import embedded_path

    done = tudsr("upscale", photo, "-o", tmp_path / "o.png", "--model", photo)
    assert done.returncode == 1
    assert "is not a tudsr model file" in done.stderr
    done = tudsr("upscale", photo, "-o", tmp_path / "o.png", "--model", embedded_path(), "--stage-one", embedded_path())
    assert done.returncode == 1
    assert "is a whole model, not an adapter" in done.stderr


def test_unwritable_folder_is_named(photo, tmp_path):
    if os.geteuid() == 0:
        target = "/proc/out.png"
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        target = locked / "out.png"
    done = tudsr("upscale", photo, "-o", target)
    assert done.returncode == 1
    assert "error: " in done.stderr and str(target) in done.stderr


def test_a_result_in_blocks_is_close_to_the_whole_one(photo, tmp_path):
    from tudsr_core.pictures import read_picture

    large = tmp_path / "large.png"
    Image.open(photo).resize((280, 64)).save(large)
    done = tudsr("upscale", large, "-o", tmp_path / "a.tif", "--scale", 4, "--blocks", "--pyramid")
    assert done.returncode == 0, done.stderr
    assert "2 blocks of 1024 x 256" in done.stdout and "1120 x 256 written in" in done.stdout
    assert tudsr("upscale", large, "-o", tmp_path / "b.tif", "--scale", 4).returncode == 0
    apart = (read_picture(tmp_path / "a.tif").pixels - read_picture(tmp_path / "b.tif").pixels).abs()
    assert apart.max() < 0.06 and apart.mean() < 0.002
    for words, says in (
        (["--color-fix", "adain", "--blocks"], "looks at the whole picture"),
        (["--pyramid"], "--pyramid belongs to --blocks"),
        (["--blocks", "--report", tmp_path / "r.html"], "writes no report"),
        (["--blocks", "--scale", 1.5], "a whole --scale"),
    ):
        done = tudsr("upscale", large, "-o", tmp_path / "c.tif", *words)
        assert done.returncode == 1 and says in done.stderr and not (tmp_path / "c.tif").exists()


def test_extreme_shapes_work(tmp_path):
    for shape in ((1, 1, 3), (2, 3000, 3)):
        path = tmp_path / f"{shape[1]}.png"
        Image.fromarray(np.full(shape, 200, np.uint8)).save(path)
        done = tudsr("upscale", path, "-o", tmp_path / "out", "--scale", 4)
        assert done.returncode == 0, done.stderr
        with Image.open(tmp_path / "out" / path.name) as made:
            assert made.size == (shape[1] * 4, shape[0] * 4)
            assert abs(np.asarray(made, float).mean() - 200) < 3


def test_a_full_disk_is_named_and_leaves_nothing(photo, tmp_path):
    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    out = tmp_path / "out"
    out.mkdir()
    command = [*TUDSR, "upscale", photo, "-o", out, "--scale", "8"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", preexec_fn=limit)
    assert done.returncode == 1
    assert "no room left" in done.stderr
    assert pictures(out) == []


def test_ctrl_c_leaves_no_half_written_file(photo, tmp_path):
    large = tmp_path / "large.png"
    Image.open(photo).resize((900, 700)).save(large)
    out = tmp_path / "out"
    child = subprocess.Popen(
        [*TUDSR, "upscale", str(large), "-o", str(out), "--scale", "4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job has it ignored
    )
    assert "large.png" in child.stdout.readline()
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate()
    assert child.returncode == 130, errors
    assert "interrupted" in errors
    assert pictures(out) == []


def test_existing_and_input_files_are_never_replaced_by_accident(photo, tmp_path):
    before = photo.read_bytes()
    done = tudsr("upscale", photo, "-o", tmp_path, "--force")
    assert done.returncode == 1
    assert "is an input" in done.stderr
    assert photo.read_bytes() == before
    (tmp_path / "x.png").write_bytes(b"mine")
    done = tudsr("upscale", photo, "-o", tmp_path / "x.png")
    assert done.returncode == 1
    assert (tmp_path / "x.png").read_bytes() == b"mine"


def test_info_names_versions_and_the_model():
    done = tudsr("info")
    assert done.returncode == 0
    for word in ("torch", "diffusers", "embedded model", "t=200", "t=50"):
        assert word in done.stdout


def test_demo_writes_its_two_pictures(tmp_path):
    done = tudsr("demo", "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"demo-x8.png", "demo-compare.png"}
    assert "stage 2: x2" in done.stdout


def test_inspect_says_what_each_file_is(published_files, tmp_path):
    for name, words in {
        "omgsr": ("peft folder", "194 updates, rank 6, scale 1", "VAE", "t = 200"),
        "hypir": ("HYPIR .pth", "257 updates, rank 8, scale 1", "t = 200"),
        "osediff": ("OSEDiff .pkl", "258 updates, rank 4, scale 2", "trained: conv_in", "t = 999", "Apache-2.0"),
        "pisa": ("PiSA-SR .pkl", "UNet, detail", "z = 1.00000 z_in -1.000000 eps"),
        "invsr": ("InvSR noise predictor", "SD-Turbo", "fixed: Cinematic", "0.86904 z + 0.49473 n"),
        "kohya": ("diffusers or kohya LoRA", "scale 0.5"),
    }.items():
        done = tudsr("inspect", published_files[name].path, env=WIDE)
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words), (name, done.stdout)
    from tudsr_core.weights.checkpoints import embedded_path

    assert "whole model 'embedded'" in tudsr("inspect", embedded_path()).stdout
    (tmp_path / "page.pkl").write_text("<html>", encoding="utf-8")
    done = tudsr("inspect", tmp_path / "page.pkl")
    assert done.returncode == 1 and "page.pkl cannot be read safely: it is a web page" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_convert_writes_one_file_that_says_everything(published_files, tmp_path):
    target = tmp_path / "new" / "one.safetensors"
    done = tudsr("convert", published_files["omgsr"].path, "-o", target, "--method", "omgsr", "--dtype", "fp16")
    assert done.returncode == 0, done.stderr
    inspected = tudsr("inspect", target, env=WIDE).stdout
    assert all(word in inspected for word in ("adapter of this pack", "OMGSR", "t = 273", "float16", "194 updates"))
    again = tudsr("convert", published_files["osediff"].path, "-o", target)
    assert again.returncode == 1 and "add --force" in again.stderr
    wrong = tudsr("convert", published_files["osediff"].path, "-o", tmp_path / "x.safetensors", "--method", "omgsr")
    assert wrong.returncode == 1 and "adapter of OSEDiff, not of OMGSR" in wrong.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_download_lists_and_explains(tmp_path):
    listed = tudsr("download", env=WIDE)
    assert all(name in listed.stdout for name in ("osediff.pkl", "S-Lab 1.0", "sd_turbo.safetensors"))
    for name, says in (("pisa_sr.pkl", "no direct address"), ("nothing", "not in the list")):
        done = tudsr("download", name, "--to", tmp_path)
        assert done.returncode == 1 and says in done.stderr
    assert os.listdir(tmp_path) == []


def test_adapter_options_need_an_adapter(photo, tmp_path):
    done = tudsr("upscale", photo, "-o", tmp_path / "x.png", "--detail", 0.5)
    assert done.returncode == 1 and "add --stage-one" in done.stderr


# Runs the entry point of the `tudsr` script and says which heavy modules that took.
LIGHT = """
import sys
sys.argv = ["tudsr", *sys.argv[1:]]
from tudsr_core.cli import main
try:
    main()
finally:
    heavy = {"torch", "numpy", "PIL", "diffusers", "transformers", "tifffile"} & set(sys.modules)
    print("heavy:", *sorted(heavy), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "says"),
    [
        (["--help"], {}, "Diffusion super-resolution"),
        (["upscale", "--help"], {}, "--long-edge"),
        (["zoom", "--help"], {}, "--guidance"),
        (["--version"], {}, f"tudsr {__version__}"),
        (["--show-completion", "bash"], {}, "_TUDSR_COMPLETE=complete_bash"),
        ([], {"_TUDSR_COMPLETE": "complete_bash", "COMP_WORDS": "tudsr up", "COMP_CWORD": "1"}, "upscale"),
        ([], {"_TUDSR_COMPLETE": "complete_bash", "COMP_WORDS": "tudsr zoom --win", "COMP_CWORD": "2"}, "--window"),
    ],
    ids=["help", "upscale help", "zoom help", "version", "script", "complete a command", "complete an option"],
)
def test_help_version_and_completion_load_nothing_heavy(arguments, environment, says):
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments],
        capture_output=True,
        encoding="utf-8",
        env=WIDE | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"} | environment,
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert done.stderr.splitlines()[-1] == "heavy:"


def without(*packages):
    """An environment in which these packages cannot be imported."""
    return {**WIDE, "PYTHONPATH": str(Path(__file__).parents[1] / "without"), "TUDSR_TEST_WITHOUT": " ".join(packages)}


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_the_command_without_its_own_packages_says_so_in_one_line(package):
    done = subprocess.run([*TUDSR, "--help"], capture_output=True, encoding="utf-8", env=without(package))
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == f"error: tudsr needs {package}; run: pip install 'comfyui-tudsr[cli]'\n"


def test_pictures_and_models_without_their_packages_are_one_line_each(photo, tmp_path, small_sd):
    deep, needs = tmp_path / "deep.tif", "needs {0}; run: pip install 'comfyui-tudsr[cli]'"
    tifffile.imwrite(deep, np.zeros((8, 8, 3), np.uint16), photometric="rgb")
    model = ["--model", small_sd / "base", "--stage-one", small_sd / "one", "--method", "tudsr"]
    for package, arguments, says in (
        ("tifffile", [deep, photo, "-o", tmp_path / "made", "--scale", "2"], f"{deep} {needs}"),
        ("tifffile", [photo, "-o", tmp_path / "x.tif", "--scale", "2"], f"{photo}: {tmp_path / 'x.tif'} {needs}"),
        ("diffusers", [photo, "-o", tmp_path / "x.png", *model], f"this {needs}"),
    ):
        command, env = [*TUDSR, "upscale", *arguments], without(package)
        done = subprocess.run(command, capture_output=True, encoding="utf-8", env=env)
        assert done.returncode == 1 and done.stderr.splitlines() == [f"error: {says.format(package)}"]
    assert (tmp_path / "made" / photo.name).exists(), "the other file is done"


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_a_name_that_the_console_cannot_show_is_still_done(photo, tmp_path, encoding):
    odd = photo.rename(tmp_path / "写真 é.png")
    console = {**WIDE, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    (tmp_path / "無.png").write_bytes(b"no picture")
    made = tmp_path / "大"
    command = [*TUDSR, "upscale", odd, tmp_path / "無.png", "-o", made, "--scale", "2"]
    done = subprocess.run(command, capture_output=True, env=console, encoding=encoding)
    assert size(made / odd.name) == (56, 40)
    assert r"\u5199\u771f" in done.stdout and "56 x 40 written" in done.stdout
    assert r"\u7121.png" in done.stderr and "Traceback" not in done.stderr and done.returncode == 1


def test_evaluate_measures_a_folder_and_writes_sheets(tmp_path):
    folder = tmp_path / "sharp"
    folder.mkdir()
    y, x = np.mgrid[0:48, 0:64]
    Image.fromarray(np.dstack([np.sin(x / 3) * 90 + 120, np.cos(y / 4) * 80 + 120, x + y]).astype(np.uint8)).save(
        folder / "waves.png"
    )
    done = tudsr("evaluate", folder, "--sheets", tmp_path / "sheets")
    assert done.returncode == 0, done.stderr
    assert "seams" in done.stdout and done.stdout.count("│ ours") == 8
    names = sorted(path.name for path in (tmp_path / "sheets").iterdir())
    assert names == [f"waves {kind} x{factor}.png" for kind in ("clean", "mild") for factor in (4, 8)]
    assert size(tmp_path / "sheets" / names[0]) == (48 * 3 + 16, 48)
