import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tudsr_core.backends.local import load_embedded
from tudsr_core.diffusion.one_step import OneStep, from_noise_level
from tudsr_core.weights.adapters import Adapter, LoRAMerger, LoRAWeights, WeightDelta
from tudsr_core.weights.checkpoints import embedded_path, read_adapter, read_model, write_adapter
from tudsr_core.weights.tensor_files import CheckpointError

HALVES = ("lora_down.weight", "lora_up.weight")


class Net(nn.Module):
    """Two kinds of adapted module: a convolution and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.to_q = nn.Linear(6, 6)

    def forward(self, x):
        return self.to_q(self.conv1(x).movedim(1, -1)).movedim(-1, 1)


def peft_folder(folder, rank=3, alpha=6):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["conv1", "to_q"])
    model = get_peft_model(Net(), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero-initialised, which would hide every mistake
            nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def test_a_peft_folder_gives_pefts_own_output(tmp_path, noise):
    theirs = peft_folder(tmp_path / "unet_lora_adapter")
    adapter = read_adapter(tmp_path)
    base = Net()
    base.load_state_dict(
        {k.replace(".base_layer", ""): v for k, v in theirs.base_model.model.state_dict().items() if "lora" not in k}
    )
    x = noise(2, 4, 5, 5)
    plain = base(x)
    merger = LoRAMerger(base, "UNet")
    merger.check(adapter.unet, "test")
    merger.use(adapter.unet)
    assert (base(x) - theirs(x)).abs().max() < 1e-5
    assert (base(x) - plain).abs().max() > 0.05
    merger.use(
        WeightDelta(
            {name: LoRAWeights(update.down, update.up, update.rank) for name, update in adapter.unet.updates.items()}
        )
    )
    assert (base(x) - theirs(x)).abs().max() > 1e-2


@torch.no_grad()
def test_switching_back_and_forth_is_bit_exact(noise):
    torch.manual_seed(0)
    net, x = Net(), noise(1, 4, 5, 5)
    merger = LoRAMerger(net, "UNet")
    patches = [
        WeightDelta({"conv1": LoRAWeights(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 2.0)}) for _ in range(2)
    ]
    plain = net(x)
    outs = []
    for choice in (patches[0], patches[1], patches[0], None):
        merger.use(choice)
        outs.append(net(x))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[3], plain)


def test_adapter_file_round_trip(tmp_path):
    updates = {"a.conv1": LoRAWeights(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 4.0)}
    encoder = {"encoder.b": LoRAWeights(torch.randn(2, 4), torch.randn(4, 2), 2.0)}
    weights = {"conv_in.weight": torch.randn(6, 4, 3, 3)}
    adapter = Adapter(
        "mine", WeightDelta(updates, weights), WeightDelta(encoder), stage=2, steps=(from_noise_level(49),)
    )
    write_adapter(tmp_path / "a.safetensors", adapter)
    back = read_adapter(tmp_path / "a.safetensors")
    assert (back.name, back.stage, back.steps, back.method) == ("mine", 2, (from_noise_level(49),), "tudsr")
    assert torch.equal(back.unet.updates["a.conv1"].down, updates["a.conv1"].down)
    assert torch.equal(back.unet.weights["conv_in.weight"], weights["conv_in.weight"])
    assert (back.unet.updates["a.conv1"].alpha, back.vae.updates["encoder.b"].alpha) == (4.0, 2.0)


def test_files_of_the_first_version_are_still_read(tmp_path):
    tensors = {f"{part}.conv1.{half}": torch.ones(2, 2) for part in ("unet", "encoder") for half in HALVES}
    tensors |= {f"{part}.conv1.alpha": torch.tensor(4.0) for part in ("unet", "encoder")}
    step = {"t": 50, "p": 1.5, "q": -0.5, "a": 1.0, "b": 0.0}
    about = {"format": "tudsr-adapter/1", "name": "old", "stage": "2", "step": json.dumps(step)}
    save_file(tensors, tmp_path / "old.safetensors", about)
    old = read_adapter(tmp_path / "old.safetensors")
    assert (old.stage, old.steps) == (2, (OneStep(50, 1.5, -0.5),))
    assert old.unet.updates["conv1"].alpha == old.vae.updates["encoder.conv1"].alpha == 4.0


def change_file(folder, change):
    path = folder / "unet_lora_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder, **values):
    path = folder / "unet_lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), encoding="utf-8")


PREFIX = "base_model.model.conv1.lora_"


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda f: change_file(f, lambda t: t.pop(PREFIX + "B.weight")), "half an update: conv1"),
        (lambda f: change_file(f, lambda t: t.update(foreign=torch.zeros(1))), "no peft LoRA: foreign"),
        (
            lambda f: change_file(f, lambda t: t.update({PREFIX + "A.weight": torch.zeros(5, 4, 3, 3)})),
            "ranks of conv1",
        ),
        (lambda f: change_file(f, lambda t: t[PREFIX + "A.weight"].fill_(float("nan"))), "NaN"),
        (lambda f: change_config(f, use_dora=True), "use_dora"),
        (lambda f: change_config(f, r=7), "rank 7"),
        (
            lambda f: (f / "unet_lora_adapter" / "adapter_config.json").write_text("{", encoding="utf-8"),
            "cannot be read",
        ),
        (lambda f: (f / "unet_lora_adapter" / "adapter_model.safetensors").unlink(), "does not exist"),
        (lambda f: (f / "unet_lora_adapter" / "adapter_model.safetensors").write_bytes(b"\0" * 30), "not a whole"),
    ],
)
def test_damaged_adapters_are_named(tmp_path, break_it, says):
    peft_folder(tmp_path / "unet_lora_adapter")
    break_it(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        read_adapter(tmp_path)


def test_wrong_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        read_adapter(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="neither adapter_config.json"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="a whole model, not an adapter"):
        read_adapter(embedded_path())
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a tudsr model"):
        read_model(tmp_path / "x.safetensors")


def test_an_adapter_for_another_base_is_refused():
    merger = LoRAMerger(Net(), "UNet")
    update = LoRAWeights(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)
    for patch, says in (
        (WeightDelta({"down.conv9": update}), "does not have: down.conv9"),
        (WeightDelta(weights={"conv_out.bias": torch.zeros(1)}), "does not have: conv_out.bias"),
        (WeightDelta({"to_q": update}), "does not fit the shapes of this UNet at to_q"),
        (WeightDelta(weights={"conv1.bias": torch.zeros(1)}), "does not fit the shapes of this UNet at conv1.bias"),
    ):
        with pytest.raises(CheckpointError, match=says):
            merger.check(patch, "foreign")


@pytest.mark.parametrize(
    ("down", "up", "weight", "fits"),
    [
        ((4, 3, 3, 128), (64, 4), (64, 128, 3, 3), False),  # as many values, in another order
        ((4, 128, 9, 1), (64, 4, 1, 1), (64, 128, 3, 3), False),
        ((4, 1152), (64, 4), (64, 128, 3, 3), False),
        ((4, 32, 2, 2), (64, 4), (64, 128), False),
        ((4, 128, 3, 3), (64, 4, 1, 1), (64, 128, 3, 3), True),
        ((4, 128, 3, 3), (64, 4), (64, 128, 3, 3), True),
        ((4, 128), (64, 4), (64, 128), True),
        ((4, 128), (64, 4), (64, 128, 1, 1), True),
        ((4, 128, 1, 1), (64, 4, 1, 1), (64, 128), True),
    ],
)
def test_updates_fit_by_shape_not_by_the_count_of_values(down, up, weight, fits):
    patch = WeightDelta({"conv": LoRAWeights(torch.ones(down), torch.ones(up), 1.0)})
    assert (patch.misfits({"conv.weight": torch.ones(weight)}) == []) == fits


def model_with(tmp_path, **changes):
    """A copy of the shipped model whose facts say something else."""
    with safe_open(embedded_path(), framework="pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}
    facts = json.loads(metadata["model"])
    facts = {key: value for key, value in (facts | changes).items() if value != "gone"}
    save_file(tensors, tmp_path / "model.safetensors", metadata | {"model": json.dumps(facts)})
    return tmp_path / "model.safetensors"


LIMITS = vars(read_model(embedded_path()).limits)
UNET, VAE = read_model(embedded_path()).unet_config, read_model(embedded_path()).vae_config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vae_config": "owner/name"}, "vae_config must be a table of names and values, not owner/name"),
        ({"unet_config": ["owner/name"]}, "unet_config must be a table"),
        ({"unet_config": "gone"}, "lacks 'unet_config'"),
        ({"stage_two_alpha": "gone"}, "lacks 'stage_two_alpha'"),
        ({"stage_one_timestep": 1000}, "'stage_one_timestep' is 1000, it must be from 0 to 999"),
        ({"stage_two_timestep": 0.5}, "must be a whole number"),
        ({"stage_three_timestep": 10}, "says stage_three_timestep, which this version does not know; update this pack"),
        ({"limits": LIMITS | {"third": 2, "\x1b": 1}}, r"limits says \\x1b, third, which this version does not know"),
        ({"limits": {"first_max": 4, "single_up_to": 4}}, "limits lacks 'second'"),
        ({"limits": LIMITS | {"second": 1.0000001}}, "second 1 is not possible; use 1.25 to 64"),
        ({"limits": LIMITS | {"first_max": 0}}, "first_max 0 is not possible"),
        ({"limits": LIMITS | {"second": 1}}, "second 1 is not possible"),
        ({"limits": LIMITS | {"single_up_to": "x"}}, "'single_up_to' is x, it must be a number"),
        ({"limits": 3}, "limits must be a table"),
        ({"unet_config": UNET | {"layers_per_block": 100_000}}, "layers_per_block cannot be 100000"),
        ({"unet_config": UNET | {"transformer_layers_per_block": [90] * 9}}, "is not known"),
        ({"unet_config": UNET | {"block_out_channels": [2**30, 96]}}, "block_out_channels cannot be"),
        ({"vae_config": VAE | {"encoder_layers_per_block": [0] * 10_000}}, "encoder_layers_per_block cannot be"),
        ({"vae_config": VAE | {"scaling_factor": {"a": 1}}}, "scaling_factor cannot be"),
    ],
)
def test_facts_of_a_model_are_data_within_limits(tmp_path, changes, says):
    with pytest.raises(CheckpointError, match=says) as caught:
        load_embedded("cpu", path=model_with(tmp_path, **changes))
    assert str(caught.value).isprintable() and "model.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"stage": "3"}, "'stage' is 3, it must be from 1 to 2"),
        ({"stage": "[1]"}, "'stage' is a list"),
        ({"steps": "3"}, "'steps' must be a list of 1 to 100 steps"),
        ({"steps": "[]"}, "'steps' must be a list"),
        ({"steps": json.dumps([{"t": 1, "p": 1, "q": 1}] * 101)}, "'steps' must be a list"),
        ({"steps": "[3]"}, "must be a table"),
        ({"steps": '[{"t": 1, "p": 1}]'}, "lacks 'q'"),
        ({"steps": '[{"t": 1000, "p": 1, "q": 1}]'}, "'t' is 1000, it must be from 0 to 999"),
        ({"steps": '[{"t": 1, "p": 1e40, "q": 1}]'}, "a number that is none or far too large"),
        ({"steps": '[{"t": 1, "p": 1, "q": 1, "r": 2}]'}, "says r, which this version does not know"),
        ({"steps": "[" * 99 + "]" * 99}, "nested too deeply"),
        ({"targets": '{"unet": 3}'}, "unet must be a table of names and values, not 3"),
        ({"targets": '{"unet": {"names": "conv1", "within": ""}}'}, "'names' is conv1, it must be a list of texts"),
        ({"targets": '{"unet": {"names": ["conv1"]}}'}, "lacks 'within'"),
        ({"method": "\x1b[1m"}, r"of method '\\x1b\[1m'"),
        ({"format": "tudsr-adapter/\x1b"}, r"newer version \(tudsr-adapter/\\x1b"),
    ],
)
def test_what_an_adapter_says_of_itself_is_checked(tmp_path, about, says):
    tensors = {f"unet.conv1.{half}": torch.ones(2, 2) for half in HALVES} | {"unet.conv1.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "tudsr-adapter/2", "method": "tudsr"} | about)
    with pytest.raises(CheckpointError, match=says) as caught:
        read_adapter(tmp_path / "a.safetensors")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("about", "read"),
    [
        ({"format": "x" * 2_000_000}, read_model),
        ({"format": "tudsr-adapter/" + "x" * 2_000_000}, read_adapter),
        ({"format": "tudsr-adapter/2", "method": "y" * 2_000_000}, read_adapter),
    ],
)
def test_messages_about_long_texts_stay_short(tmp_path, about, read):
    tensors = {f"unet.conv1.{half}": torch.ones(2, 2) for half in HALVES} | {"unet.conv1.alpha": torch.tensor(4.0)}
    save_file(tensors, tmp_path / "a.safetensors", about)
    with pytest.raises(CheckpointError, match="a.safetensors") as caught:
        read(tmp_path / "a.safetensors")
    assert len(str(caught.value)) < 400 + len(str(tmp_path)) and "; " in str(caught.value)


def test_an_alpha_of_many_numbers_is_named(tmp_path):
    tensors = {f"unet.conv1.{half}": torch.ones(2, 2) for half in HALVES} | {"unet.conv1.alpha": torch.ones(3)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "tudsr-adapter/2", "method": "tudsr"})
    with pytest.raises(CheckpointError, match="an alpha that is not one number: unet.conv1|not one number: conv1"):
        read_adapter(tmp_path / "a.safetensors")
