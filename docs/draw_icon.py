"""Draws docs/icon.png and docs/banner.jpg, the pack's pictures in the registry: `python docs/draw_icon.py`.

Both show the shipped photo before and after the embedded model, x8, divided by a line.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from tudsr_core import Target, load_embedded, read_picture, upscale
from tudsr_core.evaluation import example_path

ICON, BANNER = Path(__file__).with_name("icon.png"), Path(__file__).with_name("banner.jpg")
SCALE, SMOOTH = 8, 4
"""The factor of the enlargement; how much finer shapes are drawn before they are shrunk, so that edges are smooth."""
ICON_SIDE, BANNER_SIZE = 400, (1470, 630)
"""The registry's: a square of at most 400 px; 21:9."""
DARK, LIGHT, DIM = (27, 24, 26), (250, 246, 241), (196, 184, 176)


def before_and_after() -> tuple[Image.Image, Image.Image]:
    """Return the shipped photo enlarged without and with the embedded model, both of one size."""
    with Image.open(example_path()) as image:
        small = image.convert("RGB")
    pixels = upscale(read_picture(example_path()).pixels, load_embedded(), Target(scale=SCALE))
    array = (pixels[0, :3].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    large = Image.fromarray(array)
    return small.resize(large.size, Image.Resampling.NEAREST), large


def divided(
    pair: tuple[Image.Image, Image.Image], box: tuple[int, int, int, int], size: tuple[int, int]
) -> Image.Image:
    """Return `box` of both pictures at `size`: left of the middle the first, right of it the second."""
    first, second = (one.crop(box).resize(size, Image.Resampling.LANCZOS) for one in pair)
    second.paste(first.crop((0, 0, size[0] // 2, size[1])), (0, 0))
    return second


def handle(picture: Image.Image, radius: int, down: float) -> None:
    """Draw the divider in the middle of a picture: a line, and `down` from its top a knob with two arrows."""
    width, height = (side * SMOOTH for side in picture.size)
    middle, level, r = width // 2, round(height * down), radius * SMOOTH
    layer = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(layer)
    line = max(1, r // 9)
    draw.rectangle((middle - line, 0, middle + line, height), fill=LIGHT)
    draw.ellipse((middle - r, level - r, middle + r, level + r), fill=LIGHT)
    for side in (-1, 1):
        tip, back, half = middle + side * r * 0.66, middle + side * r * 0.26, r * 0.32
        draw.polygon([(tip, level), (back, level - half), (back, level + half)], fill=DARK)
    layer = layer.resize(picture.size, Image.Resampling.LANCZOS)
    picture.paste(layer, mask=layer.getchannel("A"))


def rounded(picture: Image.Image, radius: int) -> Image.Image:
    """Return a picture whose corners are round and transparent."""
    mask = Image.new("L", [side * SMOOTH for side in picture.size])
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, *mask.size), radius * SMOOTH, fill=255)
    picture = picture.convert("RGBA")
    picture.putalpha(mask.resize(picture.size, Image.Resampling.LANCZOS))
    return picture


def icon(pair: tuple[Image.Image, Image.Image]) -> Image.Image:
    """Return the icon: the spoon before and after, and the factor."""
    side = ICON_SIDE
    picture = divided(pair, (790, 590, 1130, 930), (side, side))
    handle(picture, 30, 0.83)
    return rounded(picture, 72)


def banner(pair: tuple[Image.Image, Image.Image]) -> Image.Image:
    """Return the banner: name and purpose beside the photo before and after."""
    width, height = BANNER_SIZE
    shown = round(height * 1.3)
    picture = divided(pair, (70, 0, 70 + round(1064 * 1.3), 1064), (shown, height))
    handle(picture, 36, 0.78)
    whole = Image.new("RGB", BANNER_SIZE, DARK)
    whole.paste(picture, (width - shown, 0))
    draw = ImageDraw.Draw(whole)
    draw.text((64, 150), "TUDSR", LIGHT, ImageFont.load_default(132))
    for row, text in enumerate(("Diffusion super-resolution", "in two one-step stages,", "in tiles, at any size")):
        draw.text((68, 316 + 52 * row), text, DIM, ImageFont.load_default(38))
    return whole


if __name__ == "__main__":
    torch.set_num_threads(1)
    both = before_and_after()
    icon(both).save(ICON, optimize=True)
    banner(both).save(BANNER, quality=88, optimize=True)
