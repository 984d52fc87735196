"""Memory that runs out anywhere in encode or decode: the same picture, or one clear error, and nothing left behind."""

import os
from itertools import count
from weakref import WeakKeyDictionary

import pytest
import torch
from small_vae import SHALLOW, make_vae, target
from torch.utils._python_dispatch import TorchDispatchMode

from tudsr_core.vae import tiled as tiled_module
from tudsr_core.vae.settings import VAETiling
from tudsr_core.vae.tiled import TiledVAE, VAECallables

EVERY = bool(os.environ.get("TUDSR_EVERY_OPERATION"))  # minutes; else a share of them
SAMPLES = 12
TILING = VAETiling(48, "host")


class OutOfMemory(TorchDispatchMode):
    """Raises at the operation of that number, or at all operations from it on."""

    def __init__(self, at=0, lasting=False):
        super().__init__()
        self.at, self.lasting, self.count = at, lasting, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        if self.count == self.at or (self.lasting and self.count > self.at > 0):
            raise torch.OutOfMemoryError("simulated")
        return function(*args, **(kwargs or {}))


class Local(torch.nn.Module):
    """Encoder and decoder of one convolution each: tiles with a halo."""

    def __init__(self):
        super().__init__()
        self.down = torch.nn.Conv2d(3, 4, 4, 2, 1).double()
        self.up = torch.nn.ConvTranspose2d(4, 3, 4, 2, 1).double()


def next_prime(number):
    return next(n for n in count(max(2, number)) if all(n % d for d in range(2, int(n**0.5) + 1)))


def known():
    vae = make_vae(**SHALLOW, layers_per_block=1)
    return vae, lambda vae, x: vae.encode(x).latent_dist.mode(), lambda vae, z: vae.decode(z).sample


def unknown():
    vae, encode, decode = known()
    vae.decoder.extra = torch.nn.Identity()
    return vae, encode, decode


def local():
    torch.manual_seed(0)
    return Local().requires_grad_(False), lambda vae, x: vae.down(x), lambda vae, z: vae.up(z)


def tiled(vae, encode, decode):
    callables = VAECallables(lambda x: encode(vae, x.double()), lambda z: decode(vae, z.double()), encode, decode)
    return TiledVAE(vae, callables, 2, 4, target(torch.float64, lambda error: "simulated" in str(error)), lambda: 0)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("side", ["encode", "decode"])
@pytest.mark.parametrize("build", [known, unknown, local])
def test_memory_that_runs_out_at_any_operation(build, side, lasting, monkeypatch):
    monkeypatch.setattr(tiled_module, "_proven", WeakKeyDictionary())
    parts, generator = build(), torch.Generator().manual_seed(1)
    x = torch.rand(1, *((3, 40, 64) if side == "encode" else (4, 20, 32)), generator=generator).double()

    def run():
        return getattr(tiled(*parts), side)(x, lambda: None, TILING)

    with OutOfMemory() as first:
        wanted = run()
    with OutOfMemory() as later:  # the small picture that layers are tried on is not repeated
        run()
    counts = {"made": 0, "refused": 0}
    for proven, operations in ((False, first.count - later.count), (True, later.count)):
        # A prime number of operations apart, so that other ones are met in every tile.
        for at in range(1, operations + 1, 1 if EVERY else next_prime(operations // SAMPLES)):
            if not proven:
                tiled_module._proven.clear()
            with OutOfMemory(at, lasting):
                try:
                    made = run()
                except MemoryError as error:
                    counts["refused"] += 1
                    assert "out of memory in the autoencoder" in str(error) and "\n" not in str(error)
                else:
                    counts["made"] += 1
                    assert (made - wanted).abs().max() < 1e-12, at
            if not proven:
                assert torch.equal(run(), wanted), at
    assert torch.equal(run(), wanted)
    assert counts["refused"] and bool(counts["made"]) == (not lasting and build is not unknown), counts
