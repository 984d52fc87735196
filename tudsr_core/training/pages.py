"""Pages of small print for training, as scanned or photographed: letters that a x4 or x8 picture hardly resolves.

Words follow English letter frequencies, because what a restorer may guess of a blurred letter is the mean
over the letters it could be. The texts of `drawn.py` are larger, and letters in any order.
"""

from __future__ import annotations

import io
import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from torch import Tensor

from ..pictures import resize
from .data import to_tensor

_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_OFTEN = np.array([int(n) for n in "127 91 82 75 70 67 63 61 60 43 40 28 28 24 24 22 20 20 19 15 10 8 2 2 1 1".split()])
SMALLEST, LARGEST = 7, 32  # pixels of the em
FINER = 2  # letters are set on a finer grid, so that a turn of the page blurs nothing


def draw_pages(count: int, side: int, fonts: list[bytes], rng: np.random.Generator) -> Tensor:
    """Return `count 3 side side` in 0..1: cuts of pages set in `fonts`, the content of TrueType files."""
    return torch.stack([_light(_photograph(_set_page(side, fonts, rng), side, rng), rng) for _ in range(count)])


def _word(rng: np.random.Generator) -> str:
    if rng.random() < 0.06:
        return str(rng.integers(0, 3000))
    letters = rng.choice(len(_LETTERS), int(rng.integers(1, 4) + rng.integers(0, 7)), p=_OFTEN / _OFTEN.sum())
    word = "".join(_LETTERS[i] for i in letters)
    word = word.capitalize() if rng.random() < 0.15 else word.upper() if rng.random() < 0.03 else word
    return word + str(rng.choice([",", ".", ":", ")", "-"])) if rng.random() < 0.15 else word


def _set_page(side: int, fonts: list[bytes], rng: np.random.Generator) -> Image.Image:
    """Set black paragraphs, headings and rules on white, larger than the cut so that it can be turned."""
    wide = round(side * 1.4) * FINER
    page = Image.new("L", (wide, wide), 255)
    draw = ImageDraw.Draw(page)
    body = float(np.exp(rng.uniform(math.log(SMALLEST), math.log(LARGEST)))) * FINER
    y = float(rng.uniform(-body, 0))
    while y < wide:
        heading = rng.random() < 0.1
        em = body * float(rng.uniform(1.3, 2)) if heading else body
        font = ImageFont.truetype(io.BytesIO(fonts[rng.integers(len(fonts))]), em)
        pitch, margin = em * float(rng.uniform(1.1, 1.6)), float(rng.uniform(-2, 2)) * em
        for _ in range(1 if heading else int(rng.integers(1, 9))):
            end = wide if rng.random() < 0.85 else wide * float(rng.random())
            words = " ".join(_word(rng) for _ in range(int(end / em / 2) + 1))
            draw.text((margin, y), words, fill=0, font=font)
            y += pitch
        if rng.random() < 0.2:
            draw.line([(0, y), (wide, y)], fill=int(rng.integers(0, 200)), width=int(rng.integers(1, 2 * FINER + 1)))
        y += float(rng.uniform(0.1, 1)) * pitch
    return page


def _photograph(page: Image.Image, side: int, rng: np.random.Generator) -> Tensor:
    """Turn the page a little, cut its middle out, and let a lens blur it; `1 side side`, 1 is paper."""
    turned = page.rotate(float(rng.normal(0, 4)), Image.Resampling.BICUBIC)
    edge = (page.width - side * FINER) // 2
    cut = turned.crop((edge, edge, edge + side * FINER, edge + side * FINER)).reduce(FINER)
    if rng.random() < 0.6:
        cut = cut.filter(ImageFilter.GaussianBlur(float(rng.uniform(0, 0.9))))
    return to_tensor(np.asarray(cut)[..., None])


def _light(page: Tensor, rng: np.random.Generator) -> Tensor:
    """Colour paper and ink, light them unevenly and add grain: `3 side side` of `1 side side`."""
    paper, ink = rng.uniform(0.55, 1), rng.uniform(0, 0.4)
    tint = rng.uniform(0, 0.25, (2, 3, 1, 1)) if rng.random() < 0.4 else np.zeros((2, 3, 1, 1))
    paper, ink = (torch.from_numpy(level - tint[i]).float() for i, level in enumerate((paper, ink)))
    if rng.random() < 0.2:
        paper, ink = ink, paper
    shade = 1 - 0.8 * float(rng.random() ** 3) * torch.from_numpy(rng.random((1, 1, 3, 3), np.float32))
    lit = (ink + (paper - ink) * page) * resize(shade, tuple(page.shape[-2:]))[0]
    grain = float(rng.uniform(0, 0.03)) * rng.standard_normal(page.shape, np.float32)
    return (lit + torch.from_numpy(grain)).clamp(0, 1)
