"""Checks of the learned downsampler's nodes, inside ComfyUI; `test_comfyui_inside.py` starts this file.

COMFYUI_PYTHON tests/nodes/inside_degrading.py COMFYUI_PATH FILES     prints one JSON object {check: error or null}
"""

import tempfile
from pathlib import Path

from inside import NODES, main, part, picture, refused  # first: it makes ComfyUI importable

import comfy.model_management
import folder_paths
import torch
from safetensors.torch import save_file


def written():
    """A downsampler of random weights in a new folder of models, and the network itself."""
    models, root = part("tudsr_core.models"), Path(tempfile.mkdtemp())
    torch.manual_seed(0)
    network = models.Downsampler(models.DownsamplerConfig("pixel", 8, 1, 4, 2))
    torch.nn.init.normal_(network.conv_out.weight, std=0.05)
    models.write_downsampler(root / "mine.safetensors", network)
    save_file({"x": torch.zeros(1)}, root / "other.safetensors", {"format": "else"})
    folder_paths.add_model_folder_path("tudsr", str(root))
    return models.load_downsampler(root / "mine.safetensors")


def run(image, loaded, factor=4.0, seed=0, strength=1.0, enlarge=False, tile=256, style=None):
    return NODES["TUDSRDegradeLearned"].execute(image, loaded, factor, seed, strength, enlarge, tile, style).args[0]


def check_downsamplers_are_listed_and_make_the_library_s_picture():
    network, loader = written(), NODES["TUDSRLoadDownsampler"]
    options = loader.define_schema().inputs[0].options
    assert "mine.safetensors" in options and "other.safetensors" not in options, options
    assert loader.validate_inputs("mine.safetensors") is True and "other" in loader.validate_inputs("other-one.pt")
    assert loader.fingerprint_inputs("mine.safetensors")
    loaded = loader.execute("mine.safetensors").args[0]
    image = torch.cat([picture(1, 90, 70), picture(1, 90, 70).flip(1)])
    made = run(image, loaded, 3.0, 5)
    wanted = network.degrade(image.movedim(-1, 1), 3.0, 5).movedim(1, -1)
    assert made.shape == (2, 30, 23, 3) and (made - wanted).abs().max() < 1e-6
    assert (run(image, loaded, 3.0, 5, tile=16) - made).abs().max() < 1e-5
    assert run(image, loaded, 3.0, 5, enlarge=True).shape == image.shape
    styled = run(image, loaded, 3.0, 5, style=picture(1, 20, 30))
    assert (styled - made).abs().max() > 1e-4
    plain = part("tudsr_core.models").shrink(image.movedim(-1, 1), 3.0).movedim(1, -1)
    assert torch.equal(run(image, loaded, 3.0, strength=0.0), plain)


def check_the_shipped_one_needs_no_file():
    loader = NODES["TUDSRLoadDownsampler"]
    assert loader.define_schema().inputs[0].default == "shipped" and loader.validate_inputs("shipped") is True
    loaded, image = loader.execute("shipped").args[0], picture(1, 90, 70)
    made = run(image, loaded, 2.0)
    plain = part("tudsr_core.models").shrink(image.movedim(-1, 1), 2.0).movedim(1, -1)
    assert made.shape == (1, 45, 35, 3) and (made - plain).std() > 2 / 255


def check_the_network_is_managed_and_the_run_can_be_cancelled():
    written()
    loaded = NODES["TUDSRLoadDownsampler"].execute("mine.safetensors").args[0]
    run(picture(1, 40, 40), loaded)
    assert any(one.model is loaded.patcher for one in comfy.model_management.current_loaded_models)
    comfy.model_management.interrupt_current_processing()
    try:
        run(picture(1, 80, 80), loaded, tile=16)
    except comfy.model_management.InterruptProcessingException:
        pass
    else:
        raise AssertionError("not cancelled")


def check_bad_input_is_refused_by_name():
    written()
    loaded = NODES["TUDSRLoadDownsampler"].execute("mine.safetensors").args[0]
    refused(lambda: run(picture(1, 40, 40), loaded, style=picture(2, 8, 8)), "give one bad picture")
    refused(lambda: run(picture(1, 40, 40), loaded, factor=9.0), "factor 9 must be from 1 to 8")
    refused(lambda: NODES["TUDSRLoadDownsampler"].execute("other.safetensors"), "is no downsampler")


if __name__ == "__main__":
    main(globals())
