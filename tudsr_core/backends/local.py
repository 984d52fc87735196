"""The pipeline's `Networks` over networks of torch and diffusers: for the command line, batch work, training and tests.

Loads the embedded model, a folder or single file of SD2.1-base or SD-Turbo, and adapters. ComfyUI
never comes this way; its own models are wrapped in `nodes/`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from ..diffusion import scaled_linear
from ..methods import NEUTRAL, Encoded, NoisePredictor, Predict, Stage, StageLimits, TwoStageModel, turned
from ..models import SharedNetworks, build_predictor, load_networks
from ..tiling import NetworkFacts, Tile
from ..vae import ComputeTarget, Fusions, TiledVAE, VAECallables, fused_levels
from ..weights import DTYPES, Adapter, LoRAMerger, WeightDelta, embedded_path, read_adapter, read_model
from .sd21 import PREDICTIONS, check_exists, read_base, read_prediction

log = logging.getLogger(__name__)

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


@dataclass
class Backbone:
    """Weights shared by the stages: VAE, UNet, and `embed(*texts)`, `texts tokens width`.

    `prediction` is what the UNet returns: "epsilon" or "v_prediction". `fusion`: what the decoder
    fuses with the encoder's activations, by level, on `device` and in `dtype`.
    """

    vae: nn.Module
    unet: nn.Module
    embed: Callable[..., Tensor]
    device: torch.device
    dtype: torch.dtype
    prediction: str = "epsilon"
    fusion: Fusions = field(default_factory=dict)

    def __post_init__(self) -> None:
        for network in (self.vae, self.unet):
            # Past diffusers' own `to`, which warns about modules these networks do not have.
            nn.Module.to(network, self.device, self.dtype).eval().requires_grad_(False)
        self.unet_merger, self.vae_merger = LoRAMerger(self.unet, "UNet"), LoRAMerger(self.vae, "VAE")

    @property
    def latent_scale(self) -> int:
        """Pixels per latent."""
        config = self.vae.config
        blocks = getattr(config, "block_out_channels", None) or config.encoder_block_out_channels
        return 2 ** (len(blocks) - 1)

    @cached_property
    def facts(self) -> NetworkFacts:
        """What planning must know."""
        weights = sum(p.numel() * p.element_size() for m in (self.vae, self.unet) for p in m.parameters())
        vae = self.tiled_vae
        tile = (LOCAL_TILE_BYTES if not vae.layers and vae.is_tiled else SD_TILE_BYTES) * self.dtype.itemsize // 4
        return NetworkFacts(
            latent_scale=self.latent_scale,
            multiple=max(8, self.latent_scale),
            weight_bytes=weights,
            tile_bytes_per_pixel=max(tile, vae.tile_bytes(fuse=self.fusion) // vae.tiling.tile_px**2),
            picture_bytes_per_pixel=0 if vae.is_tiled else SD_PICTURE_BYTES * self.dtype.itemsize // 4,
            plane_bytes_per_pixel=vae.feature_map_bytes(1, fuse=self.fusion),
        )

    @cached_property
    def tiled_vae(self) -> TiledVAE:
        """The autoencoder, tiled; it calls the modules of `vae` as they are at each call."""
        callables = VAECallables(
            encode=lambda x: self.latents(self.vae, (x * 2 - 1).to(self.device, self.dtype)).float().cpu(),
            decode=lambda z: self.vae.decode(z.to(self.device, self.dtype)).sample.float().cpu() / 2 + 0.5,
            encode_with=lambda vae, x: self.latents(vae, x * 2 - 1),
            decode_with=lambda vae, z: vae.decode(z).sample / 2 + 0.5,
        )
        target = ComputeTarget(self.device, self.dtype, self.is_out_of_memory)
        return TiledVAE(
            self.vae, callables, self.latent_scale, self.vae.config.latent_channels, target, self.free_bytes
        )

    @staticmethod
    def latents(vae: nn.Module, x: Tensor) -> Tensor:
        """Return the posterior's mode, or the latents of autoencoders without a posterior, of x in -1..1."""
        output = vae.encode(x)
        if hasattr(output, "latent_dist"):
            return output.latent_dist.mode()
        return output.latent if hasattr(output, "latent") else output.latents

    def free_bytes(self) -> int:
        """Memory of a CUDA device that is free, or kept by torch and not in use; 0 elsewhere."""
        if self.device.type != "cuda":
            return 0
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + unused

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` is the device's or the CPU allocator's "not enough memory"."""
        if isinstance(error, torch.OutOfMemoryError):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return True
        return "DefaultCPUAllocator: can't allocate memory" in str(error)


class LocalNetworks:
    """One stage: a backbone that it shares, seen with this stage's patches."""

    def __init__(
        self, backbone: Backbone, unet: WeightDelta | None = None, vae: WeightDelta | None = None, name: str = ""
    ) -> None:
        self.backbone, self.device = backbone, backbone.device
        self.unet_delta, self.vae_delta = unet or WeightDelta(), vae or WeightDelta()
        backbone.unet_merger.check(self.unet_delta, name)
        backbone.vae_merger.check(self.vae_delta, name)

    @property
    def facts(self) -> NetworkFacts:
        """Geometry and memory of the shared backbone."""
        return replace(self.backbone.facts, free_bytes=self.backbone.free_bytes())

    def vae_calls(self, size: tuple[int, int]) -> int:
        """Tiles of one encode plus one decode of `size` pixels."""
        vae, fusion = self.backbone.tiled_vae, self.backbone.fusion
        return sum(vae.count(side, size, fuse=fusion) for side in ("encoder", "decoder"))

    def encode(self, pixels: Tensor, seed: int | None, on_tile: Callable[[], None]) -> Encoded:
        """Return scaled float32 latents of `B 3 H W` in 0..1 on the CPU, with what the decoder will fuse."""
        self.backbone.vae_merger.use(self.vae_delta)
        levels = fused_levels(self.backbone.fusion)
        z, features = self.backbone.tiled_vae.encode_with_features(pixels, levels, on_tile, seed=seed)
        return Encoded(z * self.backbone.vae.config.scaling_factor, features)

    def denoise(
        self,
        z: Tensor,
        t: int,
        condition: Tensor | list[Tensor],
        part: tuple[int, ...],
        body: Callable[[Predict], Tensor],
    ) -> Tensor:
        """Return `body(predict)` with this stage's patch in the UNet.

        `condition` is one for all tiles, or a list with one for each, by `Tile.index`.
        """
        self.backbone.unet_merger.use(self.unet_delta)

        def predict(parts: Tensor, tiles: Sequence[Tile]) -> Tensor:
            # The latents of one tile, of all pictures, lie next to each other.
            rows = [tile for tile in tiles for _ in range(len(parts) // len(tiles))]
            return self._predict_all(parts, t, condition, rows)

        return body(predict)

    def _predict_all(self, z: Tensor, t: int, condition: Tensor | list[Tensor], tiles: Sequence[Tile]) -> Tensor:
        # A CPU gains nothing from batching, and one tile at a time makes the bytes of a picture
        # independent of the tile batch.
        size = 1 if self.backbone.device.type == "cpu" else len(z)
        made = []
        for start in range(0, len(z), size):
            part, own = z[start : start + size], tiles[start : start + size]
            single = isinstance(condition, Tensor)
            text = condition.expand(len(part), -1, -1) if single else torch.cat([condition[tile.index] for tile in own])
            made.append(self._predict(part, t, text, own))
        return torch.cat(made).to(z.device)

    def _predict(self, z: Tensor, t: int, text: Tensor, tiles: Sequence[Tile]) -> Tensor:
        """Return eps of the rows of `z`, which lie at `tiles`."""
        output = self.backbone.unet(self._in(z), t, encoder_hidden_states=text).sample.float()
        if self.backbone.prediction == "epsilon":
            return output
        abar = scaled_linear().abar_at(t)
        return abar**0.5 * output + (1 - abar) ** 0.5 * z.to(output)

    def decode(self, encoded: Encoded, on_tile: Callable[[], None]) -> Tensor:
        """Return pixels `B 3 H W`, float32, on the CPU."""
        z, fusion = encoded.z / self.backbone.vae.config.scaling_factor, self.backbone.fusion
        return self.backbone.tiled_vae.decode(z, on_tile, fuse=fusion, features=encoded.features)

    def condition(self, text: str) -> Tensor:
        """Return the embedding `1 tokens width` of `text`."""
        return self.backbone.embed(text).to(self.backbone.device, self.backbone.dtype)

    def conditions(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the embedding `1 tokens width` of every text, loading the text encoder at most once."""
        unique = list(dict.fromkeys(texts))
        rows = self.backbone.embed(*unique).to(self.backbone.device, self.backbone.dtype).split(1)
        known = dict(zip(unique, rows, strict=True))
        return [known[text] for text in texts]

    def seeing(self, z: Tensor) -> LocalNetworks:
        """Return these networks: a plain UNet is not told what picture it works on."""
        return self

    def is_out_of_memory(self, error: BaseException) -> bool:
        """Whether `error` is the device's or the CPU allocator's "not enough memory"."""
        return self.backbone.is_out_of_memory(error)

    def _in(self, x: Tensor) -> Tensor:
        return x.to(self.backbone.device, self.backbone.dtype)


def load_embedded(
    device: str = "auto", dtype: str = "fp32", path: Path | None = None, inventive: float = NEUTRAL
) -> TwoStageModel:
    """Return the model shipped with this package (or another `tudsr-model` file) as two stages.

    `inventive`: the dial of `methods.turned`; ValueError outside 0..1.
    """
    path = path or embedded_path()
    file = read_model(path)
    vae, unet = load_networks(file.vae_config, file.vae, file.unet_config, file.unet, path)
    empty = torch.zeros(1, 1, unet.config.cross_attention_dim)
    backbone = Backbone(vae, unet, lambda *texts: empty.expand(len(texts), -1, -1), pick_device(device), DTYPES[dtype])
    dials = turned(inventive, None)
    how = {"strength": dials.strength, "dial": dials.words}
    second = LocalNetworks(backbone, file.second.unet, name="stage two")
    first = Stage(LocalNetworks(backbone), (file.first_step,), "stage one", **how)
    second = Stage(second, file.second.steps_for(2), "stage two", **how)
    return TwoStageModel(first, second, file.limits)


@dataclass(frozen=True)
class AdapterOptions:
    """How adapters are used, beyond what their files say.

    `method`: for files that leave it open (peft folders: tudsr or omgsr). `timestep`: of stage one, 0
    for the method's own. `steps`: network evaluations per tile (InvSR). `prompt`: None for the
    method's own. `fidelity` and `detail`: PiSA-SR's l_pix and l_sem. `tokenizer`: CLIP's folder, for
    prompts with a single-file base. `inventive`: the dial of `methods.turned`, for both stages.
    """

    method: str | None = None
    timestep: int = 0
    steps: int = 1
    prompt: str | None = None
    fidelity: float = 1.0
    detail: float = 1.0
    tokenizer: Path | None = None
    inventive: float = NEUTRAL


def load_sd21(
    base: Path,
    stage_one: Path,
    stage_two: Path | None = None,
    device: str = "auto",
    dtype: str = "fp32",
    options: AdapterOptions | None = None,
) -> TwoStageModel:
    """Return SD2.1-base or SD-Turbo, from a folder or a single checkpoint file, with stage adapters.

    Raises CheckpointError for missing or unsuitable files and for a stage-two adapter given as stage
    one, ValueError for options the method does not have.
    """
    options = options or AdapterOptions()
    check_exists(base)
    adapters = [read_adapter(stage_one, options.method, 1)]
    if stage_two is not None:
        adapters.append(read_adapter(stage_two, options.method, 2))
    vae, unet, embed = read_base(base, DTYPES[dtype], tokenizer=options.tokenizer)
    backbone = Backbone(vae, unet, embed, pick_device(device), DTYPES[dtype])
    stages = [adapted_stage(backbone, adapter, options) for adapter in adapters]
    if len(stages) == 2:
        return TwoStageModel(*stages, StageLimits())
    backbone.vae_merger.keep = False
    backbone.unet_merger.keep = len(stages[0].branches) > 1
    largest = adapters[0].about.first_max
    return TwoStageModel(stages[0], None, StageLimits(first_max=largest, single_up_to=largest))


def load_shared_networks(base: Path, device: str = "auto") -> SharedNetworks:
    """Return a Stable Diffusion model as a shared downsampler looks at it, in float32. Raises CheckpointError."""
    networks = load_sd2(base, device)
    backbone = networks.backbone
    return SharedNetworks(backbone.unet, backbone.vae, networks.condition("").float().clone())


def load_sd2(base: Path, device: str = "auto", dtype: str = "fp32", tokenizer: Path | None = None) -> LocalNetworks:
    """Return a Stable Diffusion model as it is, without adapters, from a folder or checkpoint file.

    Models of epsilon and of v prediction (SD2.1 at 768) are understood. `tokenizer` is CLIP's
    folder, for prompts with a single file. Raises CheckpointError.
    """
    return LocalNetworks(read_backbone(base, device, dtype, tokenizer))


def read_backbone(base: Path, device: str = "auto", dtype: str = "fp32", tokenizer: Path | None = None) -> Backbone:
    """Return the weights that `load_sd2` wraps."""
    vae, unet, embed = read_base(base, DTYPES[dtype], tokenizer=tokenizer, predictions=PREDICTIONS)
    return Backbone(vae, unet, embed, pick_device(device), DTYPES[dtype], read_prediction(base))


def adapted_stage(backbone: Backbone, adapter: Adapter, options: AdapterOptions) -> Stage:
    """Return the stage that `adapter` says it is for, on weights that other stages share."""
    first = adapter.stage == 1
    prompt = adapter.about.prompt if options.prompt is None else options.prompt
    if prompt is None:
        log.warning("%s was trained with tags of each picture; without --prompt it gets the empty one", adapter.name)
    adapter.dials(options.fidelity, options.detail)  # those of another method are refused
    count = options.steps if first else 1
    dials = turned(options.inventive, adapter.about, count, options.fidelity, options.detail)
    networks = [
        (weight, LocalNetworks(backbone, patch, adapter.vae, adapter.name))
        for weight, patch in adapter.branches(dials.fidelity, dials.detail)
    ]
    return Stage(
        networks[0][1],
        adapter.steps_for(adapter.stage, dials.count, options.timestep if first else 0),
        f"stage {'one' if first else 'two'}",
        prompt or "",
        tuple(networks) if len(networks) > 1 or networks[0][0] != 1 else (),
        _predictor(backbone, adapter) if adapter.predictor else None,
        adapter.about,
        dials.strength,
        dials.words,
    )


def _predictor(backbone: Backbone, adapter: Adapter) -> NoisePredictor:
    # In float32 as published, where the other networks may be in half precision.
    network = build_predictor(adapter.predictor, adapter.name).to(backbone.device, torch.float32)

    def predict(pixels: Tensor, t: int) -> tuple[Tensor, Tensor]:
        mean, deviation = network(pixels, t)
        return mean.cpu(), deviation.cpu()

    return predict
