"""Perceptual metrics through pyiqa, the package with which the published tables were made.

Its licence is non-commercial and most of its metrics fetch weights, so it is never a requirement, and
is imported only when one of its metrics is asked for.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ..pictures import Picture, write_picture
from .measurement import Result

# In the order of TUDSR's tables; the names are pyiqa's.
PERCEPTUAL = {
    "fid": "FID",
    "niqe": "NIQE",
    "clipiqa+": "CLIPIQA+",
    "liqe": "LIQE",
    "musiq": "MUSIQ",
    "maniqa": "MANIQA",
    "lpips": "LPIPS",
    "dists": "DISTS",
}


class Perceptual:
    """Means of perceptual metrics by case and method, gathered one result at a time.

    `wanted`: names of pyiqa's metrics, joined by commas, or "all" for those of the published tables.
    Raises ImportError without pyiqa, ValueError for a name that it does not know.
    """

    def __init__(self, wanted: str, device: str = "cpu") -> None:
        import pyiqa

        self.names = list(PERCEPTUAL) if wanted == "all" else [name.strip() for name in wanted.split(",")]
        if unknown := sorted(set(self.names) - set(pyiqa.list_models())):
            raise ValueError(f"pyiqa has no metric {', '.join(unknown)}; see pyiqa.list_models()")
        self.metrics: dict[str, Any] = {name: pyiqa.create_metric(name, device=device) for name in self.names}
        self.values: dict[tuple[str, str], dict[str, list[float]]] = {}
        self.folder = tempfile.TemporaryDirectory()

    def add(self, result: Result) -> None:
        """Measure one result; for FID, which compares folders, it is kept as a file."""
        key = result.case, result.method
        row = self.values.setdefault(key, {})
        for name, metric in self.metrics.items():
            if name == "fid":
                self._keep(result)
                continue
            given = (result.made, result.sharp) if metric.metric_mode == "FR" else (result.made,)
            row.setdefault(name, []).append(float(metric(*given)))

    def _folders(self, key: tuple[str, str]) -> tuple[Path, Path]:
        root = Path(self.folder.name, *key)
        return root / "made", root / "sharp"

    def _keep(self, result: Result) -> None:
        for folder, pixels in zip(
            self._folders((result.case, result.method)), (result.made, result.sharp), strict=True
        ):
            folder.mkdir(parents=True, exist_ok=True)
            write_picture(folder / f"{result.name}.png", Picture(pixels), overwrite=True)

    def mean(self, key: tuple[str, str], name: str) -> float:
        """Return one metric of one `(case, method)` over all pictures."""
        if name == "fid":
            return float(self.metrics[name](*map(str, self._folders(key))))
        values = self.values[key][name]
        return sum(values) / len(values)


def perceptual_rows(measured: Perceptual) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of a table in the published layout; each head says which way is better."""
    heads = ["case", "method"]
    for name, metric in measured.metrics.items():
        heads.append(f"{PERCEPTUAL.get(name, name)} {'down' if metric.lower_better else 'up'}")
    rows = [[*key, *(f"{measured.mean(key, name):.4f}" for name in measured.names)] for key in measured.values]
    return heads, rows
