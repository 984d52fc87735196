"""StableSR's networks against themselves written out, and the files they are read from."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from plain_stablesr import (
    FULL,
    PLACES,
    UNET_CHANNELS,
    channels_of,
    encode,
    random_tensors,
    shapes_of,
    steer_diffusers,
    transform,
)
from safetensors.torch import save_file
from small_sd import SMALL_UNET

from tudsr_core.backends.stablesr import diffusers_blocks
from tudsr_core.models.stablesr import StableSR, distinct_rows, load_stablesr
from tudsr_core.weights import TELLTALE, CheckpointError

SIZES = [(16, 16), (24, 40), (20, 33)]


@pytest.fixture(scope="module")
def tensors():
    return random_tensors()


@pytest.fixture(scope="module")
def path(tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp("stablesr") / "webui.safetensors"
    save_file(tensors, file)
    return file


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(**SMALL_UNET).eval().requires_grad_(False)


def latents(height, width, batch=1, seed=1):
    return torch.randn(batch, 4, height, width, generator=torch.Generator().manual_seed(seed))


def relative(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


def test_the_published_networks_have_these_tensors_and_parameters():
    with torch.device("meta"):
        network = StableSR(**FULL, channels=channels_of(UNET_CHANNELS["full"]))
    weights = network.state_dict()
    encoder = {key: value for key, value in weights.items() if key.startswith("structcond_stage_model.")}
    assert (len(weights), len(encoder)) == (376, 200)
    shapes = {key: tuple(value.shape) for key, value in weights.items()}
    assert shapes == shapes_of(**FULL, unet=UNET_CHANNELS["full"])
    assert round(sum(value.numel() for value in weights.values()) / 1e6, 1) == 105.5
    assert round(sum(value.numel() for value in encoder.values()) / 1e6, 2) == 52.49
    shapes = {
        "model.diffusion_model.input_blocks.1.0.spade.mlp_gamma.weight": (320, 128, 3, 3),
        "model.diffusion_model.middle_block.2.0.spade.param_free_norm.bias": None,
        "model.diffusion_model.middle_block.2.spade.param_free_norm.bias": (1280,),
        "model.diffusion_model.output_blocks.11.0.spade.mlp_shared.0.weight": (128, 256, 3, 3),
        "structcond_stage_model.time_embed.0.weight": (1024, 256),
        "structcond_stage_model.input_blocks.3.0.op.weight": (256, 256, 3, 3),
        "structcond_stage_model.input_blocks.7.0.skip_connection.weight": (512, 256, 1, 1),
        "structcond_stage_model.input_blocks.8.1.qkv.weight": (1536, 512, 1),
        "structcond_stage_model.fea_tran.3.skip_connection.bias": (256,),
    }
    for key, shape in shapes.items():
        assert (tuple(weights[key].shape) if key in weights else None) == shape, key
    skips = {key.rpartition(".skip")[0] for key in encoder if ".skip_connection." in key}
    assert skips == {f"structcond_stage_model.{part}" for part in ("input_blocks.7.0", "fea_tran.2", "fea_tran.3")}


@pytest.mark.parametrize("size", SIZES)
def test_the_encoder_is_the_written_out_one(tensors, path, size):
    network = load_stablesr(path)
    for t in (0, 333, 999):
        z = latents(*size, batch=2)
        ours, truth = network.features(z, torch.tensor([t, t])), encode(tensors, z, t)
        sizes = [tuple(-(-side // 2**level) for side in size) for level in range(4)]
        assert [tuple(x.shape[-2:]) for x in ours] == sizes
        assert max(map(relative, ours, truth)) < 1e-5


def test_the_encoder_in_its_published_size():
    torch.manual_seed(0)
    network = StableSR(**FULL, channels={}).eval().requires_grad_(False)
    z, t = latents(12, 17), 500
    ours = network.features(z, torch.tensor([t]))
    assert max(map(relative, ours, encode(network.state_dict(), z, t))) < 1e-5


def test_the_transforms_in_their_published_size():
    torch.manual_seed(0)
    channels = channels_of(UNET_CHANNELS["full"])
    network = StableSR(**FULL, channels=channels).eval().requires_grad_(False)
    weights, s = network.state_dict(), torch.randn(2, 256, 5, 7)
    for place, width in channels.items():
        h = torch.randn(2, width, 5, 7)
        ours = network.transform(place)(h, s, torch.tensor([1, 0]))
        assert relative(ours, transform(weights, place, h, s.flip(0))) < 1e-5, place


def test_timesteps_may_differ_by_row(tensors, path):
    z = latents(16, 16, batch=2)
    ours = load_stablesr(path).features(z, torch.tensor([999.0, 7.0]))
    for row, t in enumerate((999, 7)):
        for level, truth in enumerate(encode(tensors, z[row : row + 1], t)):
            assert relative(ours[level][row : row + 1], truth) < 1e-5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("t", [0, 333, 999])
def test_a_steered_unet_is_one_with_the_transform_in_its_blocks(tensors, path, unet, size, t):
    network, z, low = load_stablesr(path), latents(*size), latents(*size, seed=2)
    text = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(3))
    before = unet(z, t, encoder_hidden_states=text).sample
    plain = copy.deepcopy(unet)
    steer_diffusers(plain, tensors, low, t)
    truth = plain(z, t, encoder_hidden_states=text).sample
    with network.steering(diffusers_blocks(unet), low, torch.tensor([t])):
        ours = unet(z, t, encoder_hidden_states=text).sample
    assert relative(ours, truth) < 1e-5
    assert relative(before, truth) > 1e-2, "a steering that does nothing proves nothing"
    assert torch.equal(unet(z, t, encoder_hidden_states=text).sample, before), "and nothing may be left of it"


def test_every_row_is_steered_by_its_own_picture_and_equal_rows_are_encoded_once(tensors, path, unet):
    network, z, low = load_stablesr(path), latents(16, 24, batch=4), latents(16, 24, batch=2, seed=2)
    text = torch.randn(4, 7, 32, generator=torch.Generator().manual_seed(3))
    seen = []
    encoder = network.get_submodule("structcond_stage_model")
    encoder.register_forward_hook(lambda module, args, made: seen.append(len(args[0])))
    t = torch.full((4,), 500)
    with network.steering(diffusers_blocks(unet), low[[0, 1, 0, 1]], t):
        ours = unet(z, t, encoder_hidden_states=text).sample
    assert seen == [2]
    for row in range(4):
        plain = copy.deepcopy(unet)
        steer_diffusers(plain, tensors, low[row % 2 : row % 2 + 1], 500)
        truth = plain(z[row : row + 1], 500, encoder_hidden_states=text[row : row + 1]).sample
        assert relative(ours[row : row + 1], truth) < 1e-4


def test_the_same_picture_at_the_same_timestep_is_not_encoded_again(path):
    network, z, seen = load_stablesr(path), latents(16, 16), []
    network.get_submodule("structcond_stage_model").register_forward_hook(lambda *call: seen.append(1))
    for t, count in ((5, 1), (5, 1), (6, 2), (5, 3)):
        network.features(z.clone(), torch.tensor([t]))
        assert len(seen) == count
    network.features(z + 1, torch.tensor([5]))
    assert len(seen) == 4
    network.forget()
    network.features(z + 1, torch.tensor([5]))
    assert len(seen) == 5


def test_distinct_rows():
    z, t = latents(4, 4, batch=3), torch.tensor([1, 1, 1])
    assert distinct_rows(z[[0, 1, 0, 2, 1]], torch.tensor([1, 1, 1, 1, 1])) == ([0, 1, 3], [0, 1, 0, 2, 1])
    assert distinct_rows(z[[0, 0, 0]], torch.tensor([1, 2, 1])) == ([0, 1], [0, 1, 0])
    assert distinct_rows(z, t) == ([0, 1, 2], [0, 1, 2])


def test_a_latent_of_another_size_is_named(path, unet):
    network = load_stablesr(path)
    with network.steering(diffusers_blocks(unet), latents(16, 24), torch.tensor([5])):
        with pytest.raises(ValueError, match=r"features are \(16, 24\) where the UNet works on \(16, 16\)"):
            unet(latents(16, 16), 5, encoder_hidden_states=torch.zeros(1, 7, 32))
    assert not any(block._forward_hooks for block in diffusers_blocks(unet).values())


def test_half_precision_is_close(tensors, path, unet):
    network, half = load_stablesr(path), copy.deepcopy(load_stablesr(path)).to(torch.bfloat16)
    z, h = latents(16, 24), torch.randn(1, 32, 16, 24, generator=torch.Generator().manual_seed(5))
    features, place = network.features(z, torch.tensor([333])), next(iter(PLACES))
    rough = half.features(z, torch.tensor([333]))
    assert {x.dtype for x in rough} == {torch.bfloat16}
    assert max(map(relative, rough, features)) < 0.05
    ours = half.transform(place)(h.to(torch.bfloat16), rough[0], torch.tensor([0]))
    assert ours.dtype == torch.bfloat16
    assert relative(ours, transform(tensors, place, h, features[0])) < 0.05


def whole_checkpoint(tensors, spread):
    """Return what a full training checkpoint holds beside StableSR's tensors."""
    return tensors | {
        TELLTALE: torch.linspace(-1, 1, 32) * spread,
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(32, 4, 3, 3),
        "first_stage_model.encoder.conv_in.weight": torch.zeros(8, 3, 3, 3),
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
    }


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize(("spread", "prediction"), [(0.05, "epsilon"), (0.3, "v_prediction")])
def test_every_published_layout_is_read(tensors, tmp_path, wrapped, spread, prediction):
    content = whole_checkpoint(tensors, spread)
    if wrapped:
        content = {"state_dict": content, "epoch": 117, "global_step": 1, "callbacks": {}}
    torch.save(content, tmp_path / "stablesr_000117.ckpt")
    network = load_stablesr(tmp_path / "stablesr_000117.ckpt")
    assert network.prediction == prediction
    own = network.state_dict()
    assert own.keys() == tensors.keys() and all(torch.equal(own[key], tensors[key]) for key in own)


def test_a_file_of_the_tensors_alone_says_by_its_name_what_it_needs(tensors, tmp_path):
    half = {key: value.half() for key, value in tensors.items()}
    torch.save(half, tmp_path / "webui_768v_139.ckpt")
    torch.save(half, tmp_path / "stablesr_webui_sd-v2-1_512-ema-000117.ckpt")
    assert load_stablesr(tmp_path / "webui_768v_139.ckpt").prediction == "v_prediction"
    assert load_stablesr(tmp_path / "stablesr_webui_sd-v2-1_512-ema-000117.ckpt").prediction == ""


def test_what_is_not_stablesr_or_not_whole_is_named(tensors, tmp_path):
    def refused(content, says):
        save_file(content, tmp_path / "file.safetensors")
        with pytest.raises(CheckpointError, match=says) as error:
            load_stablesr(tmp_path / "file.safetensors")
        assert "\n" not in str(error.value) and "file.safetensors" in str(error.value)

    refused({"decoder.fusion_layer_1.encode_enc_1.conv1.weight": torch.zeros(1)}, "none of StableSR's tensors")
    last = list(tensors)[-1]
    refused({key: value for key, value in tensors.items() if key != last}, "does not fit StableSR: missing")
    refused(tensors | {"structcond_stage_model.extra": torch.zeros(1)}, "unknown structcond_stage_model.extra")
    key = "structcond_stage_model.input_blocks.0.0.weight"
    refused(tensors | {key: torch.zeros(32, 3, 3, 3)}, "wrong shape")
    refused(tensors | {key: tensors[key] * torch.nan}, "NaN")
    refused({k: v for k, v in tensors.items() if "structcond" not in k}, "not a whole StableSR file")
    refused({k: v for k, v in tensors.items() if "spade" not in k}, "not a whole StableSR file")
    odd = {k: v[:7] if k.endswith("input_blocks.1.0.in_layers.2.bias") else v for k, v in tensors.items()}
    refused(odd, "not a whole StableSR file")


def test_a_unet_of_other_channels_does_not_fit(path, unet):
    network = load_stablesr(path)
    assert network.misfit(diffusers_blocks(unet), "epsilon") == ""
    wide = UNet2DConditionModel(**SMALL_UNET | dict(block_out_channels=(32, 64, 64, 128)))
    assert "input_blocks.10.0 has 128 channels, not 64" in network.misfit(diffusers_blocks(wide), "epsilon")
    short = UNet2DConditionModel(**SMALL_UNET | dict(layers_per_block=1))
    assert "14 residual blocks, not 22" in network.misfit(diffusers_blocks(short), "epsilon")
    network.prediction = "v_prediction"
    assert "predicts epsilon, and this was trained with v_prediction" in network.misfit({}, "epsilon")
