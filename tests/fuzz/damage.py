"""Ways to damage the bytes of any file."""

from __future__ import annotations

import random

EXTREME = (0, 1, 2, 3, 5, 7, 127, 255, 256, 4096, 65535, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def flip_bits(rng: random.Random, data: bytearray) -> bytearray:
    """Flip one to many bits anywhere."""
    for _ in range(rng.choice((1, 2, 8, 64))):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data


def damage_head(rng: random.Random, data: bytearray) -> bytearray:
    """Overwrite bytes of the header only."""
    for _ in range(rng.randint(1, 4)):
        data[rng.randrange(min(len(data), 80))] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))
    return data


def truncate(rng: random.Random, data: bytearray) -> bytearray:
    """Cut the end off, or a piece out of the middle."""
    at = rng.randrange(1, len(data))
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.randint(1, 64) :]


def grow(rng: random.Random, data: bytearray) -> bytearray:
    """Repeat a piece, or put noise in."""
    at = rng.randrange(2, len(data))
    piece = data[at : at + rng.randint(1, 200)] * rng.randint(1, 50) if rng.random() < 0.5 else rng.randbytes(50)
    return data[:at] + piece + data[at:]
