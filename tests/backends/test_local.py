import json
import shutil
import socket
from functools import cache

import published
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sd_layout import to_ldm
from sd_stand_in import slow_text_tower, text_weights
from small_sd import SMALL_TEXT, SMALL_UNET, SMALL_VAE

from tudsr_core.backends import sd21
from tudsr_core.backends.clip_tokens import tokens_of
from tudsr_core.backends.local import AdapterOptions, load_embedded, load_sd21, pick_device
from tudsr_core.backends.sd21 import Architecture, read_base
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.two_stage import TwoStageModel, UpscaleOptions, plan_for, upscale
from tudsr_core.pictures.tensors import resize
from tudsr_core.vae.settings import VAETiling
from tudsr_core.weights.checkpoints import embedded_path
from tudsr_core.weights.tensor_files import CheckpointError


def photo(height, width):
    y, x = torch.meshgrid(torch.linspace(0, 9, height), torch.linspace(0, 7, width), indexing="ij")
    return torch.stack([(x * y).sin(), (x + y).cos(), (x - y).sin()])[None] * 0.4 + 0.5


@pytest.mark.parametrize("scale", [4, 8])
def test_same_bytes_for_any_tile_batch_and_run_to_run(embedded, scale):
    image = photo(40, 52)
    results = [upscale(image, embedded, Target(scale=scale), UpscaleOptions(128, 32, batch)) for batch in (1, 2, 5, 1)]
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_number_of_threads_changes_nothing_that_can_be_seen(embedded):
    """Sums are split between threads, so the last bits may differ: far below a hundredth of an 8-bit step."""
    threads, results = torch.get_num_threads(), []
    for count in (1, 2):
        torch.set_num_threads(count)
        results.append(upscale(photo(24, 36), embedded, Target(scale=8), UpscaleOptions(128, 32)))
    torch.set_num_threads(threads)
    assert (results[0] - results[1]).abs().max() <= 1e-6


def test_tiled_is_close_to_untiled(embedded):
    image = photo(64, 80)
    whole, tiled = (
        upscale(image, embedded, Target(scale=8), UpscaleOptions(tile, overlap))
        for tile, overlap in ((1024, 128), (128, 32))
    )
    assert (whole - tiled).abs().mean() < 1e-3
    assert (whole - tiled).abs().max() < 0.03


def test_the_embedded_vae_tiles_exactly(embedded):
    backbone = embedded.first.networks.backbone
    image, tiling = photo(96, 136), VAETiling(32)
    with torch.inference_mode():
        latents = backbone.vae.encode(image * 2 - 1).latent
        tiled = backbone.tiled_vae.encode(image, lambda: None, tiling)
        assert (tiled - latents).abs().max() < 1e-5
        pixels = backbone.vae.decode(latents).sample / 2 + 0.5
        assert (backbone.tiled_vae.decode(latents, lambda: None, tiling) - pixels).abs().max() < 1e-5


def test_stage_one_again_after_stage_two_is_bit_identical(embedded):
    image = photo(16, 20)
    before = upscale(image, embedded, Target(scale=4))
    upscale(image, embedded, Target(scale=8))
    assert torch.equal(upscale(image, embedded, Target(scale=4)), before)


def test_stage_two_is_another_network_than_stage_one(embedded):
    networks = embedded.second.networks
    z = networks.encode(photo(32, 32), None, lambda: None).z
    empty = networks.condition("")
    adapted, plain = (
        stage.networks.denoise(z, 50, empty, z.shape, lambda predict: predict(z, []))
        for stage in (embedded.second, embedded.first)
    )
    assert (adapted - plain).abs().max() > 1e-3


def test_half_precision_stays_close(embedded):
    from tudsr_core.backends.local import load_embedded

    image = photo(24, 24)
    exact = upscale(image, embedded, Target(scale=4))
    rough = upscale(image, load_embedded("cpu", "bf16"), Target(scale=4))
    assert -10 * torch.log10((exact - rough).square().mean()) > 35


def test_devices_that_are_absent_are_named():
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda' is not available"):
            pick_device("cuda")
    assert pick_device("cpu").type == "cpu"


def test_sd21_folder_with_two_adapters_equals_the_formula_by_hand(small_sd):
    """Both stages, untiled, against diffusers and peft called directly."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import PeftModel

    model = load_sd21(small_sd / "base", small_sd / "one", small_sd / "two", device="cpu")
    image = photo(16, 24)
    ours = upscale(image, model, Target(scale=8), UpscaleOptions(color_fix="none", native_size=False))
    vae = AutoencoderKL.from_pretrained(small_sd / "base" / "vae")
    text = model.first.networks.condition("")
    picture = image
    with torch.no_grad():
        for name, t, abar, size in (("one", 200, 0.753692, (64, 96)), ("two", 50, 0.951577, (128, 192))):
            unet = UNet2DConditionModel.from_pretrained(small_sd / "base" / "unet")
            unet = PeftModel.from_pretrained(unet, small_sd / name / "unet_lora_adapter")
            z = vae.encode(resize(picture, size).clamp(0, 1) * 2 - 1).latent_dist.mode() * 0.18215
            eps = unet(z, t, encoder_hidden_states=text).sample
            z = (z - (1 - abar) ** 0.5 * eps) / abar**0.5
            picture = (vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    # Two chained random networks enlarge float32's rounding.
    assert (ours - picture).abs().max() < 5e-4
    assert (ours - picture).abs().mean() < 1e-5


def test_sd21_posterior_sample_depends_on_the_seed_only(small_sd):
    model = load_sd21(small_sd / "base", small_sd / "one", device="cpu")
    image = photo(16, 16)

    def run(seed, sample=True):
        return upscale(
            image, model, Target(scale=2), UpscaleOptions(sample_posterior=sample, seed=seed, native_size=False)
        )

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, False), run(2, False))


def test_posterior_sample_is_mode_plus_deviation_times_noise(small_sd):
    networks = load_sd21(small_sd / "base", small_sd / "one", device="cpu").first.networks
    image = photo(32, 40)
    mode, drawn = (networks.encode(image, seed, lambda: None).z for seed in (None, 7))
    distribution = networks.backbone.vae.encode(image * 2 - 1).latent_dist
    noise = torch.randn(distribution.mean.shape, generator=torch.Generator().manual_seed(7))
    assert (mode - distribution.mode() * 0.18215).abs().max() < 1e-6
    assert (drawn - (distribution.mean + distribution.std * noise) * 0.18215).abs().max() < 1e-6


def test_sd21_refuses_what_does_not_fit(small_sd, tmp_path):
    from tudsr_core.weights.checkpoints import read_adapter, write_adapter

    with pytest.raises(CheckpointError, match="does not exist"):
        load_sd21(tmp_path / "none", small_sd / "one")
    with pytest.raises(CheckpointError, match="vae/ is missing|unet/ is missing"):
        load_sd21(tmp_path, small_sd / "one")
    adapter = read_adapter(small_sd / "two")
    from dataclasses import replace

    write_adapter(tmp_path / "two.safetensors", replace(adapter, stage=2))
    with pytest.raises(CheckpointError, match="stage-2 adapter and was given as stage 1"):
        load_sd21(small_sd / "base", tmp_path / "two.safetensors", device="cpu")


@pytest.fixture(scope="module")
def published_base(tmp_path_factory, small_sd, published_files):
    """A diffusers folder of `published.networks()`, with the small text tower, and the adapters for it."""
    root = tmp_path_factory.mktemp("published")
    unet, vae = published.networks()
    unet.save_pretrained(root / "base" / "unet")
    vae.save_pretrained(root / "base" / "vae")
    for part in ("text_encoder", "tokenizer", "scheduler"):
        shutil.copytree(small_sd / "base" / part, root / "base" / part)
    return root / "base", published_files


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "branches"),
    [
        ("omgsr", AdapterOptions(method="omgsr"), 1),
        ("hypir", AdapterOptions(prompt="a b"), 1),
        ("osediff", AdapterOptions(prompt="a b"), 1),
        ("pisa", AdapterOptions(), 1),
        ("pisa", AdapterOptions(fidelity=0.6, detail=1.3), 2),
    ],
)
def test_published_adapters_upscale_as_their_papers_say(published_base, name, options, branches):
    """The whole way at x4 against the method's own formula over peft's networks."""
    base, files = published_base
    made, image = files[name], photo(16, 24)
    model = load_sd21(base, made.path, device="cpu", options=options)
    ticks = []
    ours = upscale(
        image,
        model,
        Target(scale=4),
        UpscaleOptions(color_fix="none", native_size=False),
        lambda done, total, preview: ticks.append((done, total)),
    )
    assert ticks[-1][0] == ticks[-1][1] == model.first.networks.vae_calls((64, 96)) + branches
    text = model.first.networks.condition(options.prompt or "")
    z = made.vae.encode(resize(image, (64, 96)).clamp(0, 1) * 2 - 1).latent_dist.mode() * 0.18215
    t = {"omgsr": 273, "hypir": 200, "osediff": 999, "pisa": 1}[name]

    def eps(*names):
        if names:
            made.unet.set_adapter([f"default_{which}_{kind}" for kind in names for which in published.LISTS])
        return made.unet(z, t, encoder_hidden_states=text).sample

    if name == "pisa":
        full, pixel = eps("pix", "sem"), eps("pix")
        z = z - (options.fidelity * pixel + options.detail * (full - pixel))
    else:
        abar = {200: 0.753692, 273: 0.635743, 999: 0.004660095}[t]
        z = (z - (1 - abar) ** 0.5 * eps()) / abar**0.5
    wanted = (made.vae.decode(z / 0.18215).sample / 2 + 0.5).clamp(0, 1)
    assert (ours - wanted).abs().max() < (1e-3 if t == 999 else 1e-4)
    assert ours.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize(("one", "two"), [("hypir", "hypir"), ("hypir", "omgsr"), ("kohya", "hypir")])
def test_any_one_step_adapter_takes_either_stage(published_base, one, two):
    """x4 then x2, each the adapter's own formula; one taken for TUDSR's is at 200 in stage one and 50 in stage two."""
    base, files = published_base
    model = load_sd21(base, files[one].path, files[two].path, device="cpu")
    image, plain = photo(8, 16), UpscaleOptions(color_fix="none", native_size=False)
    wanted = image
    for stage, size in ((model.first, (32, 64)), (model.second, (64, 128))):
        wanted = upscale(wanted, TwoStageModel(stage, None, StageLimits(4, 2, 4)), Target(height=size[0]), plain)
    assert (upscale(image, model, Target(scale=8), plain) - wanted).abs().max() < 1e-6
    assert [stage.steps[0].t for stage in (model.first, model.second)] == [200, 50 if two == "omgsr" else 200]
    lines = plan_for(model, (8, 16), Target(scale=8), plain).describe()
    for line, name in zip(lines[-3:-1], (one, two), strict=True):
        assert ("HYPIR" if name == "hypir" else "TUDSR") in line


def test_published_tiles_follow_the_adapter_that_is_loaded(published_base):
    base, files = published_base
    for name, side in (("omgsr", 512), ("hypir", 512), ("osediff", 768), ("pisa", 768)):
        model = load_sd21(base, files[name].path, device="cpu")
        plan = plan_for(model, (200, 250), Target(scale=4), UpscaleOptions(published=True))
        assert f" tiles of {side} x {side} as published" in plan.describe()[1]


def test_invsr_noise_is_tiled_seeded_and_independent_of_the_tile_batch(published_base):
    base, files = published_base
    model = load_sd21(base, files["invsr"].path, device="cpu", options=AdapterOptions(steps=3, prompt="a"))
    assert [step.t for step in model.first.steps] == [199, 99, 49]
    image = photo(16, 28)

    def run(**more):
        return upscale(
            image, model, Target(scale=4), UpscaleOptions(tile_px=64, overlap_px=16, native_size=False, **more)
        )

    first = run()
    assert torch.equal(first, run(tile_batch=3))
    assert not torch.equal(first, run(seed=1))
    plan = plan_for(model, (16, 28), Target(scale=4), UpscaleOptions(tile_px=64, overlap_px=16, native_size=False))
    assert plan.calls == 4 * len(plan.stages[0].tiles)


def test_a_method_says_what_prompt_it_needs(published_base, caplog):
    base, files = published_base
    model = load_sd21(base, files["osediff"].path, device="cpu")
    assert model.first.prompt == "" and "tags of each picture" in caplog.text
    assert load_sd21(base, files["invsr"].path, device="cpu").first.prompt.startswith("Cinematic, high-contrast")
    with pytest.raises(ValueError, match="cannot run in 2 steps"):
        load_sd21(base, files["omgsr"].path, device="cpu", options=AdapterOptions(steps=2))


def test_one_adapter_alone_keeps_no_second_copy_of_its_weights(published_base):
    base, files = published_base
    alone = load_sd21(base, files["osediff"].path, device="cpu")
    upscale(photo(8, 8), alone, Target(scale=4), UpscaleOptions(color_fix="none", native_size=False))
    merger = alone.first.networks.backbone.unet_merger
    assert merger.active and not merger._originals
    with pytest.raises(RuntimeError, match="were not kept"):
        merger.use(None)


@cache
def original_tensors(base):
    """Return the base's UNet and VAE under the original checkpoint's names."""
    vae, unet, _ = read_base(base)
    return to_ldm(unet, vae)


def single_file(base, path, prefix="cond_stage_model.model.", **more):
    """Write the base as one checkpoint in the original layout, its text tower under `prefix`."""
    tensors = original_tensors(base) | {
        key.replace("cond_stage_model.model.", prefix): value for key, value in text_weights().items()
    }
    save_file(tensors | more, path)
    return Architecture(SMALL_UNET, SMALL_VAE, {**SMALL_TEXT, "hidden_act": "gelu"})


@pytest.mark.parametrize("prefix", ["cond_stage_model.model.", "conditioner.embedders.0.model."])
def test_the_text_tower_of_a_single_file_is_read(small_sd, tmp_path, prefix):
    """Hidden state before the last layer, after the final norm, by the layers written out."""
    architecture = single_file(small_sd / "base", tmp_path / "single.safetensors", prefix)
    _, _, embed = read_base(tmp_path / "single.safetensors", architecture=architecture)
    with torch.no_grad():
        wanted = slow_text_tower(text_weights(), [49406, 49407] + [0] * 75)
    assert (embed("")[0] - wanted).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match="add --tokenizer"):
        embed("a")
    _, _, embed = read_base(
        tmp_path / "single.safetensors", architecture=architecture, tokenizer=small_sd / "base" / "tokenizer"
    )
    assert not torch.equal(embed("a b"), embed("b a"))


@pytest.mark.parametrize(
    ("settings", "pad"),
    [
        ({"pad_token": "!"}, 0),  # SD 2.x
        ({"pad_token": "<|endoftext|>"}, 6),  # SD 1.5
        ({"pad_token": {"content": "b</w>", "__type": "AddedToken"}}, 2),  # as older files write it
        ({}, 6),  # CLIP's own
    ],
)
def test_prompts_are_filled_up_with_the_folders_pad_token(small_sd, tmp_path, settings, pad):
    """As diffusers' pipelines do; a single file's own is SD 2.x's, whatever CLIP's folder says."""
    from transformers import CLIPTextModel, CLIPTokenizer

    settings |= {"unk_token": "<|endoftext|>"}
    base = hostile_base(small_sd, tmp_path / "base", {})
    config = base / "tokenizer" / "tokenizer_config.json"
    config.write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77} | settings), "utf-8")
    ids = CLIPTokenizer.from_pretrained(base / "tokenizer")(
        "a b", padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    assert ids[0].tolist() == [5, 1, 2, 6] + [pad] * 73
    text = CLIPTextModel.from_pretrained(base / "text_encoder")
    with torch.no_grad():
        assert (read_base(base)[2]("a b") - text(ids)[0]).abs().max() < 1e-6
    assert tokens_of(base / "tokenizer", 49408, sd21.PAD)("a b")[0, 4:].eq(0).all()


def test_a_pad_token_that_is_no_word_is_refused(small_sd, tmp_path):
    base = hostile_base(small_sd, tmp_path / "base", {"tokenizer/tokenizer_config.json": {"pad_token": "<pad>"}})
    with pytest.raises(CheckpointError, match="<pad>.*no word of its vocab.json") as caught:
        read_base(base)[2]("a")
    assert str(caught.value).isprintable()


def test_v_prediction_checkpoints_are_refused(small_sd, tmp_path):
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, says in ((0.04, None), (0.11, "predicts v")):
        bias = torch.randn(32, generator=torch.Generator().manual_seed(0))
        architecture = single_file(small_sd / "base", tmp_path / "x.safetensors", **{key: bias / bias.std() * spread})
        if says:
            with pytest.raises(CheckpointError, match=says):
                read_base(tmp_path / "x.safetensors", architecture=architecture)
        else:
            read_base(tmp_path / "x.safetensors", architecture=architecture)


def test_folders_may_be_half_precision_sharded_or_old(small_sd, tmp_path):
    """fp16 file names, several files with an index, .bin pickles, and the attention names of 2022."""

    wanted_vae, wanted_unet, _ = read_base(small_sd / "base")
    shutil.copytree(small_sd / "base", tmp_path / "base")
    stem = "diffusion_pytorch_model"
    unet = tmp_path / "base" / "unet"
    tensors = load_file(unet / f"{stem}.safetensors")
    (unet / f"{stem}.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, unet / f"part-{number}.safetensors")
    index = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    (unet / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    vae = tmp_path / "base" / "vae"
    renamed = load_file(vae / f"{stem}.safetensors")
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        renamed = {key.replace(f".{new}.", f".{old}."): value for key, value in renamed.items()}
    (vae / f"{stem}.safetensors").unlink()
    torch.save(renamed, vae / f"{stem}.bin")
    made_vae, made_unet, _ = read_base(tmp_path / "base", torch.float16)
    for made, wanted in ((made_vae, wanted_vae), (made_unet, wanted_unet)):
        found = made.state_dict()
        for key, value in wanted.state_dict().items():
            assert torch.equal(found[key], value.half()), key
    (vae / f"{stem}.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="it is empty"):
        read_base(tmp_path / "base")


@pytest.mark.parametrize("part", ["vae", "unet"])
def test_a_config_key_that_diffusers_would_drop_is_refused_by_name(small_sd, tmp_path, part):
    import diffusers

    shutil.copytree(small_sd / "base", tmp_path / "base")
    path = tmp_path / "base" / part / "config.json"
    config = json.loads(path.read_bytes()) | {"norm_out_eps": 0.1, "_internal": "left alone"}
    path.write_text(json.dumps(config), encoding="utf-8")
    says = f"the config of its {part} says 'norm_out_eps', which the installed diffusers {diffusers.__version__} does"
    with pytest.raises(CheckpointError, match=says):
        read_base(tmp_path / "base")


def test_sd21_single_file_equals_the_folder(small_sd, tmp_path):
    """The same weights under the original checkpoint's names give the same networks."""

    vae, unet, embed = read_base(small_sd / "base")
    tensors = to_ldm(unet, vae)
    save_file(tensors, tmp_path / "single.safetensors")
    made_vae, made_unet, _ = read_base(
        tmp_path / "single.safetensors", architecture=Architecture(SMALL_UNET, SMALL_VAE, SMALL_TEXT)
    )
    for made, wanted in ((made_vae, vae), (made_unet, unet)):
        found = made.state_dict()
        for key, value in wanted.state_dict().items():
            assert torch.equal(found[key], value), key


@pytest.fixture
def no_network(monkeypatch):
    """Makes every attempt to reach the network fail; returns the list of them."""
    attempts = []

    def refuse(*args, **kwargs):
        attempts.append(args)
        raise ConnectionError("no test may reach the network")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return attempts


def hostile_base(small_sd, folder, changes):
    """A copy of the folder with JSON files changed: a value replaces the file, a dict is added to its table."""
    shutil.copytree(small_sd / "base", folder)
    for name, change in changes.items():
        path = folder / name
        old = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps(old | change if isinstance(change, dict) else change), encoding="utf-8")
    return folder


def test_notes_about_other_places_load_nothing_from_there(small_sd, tmp_path, no_network):
    elsewhere = {"_name_or_path": "owner/name", "_class_name": "Other", "auto_map": {"AutoModel": "owner/name--x.Y"}}
    parts = ("unet/config.json", "vae/config.json")
    changes = {name: {key: elsewhere[key] for key in ("_name_or_path", "_class_name")} for name in parts}
    changes |= {"text_encoder/adapter_config.json": {"base_model_name_or_path": "owner/name", "peft_type": "LORA"}}
    changes |= {
        "text_encoder/config.json": {"_name_or_path": "owner/name"},
        "tokenizer/tokenizer_config.json": elsewhere,
    }
    networks = [read_base(path)[1:] for path in (small_sd / "base", hostile_base(small_sd, tmp_path / "base", changes))]
    assert torch.equal(networks[0][1]("a b", ""), networks[1][1]("a b", ""))
    assert not no_network


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"unet/config.json": "owner/name"}, "config.json must be a table of names and values, not owner/name"),
        ({"vae/config.json": "owner/name"}, "config.json must be a table"),
        ({"vae/config.json": ["owner/name"]}, "config.json must be a table"),
        ({"text_encoder/config.json": "owner/name"}, "config.json must be a table"),
        ({"scheduler/scheduler_config.json": "owner/name"}, "scheduler_config.json must be a table"),
        ({"scheduler/scheduler_config.json": {"prediction_type": [1]}}, "'prediction_type' is a list"),
        ({"unet/config.json": {"layers_per_block": 100_000}}, "layers_per_block|its layers are too many"),
        ({"unet/config.json": {"transformer_layers_per_block": 400}}, "its layers are too many"),
        ({"vae/config.json": {"layers_per_block": 10**7}}, "'layers_per_block' is no size"),
        ({"unet/config.json": {"block_out_channels": [2**40]}}, "a number that is none|no size of a network"),
        ({"unet/config.json": {"norm_num_groups": 0}}, "its unet does not fit"),
        ({"unet/config.json": {"norm_num_groups": 8.0}}, "'norm_num_groups' is no size of a network"),
        ({"text_encoder/config.json": {"num_attention_heads": -2}}, "'num_attention_heads' is no size of a network"),
        ({"text_encoder/config.json": {"eos_token_id": True}}, "'eos_token_id' is True, it must be a number"),
        ({"unet/config.json": {"down_block_types": ["owner/name"] * 4}}, "its unet does not fit"),
        ({"unet/config.json": {"cross_attention_dim": {"a": "owner/name"}}}, "is no size of a network"),
        ({"text_encoder/config.json": {"num_hidden_layers": 100_000}}, "its layers are too many"),
        ({"text_encoder/config.json": {"hidden_size": 48}}, "its text encoder does not fit"),
        ({"text_encoder/config.json": {"hidden_act": "owner/name"}}, "its text encoder does not fit"),
        ({"text_encoder/config.json": {"auto_map": {"AutoModel": "owner/name--x.Y"}}}, "'auto_map' is no size"),
    ],
)
def test_configurations_are_data_within_limits(small_sd, tmp_path, no_network, changes, says):
    base = hostile_base(small_sd, tmp_path / "base", changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_base(base)[2]("a b")
    assert str(caught.value).isprintable() and str(base) in str(caught.value)
    assert not no_network


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", 500),
        ("scheduler/scheduler_config.json", "beta_start", 0.0001),
        ("scheduler/scheduler_config.json", "beta_end", 0.02),
        ("scheduler/scheduler_config.json", "beta_schedule", "linear"),
        ("scheduler/scheduler_config.json", "rescale_betas_zero_snr", True),
        ("scheduler/scheduler_config.json", "trained_betas", [0.1]),
        ("vae/config.json", "shift_factor", 0.1),
        ("vae/config.json", "latents_mean", [0.1] * 4),
        ("vae/config.json", "latents_std", [0.1] * 4),
    ],
)
def test_settings_that_would_be_ignored_are_refused_by_name(small_sd, tmp_path, part, name, value):
    base = hostile_base(small_sd, tmp_path / "base", {part: {name: value}})
    with pytest.raises(CheckpointError, match=rf"{part} says {name} .*; use a folder of one of these"):
        read_base(base)


def test_settings_that_change_nothing_are_read(small_sd, tmp_path):
    changes = {"vae/config.json": {"shift_factor": 0, "latents_mean": None}}
    changes["scheduler/scheduler_config.json"] = {"rescale_betas_zero_snr": False, "set_alpha_to_one": False}
    base = hostile_base(small_sd, tmp_path / "base", changes)
    plain = read_base(small_sd / "base")[0].state_dict()
    for schedule_is_there in (True, False):
        read = read_base(base)[0].state_dict()
        assert read.keys() == plain.keys() and all(torch.equal(read[key], plain[key]) for key in plain)
        if schedule_is_there:
            (base / "scheduler" / "scheduler_config.json").unlink()


VOCABULARY = {"!": 0, "a</w>": 1, "b</w>": 2, "<|startoftext|>": 5, "<|endoftext|>": 6}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("tokenizer_config.json", '"a/b"', "tokenizer_config.json must be a table of names and values, not a/b"),
        ("tokenizer_config.json", "[" * 100_000, "tokenizer_config.json is nested too deeply"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 3}}', "is not a CLIP tokenizer"),
        ("tokenizer.json", "[" * 100_000, "is not a CLIP tokenizer"),
        ("added_tokens.json", "[1]", "added_tokens.json must be a table"),
        ("special_tokens_map.json", "[1]", "special_tokens_map.json must be a table"),
        ("vocab.json", "[1, 2]", "vocab.json must be a table"),
        ("vocab.json", "[" * 100_000, "vocab.json is nested too deeply"),
        ("vocab.json", json.dumps(VOCABULARY | {"a</w>": "b"}), "vocab.json: 'a</w>' is b, it must be a number"),
        ("vocab.json", json.dumps(VOCABULARY | {"a</w>": -5}), "'a</w>' is -5, it must be from 0 to 49407"),
        ("vocab.json", json.dumps(VOCABULARY | {"a</w>": 49408}), "'a</w>' is 49408, it must be from 0 to 49407"),
        ("merges.txt", "#v\nx\n\n a b c\n", "is not a CLIP tokenizer .*(Merges|merges)"),
        ("merges.txt", "#v\nq z\n", "is not a CLIP tokenizer"),
    ],
)
def test_damaged_tokenizers_are_one_line(small_sd, tmp_path, name, text, says):
    base = hostile_base(small_sd, tmp_path / "base", {})
    (base / "tokenizer" / name).write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_base(base)[2]("a b")
    assert str(caught.value).isprintable() and str(base / "tokenizer") in str(caught.value)


def test_words_that_the_text_encoder_lacks_are_refused(small_sd):
    with pytest.raises(CheckpointError, match="must be from 0 to 5"):
        tokens_of(small_sd / "base" / "tokenizer", 6)


def test_added_words_that_the_text_encoder_lacks_are_refused(small_sd, tmp_path):
    added = {"added_tokens_decoder": {"50000": {"content": "<new>", "special": False}}}
    base = hostile_base(small_sd, tmp_path / "base", {"tokenizer/tokenizer_config.json": added})
    tokens = tokens_of(base / "tokenizer", 7)
    with pytest.raises(CheckpointError, match="makes a word number .*, but this text encoder has 7 words"):
        tokens("a <new>")


@pytest.mark.parametrize("value", ["a", 0, -0.2, [1], True, 1e-300, 5000])
def test_a_scaling_factor_that_cannot_be_is_refused_by_name(small_sd, tmp_path, value):
    base = hostile_base(small_sd, tmp_path / "base", {"vae/config.json": {"scaling_factor": value}})
    with pytest.raises(CheckpointError, match="vae/config.json: 'scaling_factor' is .*, it must be"):
        read_base(base)


def test_a_scaling_factor_of_null_is_stable_diffusions(small_sd, tmp_path):
    base = hostile_base(small_sd, tmp_path / "base", {"vae/config.json": {"scaling_factor": None}})
    assert read_base(base)[0].config.scaling_factor == 0.18215


M, V = "model.diffusion_model.", "first_stage_model."


@pytest.mark.parametrize(
    ("key", "change", "says"),
    [
        (f"{M}out.2.weight", lambda x: x.to(torch.int8), "out.2.weight is stored in whole numbers"),
        (f"{V}decoder.norm_out.weight", lambda x: x.to(torch.int64), "norm_out.weight is stored in whole numbers"),
        (f"{V}decoder.norm_out.weight", lambda x: x * float("nan"), "norm_out.weight contains NaN or infinite"),
        (f"{M}out.0.bias", lambda x: x + float("inf"), "out.0.bias contains NaN or infinite"),
        (f"{M}label_emb.0.x", None, "has weights that the networks of .* do not: model.diffusion_model.label_emb.0.x"),
        (f"{M}input_blocks.99.0.w", None, "do not: model.diffusion_model.input_blocks.99"),
        (f"{V}encoder.down.7.block.0.x", None, "first_stage_model.encoder.down.7.block.0.x"),
        ("cond_stage_model.model.ln_final.weight", lambda x: x * float("nan"), "ln_final.weight contains NaN"),
    ],
)
def test_weights_of_the_wrong_kind_in_a_single_file_are_named(small_sd, tmp_path, key, change, says):
    path = tmp_path / "x.safetensors"
    architecture = single_file(small_sd / "base", path)
    tensors = load_file(path)
    save_file(tensors | {key: change(tensors[key]) if change else torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_base(path, architecture=architecture)[2]("")
    assert str(path) in str(caught.value)


def test_what_training_leaves_in_a_single_file_changes_nothing(small_sd, tmp_path):
    path = tmp_path / "x.safetensors"
    beside = ("model_ema.decay", "model_ema.diffusion_modelout2weight", "betas", "alphas_cumprod", "loss.logvar")
    beside += (f"{V}loss.logvar", f"{V}model_ema.decay", "cond_stage_model.model.logit_scale")
    more = {key: torch.ones(1) for key in beside} | {"model_ema.num_updates": torch.tensor(3)}
    architecture = single_file(small_sd / "base", path, **more)
    _, unet, embed = read_base(path, architecture=architecture)
    assert torch.equal(unet.conv_in.weight, read_base(small_sd / "base")[1].conv_in.weight)
    assert embed("").isfinite().all()


@pytest.mark.parametrize("part", ["vae_config", "unet_config"])
def test_a_model_file_whose_config_names_a_repository_asks_nobody(tmp_path, no_network, part):
    with safe_open(embedded_path(), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    facts = json.loads(metadata["model"]) | {part: "owner/name"}
    save_file(tensors, tmp_path / "model.safetensors", metadata | {"model": json.dumps(facts)})
    with pytest.raises(CheckpointError, match=f"{part} must be a table of names and values, not owner/name"):
        load_embedded("cpu", path=tmp_path / "model.safetensors")
    assert not no_network
