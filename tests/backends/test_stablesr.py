"""StableSR's sampling without ComfyUI against a slow loop written out from the paper, and its loading."""

import copy
import math
from itertools import product

import pytest
import torch
from conftest import LONG
from diffusers import UNet2DConditionModel
from plain_stablesr import random_tensors, steer_diffusers
from safetensors.torch import save_file
from small_sd import SMALL_UNET

from tudsr_core.backends.local import Backbone
from tudsr_core.backends.stablesr import StableSRNetworks
from tudsr_core.methods.sampling import SampleOptions, noised, sample, tiled_predictor
from tudsr_core.models.stablesr import load_stablesr
from tudsr_core.tiling import TiledRun, plan_tiles

SIDE, OVERLAP = 16, 8
TIMESTEPS = (999, 666, 333, 0)


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


def embed(*texts):
    generator = torch.Generator().manual_seed(7)
    known = {text: torch.randn(1, 5, 32, generator=generator) for text in ("good", "bad")}
    return torch.cat([known[text] for text in texts])


def networks_of(path, unet, prediction):
    backbone = Backbone(torch.nn.Identity(), unet, embed, torch.device("cpu"), torch.float32, prediction)
    return StableSRNetworks(backbone, load_stablesr(path))


def slow_weights():
    x = [(i - (SIDE - 1) / 2) / SIDE for i in range(SIDE)]
    density = torch.tensor([math.exp(-(v**2) / (2 * 0.01)) for v in x], dtype=torch.float64)
    return density[:, None] * density[None]


def slow_offsets(length):
    count = math.ceil((length - SIDE) / (SIDE - OVERLAP)) + 1
    return [min(i * (SIDE - OVERLAP), length - SIDE) for i in range(count)]


def slow_output(unet, tensors, x, low, t, guidance):
    """Return the UNet's blended output: at every place each tile on its own, encoder and guidance included."""
    total, weight, w = torch.zeros_like(x).double(), torch.zeros(x.shape[-2:]).double(), slow_weights()
    for left in slow_offsets(x.shape[-1]):
        for top in slow_offsets(x.shape[-2]):
            place = (..., slice(top, top + SIDE), slice(left, left + SIDE))
            steer_diffusers(unet, tensors, low[place], t)
            out = unet(x[place], t, encoder_hidden_states=embed("good")).sample
            if guidance != 1:
                negative = unet(x[place], t, encoder_hidden_states=embed("bad")).sample
                out = negative + guidance * (out - negative)
            total[place] += w * out
            weight[place[1:]] += w
    return (total / weight).float()


def slow_sampling(unet, tensors, low, seed, prediction, guidance):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abars = torch.cumprod(1 - betas, 0)
    generator = torch.Generator().manual_seed(seed)
    abar = float(abars[999])
    x = abar**0.5 * low + (1 - abar) ** 0.5 * torch.randn(low.shape, generator=generator)
    for t, later in zip(TIMESTEPS, (*TIMESTEPS[1:], None), strict=True):
        abar, before = float(abars[t]), 1.0 if later is None else float(abars[later])
        out = slow_output(unet, tensors, x, low, t, guidance)
        if prediction == "epsilon":
            x0 = (x - (1 - abar) ** 0.5 * out) / abar**0.5
        else:
            x0 = abar**0.5 * x - (1 - abar) ** 0.5 * out
        beta = 1 - abar / before
        mean = beta * before**0.5 / (1 - abar) * x0 + (1 - before) * (1 - beta) ** 0.5 / (1 - abar) * x
        variance = beta * (1 - before) / (1 - abar)
        x = mean if later is None else mean + variance**0.5 * torch.randn(low.shape, generator=generator)
    return x


SIZES, PREDICTIONS, GUIDANCE = ((16, 16), (24, 40), (20, 33)), ("epsilon", "v_prediction"), (1.0, 7.0)
# Every value once or more; all combinations take minutes.
CHOSEN = {((16, 16), prediction, 7.0) for prediction in PREDICTIONS}
CHOSEN |= {((24, 40), "epsilon", 1.0), ((20, 33), "v_prediction", 1.0)}


@pytest.mark.parametrize(
    ("size", "prediction", "guidance"),
    [case if case in CHOSEN else pytest.param(*case, marks=LONG) for case in product(SIZES, PREDICTIONS, GUIDANCE)],
)
def test_aggregation_sampling_is_the_slow_loop(tensors, path, unet, size, prediction, guidance):
    low = torch.randn(1, 4, *size, generator=torch.Generator().manual_seed(1))
    truth = slow_sampling(copy.deepcopy(unet), tensors, low, 3, prediction, guidance)
    networks = networks_of(path, unet, prediction).seeing(low)
    encoder, seen = networks.network.get_submodule("structcond_stage_model"), []
    encoder.register_forward_hook(lambda *call: seen.append(1))
    options = SampleOptions(4, guidance=guidance, window="centred", respacing="whole")
    tiles = plan_tiles(*size, SIDE, OVERLAP, spacing="stride")
    noise = torch.Generator().manual_seed(3)
    predict = tiled_predictor(networks, TiledRun(tiles, options.window), [("good", "bad")] * len(tiles), guidance)
    ours = sample(noised(low, noise, options), predict, noise, options)
    assert (ours - truth).abs().max() < 1e-5 * truth.abs().max()
    assert len(seen) == 4 * len(tiles), "guidance must not encode a tile twice"


def test_tile_batches_are_steered_row_by_row(path, unet, monkeypatch):
    """Two pictures in turn, three tiles at once as on a GPU: the same as one tile at a time."""
    networks = networks_of(path, unet, "epsilon")
    tiles = list(plan_tiles(24, 40, 16, 8))[:3]
    low = torch.randn(1, 4, 24, 40, generator=torch.Generator().manual_seed(1))
    parts = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    seeing, text = networks.seeing(low), networks.conditions(["good"])[0]
    together = seeing._predict(parts, 500, text.expand(3, -1, -1), tiles)
    single = [seeing._predict(part, 500, text, [tile]) for part, tile in zip(parts.split(1), tiles, strict=True)]
    assert (together - torch.cat(single)).abs().max() < 1e-5
    swapped = seeing._predict(parts, 500, text.expand(3, -1, -1), [tiles[1], tiles[0], tiles[2]])
    assert (swapped - together).abs().amax((1, 2, 3))[:2].min() > 1e-2
