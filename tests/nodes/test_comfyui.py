"""The pack on a real ComfyUI server: loading, every workflow, the same picture from every door, cancel."""

from __future__ import annotations

import importlib.util
import json
import time

import numpy as np
import pytest
import sd_stand_in
import torch
from comfyui import PACK, Server, find
from PIL import Image

from tudsr_core.evaluation.measurement import example_path
from tudsr_core.methods.plan import Target
from tudsr_core.methods.two_stage import UpscaleOptions, upscale

API = sorted((PACK / "workflows" / "api").glob("*.json"))


def script(path):
    """Return a script of this repository as a module."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), PACK / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOCALES = script("locales/make.py")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    comfyui = find()
    if comfyui is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    base = tmp_path_factory.mktemp("comfyui")
    sd_stand_in.write(base / "models")
    running = Server(comfyui, base, "My.TUDSR pack", {"tests_pack": sd_stand_in.PACK})
    running.put_image("example.png", photo(40, 56))
    yield running
    running.stop()


def photo(height, width):
    with Image.open(example_path()) as image:
        return np.array(image.convert("RGB").crop((60, 20, 60 + width, 20 + height)))


def graph(name):
    return json.loads((PACK / "workflows" / "api" / f"{name}.json").read_text("utf-8"))


def tensor(array):
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255


def to_8bit(pixels):
    return (pixels.clamp(0, 1) * 255).round().byte()[0].permute(1, 2, 0).numpy().astype(int)


def test_the_pack_loads_without_complaint(server):
    log = server.log.read_text("utf-8")
    ours = [line for line in log.splitlines() if "My.TUDSR pack" in line]
    assert any("seconds" in line for line in ours), "the pack is not among the import times"
    assert not [line for line in ours if "Cannot import" in line or "IMPORT FAILED" in line]
    ids = {name for name in server.get("/object_info") if name.startswith("TUDSR")}
    assert ids == set(json.loads((PACK / "tests" / "nodes" / "schema.json").read_text("utf-8")))


def test_the_nodes_need_nothing_that_comfyui_does_not_require(server):
    """Template 01 where diffusers, tifffile, imagecodecs, typer, rich, peft and accelerate cannot be imported."""
    assert "nothing but what ComfyUI requires can be imported" in server.log.read_text("utf-8")
    work = graph("01-embedded-x8")
    work["1"]["inputs"]["image"] = server.put_image("little.png", photo(16, 20))
    (image,) = server.images(server.run(work), "4")
    assert image.shape[:2] == (128, 160) and image.std() > 3


def test_every_node_has_help_tooltips_and_a_frozen_schema(server):
    frozen = json.loads((PACK / "tests" / "nodes" / "schema.json").read_text("utf-8"))
    for name, info in server.get("/object_info").items():
        if not name.startswith("TUDSR"):
            continue
        page = PACK / "nodes" / "web" / "docs" / f"{name}.md"
        assert page.is_file() and len(page.read_text("utf-8")) > 300, f"help page of {name}"
        inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        for input_name, spec in inputs.items():
            assert spec[1].get("tooltip"), f"{name}.{input_name} has no tooltip"
        now = {"inputs": list(inputs), "outputs": info["output"], "names": info["output_name"]}
        assert now == frozen[name], f"the schema of {name} changed: saved workflows would break"


def test_the_translations_are_served_and_of_the_nodes_as_they_are(server):
    served = server.get("/i18n")
    known = server.get("/object_info")
    assert served["en"]["nodeDefs"] == LOCALES.node_defs(known), "run: python locales/make.py"
    assert {"en", *LOCALES.languages()} <= served.keys()
    for language in LOCALES.languages():
        assert served[language]["nodeDefs"].keys() == served["en"]["nodeDefs"].keys()
        assert served[language]["settings"].keys() == served["en"]["settings"].keys()
        assert "settingsCategories" in served[language]


def skip_without(server, kinds):
    """Skip the test where this ComfyUI lacks nodes of its own that a template uses."""
    missing = sorted(kinds - set(server.get("/object_info")))
    assert not any(kind.startswith("TUDSR") for kind in missing)
    if missing:
        pytest.skip(f"this ComfyUI is older than its nodes {', '.join(missing)}")


@pytest.mark.parametrize("path", API, ids=lambda path: path.stem)
def test_every_workflow_runs_to_a_saved_picture(server, path):
    work = graph(path.stem)
    skip_without(server, {part["class_type"] for part in work.values()})
    if "seedvr2" in path.stem:
        work = without_seedvr2s_network(server, work)
    for part in work.values():
        if part["class_type"] == "CheckpointLoaderSimple" and "stablesr" in path.stem:
            # CFW needs an autoencoder of SD's kind, which the other stand-in does not have.
            part["inputs"]["ckpt_name"] = part["inputs"]["ckpt_name"].replace("v2-1_512-ema-pruned", "stablesr-base")
        if "long_edge" in part["inputs"]:
            part["inputs"]["long_edge"] = min(part["inputs"]["long_edge"], 320)
    outputs = server.run(work)
    saves = [node for node, part in work.items() if part["class_type"] == "SaveImage"]
    assert saves
    for node in saves:
        for image in server.images(outputs, node):
            # The server's picture is 40 px high; all but the template that degrades it first enlarge it.
            assert min(image.shape[:2]) >= (40 if "degrade" in path.stem else 160)
            assert image.std() > 3


def without_seedvr2s_network(server, work):
    """Return the graph with the resized picture in the place of what SeedVR2 makes of it; its weights have gigabytes.

    The whole graph is one that the server would run if it had them.
    """
    answer = server.post("/prompt", {"prompt": work, "client_id": "tests"})
    wrong = {(node, one["type"]) for node, says in answer["node_errors"].items() for one in says["errors"]}
    loaders = {node for node, part in work.items() if part["class_type"] in ("UNETLoader", "VAELoader")}
    assert wrong == {(node, "value_not_in_list") for node in loaders}
    (before,) = (node for node, part in work.items() if part["class_type"] == "SeedVR2Preprocess")
    (after,) = (node for node, part in work.items() if part["class_type"] == "SeedVR2PostProcessing")
    work[after]["inputs"]["images"] = work[before]["inputs"]["resized_images"]
    network = (
        "SeedVR2Preprocess",
        "VAEEncodeTiled",
        "SeedVR2Conditioning",
        "KSampler",
        "VAEDecodeTiled",
        "UNETLoader",
        "VAELoader",
    )
    return {node: part for node, part in work.items() if part["class_type"] not in network}


@pytest.mark.parametrize("path", sorted((PACK / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_templates_use_known_nodes_and_have_a_picture(server, path):
    template = json.loads(path.read_text("utf-8"))
    kinds = {node["type"] for node in template["nodes"]}
    skip_without(server, kinds - {"MarkdownNote", "Note"})
    assert "MarkdownNote" in kinds
    with Image.open(path.with_suffix(".jpg")) as thumbnail:
        assert min(thumbnail.size) >= 200
    api = graph(path.stem)
    assert sorted(kinds - {"MarkdownNote"}) == sorted({part["class_type"] for part in api.values()})


@pytest.mark.parametrize(("scale", "size"), [(4, (40, 56)), (8, (40, 56)), (3, (93, 141))])
def test_node_and_library_give_the_same_picture(server, embedded, scale, size):
    array = photo(*size)
    work = graph("01-embedded-x8")
    work["1"]["inputs"]["image"] = server.put_image(f"{size[0]}.png", array)
    work["3"]["inputs"]["scale"] = float(scale)
    made = server.images(server.run(work), "4")[0].astype(int)
    assert np.abs(made - to_8bit(upscale(tensor(array), embedded, Target(scale=scale)))).max() <= 1


def test_adapters_on_sd21_equal_peft_in_diffusers(server):
    """The two-stage graph on the stand-in against the core over diffusers with the same weights."""
    from tudsr_core.backends.local import Backbone, LocalNetworks
    from tudsr_core.diffusion.one_step import from_noise_level
    from tudsr_core.methods.plan import StageLimits
    from tudsr_core.methods.two_stage import Stage, TwoStageModel
    from tudsr_core.weights.checkpoints import read_adapter

    work = graph("02-sd21-two-stage")
    work["3"] = {"class_type": "TestConditioning", "inputs": {}}
    work["6"]["inputs"] |= {"color_fix": "none", "scale": 4.0, "tile": 128, "overlap": 32, "native_size": False}
    work["8"] = {"class_type": "TestSaveTensor", "inputs": {"images": ["6", 0], "name": "sd21.npy"}}
    server.run(work)
    made = torch.from_numpy(np.load(server.base / "output" / "sd21.npy")).movedim(-1, 1)
    unet, vae = sd_stand_in.networks()
    backbone = Backbone(vae, unet, lambda text: sd_stand_in.condition(), torch.device("cpu"), torch.float32)
    stages = [
        Stage(
            LocalNetworks(backbone, read_adapter(server.base / "models/tudsr" / f"tudsr-stage-{word}").unet),
            (from_noise_level(t),),
        )
        for word, t in (("one", 200), ("two", 50))
    ]
    options = UpscaleOptions(128, 32, color_fix="none")
    wanted = upscale(tensor(photo(40, 56)), TwoStageModel(*stages, StageLimits()), Target(scale=4), options)
    assert (made - wanted).abs().max() < 1e-3
    assert (made - wanted).abs().mean() < 2e-5


def test_the_adapters_prompt_is_the_text_towers_own(server):
    """The empty prompt through ComfyUI's CLIP against the same layers written out, as `sd21.py` has them."""
    work = {key: graph("06-published-adapters")[key] for key in ("2", "3")}
    work["9"] = {"class_type": "TestSaveConditioning", "inputs": {"conditioning": ["3", 2], "name": "empty.npy"}}
    server.run(work)
    made = torch.from_numpy(np.load(server.base / "output" / "empty.npy"))[0]
    wanted = sd_stand_in.slow_text_tower(sd_stand_in.text_weights(), [49406, 49407] + [0] * 75)
    assert (made - wanted).abs().max() < 5e-3  # ComfyUI keeps text encoders in float16
    assert torch.nn.functional.cosine_similarity(made.flatten(), wanted.flatten(), 0) > 1 - 1e-6


def test_the_stock_sampler_equals_stage_one(server):
    work = graph("05-stock-sampler")
    work["1"]["inputs"]["image"] = server.put_image("large.png", photo(128, 128))
    work["4"]["inputs"]["pixels"] = ["1", 0]
    del work["3"], work["10"]
    options = {"tile": 512, "overlap": 128, "tile_batch": 1, "window": "gaussian", "color_fix": "none"}
    work["20"] = {
        "class_type": "TUDSRStageOne",
        "inputs": {
            "image": ["1", 0],
            "model": ["2", 0],
            "vae": ["2", 2],
            "conditioning": ["2", 3],
            "factor": 1.0,
            "timestep": 0,
            "sample_posterior": False,
            "seed": 0,
            **options,
        },
    }
    for node, source in (("21", ["9", 0]), ("22", ["20", 0])):
        work[node] = {"class_type": "TestSaveTensor", "inputs": {"images": source, "name": f"{node}.npy"}}
    server.run(work)
    stock, ours = (np.load(server.base / "output" / f"{node}.npy") for node in ("21", "22"))
    assert np.abs(stock - ours).max() < 1e-4


def test_cancel_ends_the_run_and_the_next_is_right(server, embedded):
    array = photo(110, 130)
    work = graph("01-embedded-x8")
    work["1"]["inputs"]["image"] = server.put_image("cancel.png", array)
    work["3"]["inputs"] |= {"tile": 128, "overlap": 64}
    prompt = server.queue(work)
    while not server.get("/queue")["queue_running"]:
        time.sleep(0.05)
    while not server.get(f"/history/{prompt}"):
        server.post("/interrupt", {})
        time.sleep(0.2)
    assert "execution_interrupted" in dict(server.wait(prompt)["status"]["messages"])
    made = server.images(server.run(work), "4")[0].astype(int)
    wanted = upscale(tensor(array), embedded, Target(scale=8), UpscaleOptions(128, 64))
    assert np.abs(made - to_8bit(wanted)).max() <= 1


def filled(server, node, **links):
    """Return a node of an API graph whose other widgets have their defaults."""
    kinds = server.get(f"/object_info/{node}")[node]["input"]
    specs = {**kinds.get("required", {}), **kinds.get("optional", {})}
    defaults = {name: spec[1]["default"] for name, spec in specs.items() if "default" in spec[1]}
    return {"class_type": node, "inputs": defaults | links}


def test_a_folder_is_upscaled_cancelled_and_goes_on(server, embedded):
    """Forty pictures, one of them broken."""
    (server.base / "input" / "scans").mkdir()
    arrays = {f"{number:02}.png": photo(24, 24 + number % 3) for number in range(39)}
    for name, array in arrays.items():
        server.put_image(f"scans/{name}", array)
    (server.base / "input" / "scans" / "20a.png").write_bytes(b"no picture")
    models = {"stage_one": ["1", 0], "stage_two": ["1", 1], "vae": ["1", 2], "conditioning": ["1", 3]}
    folder = filled(server, "TUDSRUpscaleFolder", folder="scans", output="big", scale=2.0, **models)
    work = {"1": filled(server, "TUDSRLoadEmbedded"), "2": folder}
    done = server.base / "output" / "big"
    prompt = server.queue(work)
    while not list(done.glob("0*.png")):
        time.sleep(0.01)
    while not server.get(f"/history/{prompt}"):
        server.post("/interrupt", {})
        time.sleep(0.05)
    assert "execution_interrupted" in dict(server.wait(prompt)["status"]["messages"])
    first = len(list(done.glob("*.png")))
    assert 0 < first < 39
    (text,) = server.run(work)["2"]["text"]
    assert text.startswith(f"40 pictures: {first} done before, {39 - first} written, 1 failed, in ")
    assert "20a.png: this is not a picture" in text
    assert server.run(work)["2"]["text"][0].startswith("40 pictures: 39 done before, 1 failed, in "), "not cached"
    for name in ("00.png", "38.png"):
        made = np.array(Image.open(done / name)).astype(int)
        assert np.abs(made - to_8bit(upscale(tensor(arrays[name]), embedded, Target(scale=2.0)))).max() <= 1


def test_a_folder_goes_through_other_nodes_one_by_one(server):
    (server.base / "input" / "album" / "x").mkdir(parents=True)
    exif = Image.Exif()
    exif[0x010F] = "Camera"
    Image.fromarray(photo(20, 24)).save(server.base / "input" / "album" / "x" / "a.jpg", exif=exif, dpi=(240, 240))
    load = filled(server, "TUDSRLoadFromFolder", folder="album", recursive=True)
    how = {"image": ["1", 0], "upscale_method": "bilinear", "scale_by": 2.0}
    scale = {"class_type": "ImageScaleBy", "inputs": how}
    save = filled(server, "TUDSRSaveWithSourceName", image=["2", 0], source=["1", 2], ending="-x2", output="album")
    shown = server.run({"1": load, "2": scale, "3": save})["3"]["images"]
    assert shown == [{"filename": "a-x2.jpg", "subfolder": "album/x", "type": "output"}]
    with Image.open(server.base / "output" / "album" / "x" / "a-x2.jpg") as made:
        assert (made.size, made.getexif()[0x010F], made.info["dpi"]) == ((48, 40), "Camera", (240, 240))


def test_swapped_stages_fail_with_a_name(server):
    work = graph("01-embedded-x8")
    work["3"]["inputs"] |= {"stage_one": ["2", 1], "stage_two": ["2", 0]}
    assert "swap the two MODEL inputs" in server.fail(work)


def test_a_missing_adapter_says_where_to_put_it(server):
    work = graph("02-sd21-two-stage")
    work["4"]["inputs"]["adapter"] = "none.safetensors"
    answer = server.post("/prompt", {"prompt": work, "client_id": "tests"})
    assert "none.safetensors" in json.dumps(answer)
    info = server.get("/object_info")["TUDSRLoadAdapter"]
    options = info["input"]["required"]["adapter"]
    names = options[1].get("options") or options[0]
    stablesr = ["stablesr_000117.ckpt", "vqgan_cfw_00011.ckpt", "webui_768v_139.ckpt"]
    assert names == sorted(["HYPIR_sd2.pth", "pisa_sr.pkl", "tudsr-stage-one", "tudsr-stage-two", *stablesr])
