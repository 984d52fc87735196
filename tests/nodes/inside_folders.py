"""Checks of the folder nodes, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_folders.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

from inside import (  # first: it makes ComfyUI importable
    NODES,
    OPTIONS,
    cancelled_at,
    embedded,
    main,
    part,
    refused,
    upscale,
)

import tempfile
from pathlib import Path

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image, ImageCms

WHOLE = 39


def folders():
    """New input and output folders for ComfyUI."""
    base = Path(tempfile.mkdtemp(prefix="tudsr-folders-"))
    for name in ("input", "output"):
        (base / name).mkdir()
    folder_paths.set_input_directory(str(base / "input"))
    folder_paths.set_output_directory(str(base / "output"))
    return base / "input", base / "output"


def draw(path, shade, side=16, **travels):
    path.parent.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0:side, 0:side]
    Image.fromarray(np.dstack([x * 9, y * 9, (x + y + shade) * 4]).astype(np.uint8)).save(path, **travels)


def run(folder, models=None, scale=2.0, output="big", **changes):
    first, second, vae, conditioning = models or embedded()
    shared = {"pattern": "*", "recursive": False, "file_type": "as the source", "quality": 95, "replace": False}
    with torch.inference_mode():
        return NODES["TUDSRUpscaleFolder"].execute(
            folder, output=output, stage_one=first, vae=vae, conditioning=conditioning, scale=scale, width=0, height=0,
            stage_two=second, **(shared | OPTIONS | changes),
        )  # fmt: skip


def check_forty_pictures_with_a_broken_one_cancelled_and_resumed():
    source, out = folders()
    for number in range(WHOLE):
        draw(source / "scans" / f"{number:02}.png", number)
    (source / "scans" / "10a.png").write_bytes(b"no picture")
    models = embedded()
    cancelled_at(60, lambda: run("scans", models))
    done = len(list((out / "big").glob("*.png")))
    assert 3 < done < WHOLE, done
    text, failed = run("scans", models).args
    assert failed == 1 and text.startswith(f"40 pictures: {done} done before, {WHOLE - done} written, 1 failed, in")
    assert "10a.png: this is not a picture" in text
    assert len(list((out / "big").glob("*.png"))) == WHOLE and not list((out / "big").glob(".*"))
    assert run("scans", models).args[0].startswith(f"40 pictures: {WHOLE} done before, 1 failed")
    image = torch.from_numpy(np.array(Image.open(source / "scans" / "07.png"), np.float32) / 255)[None]
    wanted = (upscale(2.0, image, models).args[0][0] * 255).round().byte().numpy()
    assert np.array_equal(np.array(Image.open(out / "big" / "07.png")), wanted)


def check_other_settings_other_models_and_foreign_places_are_refused():
    source, out = folders()
    draw(source / "a.png", 0)
    models = embedded()
    run(str(source), models)
    refused(lambda: run(str(source), models, scale=3.0), "other settings (scale 2.0, now 3.0)", "ComfyUI: replace")
    other = models[0].clone()
    key = "diffusion_model.unet.conv_in.weight"
    other.add_patches({key: (torch.full((1,), 0.01).expand(models[0].model.state_dict()[key].shape),)}, 1.0)
    refused(lambda: run(str(source), (other, *models[1:])), "other settings (model sha256:")
    assert run(str(source), models, scale=3.0, replace=True).args[1] == 0
    assert Image.open(out / "big" / "a.png").size == (48, 48)
    for place in ("../elsewhere", "/tmp"):
        refused(lambda place=place: run(str(source), models, output=place), "outside ComfyUI's output folder")
    refused(lambda: run("none", models), "does not exist")
    refused(lambda: run("", models), "no folder is given")
    refused(lambda: run(str(source), models, pattern="*.jpg"), "no picture", "'*.jpg'")


def check_a_model_is_the_same_whatever_was_patched_into_it_meanwhile():
    fingerprint = part("nodes.host.folders").fingerprint
    first, second, vae, conditioning = embedded()
    before = fingerprint(first, vae, conditioning), fingerprint(second, vae, conditioning)
    assert before[0] != before[1]
    image = torch.rand(1, 16, 16, 3)
    upscale(8, image, (first, second, vae, conditioning))
    assert (fingerprint(first, vae, conditioning), fingerprint(second, vae, conditioning)) == before
    comfy.model_management.unload_all_models()
    assert fingerprint(first, vae, conditioning) == before[0] == fingerprint(*embedded()[::2], conditioning)
    assert fingerprint(first, vae, [[conditioning[0][0] + 1, {}]]) != before[0]


def check_name_exif_and_profile_come_through_other_nodes():
    source, out = folders()
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    draw(source / "in" / "sub" / "a.jpg", 5, exif=exif, icc_profile=profile, dpi=(240, 240))
    draw(source / "in" / "b.png", 6)
    load, save = NODES["TUDSRLoadFromFolder"], NODES["TUDSRSaveWithSourceName"]
    names = [load.execute("in", "*", True, index).args[3:] for index in range(2)]
    assert names == [("b.png", 2), ("sub/a.jpg", 2)], names
    image, mask, origin, _, _ = load.execute("in", "*", True, 1).args
    assert mask.shape == image.shape[:3] and mask.max() == 0
    (path,) = save.execute(1 - image, origin, "done", "-neg", "as the source", 95, False).args
    assert Path(path) == out / "done" / "sub" / "a-neg.jpg"
    with Image.open(path) as made:
        assert made.getexif()[0x010F] == "Camera" and made.info["icc_profile"] == profile
        assert made.info["dpi"] == (240, 240)
        assert abs(np.array(made, float) / 255 - (1 - image[0].numpy())).mean() < 0.02
    refused(lambda: save.execute(image, origin, "done", "-neg", "as the source", 95, False), "turn 'replace' on")
    refused(lambda: save.execute(image, origin, "../x", "", "png", 95, False), "outside ComfyUI's output folder")
    pair = torch.cat([image, image])
    many = save.execute(pair, origin, "done", "", "png", 95, False, mask=torch.zeros(1, 4, 4)).args[0].splitlines()
    assert [Path(path).name for path in many] == ["a.png", "a-2.png"] and Image.open(many[1]).mode == "RGBA"
    refused(lambda: load.execute("in", "*", True, 2), "index 2 is behind the last picture: there are 2")


def check_grey_stays_grey_and_colour_may_come():
    source, out = folders()
    Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(source / "grey.png")
    image, _, origin, _, _ = NODES["TUDSRLoadFromFolder"].execute(str(source), "*", False, 0).args
    save = NODES["TUDSRSaveWithSourceName"]
    (path,) = save.execute(image, origin, "", "", "as the source", 95, False).args
    assert Image.open(path).mode == "L" and np.array_equal(np.array(Image.open(path)), np.arange(256).reshape(16, 16))
    (path,) = save.execute(image * torch.tensor([1, 0.5, 0]), origin, "", "-red", "as the source", 95, False).args
    assert Image.open(path).mode == "RGB" and Image.open(path).getpixel((15, 15)) == (255, 128, 0)


def check_compared_pictures_come_with_their_figures():
    compare = NODES["TUDSRCompare"].execute
    small, large = torch.rand(2, 12, 16, 3), torch.rand(2, 24, 32, 4)
    output = compare(small, large, large[:1])
    assert output.args[0] is large
    assert {name: len(output.ui[name]) for name in ("before", "after")} == {"before": 2, "after": 2}
    lines = output.ui["text"][0].splitlines()
    assert lines[0] == "1: after against reference: PSNR-Y 120.00 dB, SSIM 1.0000"
    assert len(lines) == 2 and lines[1].startswith("2: after against reference: PSNR-Y ")
    assert "text" not in compare(small[:1], large[:1]).ui
    assert compare(small[:1], small[1:]).ui["text"][0].startswith("before against after: ")
    refused(lambda: compare(small, torch.rand(3, 8, 8, 3)), "3 pictures but 2 in 'before'")
    models = NODES["TUDSRLoadEmbedded"].execute().args
    plan = NODES["TUDSRPlan"].execute(small[:1], models[0], models[2], 8.0, 0, 0, 64, 32, 1).args[3]
    lines = compare(small[:1], torch.rand(1, 96, 128, 3), plan=plan).ui["text"][0].splitlines()
    assert [line.split(" are ")[0] for line in lines] == [
        "before, enlarged: edges at 5 tile borders",
        "after: edges at 5 tile borders",
    ], lines
    refused(
        lambda: compare(small[:1], torch.rand(1, 128, 96, 3), plan=plan), "these tiles are of a picture in the shape"
    )


main(globals())
