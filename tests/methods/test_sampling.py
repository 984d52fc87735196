import math

import pytest
import torch
import torch.nn.functional as F

from tudsr_core.backends.local import Backbone, LocalNetworks
from tudsr_core.diffusion.multi_step import plan_steps, respaced_timesteps
from tudsr_core.methods.sampling import SampleOptions, count_calls, noised, sample, tiled_predictor
from tudsr_core.tiling.out_of_memory import TiledRun
from tudsr_core.tiling.plan import plan_tiles

ABAR = [0.0] * 1000
running = 1.0
for number in range(1000):
    running *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * number / 999) ** 2
    ABAR[number] = running


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def embed(*texts):
    """One random row of four numbers per text, always the same for the same text."""
    rows = [torch.randn(1, 4, generator=seeded(sum(ord(c) * 31**i for i, c in enumerate(t)) % 2**31)) for t in texts]
    return torch.stack(rows)


class ToyNetworks:
    """A text-conditioned model in a formula: x0 is a colour that the text names, mixed with what is there.

    `spread` > 0 also looks at neighbours inside the tile, so that tiles differ from the whole.
    """

    def __init__(self, spread=0.0):
        self.spread, self.calls, self.batches = spread, 0, []

    def conditions(self, texts):
        return list(embed(*texts).split(1))

    def is_out_of_memory(self, error):
        return isinstance(error, torch.OutOfMemoryError)

    def denoise(self, z, t, condition, part, body):
        def predict(parts, tiles):
            self.calls += len(tiles)
            self.batches.append(len(tiles))
            copies = len(parts) // len(tiles)
            rows = [condition[tile.index] for tile in tiles for _ in range(copies)]
            return torch.cat([self.eps(one[None], t, row) for one, row in zip(parts, rows, strict=True)])

        return body(predict)

    def eps(self, z, t, row):
        near = F.avg_pool2d(z, 3, 1, 1) if self.spread else 0.0
        return torch.tanh(0.7 * z + self.spread * near + row.view(1, 4, 1, 1) + t / 1000)


def sampled(z, networks, tiles, prompts, noise, options=None, on_tile=lambda preview: None):
    """The whole chain in tiles, each under its own pair of prompts."""
    options = options or SampleOptions()
    tiled_run = TiledRun(tiles, options.window, options.tile_batch)
    return sample(z, tiled_predictor(networks, tiled_run, prompts, options.guidance, on_tile), noise, options)


def pairs(tiles, positive="a {}", negative="not {}"):
    return [(positive.format(tile.index), negative.format(tile.index % 2)) for tile in tiles]


def test_sampling_equals_multidiffusion_and_the_ddpm_posterior_by_hand():
    """Plain loops over tiles and pixels' counts; the posterior as DDPM's paper writes it, with respaced betas."""
    z, networks = torch.randn(2, 4, 23, 37, generator=seeded(1)), ToyNetworks(spread=0.4)
    tiles, guidance, count = plan_tiles(23, 37, 16, 8), 5.5, 6
    prompts = pairs(tiles)
    ours = sampled(z, networks, tiles, prompts, seeded(9), SampleOptions(count, guidance=guidance, tile_batch=3))
    noise, x = seeded(9), z.double()
    chain = [1 + number * 1000 // count for number in range(count)]
    for position in reversed(range(count)):
        t = chain[position]
        halves = []
        for which in (0, 1):
            total, hits = torch.zeros_like(x), torch.zeros(23, 37, dtype=torch.float64)
            for tile in tiles:
                rows, columns = slice(tile.top, tile.top + 16), slice(tile.left, tile.left + 16)
                row = networks.conditions([prompts[tile.index][which]])[0].double()
                for picture in range(2):
                    part = x[picture : picture + 1, :, rows, columns]
                    total[picture, :, rows, columns] += networks.eps(part, t, row)[0]
                hits[rows, columns] += 1
            halves.append(total / hits)
        eps = halves[1] + guidance * (halves[0] - halves[1])
        abar, before = ABAR[t], ABAR[chain[position - 1]] if position else 1.0
        alpha, beta = abar / before, 1 - abar / before
        x0 = (x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)
        mean = math.sqrt(before) * beta / (1 - abar) * x0 + math.sqrt(alpha) * (1 - before) / (1 - abar) * x
        x = mean
        if position:
            fresh = torch.randn(z.shape, generator=noise)
            x = mean + math.sqrt((1 - before) / (1 - abar) * beta) * fresh
    assert (ours - x).abs().max() < 1e-4 * x.abs().max()


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("count", [4, 10, 50])
def test_the_chain_equals_diffusers(eta, count):
    from diffusers import DDIMScheduler, DDPMScheduler

    settings = dict(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler = DDPMScheduler(**settings) if eta else DDIMScheduler(**settings, set_alpha_to_one=True)
    scheduler.set_timesteps(count)
    steps = plan_steps(count, eta)
    assert [step.t for step in steps] == scheduler.timesteps.tolist()
    z = theirs = torch.randn(1, 4, 8, 8, generator=seeded())
    mine, other = seeded(3), seeded(3)
    for step in steps:
        eps = torch.sin(3 * z) + 0.1 * z
        theirs = scheduler.step(torch.sin(3 * theirs) + 0.1 * theirs, step.t, theirs, generator=other).prev_sample
        z = step.from_z * z + step.from_x0 * step.x0(z, eps)
        z = z + step.std * torch.randn(z.shape, generator=mine) if step.std else z
        assert (z - theirs).abs().max() < 1e-3 * max(1, theirs.abs().max())


def test_timesteps_are_sd2s():
    assert respaced_timesteps(50) == list(range(981, 0, -20))
    for count in (1, 3, 7, 30, 334, 500):
        chain = respaced_timesteps(count)
        assert len(set(chain)) == count and chain == sorted(chain, reverse=True)
        assert chain[-1] == 1 and chain[0] > 1000 - 1000 / count - 1


def test_the_whole_chain_is_thinned_evenly_from_end_to_end():
    """StableSR's timesteps, from its authors' rule: every (1000 - 1) / (N - 1), rounded half to even."""
    twenty = [0, 53, 105, 158, 210, 263, 315, 368, 421, 473, 526, 578, 631, 684, 736, 789, 841, 894, 946, 999]
    assert respaced_timesteps(20, respacing="whole") == twenty[::-1]
    assert respaced_timesteps(4, respacing="whole") == [999, 666, 333, 0]
    assert respaced_timesteps(50, respacing="whole")[-4:] == [61, 41, 20, 0]
    assert respaced_timesteps(100, respacing="whole")[-4:] == [30, 20, 10, 0]
    assert respaced_timesteps(200, respacing="whole")[:3] == [999, 994, 989]
    for count in (4, 20, 50, 100, 200):
        chain, at = [], 0.0
        for _ in range(count):
            chain.append(round(at))
            at += 999 / (count - 1)
        assert respaced_timesteps(count, respacing="whole") == chain[::-1]
    assert respaced_timesteps(1, respacing="whole") == [999]
    with pytest.raises(ValueError, match="respacing is 'some'"):
        respaced_timesteps(4, respacing="some")


@pytest.mark.parametrize("count", [4, 20, 50, 100, 200])
def test_its_steps_are_the_posterior_of_the_respaced_betas(count):
    """DDPM eq. 7 with betas rebuilt from what is left of the chain, as StableSR samples."""
    chain = sorted(respaced_timesteps(count, respacing="whole"))
    for position, step in enumerate(reversed(plan_steps(count, respacing="whole"))):
        abar, before = ABAR[chain[position]], ABAR[chain[position - 1]] if position else 1.0
        beta = 1 - abar / before
        assert step.t == chain[position]
        assert abs(step.from_x0 - beta * math.sqrt(before) / (1 - abar)) < 1e-12
        assert abs(step.from_z - (1 - before) * math.sqrt(1 - beta) / (1 - abar)) < 1e-12
        assert abs(step.std**2 - beta * (1 - before) / (1 - abar)) < 1e-12


def test_eta_is_the_share_of_the_noise():
    """DDIM eq. 16: sigma is proportional to eta; what noise does not fill, z keeps (eq. 12)."""
    for half, whole in zip(plan_steps(10, 0.5), plan_steps(10, 1.0), strict=True):
        assert half.std == pytest.approx(whole.std / 2)
        kept = [step.from_z**2 * (1 - step.abar) + step.std**2 for step in (half, whole)]
        assert kept[0] == pytest.approx(kept[1])


def test_the_last_step_returns_x0():
    last = plan_steps(50)[-1]
    assert (last.t, last.from_z, last.from_x0, last.std) == (1, 0.0, 1.0, 0.0)


def test_the_start_is_the_picture_at_the_last_timestep():
    z = torch.randn(1, 4, 64, 64, generator=seeded()) * 2
    made, noise = noised(z, seeded(5)), torch.randn(z.shape, generator=seeded(5))
    assert (made - 0.068265 * z - 0.997667 * noise).abs().max() < 1e-5


def test_less_strength_is_the_end_of_the_chain():
    """A fifth of 50 steps: start at t = 181, with that timestep's noise, and do the last ten steps."""
    z, tiles, seen = torch.randn(1, 4, 8, 8, generator=seeded()), plan_tiles(8, 8, 8, 0), []
    options = SampleOptions(strength=0.2)
    noise = torch.randn(z.shape, generator=seeded(5))
    start = noised(z, seeded(5), options)
    assert (start - ABAR[181] ** 0.5 * z - (1 - ABAR[181]) ** 0.5 * noise).abs().max() < 1e-5

    class Watched(ToyNetworks):
        def denoise(self, z, t, condition, part, body):
            seen.append(t)
            return super().denoise(z, t, condition, part, body)

    sampled(start, Watched(), tiles, pairs(tiles), seeded(), options)
    assert seen[::2] == seen[1::2] == list(range(181, 0, -20))
    assert count_calls(tiles, options) == len(seen) == 20


def test_tiles_with_one_prompt_equal_the_whole_for_a_pointwise_model():
    z, options = torch.randn(1, 4, 41, 29, generator=seeded()), SampleOptions(8)
    results = []
    for side, overlap in ((64, 0), (16, 8), (12, 3)):
        tiles = plan_tiles(41, 29, side, overlap)
        results.append(sampled(z, ToyNetworks(), tiles, [("a", "b")] * len(tiles), seeded(1), options))
    assert (results[0] - results[1]).abs().max() < 1e-4
    assert (results[0] - results[2]).abs().max() < 1e-4


@pytest.mark.parametrize("window", ["uniform", "gaussian"])
def test_a_tiles_prompt_changes_its_own_tile_and_a_global_one_changes_all(window):
    z, tiles = torch.randn(1, 4, 40, 40, generator=seeded()), plan_tiles(40, 40, 16, 4)
    options = SampleOptions(6, window=window)
    assert len(tiles) == 9

    def run(prompts):
        return sampled(z, ToyNetworks(), tiles, prompts, seeded(2), options)

    plain = [("a field", "noise")] * 9
    before, middle = run(plain), list(tiles)[4]
    for part in (("a red barn", "noise"), ("a field", "barn")):
        after = run([part if index == 4 else pair for index, pair in enumerate(plain)])
        changed = (after != before).any(1)[0]
        inside = torch.zeros(40, 40, dtype=torch.bool)
        middle.cut(inside).fill_(True)
        assert torch.equal(changed, inside)
        alone = inside.clone()
        for tile in tiles:
            if tile.index != 4:
                tile.cut(alone).fill_(False)
        # The neighbours' share pulls the blended border back towards what it was.
        difference = (after - before).abs().mean(1)[0]
        assert difference[alone].mean() > 1.5 * difference[inside & ~alone].mean()
    everywhere = run([("a red barn", "noise")] * 9)
    assert (everywhere != before).any(1).all()


UNET = dict(
    sample_size=8,
    block_out_channels=(16, 32),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    layers_per_block=1,
    attention_head_dim=2,
    cross_attention_dim=4,
    norm_num_groups=8,
)


@pytest.fixture(scope="module")
def unet_networks():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**UNET)
    return LocalNetworks(Backbone(torch.nn.Identity(), unet, embed, torch.device("cpu"), torch.float32))


@pytest.mark.parametrize("pictures", [1, 2])
def test_same_bytes_for_any_tile_batch(unet_networks, pictures):
    z, tiles = torch.randn(pictures, 4, 13, 27, generator=seeded()), plan_tiles(13, 27, 13, 5)

    def run(batch):
        options = SampleOptions(2, tile_batch=batch)
        return sampled(z, unet_networks, tiles, pairs(tiles), seeded(4), options)

    results = [run(batch) for batch in (1, 2, 5)]
    assert torch.isfinite(results[0]).all()
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_every_tile_of_every_picture_gets_its_own_text(unet_networks):
    """The batched prediction against the UNet called for one tile at a time."""
    z, tiles = torch.randn(2, 4, 16, 24, generator=seeded()), list(plan_tiles(16, 24, 16, 8))
    conditions = unet_networks.conditions(["left", "right"])
    parts = torch.cat([tile.cut(z) for tile in tiles])
    with torch.no_grad():
        made = unet_networks.denoise(z, 500, conditions, parts.shape, lambda predict: predict(parts, tiles))
        row = 0
        for text, tile in zip(("left", "right"), tiles, strict=True):
            for picture in z.split(1):
                alone = unet_networks.backbone.unet(tile.cut(picture), 500, encoder_hidden_states=embed(text)).sample
                assert torch.allclose(made[row : row + 1], alone, atol=1e-6)
                row += 1


def test_v_prediction_becomes_eps():
    """For v = sqrt(abar) n - sqrt(1 - abar) x0 the noise itself must come back (Salimans and Ho 2022)."""
    x0, noise = torch.randn(2, 1, 4, 8, 8, generator=seeded())
    abar = ABAR[321]
    z = abar**0.5 * x0 + (1 - abar) ** 0.5 * noise

    class Knows(torch.nn.Module):
        def forward(self, z, t, encoder_hidden_states):
            output = type("Output", (), {})()
            output.sample = abar**0.5 * noise - (1 - abar) ** 0.5 * x0
            return output

    backbone = Backbone(torch.nn.Identity(), Knows(), embed, torch.device("cpu"), torch.float32, "v_prediction")
    networks = LocalNetworks(backbone)
    tile = list(plan_tiles(8, 8, 8, 0))
    made = networks.denoise(z, 321, networks.conditions(["a"]), z.shape, lambda predict: predict(z, tile))
    assert (made - noise).abs().max() < 1e-5


def test_progress_counts_every_call_and_may_cancel():
    z, tiles = torch.randn(1, 4, 24, 24, generator=seeded()), plan_tiles(24, 24, 16, 8)
    for guidance, wanted in ((5.5, 4 * 2 * 3), (1.0, 4 * 3)):
        options, networks, previews = SampleOptions(3, guidance=guidance, tile_batch=3), ToyNetworks(), []
        sampled(z, networks, tiles, pairs(tiles), seeded(), options, previews.append)
        assert len(previews) == networks.calls == count_calls(tiles, options) == wanted
        assert previews[-1]().shape == z.shape
        assert max(networks.batches) == 3

    def cancel(preview, seen=[]):  # noqa: B006 - counts over calls
        seen.append(preview)
        if len(seen) == 5:
            raise KeyboardInterrupt

    networks = ToyNetworks()
    with pytest.raises(KeyboardInterrupt):
        sampled(z, networks, tiles, pairs(tiles), seeded(), SampleOptions(3), cancel)
    assert networks.calls == 6, "a tile's two prompts are one piece of work"


def test_what_cannot_be_sampled_is_named():
    z, tiles = torch.randn(1, 4, 24, 24, generator=seeded()), plan_tiles(24, 24, 16, 8)
    with pytest.raises(ValueError, match="3 prompts for 4 tiles"):
        sampled(z, ToyNetworks(), tiles, [("a", "b")] * 3, seeded())
    for wrong, says in (
        (dict(steps=0), "0 steps"),
        (dict(steps=1001), "1001 steps"),
        (dict(strength=0), "strength 0"),
        (dict(eta=1.5), "eta 1.5"),
        (dict(guidance=0.5), "guidance 0.5"),
        (dict(guidance=math.nan), "guidance nan"),
        (dict(tile_batch=0), "tile batch 0"),
    ):
        with pytest.raises(ValueError, match=says):
            SampleOptions(**wrong)
    broken = ToyNetworks()
    broken.eps = lambda z, t, row: z * math.nan
    with pytest.raises(ValueError, match="NaN"):
        sampled(z, broken, tiles, pairs(tiles), seeded(), SampleOptions(2))
