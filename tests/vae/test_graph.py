import pytest
from small_vae import make_vae
from torch import nn

from tudsr_core.vae.graph import Attention, Conv, UnknownTree, read_layers


def test_the_passes_of_sd_are_those_of_its_layers():
    """34 passes to decode and 26 to encode, the embedding convolutions and second attention passes apart."""
    vae = make_vae()
    for side, attentions, convolutions in (
        ("decoder", 1, 1 + 2 + 2 + 4 * 6 + 3 + 1),
        ("encoder", 1, 1 + 16 + 3 + 4 + 1),
    ):
        layers = read_layers(vae, side)
        assert sum(isinstance(layer, Attention) for layer in layers) == attentions
        assert sum(isinstance(layer, Conv) and layer.halo == 1 for layer in layers) == convolutions
        opens, closes = (sum(getattr(layer, "skip", "") == role for layer in layers) for role in ("open", "close"))
        assert opens == closes == (2 + 12 if side == "decoder" else 2 + 8)


@pytest.mark.parametrize(
    ("side", "path", "module", "says"),
    [
        ("decoder", "conv_act", nn.GELU(), "GELU"),
        ("decoder", "mid_block.resnets.0.nonlinearity", nn.ReLU(), "ReLU"),
        ("decoder", "mid_block.resnets.0.norm1", nn.BatchNorm2d(16), "GroupNorm"),
        ("decoder", "up_blocks.0.resnets.1.conv1", nn.Conv2d(16, 16, 3, padding=2, dilation=2), "convolution"),
        ("decoder", "up_blocks.0.resnets.1.conv2", nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular"), "conv"),
        ("decoder", "up_blocks.0.resnets.1.time_emb_proj", nn.Linear(2, 2), "time_emb_proj"),
        ("encoder", "down_blocks.0.downsamplers.0.conv", nn.Conv2d(8, 8, 3, stride=2, padding=1), "stride 2"),
        ("encoder", "mid_block.attentions.0.norm_q", nn.LayerNorm(16), "norm_q"),
        ("encoder", "extra", nn.Identity(), "extra"),
    ],
)
def test_a_tree_that_differs_is_refused_by_name(side, path, module, says):
    vae = make_vae()
    parent, _, name = path.rpartition(".")
    target = getattr(vae, side).get_submodule(parent)
    if name.isdigit():
        target[int(name)] = module
    else:
        setattr(target, name, module)
    with pytest.raises(UnknownTree, match=says):
        read_layers(vae, side)


def test_other_autoencoders_are_refused():
    for vae in (nn.Linear(2, 2), nn.ModuleDict({"encoder": nn.Conv2d(3, 4, 3)})):
        with pytest.raises(UnknownTree):
            read_layers(vae, "encoder")
