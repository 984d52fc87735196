"""Every published adapter format, written as its authors write it, read back and compared with peft's own output."""

import json
import re
import shutil
import time
from dataclasses import replace

import published
import pytest
import torch
from safetensors.torch import load_file, save_file

from tudsr_core.models.invsr import build_predictor
from tudsr_core.weights.adapters import LoRAMerger, LoRAWeights, WeightDelta
from tudsr_core.weights.checkpoints import identify, read_adapter, write_adapter
from tudsr_core.weights.formats import dotted
from tudsr_core.weights.tensor_files import CheckpointError

TIMESTEP = {"omgsr": 273, "osediff": 999, "pisa": 1, "peft file": 273}
LORA = ("omgsr", "hypir", "osediff", "pisa", "diffusers", "old diffusers", "kohya", "peft file")
TITLES = {
    "omgsr": "peft folder",
    "hypir": "HYPIR .pth",
    "osediff": "OSEDiff .pkl",
    "pisa": "PiSA-SR .pkl",
    "diffusers": "diffusers or kohya LoRA",
    "old diffusers": "diffusers or kohya LoRA",
    "kohya": "diffusers or kohya LoRA",
    "peft file": "peft LoRA file",
    "invsr": "InvSR noise predictor",
}


@pytest.fixture
def files(published_files):
    return published_files


@pytest.fixture
def nets():
    return published.networks()


def eps_with(unet, patch, t):
    merger = LoRAMerger(unet, "UNet")
    merger.check(patch, "test")
    merger.use(patch)
    return published.eps_of(unet, t)


def latent_with(vae, patch):
    merger = LoRAMerger(vae, "VAE")
    merger.check(patch, "test")
    merger.use(patch)
    return published.latent_of(vae)


@pytest.mark.parametrize("name", TITLES)
def test_each_format_is_told_by_its_content(files, name):
    title, adapter = identify(files[name].path)
    assert title == TITLES[name]
    wanted = {"hypir": "hypir", "osediff": "osediff", "pisa": "pisa-sr", "invsr": "invsr"}.get(name, "tudsr")
    assert adapter.method == wanted


@pytest.mark.parametrize("name", LORA)
def test_the_unet_equals_pefts_own_forward(files, nets, name):
    adapter = read_adapter(files[name].path)
    t = TIMESTEP.get(name, 200)
    plain = published.eps_of(nets[0], t)
    ours = eps_with(nets[0], adapter.branches()[0][1], t)
    assert (ours - files[name].eps["eps"]).abs().max() < 1e-5
    assert (plain - files[name].eps["eps"]).abs().max() > 0.02


@pytest.mark.parametrize("name", ["omgsr", "osediff"])
def test_the_encoder_equals_pefts_own_forward(files, nets, name):
    ours = latent_with(nets[1], read_adapter(files[name].path).vae)
    assert (ours - files[name].latent).abs().max() < 1e-5
    assert (published.latent_of(published.networks()[1]) - files[name].latent).abs().max() > 0.02


def test_osediff_covers_everything_its_authors_list(files):
    adapter = read_adapter(files["osediff"].path)
    assert {update.alpha / update.rank for update in adapter.unet.updates.values()} == {2.0}
    assert "quant_conv" in adapter.vae.updates
    assert set(adapter.unet.weights) == {"conv_in.weight", "conv_in.bias"}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda patch: replace(patch, updates={k: LoRAWeights(v.down, v.up, v.rank) for k, v in patch.updates.items()}),
        lambda patch: replace(patch, weights={}),
        lambda patch: replace(
            patch,
            updates=patch.updates
            | {
                "mid_block.resnets.0.conv1": patch.updates["mid_block.resnets.0.conv2"],
                "mid_block.resnets.0.conv2": patch.updates["mid_block.resnets.0.conv1"],
            },
        ),
    ],
    ids=["alpha dropped", "conv_in dropped", "two keys swapped"],
)
def test_the_comparison_notices_mistakes(files, nets, spoil):
    adapter = read_adapter(files["osediff"].path)
    ours = eps_with(nets[0], spoil(adapter.unet), 999)
    assert (ours - files["osediff"].eps["eps"]).abs().max() > 1e-3


def test_every_update_equals_pefts_delta_weight(tmp_path, nets):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(nets[0], LoraConfig(r=5, lora_alpha=7, target_modules=published.OMGSR_TARGETS))
    published.randomise(adapted, 1)
    adapted.save_pretrained(tmp_path)
    updates = read_adapter(tmp_path).unet.updates
    modules = dict(adapted.base_model.model.named_modules())
    assert len(updates) == 32 * 4 + 22 * 2 + 14 + 6 + 2
    for path, update in updates.items():
        theirs = modules[path].get_delta_weight("default")
        assert (update.delta(modules[path].base_layer.weight) - theirs).abs().max() < 1e-6, path


def test_pisa_dials(files, nets):
    """l_pix eps_pix + l_sem (eps_full - eps_pix), by two explicit passes of peft."""
    made, adapter = files["pisa"], read_adapter(files["pisa"].path)
    for l_pix, l_sem in ((1, 1), (0.6, 1.3), (1, 0), (0, 1)):
        branches = adapter.branches(l_pix, l_sem)
        assert len(branches) == (1 if l_pix == l_sem or l_sem == 0 else 2)
        ours = sum(weight * eps_with(published.networks()[0], patch, 1) for weight, patch in branches)
        wanted = l_pix * made.eps["pix"] + l_sem * (made.eps["eps"] - made.eps["pix"])
        # 1e-5 for each forward pass, as it is weighted.
        assert (ours - wanted).abs().max() < 1e-5 * (1 + l_pix + 2 * l_sem)
    with pytest.raises(ValueError, match="no dials"):
        read_adapter(files["omgsr"].path).branches(0.5, 1)


def test_pisa_merging_in_turn_equals_one_sum(files):
    adapter = read_adapter(files["pisa"].path)
    for path, update in adapter.unet.plus(adapter.detail).updates.items():
        first, second = adapter.unet.updates[path], adapter.detail.updates[path]
        weight = torch.zeros(update.up.shape[0], *update.down.shape[1:])
        assert (update.delta(weight) - (first.delta(weight) + second.delta(weight))).abs().max() < 1e-6


def test_pisa_updates_of_unlike_shapes_are_named(files, tmp_path):
    key = "mid_block.resnets.0.conv1.lora_{}.default_others_sem.weight"

    def spoil(saved):
        part = saved["state_dict_unet"]
        part[key.format("A")] = part[key.format("A")][:, :5].clone()

    path = change_pickle(files, "pisa", spoil, tmp_path / "spoilt.pkl")
    with pytest.raises(
        CheckpointError,
        match=r"two updates of mid_block.resnets.0.conv1 differ in shape .pix 128 x 128 x 3 x 3, sem 128",
    ):
        read_adapter(path)


def test_the_noise_predictor_is_the_published_network(files):
    tensors = torch.load(files["invsr"].path, weights_only=True)["state_dict"]
    adapter = read_adapter(files["invsr"].path)
    network = build_predictor(adapter.predictor, "test")
    pixels = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        mean, deviation = network(pixels, 199)
    assert mean.shape == deviation.shape == (1, 4, 8, 12) and (deviation > 0).all()
    assert len(adapter.predictor) == len(tensors)
    broken = dict(adapter.predictor)
    broken.pop("encoder.mid_block.resnets.0.conv1.weight")
    with pytest.raises(CheckpointError, match="mid_block.resnets.0.conv1.weight"):
        build_predictor(broken, "broken.pth")
    broken["encoder.mid_block.resnets.0.conv1.weight"] = torch.zeros(3, 3)
    with pytest.raises(CheckpointError, match="does not fit InvSR's noise predictor"):
        build_predictor(broken, "broken.pth")


class DiffusersEncoder(torch.nn.Module):
    """InvSR's encoder out of the blocks of diffusers that its authors used."""

    def __init__(self, widths, layers, temb):
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.unets.unet_2d_blocks import AttnDownBlock2D, UNetMidBlock2D

        super().__init__()
        shared = dict(temb_channels=temb, resnet_eps=1e-6, resnet_groups=32, attention_head_dim=64)
        down = dict(num_layers=layers, downsample_padding=0, **shared)
        self.time_proj = Timesteps(128, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(128, temb)
        self.conv_in = torch.nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = torch.nn.ModuleList(
            [
                AttnDownBlock2D(in_channels=widths[0], out_channels=widths[0], downsample_type="conv", **down),
                AttnDownBlock2D(in_channels=widths[0], out_channels=widths[1], downsample_type=None, **down),
            ]
        )
        self.mid_block = UNetMidBlock2D(in_channels=widths[1], **shared)
        self.conv_norm_out = torch.nn.GroupNorm(32, widths[1], eps=1e-6)
        self.conv_out = torch.nn.Conv2d(widths[1], 8, 3, padding=1)

    def forward(self, x, t):
        emb = self.time_embedding(self.time_proj(torch.full((len(x),), float(t))))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x, _ = block(x, emb)
        return self.conv_out(torch.nn.functional.silu(self.conv_norm_out(self.mid_block(x, emb))))


@pytest.mark.parametrize("layers", [2, 3])
@torch.no_grad()
def test_the_noise_predictor_equals_the_blocks_of_diffusers(layers):
    torch.manual_seed(1)
    wanted = DiffusersEncoder((64, 128), layers, 96).eval()
    ours = build_predictor({f"encoder.{key}": value for key, value in wanted.state_dict().items()}, "test")
    for size, t in (((16, 24), 199), ((2, 2), 0), ((18, 10), 999)):
        pixels = torch.rand(2, 3, *size)
        mean, deviation = ours(pixels, t)
        moments = wanted(pixels * 2 - 1, t)
        assert (mean - moments[:, :4]).abs().max() < 1e-6
        assert (2 * deviation.log() - moments[:, 4:]).abs().max() < 1e-5


def test_a_noise_predictor_that_would_take_for_ever_is_refused():
    tensors = {f"encoder.down_blocks.0.resnets.{i}.conv1.bias": torch.zeros(64) for i in range(5000)}
    weights = {f"encoder.down_blocks.{i}.resnets.0.conv1.weight": torch.zeros(64, 1) for i in (0, 1)}
    with pytest.raises(CheckpointError, match=r"big.pth is not a whole InvSR noise predictor \(5000 layers"):
        build_predictor(tensors | weights, "big.pth")


def test_counts_on_the_full_size_networks():
    """The published numbers of modules and parameters, on shapes alone."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from peft import LoraConfig, get_peft_model

    from tudsr_core.backends.sd21 import UNET_CONFIG, VAE_CONFIG

    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(**UNET_CONFIG), AutoencoderKL.from_config(VAE_CONFIG)
        listed = {name for modules in published.split_modules(unet).values() for name in modules}
        listed_vae = set(published.vae_modules(vae))
        found = {}
        for name, net, rank in (("unet", unet, 32), ("encoder", vae.encoder, 16)):
            adapted = get_peft_model(net, LoraConfig(r=rank, target_modules=published.OMGSR_TARGETS))
            sizes = [p.numel() for key, p in adapted.named_parameters() if "lora_" in key]
            found[name] = len(sizes) // 2, sum(sizes)
    assert found == {"unet": (194, 25_257_216), "encoder": (31, 1_477_168)}
    assert (len(listed), len(listed_vae)) == (258, 32)


@pytest.mark.parametrize("name", TITLES)
def test_converted_files_say_and_do_the_same(files, tmp_path, nets, name):
    adapter = read_adapter(files[name].path, stage=1)
    write_adapter(tmp_path / "converted.safetensors", adapter)
    back = read_adapter(tmp_path / "converted.safetensors")
    assert (back.method, back.stage) == (adapter.method, 1)
    assert back.steps_for() == adapter.steps_for()
    if adapter.predictor:
        assert all(torch.equal(back.predictor[key], value) for key, value in adapter.predictor.items())
        return
    t = TIMESTEP.get(name, 200)
    assert torch.equal(
        eps_with(nets[0], back.branches()[0][1], t), eps_with(published.networks()[0], adapter.branches()[0][1], t)
    )
    assert back.vae.updates.keys() == adapter.vae.updates.keys()
    write_adapter(tmp_path / "half.safetensors", adapter, "fp16")
    half = eps_with(published.networks()[0], read_adapter(tmp_path / "half.safetensors").branches()[0][1], t)
    assert 0 < (half - files[name].eps["eps"]).abs().max() < 2e-2


def test_methods_and_stages_are_filled_in_and_contradictions_refused(files, tmp_path):
    folder = files["omgsr"].path
    assert read_adapter(folder).steps_for(1)[0].t == 200 and read_adapter(folder).steps_for(2)[0].t == 50
    assert read_adapter(folder, "omgsr").steps_for()[0].t == 273
    with pytest.raises(CheckpointError, match="adapter of OSEDiff, not of OMGSR"):
        read_adapter(files["osediff"].path, "omgsr")
    write_adapter(tmp_path / "two.safetensors", read_adapter(folder, stage=2))
    with pytest.raises(CheckpointError, match="stage-2 adapter and was given as stage 1"):
        read_adapter(tmp_path / "two.safetensors", stage=1)


def change_pickle(files, name, change, path):
    saved = torch.load(files[name].path, weights_only=True)
    change(saved)
    torch.save(saved, path)
    return path


UNET_KEY = "mid_block.resnets.0.conv1.lora_{}.default_others.weight"
OSEDIFF_DAMAGE = {
    "half an update: mid_block.resnets.0.conv1": lambda s: s["state_dict_unet"].pop(UNET_KEY.format("B")),
    "that its tensors do not match: mid_block.resnets.0.conv1": lambda s: [
        s["state_dict_unet"].pop(UNET_KEY.format(half)) for half in "AB"
    ],
    "keys that fit nothing: state_dict_unet.foreign.weight": lambda s: s["state_dict_unet"].update(
        {"foreign.weight": torch.ones(1)}
    ),
    "says rank 8 for its unet": lambda s: s.update(rank_unet=8),
    "NaN": lambda s: s["state_dict_unet"][UNET_KEY.format("A")].fill_(float("nan")),
    "ranks of mid_block.resnets.0.conv1": lambda s: s["state_dict_unet"].update(
        {UNET_KEY.format("B"): torch.ones(128, 5, 1, 1)}
    ),
    "'unet_lora_encoder_modules' is 3, it must be a list of texts": lambda s: s.update(unet_lora_encoder_modules=3),
    "'vae_lora_encoder_modules' is a list, it must be a list of texts": lambda s: s.update(
        vae_lora_encoder_modules=[["conv"], 1]
    ),
    "'rank_unet' is a dict, it must be a number": lambda s: s.update(rank_unet={"a": 1}),
    "'rank_vae' is 4.5, it must be a whole number": lambda s: s.update(rank_vae=4.5),
    "nested too deeply or holds too many": lambda s: s.update(more=json.loads("[" * 99 + "]" * 99)),
    "conv_in.bias contains NaN": lambda s: s["state_dict_unet"]["conv_in.base_layer.bias"].fill_(float("inf")),
}


@pytest.mark.parametrize("says", OSEDIFF_DAMAGE)
def test_damaged_osediff_files_are_named(files, tmp_path, says):
    path = change_pickle(files, "osediff", OSEDIFF_DAMAGE[says], tmp_path / "damaged.pkl")
    with pytest.raises(CheckpointError, match=says) as caught:
        read_adapter(path)
    assert "damaged.pkl" in str(caught.value)


KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
LORA_DAMAGE = {
    "half an update: mid_block.attentions.0.proj_in": lambda t: t.pop(f"{KOHYA}.lora_up.weight"),
    "also changes something else": lambda t: t.update({"lora_vae_q.lora_up.weight": torch.ones(1)}),
    "names its modules in another way": lambda t: t.update({"lora_unet_input_blocks_1_1.alpha": torch.ones(())}),
    "an alpha without its update: conv_out": lambda t: t.update({"lora_unet_conv_out.alpha": torch.ones(())}),
    "alpha of mid_block.attentions.0.proj_in is missing or not above": lambda t: t[f"{KOHYA}.alpha"].fill_(0),
}


def test_text_encoder_parts_are_left_out_with_a_word(files, tmp_path, caplog):
    tensors = load_file(files["kohya"].path)
    more = {f"lora_te_text_model_encoder_layers_0_mlp_fc1.{half}": torch.ones(2, 2) for half in ("lora_up.weight",)}
    save_file(tensors | more, tmp_path / "both.safetensors")
    plain, ours = (read_adapter(path).unet.updates for path in (files["kohya"].path, tmp_path / "both.safetensors"))
    assert plain.keys() == ours.keys() and all(torch.equal(plain[name].up, ours[name].up) for name in plain)
    assert "both.safetensors also changes the text encoder (1 tensors, lora_te_text_model_enc" in caplog.text
    save_file(more, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="changes only the text encoder"):
        read_adapter(tmp_path / "text.safetensors")


def test_a_file_that_does_not_say_whose_it_is_is_taken_for_tudsrs_aloud(files, caplog):
    for name in ("omgsr", "peft file", "kohya"):
        read_adapter(files[name].path)
        assert "does not say whose it is: taken for TUDSR's, t = 200; OMGSR's want the method omgsr (t = 273)" in (
            caplog.text
        )
        caplog.clear()
        read_adapter(files[name].path, "tudsr")
        read_adapter(files["pisa"].path)
        assert not caplog.text


@pytest.mark.parametrize(
    ("part", "module", "network"),
    [
        ("unet_lora_adapter", "mid_block.resnets.0.conv1", 0),
        ("vae_encoder_lora_adapter", "mid_block.attentions.0.to_out.0", 1),
    ],
)
def test_a_peft_folder_that_lacks_a_module_is_refused(files, tmp_path, nets, part, module, network):
    folder = shutil.copytree(files["omgsr"].path, tmp_path / "lacking")
    file = folder / part / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if f".{module}." not in key}, file)
    path, name = (f"encoder.{module}", "VAE") if network else (module, "UNet")
    says = f"adapter lacking lacks 1 of the {name}'s modules that it says it changes: {path}; it is damaged, get it"
    converted = tmp_path / "converted.safetensors"
    for source in (folder, converted):  # what is converted still knows what it lacks
        adapter = read_adapter(source)
        with pytest.raises(CheckpointError, match=re.escape(says)):
            LoRAMerger(nets[network], name).check((adapter.unet, adapter.vae)[network], adapter.name)
        write_adapter(converted, adapter)
    write_adapter(converted, read_adapter(files["omgsr"].path))
    for source in (files["omgsr"].path, converted):
        whole = read_adapter(source)
        LoRAMerger(nets[network], name).check((whole.unet, whole.vae)[network], "whole")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"target_modules": "all-linear"}, "its target_modules is all-linear"),
        ({"target_modules": r".*\.conv\d"}, r"its target_modules is .*\.conv\d"),
        ({"target_modules": None}, "its target_modules is None"),
        ({"exclude_modules": ["conv1"]}, "its exclude_modules"),
    ],
)
def test_that_lacking_modules_cannot_be_checked_is_said(files, tmp_path, caplog, changes, why):
    says = f"has no plain list of the modules that it changes ({why}), so it cannot be checked that none is lacking"
    folder = unet_folder(files, tmp_path, **changes)
    for source in (folder, folder / "adapter_model.safetensors"):
        assert read_adapter(source, "tudsr").unet.targets == ()
        assert f"{source} {says}" in caplog.text
    caplog.clear()
    read_adapter(files["omgsr"].path, "omgsr")
    assert not caplog.text


def test_one_file_of_a_peft_folder_knows_what_it_must_change(files):
    path = files["omgsr"].path / "unet_lora_adapter"
    targets = read_adapter(path / "adapter_model.safetensors", "tudsr").unet.targets
    assert targets and targets == read_adapter(path, "tudsr").unet.targets


def test_omgsr_without_its_encoder_is_refused(files, tmp_path):
    folder = shutil.copytree(files["omgsr"].path, tmp_path / "half")
    shutil.rmtree(folder / "vae_encoder_lora_adapter")
    for source in (folder, folder / "unet_lora_adapter"):
        with pytest.raises(
            CheckpointError, match=f"{source.name} has no vae_encoder_lora_adapter/, which OMGSR always"
        ):
            read_adapter(source, "omgsr")
    assert not read_adapter(folder, "tudsr").vae


def test_a_wrong_shape_names_the_key_and_both_shapes(files, tmp_path, nets):
    def spoil(saved):
        for kind in ("pix", "sem"):
            key = f"mid_block.resnets.0.conv1.lora_A.default_others_{kind}.weight"
            saved["state_dict_unet"][key] = saved["state_dict_unet"][key][:, :5].clone()

    adapter = read_adapter(change_pickle(files, "pisa", spoil, tmp_path / "spoilt.pkl"))
    with pytest.raises(CheckpointError) as caught:
        LoRAMerger(nets[0], "UNet").check(adapter.branches()[0][1], "spoilt")
    assert "mid_block.resnets.0.conv1 (expected 128 x 128 x 3 x 3, found 128 x 5 x 3 x 3)" in str(caught.value)


@pytest.mark.parametrize("says", LORA_DAMAGE)
def test_damaged_loras_are_named(files, tmp_path, says):
    tensors = load_file(files["kohya"].path)
    LORA_DAMAGE[says](tensors)
    save_file(tensors, tmp_path / "damaged.safetensors")
    with pytest.raises(CheckpointError, match=says):
        read_adapter(tmp_path / "damaged.safetensors")


def test_kohya_names_are_parsed_in_linear_time(tmp_path):
    assert dotted("down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0") == (
        "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    )
    assert dotted("mid_block_resnets_0_time_emb_proj") == "mid_block.resnets.0.time_emb_proj"
    assert dotted("time_embedding_linear_1") == "time_embedding.linear_1"
    for wrong in ("a__b", "", "conv-1", "attn12a3", "é"):
        assert dotted(wrong) is None
    # Read twice over as words and as parts of words, this takes the age of the universe.
    crafted = "to_q_" * 60 + "!"
    save_file({f"lora_unet_{crafted}.alpha": torch.ones(())}, tmp_path / "crafted.safetensors")
    start = time.process_time()
    with pytest.raises(CheckpointError, match="names its modules in another way"):
        read_adapter(tmp_path / "crafted.safetensors")
    assert time.process_time() - start < 2


def unet_folder(files, tmp_path, **changes):
    """A copy of one peft folder with another configuration."""
    folder = tmp_path / "folder"
    shutil.copytree(files["omgsr"].path / "unet_lora_adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    (folder / "adapter_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"r": "six"}, "'r' is six, it must be a number"),
        ({"r": [6]}, "'r' is a list, it must be a number"),
        ({"lora_alpha": {"a": 1}}, "'lora_alpha' is a dict"),
        ({"lora_alpha": True}, "'lora_alpha' is True"),
        ({"lora_alpha": 1e11}, "missing or not above 0, or far too large"),
        ({"use_rslora": "yes"}, "'use_rslora' is yes, it must be true or false"),
        ({"target_modules": 3}, "'target_modules' is 3, it must be a list of texts"),
        ({"target_modules": [1, 2]}, "'target_modules' is a list, it must be a list of texts"),
        ({"exclude_modules": {"a": 1}}, "'exclude_modules' is a dict, it must be a list of texts"),
        ({"peft_type": "LOHA"}, "is of the kind LOHA, which this pack does not support; it reads LORA"),
        ({"peft_type": 3}, "'peft_type' is 3, it must be a text"),
        ({"fan_in_fan_out": True}, "uses fan_in_fan_out, which this pack does not support"),
        ({"modules_to_save": ["conv_out"]}, "uses modules_to_save, which"),
        ({"alpha_pattern": {"to_q": 2}}, "uses alpha_pattern, which"),
        ({"rank_pattern": {"to_q": 2}}, "uses rank_pattern, which"),
        ({"bias": "all"}, r"trains biases \(all\)"),
        ({"init_lora_weights": "pissa_niter_4"}, "begins with pissa_niter_4, which also changes the base model"),
        ({"more": json.loads("[" * 40 + "]" * 40)}, "nested too deeply"),
        ({"more": ["x"] * 300_000}, "too many values"),
    ],
)
def test_lora_configurations_of_wrong_kinds_are_named(files, tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        read_adapter(unet_folder(files, tmp_path, **changes))
    assert "folder" in str(caught.value)


def test_the_configuration_of_a_diffusers_file_counts_too(files, tmp_path):
    """rsLoRA's scale is alpha / sqrt(r), and what is not implemented is refused."""
    tensors = load_file(files["diffusers"].path)
    updates = []
    for rooted in (False, True):
        about = {"unet.r": 4, "unet.lora_alpha": 2, "unet.use_rslora": rooted, "unet.init_lora_weights": "gaussian"}
        save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(about)})
        updates.append(read_adapter(tmp_path / "x.safetensors").unet.updates)
    for name, plain in updates[0].items():
        assert updates[1][name].alpha == pytest.approx(plain.alpha * plain.rank**0.5)
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": '{"unet.use_dora": true}'})
    with pytest.raises(CheckpointError, match="uses use_dora"):
        read_adapter(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["[]", "3", "null", '"owner/name"', "[" * 100_000, "{", "\ufeff"])
def test_a_lora_configuration_must_be_a_table(files, tmp_path, text):
    folder = unet_folder(files, tmp_path)
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match="LoRA configuration of .*(table|cannot be read|nested too deeply)"):
        read_adapter(folder)
    tensors = load_file(files["diffusers"].path)
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match="LoRA configuration of .*(table|cannot be read|nested too deeply)"):
        read_adapter(tmp_path / "x.safetensors")


def test_fp8_adapters_are_read_and_whole_numbers_refused(files, tmp_path):
    tensors = load_file(files["kohya"].path)
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        save_file(
            {k: v if k.endswith("alpha") else v.to(dtype) for k, v in tensors.items()}, tmp_path / "8.safetensors"
        )
        update = read_adapter(tmp_path / "8.safetensors").unet.updates["mid_block.attentions.0.proj_in"]
        whole = read_adapter(files["kohya"].path).unet.updates["mid_block.attentions.0.proj_in"]
        weight = torch.zeros(whole.up.shape[0], *whole.down.shape[1:])
        assert (update.delta(weight) - whole.delta(weight)).norm() < 0.2 * whole.delta(weight).norm()
    spoilt = {k: v if k.endswith("alpha") else v.to(torch.float8_e4m3fn) for k, v in tensors.items()}
    spoilt[f"{KOHYA}.lora_up.weight"] = torch.full_like(tensors[f"{KOHYA}.lora_up.weight"], float("nan")).to(
        torch.float8_e4m3fn
    )
    save_file(spoilt, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match="contains NaN"):
        read_adapter(tmp_path / "nan.safetensors")
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, tmp_path / "int.safetensors")
    with pytest.raises(CheckpointError, match="stored in whole numbers"):
        read_adapter(tmp_path / "int.safetensors")


def test_control_codes_in_keys_are_printed_escaped(tmp_path):
    save_file({"\x1b]0;owned\x07\n.weight": torch.ones(1)}, tmp_path / "esc.safetensors")
    with pytest.raises(CheckpointError) as caught:
        read_adapter(tmp_path / "esc.safetensors")
    assert str(caught.value).isprintable() and r"\x1b]0;owned\x07\n.weight" in str(caught.value)


def test_foreign_files_are_named_with_what_is_known(tmp_path):
    save_file({"blocks.0.weight": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="no adapter this pack knows.*blocks.0.weight.*OSEDiff"):
        read_adapter(tmp_path / "other.safetensors")
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(CheckpointError, match="no weight file"):
        read_adapter(tmp_path / "notes.txt")


def test_a_patch_returns_to_the_base_bit_for_bit(files, nets):
    unet, _ = nets
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    merger = LoRAMerger(unet, "UNet")
    first, second = (read_adapter(files[name].path) for name in ("osediff", "omgsr"))
    outs = []
    for patch in (first.unet, second.unet, first.unet):
        merger.use(patch)
        outs.append(published.eps_of(unet, 200))
    merger.use(WeightDelta())
    assert torch.equal(outs[0], outs[2]) and not torch.equal(outs[0], outs[1])
    assert all(torch.equal(value, before[key]) for key, value in unet.state_dict().items())
