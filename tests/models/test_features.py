"""Frozen extractors against the same layers written out, and files that fill them."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from tudsr_core.models import features as module
from tudsr_core.models.features import DinoConvNext, DinoViT, Kind, Scratch, Vgg16, l2_pool, load_features
from tudsr_core.weights.tensor_files import CheckpointError

SMALL_VIT = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2)
SMALL_STAGES = ((8, 12, 16, 20), (1, 1, 2, 1))


@pytest.fixture
def shaken():
    """Return a function that gives every weight of a network a random value."""

    def shake(network):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return network.eval()

    return shake


def normalised(picture):
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    return (picture - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def test_vit_taps_are_the_backbones_of_transformers(noise, shaken):
    """Layers 3, 6, 9, each through the final norm, without class token and registers; nothing after the ninth."""
    backbones = pytest.importorskip("transformers", minversion="5", reason="older ones have no backbone of DINOv3")
    ours = shaken(DinoViT(**SMALL_VIT))
    config = backbones.DINOv3ViTConfig(
        **SMALL_VIT, num_hidden_layers=12, num_register_tokens=4, out_features=["stage3", "stage6", "stage9"]
    )
    theirs = backbones.DINOv3ViTBackbone(config).eval()
    theirs.load_state_dict(ours.network.state_dict(), strict=False)
    picture = noise(2, 3, 48, 64)
    with torch.no_grad():
        pairs = zip(ours(picture), theirs(normalised(picture)).feature_maps, strict=True)
    for made, wanted in pairs:
        assert made.shape == (2, 32, 3, 4)
        assert (made - wanted).abs().max() < 1e-5
    assert len(ours.network.model.layer) == 9
    with pytest.raises(ValueError, match="must be multiples of DINOv3's patch of 16"):
        ours(noise(1, 3, 40, 64))


def test_convnext_stages_are_the_backbones_and_pooling_feeds_the_next(noise, shaken):
    backbones = pytest.importorskip("transformers", minversion="5", reason="older ones have no backbone of DINOv3")
    ours, picture = shaken(DinoConvNext(*SMALL_STAGES)), noise(1, 3, 64, 48)
    widths, depths = SMALL_STAGES
    config = backbones.DINOv3ConvNextConfig(
        hidden_sizes=list(widths), depths=list(depths), out_features=["stage1", "stage2", "stage3"]
    )
    theirs = backbones.DINOv3ConvNextBackbone(config).eval()
    theirs.load_state_dict(ours.network.state_dict(), strict=False)
    with torch.no_grad():
        pairs = zip(ours(picture), theirs(normalised(picture)).feature_maps, strict=True)
        for made, wanted in pairs:
            assert (made - wanted).abs().max() < 1e-5
        pooled = DinoConvNext(*SMALL_STAGES, pooled=True).eval()
        pooled.load_state_dict(ours.state_dict())
        first, second, _ = pooled(picture)
        assert (first - l2_pool(ours(picture)[0], 1)).abs().max() < 1e-6
        assert (second - l2_pool(ours.network.model.stages[1](first), 1)).abs().max() < 1e-6


def test_vgg_is_five_groups_with_l2_pooling(noise, shaken):
    network, picture = shaken(Vgg16()), noise(1, 3, 32, 32)
    x, found = normalised(picture), []
    with torch.no_grad():
        for group, places in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
            if group:
                blur = torch.tensor([1.0, 2, 1]).outer(torch.tensor([1.0, 2, 1])) / 16
                square = F.conv2d((x**2).transpose(0, 1), blur[None, None], stride=2, padding=1).transpose(0, 1)
                x = (square + 1e-12).sqrt()
            for place in places:
                conv = network.features[str(place)]
                x = F.conv2d(x, conv.weight, conv.bias, padding=1).clamp_min(0)
            found.append(x)
        for made, wanted in zip(network(picture), found, strict=True):
            assert made.shape == wanted.shape and torch.allclose(made, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("network", [Scratch(), DinoConvNext(*SMALL_STAGES), DinoViT(**SMALL_VIT), Vgg16()])
def test_channels_and_strides_are_what_they_say_and_gradients_reach_the_picture(network, noise):
    picture = noise(1, 3, 64, 64).requires_grad_()
    maps = network.eval().requires_grad_(False)(picture)
    assert [one.shape[1] for one in maps] == list(network.channels)
    assert [64 // one.shape[-1] for one in maps] == list(network.strides)
    sum(one.square().mean() for one in maps).backward()
    assert picture.grad.abs().sum() > 0


def test_scratch_follows_from_its_seed_alone(noise):
    picture, first = noise(1, 3, 16, 16), load_features("scratch")
    torch.manual_seed(99)
    assert all(map(torch.equal, first(picture), load_features("scratch")(picture)))
    assert not torch.equal(first(picture)[0], Scratch(1)(picture)[0])
    assert not any(p.requires_grad for p in first.parameters())


def test_files_fill_an_extractor_whatever_stands_behind_its_last_layer(tmp_path, monkeypatch, noise, shaken):
    """As published: twelve layers and a mask token; before transformers 5 without the level `model.`."""
    build = Kind(lambda: DinoViT((1, 2), **SMALL_VIT), "a file")
    monkeypatch.setitem(module.EXTRACTORS, "small", build)
    whole = shaken(DinoViT((1, 2, 4), **SMALL_VIT))
    state = {key.removeprefix("network."): value for key, value in whole.state_dict().items()}
    state["embeddings.mask_token"] = torch.ones(1, 1, 32)
    for name, change in (("new", lambda key: key), ("old", lambda key: key.removeprefix("model."))):
        save_file({change(key): value for key, value in state.items()}, tmp_path / f"{name}.safetensors")
        loaded = load_features("small", tmp_path / f"{name}.safetensors")
        picture = noise(1, 3, 32, 32)
        for made, wanted in zip(loaded(picture), whole(picture)[:2], strict=True):
            assert torch.equal(made, wanted)
    del state["norm.weight"]
    save_file(state, tmp_path / "less.safetensors")
    with pytest.raises(
        CheckpointError, match=r"less.safetensors does not fit the features small: missing .*norm.weight"
    ):
        load_features("small", tmp_path / "less.safetensors")


def test_nothing_stands_in_for_missing_weights(tmp_path):
    with pytest.raises(
        CheckpointError, match="features dinov3-vit-b16 need model.safetensors of facebook/dinov3-vitb16"
    ):
        load_features("dinov3-vit-b16")
    with pytest.raises(CheckpointError, match="features scratch have no weights"):
        load_features("scratch", tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="features 'vgg' are not known; use one of: dinov3-vit-b16"):
        load_features("vgg")
    with pytest.raises(CheckpointError, match=r"none.pth does not exist"):
        load_features("vgg16", tmp_path / "none.pth")
