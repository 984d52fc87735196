"""Fakes and small networks that several test files share."""

from __future__ import annotations

import gc
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

if "PYTEST_XDIST_WORKER" in os.environ:
    # A process per core: threads on top would only wait for each other. Before torch is imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from tudsr_core.diffusion.one_step import from_noise_level
from tudsr_core.methods.networks import Encoded
from tudsr_core.methods.plan import StageLimits
from tudsr_core.methods.two_stage import Stage, TwoStageModel
from tudsr_core.tiling.fitting import NetworkFacts

Made = TypeVar("Made")
LONG = pytest.mark.skipif(not os.environ.get("TUDSR_TEST_LONG"), reason="takes minutes: set TUDSR_TEST_LONG=1")


def pytest_collection_finish(session) -> None:
    """Keep the collector from looking through all that was imported, again and again."""
    gc.freeze()


def made_once(tmp_path_factory, name: str, make: Callable[[Path], Made]) -> Made:
    """Return `make(folder)`, computed by the first process of the test run that asks; the others read what it made."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    with FileLock(root / f"{name}.lock"):
        made, folder = root / f"{name}.pickle", root / name
        if not made.exists():
            folder.mkdir()
            made.write_bytes(pickle.dumps(make(folder)))
    return pickle.loads(made.read_bytes())


class IdentityNetworks:
    """A model whose answer is known: latents are pixels folded by 8, and z_H equals z_L.

    `eps(z)` may be replaced by any pointwise function; `fail_at` raises out-of-memory at that call.
    """

    facts = NetworkFacts(latent_scale=8, multiple=8, weight_bytes=0, tile_bytes_per_pixel=1)
    device = torch.device("cpu")

    def __init__(self, t: int, eps: Callable[[Tensor], Tensor] | None = None, fail_at: int | None = None) -> None:
        step = from_noise_level(t)
        self.eps = eps or (lambda z: z * (1 - step.p) / step.q)
        self.fail_at, self.calls, self.shapes = fail_at, 0, []

    def vae_calls(self, size):
        return 2

    def encode(self, pixels, seed, on_tile):
        on_tile()
        return Encoded(torch.nn.functional.pixel_unshuffle(pixels, 8))

    def denoise(self, z, t, condition, part, body):
        return body(self.predict)

    def predict(self, z, tiles):
        self.calls += 1
        self.shapes.append(tuple(z.shape))
        if self.calls == self.fail_at:
            raise torch.OutOfMemoryError("simulated")
        return self.eps(z)

    def decode(self, encoded, on_tile):
        on_tile()
        return torch.nn.functional.pixel_shuffle(encoded.z, 8)

    def condition(self, text):
        return text

    def seeing(self, z):
        return self

    def is_out_of_memory(self, error):
        return isinstance(error, torch.OutOfMemoryError)


def identity_model(**options) -> TwoStageModel:
    """Return a two-stage model of `IdentityNetworks` at t = 200 and t = 50."""
    first = Stage(IdentityNetworks(200, **options), (from_noise_level(200),), "stage one")
    second = Stage(IdentityNetworks(50), (from_noise_level(50),), "stage two")
    return TwoStageModel(first, second, StageLimits())


@pytest.fixture(scope="session")
def embedded():
    """Return the model shipped with the package, on the CPU."""
    from tudsr_core.backends.local import load_embedded

    return load_embedded("cpu")


@pytest.fixture(scope="session")
def small_sd(tmp_path_factory):
    """Return the folder of `small_sd.write`."""
    import small_sd

    return made_once(tmp_path_factory, "sd", small_sd.write)


@pytest.fixture(scope="session")
def published_files(tmp_path_factory):
    """Return one adapter of every published format, by name, with what its own networks compute."""
    import published

    return made_once(tmp_path_factory, "published", published.write_all)


@pytest.fixture(scope="session")
def browser_server(tmp_path_factory):
    """Yield one ComfyUI server for all tests in the browser, with the shipped photo as `example.png`."""
    from browser import comfyui_for_browser
    from comfyui import Server
    from PIL import Image

    from tudsr_core.evaluation.measurement import example_path

    base = tmp_path_factory.mktemp("browser")
    server = Server(comfyui_for_browser(), base)
    try:
        with Image.open(example_path()) as image:
            image.convert("RGB").save(base / "input" / "example.png")
        yield server
    finally:
        server.stop()


@pytest.fixture
def noise():
    """Return a function that makes seeded uniform noise of a shape."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))

    return make
