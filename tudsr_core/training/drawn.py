"""Procedural pictures for training: dead leaves, text, patterns and smooth colour, each from its own seed."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pictures import resize
from .data import to_tensor

# How a process that draws is started: a fork shares the photos, which elsewhere travel to it once.
START = "fork" if sys.platform == "linux" else "spawn"
_palettes: list[Tensor] = []


def draw_gradients(count: int, size: int, rng: np.random.Generator) -> Tensor:
    """Return `count 3 size size` of smooth colour, saturated ones included: where a weave would show."""
    coarse = torch.from_numpy(rng.random((count, 3, 3, 3), np.float32))
    spread = torch.from_numpy(rng.random((count, 1, 1, 1), np.float32)) ** 2
    flat = torch.from_numpy(rng.random((count, 3, 1, 1), np.float32))
    return resize(flat + (coarse - flat) * spread, (size, size)).clamp(0, 1)


def draw_pictures(count: int, seed: int, palettes: list[Tensor], size: int = 288, workers: int = 0) -> list[Tensor]:
    """Return `count` procedural pictures `3 size size`: leaves, text and regular patterns.

    Dead leaves (occluding shapes with power-law radii) have the edge and occlusion statistics of
    photos (Lee, Mumford and Huang 2001; Achddou et al. 2021 train restorers on nothing else).
    Picture n follows from `seed` and n alone, so that the number of `workers` (processes; 0: none) changes nothing.
    """
    if not workers:
        return [to_tensor(_draw(seed, size, palettes, number)) for number in range(count)]
    with ProcessPoolExecutor(workers, get_context(START), _start_drawing, (palettes,)) as pool:
        return [to_tensor(array) for array in pool.map(partial(_draw, seed, size, None), range(count), chunksize=4)]


def _start_drawing(palettes: list[Tensor]) -> None:
    torch.set_num_threads(1)
    _palettes[:] = palettes


def _draw(seed: int, size: int, palettes: list[Tensor] | None, number: int) -> np.ndarray:
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    draw = (_draw_leaves, _draw_text, _draw_pattern)[rng.choice(3, p=(0.7, 0.14, 0.16))]
    return np.asarray(draw(rng, size, palettes or _palettes).reduce(2))


def _color(rng: np.random.Generator, palettes: list[Tensor]) -> tuple[int, int, int]:
    palette = palettes[rng.integers(len(palettes))]
    y, x = rng.integers(palette.shape[1]), rng.integers(palette.shape[2])
    return tuple(int(v) for v in (palette[:, y, x] * 255).round())


def _draw_leaves(rng: np.random.Generator, size: int, palettes: list[Tensor]) -> Image.Image:
    side = size * 2
    image = Image.new("RGB", (side, side), _color(rng, palettes))
    draw = ImageDraw.Draw(image)
    smallest, largest = float(np.exp(rng.uniform(math.log(6), math.log(40)))), side / 2
    for _ in range(int(rng.integers(150, 700))):
        u = rng.random()
        radius = (smallest**-2 + u * (largest**-2 - smallest**-2)) ** -0.5
        cx, cy = rng.uniform(0, side, 2)
        corners = int(rng.choice((3, 4, 5, 7, 40), p=(0.15, 0.25, 0.1, 0.1, 0.4)))
        angles = np.sort(rng.uniform(0, math.tau, corners)) if corners < 40 else np.linspace(0, math.tau, corners)
        squash, turn = rng.uniform(0.25, 1), rng.uniform(0, math.tau)
        px, py = radius * np.cos(angles), radius * squash * np.sin(angles)
        xs = cx + px * math.cos(turn) - py * math.sin(turn)
        ys = cy + px * math.sin(turn) + py * math.cos(turn)
        points = list(zip(xs.tolist(), ys.tolist(), strict=True))
        fill = _color(rng, palettes)
        if rng.random() < 0.15:
            draw.line([*points, points[0]], fill=fill, width=int(rng.integers(2, 9)))
        else:
            draw.polygon(points, fill=fill)
    array = np.asarray(image, np.float32)
    strength = rng.uniform(0, 22)
    texture = _pink_noise(rng, side, rng.uniform(0.6, 1.6)) * strength
    light = 1 + 0.25 * _pink_noise(rng, side, 2.5)
    shaded = array * light[..., None] + texture[..., None] * rng.uniform(0.6, 1, 3).astype(np.float32)
    return Image.fromarray(shaded.clip(0, 255).astype(np.uint8))


def _pink_noise(rng: np.random.Generator, side: int, power: float) -> np.ndarray:
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    radius = np.maximum(np.hypot(fy, fx), 1 / side)
    spectrum = np.fft.rfft2(rng.standard_normal((side, side))) / radius**power
    noise = np.fft.irfft2(spectrum, (side, side))
    return (noise / noise.std()).astype(np.float32)


def _draw_text(rng: np.random.Generator, size: int, palettes: list[Tensor]) -> Image.Image:
    side = size * 2
    image = Image.new("RGB", (side, side), _color(rng, palettes) if rng.random() < 0.5 else (245, 244, 240))
    draw = ImageDraw.Draw(image)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?()-"))
    y = float(rng.uniform(-10, 10))
    while y < side:
        height = int(rng.integers(14, 72))
        words = ["".join(rng.choice(letters, rng.integers(2, 10))) for _ in range(16)]
        fill = _color(rng, palettes) if rng.random() < 0.5 else (20, 20, 24)
        draw.text((float(rng.uniform(-20, 20)), y), " ".join(words), fill=fill, font=ImageFont.load_default(height))
        y += height * 1.25
    return image.rotate(float(rng.uniform(-12, 12)), Image.Resampling.BICUBIC, fillcolor=image.getpixel((0, 0)))


def _draw_pattern(rng: np.random.Generator, size: int, palettes: list[Tensor]) -> Image.Image:
    side = size * 2
    y, x = np.mgrid[0:side, 0:side].astype(np.float32)
    turn, period = rng.uniform(0, math.pi), float(np.exp(rng.uniform(math.log(8), math.log(120))))
    u = (x * math.cos(turn) + y * math.sin(turn)) / period
    v = (y * math.cos(turn) - x * math.sin(turn)) / (period * rng.uniform(0.4, 2.5))
    kind = rng.integers(4)
    if kind == 0:
        mask = ((np.floor(u) + np.floor(v)) % 2).astype(np.float32)
    elif kind == 1:
        mask = ((u % 1 < rng.uniform(0.1, 0.6)) | (v % 1 < rng.uniform(0.05, 0.4))).astype(np.float32)
    elif kind == 2:
        mask = (0.5 + 0.5 * np.sin(math.tau * (u + rng.uniform(0, 0.4) * np.sin(v)))).astype(np.float32)
    else:
        mask = (np.hypot(u - u.mean(), v - v.mean()) % 1 < rng.uniform(0.2, 0.7)).astype(np.float32)
    a, b = (np.array(_color(rng, palettes), np.float32) for _ in range(2))
    array = a * mask[..., None] + b * (1 - mask[..., None])
    array = array + rng.uniform(0, 8) * _pink_noise(rng, side, 1.0)[..., None]
    return Image.fromarray(array.clip(0, 255).astype(np.uint8))
