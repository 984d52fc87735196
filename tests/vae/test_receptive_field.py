from fractions import Fraction

import pytest
import torch
from torch import nn

from tudsr_core.vae.receptive_field import count_blocks, measure_receptive_field, run_tiled


def local_encoder():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 4, 5, padding=2),
    ).double()


def local_decoder():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(4, 48, 3, padding=1), nn.PixelShuffle(4), nn.ReLU(), nn.Conv2d(3, 3, 7, padding=3)
    ).double()


@torch.no_grad()
def test_receptive_field_follows_the_kernels():
    like = torch.zeros(1).double()
    decoder = measure_receptive_field(local_decoder(), 4, 1, like)
    # 7 x 7 at full size reaches 3 pixels = 1 latent, and the 3 x 3 before it one more.
    assert (decoder.scale, decoder.halo) == (Fraction(4), 2)
    encoder = measure_receptive_field(local_encoder(), 3, 4, like)
    assert (encoder.scale, encoder.halo) == (Fraction(1, 4), 12)


@torch.no_grad()
def test_a_network_that_nan_does_not_survive_is_measured_by_what_changes():
    conv = torch.nn.Conv2d(3, 8, 7, padding=3)
    torch.manual_seed(0)
    seen = [measure_receptive_field(call, 3, 1, torch.zeros(1)) for call in (conv, lambda x: conv(x).nan_to_num(0.0))]
    assert seen[0] == seen[1] and seen[0].halo == 3


def test_global_networks_are_recognised():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(2, 4)).double()
    assert measure_receptive_field(network, 4, 1, torch.zeros(1).double()) is None


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (40, 64), (100, 36)])
@pytest.mark.parametrize("tile", [16, 24, 200])
def test_tiled_equals_untiled(size, tile, noise):
    pictures, calls = noise(2, 3, *size).double(), []
    encoder = local_encoder()
    receptive_field = measure_receptive_field(encoder, 3, 4, pictures)
    tiled = run_tiled(encoder, pictures, receptive_field, tile, lambda: calls.append(1))
    assert (tiled - encoder(pictures)).abs().max() < 1e-12
    assert len(calls) == 2 * count_blocks(size, tile)
    z, decoder = noise(2, 4, *size).double(), local_decoder()
    receptive_field = measure_receptive_field(decoder, 4, 1, z)
    assert (run_tiled(decoder, z, receptive_field, tile, lambda: None) - decoder(z)).abs().max() < 1e-12
