import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tudsr_core.checkpoints import (
    Adapter,
    CheckpointError,
    Low,
    embedded_path,
    read_adapter,
    read_model,
    read_tensors,
    write_adapter,
)
from tudsr_core.local import LoraSlot
from tudsr_core.schedule import from_noise_level


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
    slot = LoraSlot(base, "UNet")
    slot.check(adapter.unet, "test")
    slot.use(adapter.unet)
    assert (base(x) - theirs(x)).abs().max() < 1e-5
    assert (base(x) - plain).abs().max() > 0.05
    wrong_alpha = {name: Low(low.down, low.up, low.rank) for name, low in adapter.unet.items()}
    slot.use(wrong_alpha)
    assert (base(x) - theirs(x)).abs().max() > 1e-2


@torch.no_grad()
def test_switching_back_and_forth_is_bit_exact(noise):
    torch.manual_seed(0)
    net, x = Net(), noise(1, 4, 5, 5)
    slot = LoraSlot(net, "UNet")
    lows = [{"conv1": Low(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 2.0)} for _ in range(2)]
    plain = net(x)
    outs = []
    for choice in (lows[0], lows[1], lows[0], None):
        slot.use(choice)
        outs.append(net(x))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
    assert torch.equal(outs[3], plain)


def test_adapter_file_round_trip(tmp_path):
    lows = {"a.conv1": Low(torch.randn(2, 4, 3, 3), torch.randn(6, 2, 1, 1), 4.0)}
    adapter = Adapter("mine", lows, {"b": Low(torch.randn(2, 4), torch.randn(4, 2), 2.0)}, 2, from_noise_level(50))
    write_adapter(tmp_path / "a.safetensors", adapter)
    back = read_adapter(tmp_path / "a.safetensors")
    assert (back.name, back.stage, back.step) == ("mine", 2, from_noise_level(50))
    assert torch.equal(back.unet["a.conv1"].down, lows["a.conv1"].down)
    assert (back.unet["a.conv1"].alpha, back.encoder["b"].alpha) == (4.0, 2.0)


def change_file(folder, change):
    path = folder / "unet_lora_adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def change_config(folder, **values):
    path = folder / "unet_lora_adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


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
        (lambda f: (f / "unet_lora_adapter" / "adapter_config.json").write_text("{"), "cannot be read"),
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
    with pytest.raises(CheckpointError, match="not a stage adapter"):
        read_adapter(embedded_path())
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="not a tudsr model"):
        read_model(tmp_path / "x.safetensors")


def test_an_adapter_for_another_base_is_refused():
    slot = LoraSlot(Net(), "UNet")
    with pytest.raises(CheckpointError, match="does not have"):
        slot.check({"down.conv9": Low(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)}, "foreign")
    with pytest.raises(CheckpointError, match="does not fit this UNet at to_q"):
        slot.check({"to_q": Low(torch.zeros(2, 4), torch.zeros(4, 2), 2.0)}, "foreign")


class Evil:
    def __reduce__(self):
        return (eval, ("open('/tmp/tudsr-was-here', 'w')",))


def test_pickles_are_never_executed(tmp_path):
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": Evil()}))
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.ckpt")
    for name in ("evil.ckpt", "evil2.ckpt"):
        with pytest.raises(CheckpointError, match="read safely"):
            read_tensors(tmp_path / name)
    from pathlib import Path

    assert not Path("/tmp/tudsr-was-here").exists()
    torch.save({"state_dict": {"w": torch.ones(2)}}, tmp_path / "good.ckpt")
    assert torch.equal(read_tensors(tmp_path / "good.ckpt")["w"], torch.ones(2))
