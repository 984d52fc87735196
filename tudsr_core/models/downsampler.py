"""Networks that make a good picture small and poor as real pictures are, behind one `degrade`.

A reconstruction of the downsampler of co-learning (Kim and Kim 2024, arXiv 2410.07663), of which neither code nor
losses are public. "latent" is the paper's: a single diffusion step from noise at the small size, conditioned on the
good picture's latent. "pixel" is the light control beside it, without any diffusion. Both add what they predict to
the antialiased downscale, so that a strength of 0 is that downscale, and neither looks further than a fixed number
of pixels, so that tiles are exact. They work on a grid of one poor pixel for 4 x 4 good ones; another factor resizes
the good picture to that grid first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pictures import gaussian_blur
from ..untrusted import shown
from .embedded import RMSNorm, make_vae
from .learned_damage import GRID, LearnedDamage, on_sphere

KINDS = ("pixel", "latent")
KEPT_SIGMA = 2.0  # of the blur that says what content and colour are, in poor pixels
PERIODS = (8, 16)  # of JPEG's blocks, and of those of its halved colour
WAVES = 0.25  # small: a pattern of place is easier to make than noise, and looks like stripes


@dataclass(frozen=True)
class DownsamplerConfig:
    """What a network is built from; raises ValueError for what it cannot be.

    `width` channels in `blocks` residual blocks; a code of `code` numbers says which kind of damage; "pixel" draws
    `maps` maps of noise (of "latent", noise is the three channels that it begins with). `vae` is the config of
    the autoencoder whose encoder "latent" sees by. The noise that "latent" begins with is ResShift's:
    `kappa` times `root`, the published kappa sqrt(eta_T) of 2 x 0.99. With `keeps` nothing that a blur of sigma 2
    leaves is added: content and colour stay, and only what is finer is damaged.
    """

    kind: str = "pixel"
    width: int = 48
    blocks: int = 6
    code: int = 16
    maps: int = 4
    kappa: float = 2.0
    root: float = 0.99
    keeps: bool = True
    vae: dict | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {shown(self.kind)!r}; it must be one of: {', '.join(KINDS)}")
        for name, most in (("width", 512), ("blocks", 64), ("code", 256), ("maps", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be from 1 to {most}")
        if not isinstance(self.keeps, bool):
            raise ValueError(f"keeps is {shown(self.keeps)!r}, it must be true or false")
        if (self.kind == "latent") != (self.vae is not None):
            raise ValueError("kind latent needs the config of an autoencoder, and pixel none")


class Block(nn.Module):
    """x + conv2(silu(film(conv1(silu(norm(x)))) + mixed noise)); the norm is over channels alone, so all is local."""

    def __init__(self, width: int, code: int, maps: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.conv1, self.conv2 = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.film = nn.Linear(code, 2 * width)
        self.mix = nn.Conv2d(maps, width, 1, bias=False) if maps else None

    def forward(self, x: Tensor, code: Tensor, noise: Tensor) -> Tensor:
        scale, move = self.film(code)[..., None, None].chunk(2, 1)
        hidden = self.conv1(F.silu(self.norm(x))) * (1 + scale) + move
        if self.mix is not None:
            hidden = hidden + self.mix(noise)
        return x + self.conv2(F.silu(hidden))


class StyleEncoder(nn.Module):
    """A bad picture `B 3 h w`, 0..1, to its code: the mean of three convolutions, brought onto the sphere of codes."""

    def __init__(self, code: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, 2, 1),
            nn.SiLU(),
        )
        self.out = nn.Linear(width, code)

    def forward(self, picture: Tensor) -> Tensor:
        return on_sphere(self.out(self.layers(picture * 2 - 1).mean((2, 3))))


class Downsampler(LearnedDamage):
    """One network of either kind, with the encoder of styles that was trained with it."""

    def __init__(self, config: DownsamplerConfig) -> None:
        super().__init__()
        self.config = config
        seen, self.encoder = 3 * GRID**2, None
        if config.kind == "latent":
            vae = make_vae(config.vae, "a downsampler's file")
            if vae.latent_scale != GRID:
                raise ValueError(f"its autoencoder has {vae.latent_scale} pixels a latent, where {GRID} are needed")
            self.encoder, seen = vae.encoder.requires_grad_(False), vae.config.latent_channels
            self.scaling = vae.config.scaling_factor
        self.conv_in = nn.Conv2d(seen + 3 + 4 * len(PERIODS), config.width, 3, padding=1)
        mixed = config.maps if config.kind == "pixel" else 0
        self.blocks = nn.ModuleList(Block(config.width, config.code, mixed) for _ in range(config.blocks))
        self.conv_out = nn.Conv2d(config.width, 3, 3, padding=1)
        self.style = StyleEncoder(config.code)
        nn.init.zeros_(self.conv_out.weight)  # so that an untrained one returns the downscale
        nn.init.zeros_(self.conv_out.bias)

    @property
    def noise_channels(self) -> int:
        """How many maps of noise there are at the small size."""
        return self.config.maps if self.config.kind == "pixel" else 3

    @property
    def reach(self) -> int:
        """How many poor pixels away anything can have an effect, at most."""
        own = 2 + 2 * len(self.blocks) + (round(4 * KEPT_SIGMA) if self.config.keeps else 0)
        if self.encoder is None:
            return own
        return own + sum(isinstance(module, nn.Conv2d) for module in self.encoder.modules())

    def tile_bytes(self, tile: int) -> int:
        """Return about how much memory a tile of `tile` poor pixels takes, in float32."""
        side, width = tile + 2 * self.reach, max(3 * self.config.width, 3 * GRID**2 * 4)
        return 4 * side**2 * width

    def condition(self, sharp: Tensor) -> Tensor:
        """Return what is seen of the good picture `B 3 4h 4w`, 0..1: its latent, or its pixels as channels, `B C h w`.

        The encoder is the upsampler's own and frozen; the picture's gradient passes through it.
        """
        if self.encoder is None:
            return F.pixel_unshuffle(sharp * 2 - 1, GRID)
        return self.encoder(sharp * 2 - 1) * self.scaling

    def forward(
        self, condition: Tensor, base: Tensor, noise: Tensor, code: Tensor, place: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Return what is added to the downscale `base`, `B 3 h w`, 0..1, at strength 1.

        `noise` is `B noise_channels h w`, `code` is `B D`; `place` is where in the poor picture this part lies,
        since JPEG's blocks are counted from its corner.
        """
        start = base * 2 - 1
        if self.config.kind == "latent":
            std = self.config.kappa * self.config.root
            start = (start + std * noise) * (std**2 + 1) ** -0.5
        waves = block_waves(tuple(base.shape[-2:]), place).to(base).expand(len(base), -1, -1, -1)
        x = self.conv_in(torch.cat([condition, start, waves], 1))
        for block in self.blocks:
            x = block(x, code, noise)
        added = self.conv_out(x)
        return added - gaussian_blur(added, KEPT_SIGMA) if self.config.keeps else added


def block_waves(size: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """Return `1 8 h w`: cosine and sine, times WAVES, of where in a block of JPEG each row and each column lies."""
    waves = []
    for period in PERIODS:
        for axis, (side, begin) in enumerate(zip(size, place, strict=True)):
            angle = (torch.arange(side) + begin) % period * (2 * math.pi / period)
            shape = (side, 1) if axis == 0 else (1, side)
            waves += [wave.view(shape).expand(size) for wave in (angle.cos(), angle.sin())]
    return WAVES * torch.stack(waves)[None]
