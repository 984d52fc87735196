"""The pipeline's `Networks` over diffusers: for the command line, batch work, training and tests.

Loads the embedded model, a Stable Diffusion 2.1-base folder or a single checkpoint file, and
stage adapters. ComfyUI never comes this way; its own models are wrapped in `nodes/`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints import (
    Adapter,
    CheckpointError,
    Low,
    embedded_path,
    read_adapter,
    read_model,
)
from .pipeline import Model, Predict, Stage
from .plan import NetworkFacts, StageLimits
from .schedule import from_noise_level, scaled_linear
from .tiles import Tile
from .vae_tiling import TILE_PX, Reach, count_tiles, find_reaches, run_tiled

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Peak activations per pixel in float32, measured as growth of the resident set at 512 x 512: the
# embedded model's tile; SD2.1's UNet, and its VAE on the whole picture.
LOCAL_TILE_BYTES, SD_TILE_BYTES, SD_PICTURE_BYTES = 600, 1100, 4400


def pick_device(name: str = "auto") -> torch.device:
    """Return the torch device for `auto`, `cpu`, `cuda` or `mps`; raises ValueError if it is absent."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available.get(name, False):
        have = ", ".join(kind for kind, present in available.items() if present)
        raise ValueError(f"device {name!r} is not available here; use one of: auto, {have}")
    return torch.device(name)


class LoraSlot:
    """A network whose weights can carry one set of low-rank updates at a time.

    Updates are merged into the weights; the originals of what was touched are kept, so that going
    back is bit-exact and base weights exist once.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network, self.name = network, name
        self.active: dict[str, Low] | None = None
        self._originals: dict[str, Tensor] = {}

    def check(self, lows: dict[str, Low], source: str) -> None:
        """Raise CheckpointError unless every update has a module whose weight it fits."""
        modules = dict(self.network.named_modules())
        for path, low in lows.items():
            weight = getattr(modules.get(path), "weight", None)
            if weight is None:
                raise CheckpointError(f"adapter {source} updates {path}, which this {self.name} does not have")
            if low.up.shape[0] * low.down[0].numel() != weight.numel():
                raise CheckpointError(f"adapter {source} does not fit this {self.name} at {path}: other base model")

    @torch.no_grad()
    def use(self, lows: dict[str, Low] | None) -> None:
        """Make `lows` the merged updates; None or an empty dict restores the base weights."""
        lows = lows or None
        if lows is self.active:
            return
        modules = dict(self.network.named_modules())
        for path, original in self._originals.items():
            modules[path].weight.copy_(original)
        self._originals.clear()
        for path, low in (lows or {}).items():
            weight = modules[path].weight
            self._originals[path] = weight.detach().clone()
            low = replace(low, down=low.down.to(weight.device), up=low.up.to(weight.device))
            weight.add_(low.delta(weight).to(weight.dtype))
        self.active = lows


@dataclass
class Backbone:
    """Weights shared by the stages: VAE, UNet, and `embed(*texts)`, `texts tokens width`.

    `prediction` is what the UNet returns: "epsilon" or "v_prediction".
    """

    vae: nn.Module
    unet: nn.Module
    embed: Callable[..., Tensor]
    device: torch.device
    dtype: torch.dtype
    prediction: str = "epsilon"

    def __post_init__(self) -> None:
        for network in (self.vae, self.unet):
            # Past diffusers' own `to`, which warns about modules these networks do not have.
            nn.Module.to(network, self.device, self.dtype).eval().requires_grad_(False)
        self.unet_slot = LoraSlot(self.unet, "UNet")
        self.encoder_slot = LoraSlot(getattr(self.vae, "encoder", self.vae), "VAE encoder")

    @property
    def latent_scale(self) -> int:
        """Pixels per latent."""
        config = self.vae.config
        blocks = config.get("block_out_channels") or config.get("encoder_block_out_channels")
        return 2 ** (len(blocks) - 1)

    @cached_property
    def facts(self) -> NetworkFacts:
        """What planning must know."""
        weights = sum(p.numel() * p.element_size() for m in (self.vae, self.unet) for p in m.parameters())
        tiled = all(self.reaches)
        return NetworkFacts(
            latent_scale=self.latent_scale,
            multiple=max(8, self.latent_scale),
            weight_bytes=weights,
            tile_bytes_per_pixel=(LOCAL_TILE_BYTES if tiled else SD_TILE_BYTES) * self.dtype.itemsize // 4,
            picture_bytes_per_pixel=0 if tiled else SD_PICTURE_BYTES * self.dtype.itemsize // 4,
        )

    @cached_property
    def reaches(self) -> tuple[Reach | None, Reach | None]:
        """`Reach` of encoder and decoder, None where the network is not local."""
        return find_reaches(
            self.vae,
            lambda x: self.moments(x)[0],
            lambda z: self.vae.decode(z).sample,
            self.latent_scale,
            self.vae.config.latent_channels,
            next(self.vae.parameters()),
        )

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return mean and standard deviation (None for autoencoders without one) for x in -1..1."""
        output = self.vae.encode(x)
        if hasattr(output, "latent_dist"):
            return output.latent_dist.mean, output.latent_dist.std
        return (output.latent if hasattr(output, "latent") else output.latents), None


class LocalNetworks:
    """One stage: a backbone that it shares, seen with this stage's adapter."""

    def __init__(self, backbone: Backbone, adapter: Adapter | None = None) -> None:
        self.backbone = backbone
        self.unet_updates = adapter.unet if adapter else None
        self.encoder_updates = adapter.encoder if adapter else None
        if adapter:
            backbone.unet_slot.check(adapter.unet, adapter.name)
            backbone.encoder_slot.check(adapter.encoder, adapter.name)

    @property
    def facts(self) -> NetworkFacts:
        """Geometry and memory of the shared backbone."""
        return self.backbone.facts

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Tiles of one encode plus one decode of `size` pixels."""
        encode, decode = self.backbone.reaches
        tiles = count_tiles(size, TILE_PX)
        return (tiles if encode else 1) + (tiles if decode else 1)

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Tensor:
        """Return scaled float32 latents of `B 3 H W` in 0..1 on the CPU."""
        self.backbone.encoder_slot.use(self.encoder_updates)

        def network(x: Tensor) -> Tensor:
            mean, std = self.backbone.moments(self._in(x * 2 - 1))
            return (mean if std is None else torch.cat([mean, std], 1)).float().cpu()

        moments = run_tiled(network, pixels, self.backbone.reaches[0], TILE_PX, on_tile)
        channels = self.backbone.vae.config.latent_channels
        mean, std = moments[:, :channels], moments[:, channels:]
        if seed is not None and std.shape[1]:
            mean = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(seed))
        return mean * self.backbone.vae.config.scaling_factor

    def denoise(
        self,
        z: Tensor,
        t: int,
        condition: Tensor | list[Tensor],
        part: tuple[int, ...],
        body: Callable[[Predict], Tensor],
    ) -> Tensor:
        """Return `body(predict)` with this stage's updates in the UNet.

        `condition` is one for all tiles, or a list with one for each, by `Tile.index`.
        """
        self.backbone.unet_slot.use(self.unet_updates)
        return body(lambda parts, tiles: self._predict_all(parts, t, self._rows(condition, len(parts), tiles)))

    def _rows(self, condition: Tensor | list[Tensor], count: int, tiles: Sequence[Tile]) -> Tensor:
        if isinstance(condition, Tensor):
            return condition.expand(count, -1, -1)
        # The latents of one tile, of all pictures, lie next to each other.
        return torch.cat([condition[tile.index] for tile in tiles]).repeat_interleave(count // len(tiles), 0)

    def _predict_all(self, z: Tensor, t: int, text: Tensor) -> Tensor:
        # A CPU gains nothing from batching, and one tile at a time makes the bytes of a picture
        # independent of the tile batch.
        size = 1 if self.backbone.device.type == "cpu" else len(z)
        rows = zip(z.split(size), text.split(size), strict=True)
        return torch.cat([self._predict(part, t, own) for part, own in rows]).to(z.device)

    def _predict(self, z: Tensor, t: int, text: Tensor) -> Tensor:
        output = self.backbone.unet(self._in(z), t, encoder_hidden_states=text).sample.float()
        if self.backbone.prediction == "epsilon":
            return output
        abar = scaled_linear().abar_at(t)
        return abar**0.5 * output + (1 - abar) ** 0.5 * z.to(output)

    def decode(self, z: Tensor, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W` for scaled latents, float32, on the CPU."""

        def network(part: Tensor) -> Tensor:
            return self.backbone.vae.decode(self._in(part)).sample.float().cpu() / 2 + 0.5

        tile = TILE_PX // self.backbone.latent_scale
        return run_tiled(network, z / self.backbone.vae.config.scaling_factor, self.backbone.reaches[1], tile, on_tile)

    def condition(self, text: str) -> Tensor:
        """Return the embedding `1 tokens width` of `text`."""
        return self.backbone.embed(text).to(self.backbone.device, self.backbone.dtype)

    def conditions(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the embedding `1 tokens width` of every text, loading the text encoder at most once."""
        unique = list(dict.fromkeys(texts))
        rows = self.backbone.embed(*unique).to(self.backbone.device, self.backbone.dtype).split(1)
        known = dict(zip(unique, rows, strict=True))
        return [known[text] for text in texts]

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` is the device's or the CPU allocator's "not enough memory"."""
        if isinstance(error, torch.OutOfMemoryError):
            if self.backbone.device.type == "cuda":
                torch.cuda.empty_cache()
            return True
        return "DefaultCPUAllocator: can't allocate memory" in str(error)

    def _in(self, x: Tensor) -> Tensor:
        return x.to(self.backbone.device, self.backbone.dtype)


def load_embedded(device: str = "auto", dtype: str = "fp32", path: Path | None = None) -> Model:
    """Return the model shipped with this package (or another `tudsr-model` file) as two stages."""
    from diffusers import AutoencoderDC, UNet2DConditionModel

    file = read_model(path or embedded_path())
    vae, unet = AutoencoderDC.from_config(file.vae_config), UNet2DConditionModel.from_config(file.unet_config)
    vae.load_state_dict(file.vae)
    unet.load_state_dict(file.unet)
    empty = torch.zeros(1, 1, unet.config.cross_attention_dim)
    backbone = Backbone(vae, unet, lambda *texts: empty.expand(len(texts), -1, -1), pick_device(device), DTYPES[dtype])
    first = Stage(LocalNetworks(backbone), file.first_step, "stage one")
    second = Stage(LocalNetworks(backbone, file.second), file.second.step, "stage two")
    return Model(first, second, file.limits)


def load_sd21(
    base: Path,
    stage_one: Path,
    stage_two: Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    timesteps: tuple[int, int] = (200, 50),
) -> Model:
    """Return SD2.1-base from a diffusers folder or a single checkpoint file, with stage adapters.

    `timesteps` are used where an adapter does not carry its own. Raises CheckpointError for
    missing or unsuitable files, and for a stage-two adapter given as stage one.
    """
    from .sd21 import read_base

    vae, unet, embed = read_base(base)
    backbone = Backbone(vae, unet, embed, pick_device(device), DTYPES[dtype])
    first = _adapted_stage(backbone, stage_one, 1, timesteps[0])
    if stage_two is None:
        return Model(first, None, StageLimits(single_up_to=StageLimits().first_max))
    return Model(first, _adapted_stage(backbone, stage_two, 2, timesteps[1]), StageLimits())


def load_sd2(base: Path, device: str = "auto", dtype: str = "fp32") -> LocalNetworks:
    """Return a Stable Diffusion model as it is, without adapters, from a folder or checkpoint file.

    Epsilon and v prediction (SD2.1 at 768) are both understood. Raises CheckpointError.
    """
    from .sd21 import PREDICTIONS, read_base, read_prediction

    vae, unet, embed = read_base(base, predictions=PREDICTIONS)
    return LocalNetworks(Backbone(vae, unet, embed, pick_device(device), DTYPES[dtype], read_prediction(base)))


def _adapted_stage(backbone: Backbone, path: Path, number: int, timestep: int) -> Stage:
    adapter = read_adapter(path)
    if adapter.stage not in (None, number):
        raise CheckpointError(
            f"{path} is a stage-{adapter.stage} adapter and was given as stage {number}; swap the two"
        )
    step = adapter.step or from_noise_level(timestep)
    return Stage(LocalNetworks(backbone, adapter), step, f"stage {'one' if number == 1 else 'two'}")
