"""CFW against its formulas written out, and its files."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tudsr_core.models import FeatureWrapping, load_wrapping
from tudsr_core.vae import wrapping
from tudsr_core.weights import CheckpointError

PAGE = "https://huggingface.co/Iceclear/StableSR"


def small(widths=(32, 64), growth=4, groups=32, dtype=torch.float32):
    """Return CFW of these widths whose every weight, norms' included, is random."""
    torch.manual_seed(5)
    network = FeatureWrapping(widths, growth, groups).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return network.to(dtype)


def residual(state, name, x):
    """A residual block of the paper's decoder: norm of 32 groups, swish, 3 x 3 convolution, twice."""
    y = x
    for number in (1, 2):
        norm, conv = f"{name}.norm{number}", f"{name}.conv{number}"
        y = F.group_norm(y, 32, state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6)
        y = F.conv2d(y * torch.sigmoid(y), state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1)
    if f"{name}.conv_out.weight" in state:
        x = F.conv2d(x, state[f"{name}.conv_out.weight"], state[f"{name}.conv_out.bias"])
    return x + y


def dense(state, name, x):
    """An RRDB: thrice five convolutions, each over all before it, scaled by 0.2, and that by 0.2 again."""
    y = x
    for block in (1, 2, 3):
        seen = [y]
        for number in (1, 2, 3, 4, 5):
            key = f"{name}.rdb{block}.conv{number}"
            out = F.conv2d(torch.cat(seen, 1), state[f"{key}.weight"], state[f"{key}.bias"], padding=1)
            seen.append(torch.where(out > 0, out, 0.2 * out))
        y = y + 0.2 * out
    return x + 0.2 * y


def fused(state, level, features, x, weight):
    """d + w * E3(E2(E1(cat[e, d])))."""
    name = f"fusion_layer_{level}"
    y = residual(state, f"{name}.encode_enc_1", torch.cat([features, x], 1))
    for number in (0, 1):
        y = dense(state, f"{name}.encode_enc_2.{number}", y)
    return x + weight * residual(state, f"{name}.encode_enc_3", y)


@pytest.mark.parametrize("weight", [0, 0.5, 1])
@pytest.mark.parametrize("size", [(12, 12), (9, 17)])
def test_the_network_is_its_formulas(size, weight, noise):
    network = small()
    for level, width in ((1, 32), (2, 64)):
        features, x = noise(2, width, *size), noise(2, width, *size, seed=1)
        ours = x + weight * getattr(network, f"fusion_layer_{level}")(features, x)
        truth = fused(network.state_dict(), level, features, x, weight)
        assert (ours - truth).abs().max() <= 1e-5 * truth.abs().max()
        assert not weight or (truth - x).abs().mean() > 0.1 * weight, "a fusion that does nothing proves nothing"


def test_published_sizes():
    with torch.device("meta"):
        network = FeatureWrapping()
    state = network.state_dict()
    assert len(state) == 156
    assert round(sum(value.numel() for value in state.values()) / 1e6, 2) == 44.39
    levels = [
        [value.numel() for key, value in state.items() if key.startswith(f"fusion_layer_{level}.")] for level in (1, 2)
    ]
    assert [len(level) for level in levels] == [78, 78]
    assert [round(sum(level) / 1e6, 2) for level in levels] == [10.5, 33.9]
    assert state["fusion_layer_2.encode_enc_1.conv_out.weight"].shape == (512, 1024, 1, 1)
    assert state["fusion_layer_1.encode_enc_2.1.rdb3.conv4.weight"].shape == (32, 352, 3, 3)


def test_fusions_name_their_levels_and_nothing_is_fused_at_zero():
    network = small()
    assert wrapping(network, 0) == {}
    fuse = wrapping(network, 0.7)
    assert {level: one.weight for level, one in fuse.items()} == {"level 1": 0.7, "level 2": 0.7}
    radii = [[layer.halo for layer in one.layers] for one in fuse.values()]
    assert radii == [[1, 1, 15, 15, 1, 1]] * 2


def test_dense_blocks_see_as_far_as_they_say():
    """Of a picture with one pixel changed, what changes, and what does not."""
    block = small().fusion_layer_1.encode_enc_2[0].double()
    x = torch.zeros(1, 32, 41, 41).double()
    changed = x.clone()
    changed[..., 20, 20] = 1e6
    away = (block(changed) - block(x)).abs().amax((0, 1, 2)) > 0
    assert away.nonzero().flatten().tolist() == list(range(20 - 15, 20 + 15 + 1))


def autoencoder(network):
    """What surrounds CFW in a published file."""
    others = ("encoder.conv_in.weight", "decoder.conv_in.weight", "quant_conv.bias", "post_quant_conv.bias")
    own = {f"decoder.{key}": value.contiguous() for key, value in network.state_dict().items()}
    return own | {key: torch.ones(2) for key in (*others, "loss.logvar")}


FILES = {
    "vqgan_cfw_00011.ckpt": lambda tensors: {"state_dict": tensors, "epoch": 11, "optimizer_states": [{"lr": 0.1}]},
    "flat.ckpt": lambda tensors: tensors,
    "flat.safetensors": lambda tensors: tensors,
    "prefixed.safetensors": lambda tensors: {f"first_stage_model.{key}": value for key, value in tensors.items()},
    "prefixed.pt": lambda tensors: {
        "state_dict": {f"first_stage_model.{key}": value.half() for key, value in tensors.items()}
    },
    "alone.safetensors": lambda tensors: {
        key.removeprefix("decoder."): value for key, value in tensors.items() if "fusion_layer" in key
    },
}


def write(path, tensors):
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_it_are_read(name, tmp_path):
    network = small(growth=8)
    loaded = load_wrapping(write(tmp_path / name, FILES[name](autoencoder(network))))
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    most = 1e-3 if name == "prefixed.pt" else 0
    for key, value in network.state_dict().items():
        read = loaded.state_dict()[key]
        assert read.dtype == torch.float32 and (read - value).abs().max() <= most, key


def without(tensors, *ends):
    return {key: value for key, value in tensors.items() if not key.endswith(ends)}


def wider(tensors):
    key = "decoder.fusion_layer_2.encode_enc_2.1.rdb3.conv5.weight"
    return tensors | {key: torch.ones(64, 99, 3, 3)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without(t, "fusion_layer_1.encode_enc_1.conv_out.bias"), "does not fit CFW: missing fusion_layer_1"),
        (lambda t: without(t, "fusion_layer_2.encode_enc_3.conv1.weight"), "does not hold all of CFW"),
        (lambda t: t | {"decoder.fusion_layer_3.norm.weight": torch.ones(2)}, "unknown fusion_layer_3.norm.weight"),
        (wider, r"wrong shape fusion_layer_2.encode_enc_2.1.rdb3.conv5.weight \(\(64, 99, 3, 3\)"),
        (lambda t: {key: value * torch.nan for key, value in t.items()}, "NaN or infinite weights"),
    ],
)
def test_files_with_less_or_more_are_refused(change, says, tmp_path):
    path = write(tmp_path / "cfw.ckpt", {"state_dict": change(autoencoder(small()))})
    with pytest.raises(CheckpointError, match=says) as refused:
        load_wrapping(path)
    assert str(path) in str(refused.value) and "download" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            ["model.diffusion_model.input_blocks.1.0.spade.mlp_beta.bias", "structcond_stage_model.time_embed.0.bias"],
            "StableSR's own module or model",
        ),
        (["structcond_stage_model.time_embed.0.bias"], "StableSR's own module or model"),
        (["model.diffusion_model.out.2.bias", "first_stage_model.decoder.conv_in.bias"], "a Stable Diffusion check"),
        (["decoder.conv_in.bias", "encoder.conv_in.bias"], "an autoencoder without CFW"),
        (["some.lora_A.weight"], "its keys are some.lora_A.weight"),
        ([], "no tensors"),
    ],
)
def test_files_without_it_are_named_and_the_right_one_is_told(keys, says, tmp_path):
    path = write(tmp_path / "other.ckpt", {"state_dict": {key: torch.ones(2) for key in keys}})
    with pytest.raises(CheckpointError, match=says) as refused:
        load_wrapping(path)
    for wanted in ("other.ckpt", PAGE, "vqgan_cfw_00011.ckpt", "non-commercial"):
        assert wanted in str(refused.value)
    assert "\n" not in str(refused.value)
