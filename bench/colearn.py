"""Whether co-learning makes a better upsampler for one kind of damage than classical damage does: small, but real.

    python bench/colearn.py PHOTOS WHEELS OUTPUT [--seeds 1,2,3] [--arms clean,...] [--choose]

PHOTOS holds the photographs of Debian's lomiri-wallpapers (`apt-get download lomiri-wallpapers-16.04
lomiri-wallpapers-20.04`, then `dpkg-deb -x` each), WHEELS the wheels of `tudsr_core/training/data.py`. OUTPUT gets
good and poor pictures and every training; a second run goes on where the first one stopped.

Half of the photographs, whole, are damaged by `hide` below; trainers see a folder of the results and a folder of
crops of the other half. Five upsamplers are trained for as many steps from the shipped model: on clean downscaling,
on Real-ESRGAN's damage, on what the pixel downsampler makes, on what the latent one makes, and by co-learning; half of
the pairs of the last three are Real-ESRGAN's. A sixth sees half true pairs of `hide`: what there is to gain. All are
measured on the five public pictures under `hide`, which nothing here was trained or chosen on; `--choose` measures on
two others, on which every setting was chosen.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from tudsr_core.backends.local import load_embedded
from tudsr_core.evaluation.metrics import psnr_y, ssim_y
from tudsr_core.methods.plan import StageLimits, Target
from tudsr_core.methods.two_stage import TwoStageModel, UpscaleOptions, upscale
from tudsr_core.models import load_downsampler, shrink
from tudsr_core.pictures.reading import read_picture
from tudsr_core.pictures.tensors import luma, resize
from tudsr_core.training.colearn_config import ColearnConfig, read_colearn
from tudsr_core.training.colearn_session import train_colearn
from tudsr_core.training.data import CHOICE, TRAIN, read_held_out, read_photos

GOOD = ("Dragonfly", "Picture_1A", "Wine", "aitzgorri", "greentock", "picosdeeuropa", "seeding")
POOR = ("Bridge", "Kleiber", "Picture_0B", "free", "friends", "life", "sunset")
GOOD_TOO = ("chelsea", "brick", "gravel", "coins", "hopper", "face", "blue-marble")
POOR_TOO = ("grass", "hubble", "ihc", "retina", "ascent", "blue-marble1", "relief")
LONGEST, CROP, CROPS = 1600, 320, 10  # pixels of a photograph's long side and of a good crop; crops of a photograph
FACTOR = 4
CONFIGS = Path(__file__).parent.parent / "configs"


def hide(sharp: Tensor, seed: int) -> Tensor:
    """Return the hidden damage of `1 3 H W`, 0..1: `1 3 h w`, a quarter of the size.

    A blur that is long in one direction, noise that grows with brightness and is correlated between neighbours, JPEG
    with halved colour; each a little different from picture to picture.
    """
    rng = np.random.default_rng([77, seed])
    long, short, angle = rng.uniform(3.0, 4.4), rng.uniform(1.2, 2.0), math.radians(rng.uniform(10, 50))
    axis = torch.arange(-12, 13).float()
    along = axis[None] * math.cos(angle) + axis[:, None] * math.sin(angle)
    across = axis[:, None] * math.cos(angle) - axis[None] * math.sin(angle)
    kernel = torch.exp(-(along**2) / (2 * long**2) - across**2 / (2 * short**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1, -1)
    blurred = F.conv2d(F.pad(sharp, (12,) * 4, mode="replicate"), kernel, groups=3)
    small = F.interpolate(blurred, scale_factor=1 / FACTOR, mode="area")
    grain = torch.from_numpy(rng.standard_normal((2, 3, *small.shape[-2:])).astype(np.float32))
    grain = 0.8 * grain[:1].mean(1, keepdim=True) * 3**0.5 + 0.6 * grain[1:]
    spread = torch.tensor([[0.2, 0.5, 0.2], [0.4, 1.0, 0.4], [0.2, 0.5, 0.2]])
    spread = (spread / spread.square().sum().sqrt()).expand(3, 1, -1, -1)
    grain = F.conv2d(F.pad(grain, (1,) * 4, mode="reflect"), spread, groups=3)
    gain = rng.uniform(0.8, 1.2) / 255
    noisy = small + gain * grain * (40 + 400 * small.clamp(0, 1)).sqrt()
    buffer = io.BytesIO()
    pixels = (noisy[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=int(rng.integers(40, 60)), subsampling=2)
    return torch.from_numpy(np.array(Image.open(buffer).convert("RGB"))).permute(2, 0, 1)[None] / 255


def write(path: Path, picture: Tensor) -> None:
    """Write `3 H W`, 0..1, as PNG."""
    Image.fromarray((picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()).save(path)


def photograph(folder: Path, name: str) -> Tensor:
    """Return a photograph of the package, shrunk, `1 3 H W`."""
    picture = read_picture(next(folder.glob(f"{name}_by_*.jpg"))).pixels[:, :3]
    shrink_by = max(1.0, max(picture.shape[-2:]) / LONGEST)
    return resize(picture, tuple(round(side / shrink_by) for side in picture.shape[-2:])).clamp(0, 1)


def whole(picture: Tensor) -> Tensor:
    """Return `1 3 H W` cut to whole poor pixels of whole blocks of JPEG."""
    return picture[..., : picture.shape[-2] // 64 * 64, : picture.shape[-1] // 64 * 64]


def prepare(photos: Path, wheels: Path, root: Path) -> None:
    """Write the two folders that trainers see."""
    if (root / "truth").exists():
        return
    public = {name: one[None] for name, one in read_photos(TRAIN, wheels).items()}
    for folder in (root / "good", root / "poor", root / "truth.part"):
        folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(5)
    for name in (*GOOD, *GOOD_TOO):
        picture = public[name] if name in public else photograph(photos, name)
        count = round(CROPS * min(1, picture.shape[-1] * picture.shape[-2] / 1e6)) + 1
        crops = []
        for _ in range(6 * count):
            top, left = (int(rng.integers(max(1, side - CROP + 1))) for side in picture.shape[-2:])
            crops.append(picture[0, :, top : top + CROP, left : left + CROP])
        crops.sort(key=lambda crop: -float(crop.std((1, 2)).mean()))  # flat sky teaches nothing
        for number, crop in enumerate(crops[: 3 * count : 3]):
            write(root / "good" / f"{name}-{number}.png", crop)
    for number, name in enumerate((*POOR, *POOR_TOO)):
        picture = whole(public[name] if name in public else photograph(photos, name))
        write(root / "poor" / f"{name}.png", hide(picture, number)[0])
    for number, path in enumerate(sorted((root / "good").iterdir())):
        write(root / "truth.part" / path.name, hide(read_picture(path).pixels[:, :3], 500 + number)[0])
    (root / "truth.part").rename(root / "truth")


def traits(poor: Tensor, sharp: Tensor) -> dict[str, float]:
    """Return what the damage of `poor`, `1 3 h w`, to `sharp`, `1 3 4h 4w`, looks like.

    `noise`: its standard deviation in steps of 8 bit; `across`, `down`: its correlation with the neighbour to the right
    and below; `blocks`: how much stronger steps of the luma are on the borders of JPEG's blocks; `bright`: its
    correlation, squared, with the picture; `colour`: the share of it that is not grey; `fine`: energy of the picture's
    finest quarter of frequencies against that of the clean downscale, in dB.
    """
    damage = poor - shrink(sharp, FACTOR)
    one = luma(damage)[0, 0]
    one = one - one.mean()
    power = one.square().mean()
    y = luma(poor)[0, 0]
    steps = y.diff(dim=1).abs().mean(0)
    border = torch.arange(1, y.shape[1]) % 8 == 0
    colour = (damage - damage.mean(1, keepdim=True)).square().mean() / damage.square().mean()
    fine = (_fine(poor) / _fine(shrink(sharp, FACTOR)).clamp_min(1e-12)).log10() * 10
    bright = torch.corrcoef(torch.stack([one.square().flatten(), luma(shrink(sharp, FACTOR)).flatten()]))[0, 1]
    found = {
        "noise": damage.std() * 255,
        "across": (one[:, 1:] * one[:, :-1]).mean() / power,
        "down": (one[1:] * one[:-1]).mean() / power,
        "blocks": steps[border].mean() / steps[~border].mean(),
        "bright": bright,
        "colour": colour,
        "fine": fine,
    }
    return {name: float(value) for name, value in found.items()}


def _fine(picture: Tensor) -> Tensor:
    spectrum = torch.fft.fft2(luma(picture)[0, 0]).abs().square()
    axes = torch.meshgrid(*(torch.fft.fftfreq(side).abs() for side in spectrum.shape), indexing="ij")
    return spectrum[torch.maximum(*axes) > 0.375].mean()


LESS = ("without D_H", "without teacher", "without cycle", "teacher alone", "cycle alone", "turns alone")
LEARNING = ("co-learning", "fresh critic", *LESS)  # in which the downsampler goes on learning
ARMS = ("clean", "real-esrgan", "pixel", "latent", *LEARNING, "truth")
DOWN = ("P", "G")
DONE = "done.json"
TAUGHT, STEPS, ALONE = 120, 200, 600  # of the teacher, of every student, of a downsampler alone
COMMON = dict(
    data=dict(size=128, batch=2, workers=0),
    optimizer=dict(rate=2e-4, down_rate=5e-4, critic_rate=2e-4, betas=(0.5, 0.99)),
    weights=dict(diversity=0.0),
    run=dict(precision="fp32", gradient_checkpointing=False, save_every=60, keep=1, tensorboard=False),
)
PAIRS_ONLY = dict(
    weights=dict(adversarial=0.0, cycle=0.0),
    teacher=dict(kind="none"),
    phases=dict(joint=STEPS),
    downsampler=dict(learns=False),
)
# Twice the steps, since student and downsampler take turns. What is less than the defaults is so for the sake of PSNR:
# the cycle's L1 outweighs the squared error of pairs, and an adversarial term invents; the inverse is another task.
TOGETHER = dict(
    weights=dict(adversarial=0.005, inverse=0.0, consistency=0.0, cycle=0.05, down_cycle=0.2, cycle_after=40),
    optimizer=dict(down_rate=2e-4),
    phases=dict(teacher=TAUGHT, joint=2 * STEPS),
    safeguards=dict(every=40),
)
NO_D_H = dict(weights=dict(adversarial=0.0))
NO_TEACHER = dict(weights=dict(distill=0.0), teacher=dict(kind="none"))
NO_CYCLE = dict(weights=dict(cycle=0.0, down_cycle=0.0))


def settings(root: Path, arm: str, seed: int) -> ColearnConfig:
    """Return what one training is asked to do; `arm` is one of ARMS, or of DOWN, which all seeds share."""
    folder = root / ("down" if arm in DOWN else f"seed-{seed}")
    down = {name: root / "down" / name / "downsampler.safetensors" for name in DOWN}
    going_on = dict(downsampler=dict(start=down["G"]), critics=dict(low=root / "down" / "G"))
    changes = {
        "P": (dict(downsampler=dict(kind="pixel"), phases=dict(warm=0, real=ALONE)),),
        "G": (dict(phases=dict(warm=0, real=ALONE)),),
        "clean": (PAIRS_ONLY, dict(data=dict(degradation="clean", classical=1.0))),
        "real-esrgan": (PAIRS_ONLY, dict(data=dict(classical=1.0))),
        "pixel": (PAIRS_ONLY, dict(downsampler=dict(start=down["P"]))),
        "latent": (PAIRS_ONLY, dict(downsampler=dict(start=down["G"]))),
        "truth": (PAIRS_ONLY, dict(data=dict(paired=True, poor=(root / "truth",)))),
        "teacher alone": (TOGETHER, going_on, NO_D_H, NO_CYCLE),
        "cycle alone": (TOGETHER, going_on, NO_D_H, NO_TEACHER),
        "turns alone": (TOGETHER, going_on, NO_D_H, NO_TEACHER, NO_CYCLE),
        "fresh critic": (TOGETHER, dict(downsampler=dict(start=down["G"]))),
        "without D_H": (TOGETHER, going_on, NO_D_H),
        "without teacher": (TOGETHER, going_on, NO_TEACHER),
        "without cycle": (TOGETHER, going_on, NO_CYCLE),
        "co-learning": (TOGETHER, going_on),
    }[arm]
    config = read_colearn(CONFIGS / "colearn.toml", "downsampler" if arm in DOWN else "colearn")
    config = replace(config, output=folder / arm, seed=1 if arm in DOWN else seed)
    for change in (dict(data=dict(good=(root / "good",), poor=(root / "poor",))), COMMON, *changes):
        config = _changed(config, change)
    return config


def _changed(config: ColearnConfig, changes: dict) -> ColearnConfig:
    return replace(config, **{name: replace(getattr(config, name), **change) for name, change in changes.items()})


def learn(root: Path, arm: str, seed: int) -> Path:
    """Run one training, or what is left of it, and return its folder."""
    config = settings(root, arm, seed)
    if not (config.output / DONE).exists():
        began = time.process_time()
        report = _reporter(f"{arm} {seed}", config.steps)
        if not train_colearn(config, resume=config.output.exists(), report=report).finished:
            raise SystemExit("stopped; the same command goes on from here")
        seconds = time.process_time() - began
        (config.output / DONE).write_text(json.dumps({"cpu_seconds": round(seconds)}), encoding="utf-8")
    return config.output


def _reporter(title: str, steps: int):
    sums: dict[str, list[float]] = {}

    def report(step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            sums.setdefault(name, []).append(value)
        if step % 40 == 0 or step == steps:
            said = "  ".join(f"{name} {statistics.mean(values):.4f}" for name, values in sums.items())
            sys.stdout.write(f"{title} {step}/{steps}  {said}\n")
            sys.stdout.flush()
            sums.clear()

    return report


def measure_upsampler(file: Path | None, pictures: dict[str, Tensor]) -> dict[str, float]:
    """Return means over `pictures` that `hide` has damaged; without a file, of the shipped model."""
    model = load_embedded("cpu", path=file)
    alone = TwoStageModel(model.first, None, StageLimits(first_max=FACTOR, single_up_to=FACTOR))
    rows = []
    for number, sharp in enumerate(pictures.values()):
        made = upscale(hide(sharp, 1000 + number), alone, Target(scale=FACTOR), UpscaleOptions(color_fix="none"))
        rows.append({"psnr": psnr_y(made, sharp), "ssim": ssim_y(made, sharp), "gmsd": gmsd(made, sharp)})
    return _means(rows)


def gmsd(picture: Tensor, truth: Tensor) -> float:
    """Return the gradient magnitude similarity deviation of the luma (Xue et al. 2014; lower is better)."""
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]
    slopes = []
    for one in (picture, truth):
        y = F.avg_pool2d(luma(one.float().clamp(0, 1)) * 255, 2)
        slopes.append(F.conv2d(y, kernels, padding=1).square().sum(1).sqrt())
    a, b = slopes
    return float(((2 * a * b + 170) / (a.square() + b.square() + 170)).std())


def measure_downsampler(file: Path | None, pictures: dict[str, Tensor]) -> dict[str, float]:
    """Return the means of `traits` of what a downsampler makes; without a file, of `hide` itself."""
    network = file and load_downsampler(file)
    made = (
        network.degrade(sharp, seed=number) if network else hide(sharp, 1000 + number)
        for number, sharp in enumerate(pictures.values())
    )
    return _means([traits(poor, sharp) for poor, sharp in zip(made, pictures.values(), strict=True)])


def kept(place: Path, arm: str, seed: int, measure) -> dict:
    """Return a row of a table, from the file `place` if it was measured before."""
    if not place.exists():
        place.write_text(json.dumps({"arm": arm, "seed": seed} | measure()), encoding="utf-8")
    return json.loads(place.read_text("utf-8"))


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(row[name] for row in rows) for name in rows[0]}


def show(rows: list[dict], names: tuple[str, ...]) -> None:
    """Print a table: means over seeds and how far apart the seeds are."""
    keys = [key for key in rows[0] if key not in ("arm", "seed")]
    sys.stdout.write(f"| | {' | '.join(keys)} | seeds |\n|{'---|' * (len(keys) + 2)}\n")
    for name in names:
        own = [row for row in rows if row["arm"] == name]
        if own:
            cells = [
                f"{statistics.mean(v):.3f} +- {statistics.stdev(v) if len(v) > 1 else 0:.3f}"
                for v in ([row[key] for row in own] for key in keys)
            ]
            sys.stdout.write(f"| {name} | {' | '.join(cells)} | {len(own)} |\n")


def main() -> None:
    """Train what is not trained yet, and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("wheels", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--arms", default=",".join((*DOWN, *ARMS)))
    parser.add_argument("--choose", action="store_true", help="measure on the pictures for choosing settings")
    args = parser.parse_args()
    torch.set_num_threads(1)
    prepare(args.photos, args.wheels, args.output)
    pictures = read_photos(CHOICE, args.wheels) if args.choose else read_held_out()
    pictures = {name: whole(one[None]) for name, one in pictures.items()}
    which = "choice" if args.choose else "held-out"
    up = [kept(args.output / f"shipped {which}.json", "shipped", 0, lambda: measure_upsampler(None, pictures))]
    down = [kept(args.output / f"hidden {which}.json", "hidden", 0, lambda: measure_downsampler(None, pictures))]
    for seed in map(int, args.seeds.split(",")):
        for arm in args.arms.split(","):
            folder = learn(args.output, arm, seed)
            if arm in ARMS:
                file = folder / "model.safetensors"
                up.append(kept(folder / f"up {which}.json", arm, seed, lambda f=file: measure_upsampler(f, pictures)))
            if arm in (*DOWN, *LEARNING):
                file = folder / "downsampler.safetensors"
                place = folder / f"down {which}.json"
                down.append(kept(place, arm, seed, lambda f=file: measure_downsampler(f, pictures)))
    show(up, ("shipped", *ARMS))
    show(down, ("hidden", *DOWN, *LEARNING))


if __name__ == "__main__":
    main()
