"""Networks that make a good picture small and poor as real pictures are, behind one `degrade`.

A reconstruction of the downsampler of co-learning (Kim and Kim 2024, arXiv 2410.07663), of which neither code nor
losses are public. "latent" is the paper's: a single diffusion step from noise at the small size, conditioned on the
good picture's latent. "pixel" is the light control beside it, without any diffusion. Both add what they predict to
the antialiased downscale, so that a strength of 0 is that downscale, and neither looks further than a fixed number
of pixels, so that tiles are exact. They work on a grid of one poor pixel for 4 x 4 good ones; another factor resizes
the good picture to that grid first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pictures import resize
from ..untrusted import Fields, parse_json, shown
from ..weights import CheckpointError, read_file, write_file
from .embedded import RMSNorm, make_vae
from .fill_weights import fill

DOWNSAMPLER_FORMAT = "tudsr-downsampler/1"
KINDS = ("pixel", "latent")
GRID = 4  # good pixels for a poor one, a side
LEAST_FACTOR, MOST_FACTOR, MOST_STRENGTH = 1.0, 8.0, 1.5
TILE = 256  # poor pixels a side, without the surroundings that are computed with them
PERIODS = (8, 16)  # of JPEG's blocks, and of those of its halved colour
STYLE_SIDE = 512  # of the middle of a style picture, which is all that is looked at

Tick = Callable[[int, int, object], None]


@dataclass(frozen=True)
class DownsamplerConfig:
    """What a network is built from; raises ValueError for what it cannot be.

    `width` channels in `blocks` residual blocks; a code of `code` numbers says which kind of damage; "pixel" draws
    `maps` maps of noise (of "latent", noise is the three channels that it begins with). `vae` is the config of
    the autoencoder whose encoder "latent" sees by. The noise that "latent" begins with is ResShift's:
    `kappa` times `root`, the published kappa sqrt(eta_T) of 2 x 0.99.
    """

    kind: str = "pixel"
    width: int = 48
    blocks: int = 6
    code: int = 16
    maps: int = 4
    kappa: float = 2.0
    root: float = 0.99
    vae: dict | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {shown(self.kind)!r}; it must be one of: {', '.join(KINDS)}")
        for name, most in (("width", 512), ("blocks", 64), ("code", 256), ("maps", 64)):
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} must be from 1 to {most}")
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


def on_sphere(code: Tensor) -> Tensor:
    """Return codes `B D` of length sqrt(D), that of a drawn one: so drawn and encoded codes lie in one place."""
    return F.normalize(code, dim=1) * code.shape[1] ** 0.5


class Downsampler(nn.Module):
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
        own = 2 + 2 * len(self.blocks)
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
        return self.conv_out(x)

    @torch.no_grad()
    def degrade(
        self,
        sharp: Tensor,
        factor: float = 4.0,
        seed: int = 0,
        strength: float = 1.0,
        style: Tensor | None = None,
        tile: int = TILE,
        tick: Tick | None = None,
    ) -> Tensor:
        """Return pictures `B 3 h w`, 0..1, with sides `round(H / factor)`, of good ones `B 3 H W`, 0..1.

        Picture n of a batch has the seed after the one before it, as everywhere here. `style` is a bad picture
        `1 3 h w` whose kind of damage is taken; without it a kind is drawn. `strength` multiplies the damage;
        at 0 this is `shrink`. Noise is drawn for the whole picture on the CPU and cut, and tiles of `tile` poor
        pixels see all that can have an effect: the result does not depend on `tile` but for rounding. `tick` is
        told of every tile. Raises ValueError for a factor or strength that is out of range.
        """
        if not 0 <= strength <= MOST_STRENGTH:
            raise ValueError(f"strength {strength:g} must be from 0 to {MOST_STRENGTH:g}")
        base = shrink(sharp, factor)
        if strength == 0:
            return base
        size, device = tuple(base.shape[-2:]), self.conv_out.weight.device
        large = resize(sharp, tuple(side * GRID for side in size)).clamp(0, 1)
        parts = boxes(size, tile, self.reach)
        for number in range(len(sharp)):
            noise, code = self.draw(size, seed + number)
            if style is not None:
                code = self.style(middle(style[:1, :3], STYLE_SIDE).to(device))
            one, result = base[number : number + 1].clone(), base[number : number + 1]
            for done, part in enumerate(parts, 1 + number * len(parts)):
                moved = (x[part.seen].to(device) for x in (one, noise))
                seen = self.condition(large[number : number + 1][part.large].to(device))
                added = self(seen, *moved, code.to(device), part.place)[part.kept]
                result[part.made] += strength * added.to(base)
                if tick:
                    tick(done, len(parts) * len(sharp), None)
        return base.clamp(0, 1)

    def draw(self, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
        """Return noise `1 K h w` for a whole poor picture and a code `1 D`, drawn from `seed` on the CPU."""
        rng = torch.Generator().manual_seed(seed)
        code = on_sphere(torch.randn(1, self.config.code, generator=rng))
        return torch.randn(1, self.noise_channels, *size, generator=rng), code


def shrink(sharp: Tensor, factor: float) -> Tensor:
    """Return the antialiased bicubic downscale of `B 3 H W`, clamped to 0..1; sides are `round(side / factor)`."""
    if not LEAST_FACTOR <= factor <= MOST_FACTOR:
        raise ValueError(f"factor {factor:g} must be from {LEAST_FACTOR:g} to {MOST_FACTOR:g}")
    return resize(sharp, tuple(max(1, round(side / factor)) for side in sharp.shape[-2:])).clamp(0, 1)


def middle(picture: Tensor, side: int) -> Tensor:
    """Return the middle of `B C H W`, at most `side` a side."""
    top, left = (max(0, have - side) // 2 for have in picture.shape[-2:])
    return picture[..., top : top + side, left : left + side]


def block_waves(size: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """Return `1 8 h w`: cosine and sine of where in a block of JPEG each row and each column lies."""
    waves = []
    for period in PERIODS:
        for axis, (side, begin) in enumerate(zip(size, place, strict=True)):
            angle = (torch.arange(side) + begin) % period * (2 * math.pi / period)
            shape = (side, 1) if axis == 0 else (1, side)
            waves += [wave.view(shape).expand(size) for wave in (angle.cos(), angle.sin())]
    return torch.stack(waves)[None]


@dataclass(frozen=True)
class Box:
    """One tile: what of the poor picture it sees, what of the good one, what it makes, and where that lies in it."""

    seen: tuple
    large: tuple
    made: tuple
    kept: tuple
    place: tuple[int, int]


def boxes(size: tuple[int, int], tile: int, reach: int) -> list[Box]:
    """Return the tiles of a poor picture of `size`; raises ValueError for a tile below 1."""
    if tile < 1:
        raise ValueError(f"tile {tile} must be 1 or more")
    rows, columns = ([(start, min(start + tile, side)) for start in range(0, side, tile)] for side in size)
    found = []
    for made in ((row, column) for row in rows for column in columns):
        seen = [(max(0, a - reach), min(side, b + reach)) for (a, b), side in zip(made, size, strict=True)]
        kept = [(a - begin, b - begin) for (a, b), (begin, _) in zip(made, seen, strict=True)]
        large = [(a * GRID, b * GRID) for a, b in seen]
        spans = ((..., *(slice(a, b) for a, b in span)) for span in (seen, large, made, kept))
        found.append(Box(*spans, tuple(begin for begin, _ in seen)))
    return found


def write_downsampler(path: Path, network: Downsampler, notes: Mapping[str, str] | None = None) -> None:
    """Write one float16 safetensors file, atomically; `notes` are metadata for people, such as how it was trained."""
    tensors = {key: value.detach().half().cpu() for key, value in network.state_dict().items()}
    write_file(
        path,
        tensors,
        {**(notes or {}), "format": DOWNSAMPLER_FORMAT, "downsampler": json.dumps(asdict(network.config))},
    )


def load_downsampler(path: Path) -> Downsampler:
    """Return the network of a file, float32 on the CPU, frozen; raises CheckpointError that says what is wrong."""
    file = read_file(path)
    if file.metadata.get("format") != DOWNSAMPLER_FORMAT:
        said = shown(file.metadata.get("format", "nothing"))
        raise CheckpointError(
            f"{path} is no downsampler (its metadata says {said}); choose a file that tudsr train has written as one"
        )
    where = f"the metadata of {path}"
    fields = Fields(
        parse_json(file.metadata.get("downsampler", "null"), where, CheckpointError), where, CheckpointError
    )
    fields.only(*DownsamplerConfig.__dataclass_fields__)
    try:
        config = DownsamplerConfig(
            fields.text("kind"),
            *(fields.whole(name) for name in ("width", "blocks", "code", "maps")),
            fields.number("kappa", least=0, most=100),
            fields.number("root", least=0, most=1),
            fields.values.get("vae"),
        )
        with torch.device("meta"):
            network = Downsampler(config)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}; get the file again, or update this pack") from error
    return fill(network, file.tensors, path, "the downsampler of its config", "get the file again")
