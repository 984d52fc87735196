"""Two pictures in one HTML file that needs nothing else: a divider, one zoom, their difference, and figures."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ..assets import asset_path
from ..atomic_write import temporary_beside
from ..pictures import Picture, PictureError
from ..untrusted import printable
from .metrics import SSIM_WINDOW, psnr_y, ssim_y
from .seams import Seam

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: dark }}
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 0; display: flex; flex-direction: column; height: 100vh }}
body {{ background: #1c1c1c; color: #ddd }}
#view {{ flex: 1 }}
table {{ border-collapse: collapse; margin: .5rem 1rem }} caption {{ text-align: left }}
td, th {{ text-align: left; padding: .1rem 1rem .1rem 0 }} td {{ font-variant-numeric: tabular-nums }}
</style></head><body><div id="view"></div>{figures}
<script type="module">
{script}
compareView(document.getElementById("view"))(...{pictures});
</script></body></html>
"""


@dataclass(frozen=True)
class Figure:
    """How close one picture is to another: `name` against `truth`, PSNR of the luma in dB, and SSIM."""

    name: str
    truth: str
    psnr: float
    ssim: float

    def describe(self) -> str:
        """Return one line such as `after against truth: PSNR-Y 31.20 dB, SSIM 0.9120`."""
        return f"{self.name} against {self.truth}: PSNR-Y {self.psnr:.2f} dB, SSIM {self.ssim:.4f}"


def figures_of(pictures: dict[str, Tensor], reference: Tensor | None = None) -> list[Figure]:
    """Measure two pictures `1 3 H W` (0..1), by name, against `reference`, or the first against the second.

    Alpha is left out. A picture of another size than what it would be measured against, or smaller than
    SSIM's window, has no figure.
    """
    names = list(pictures)
    truth, name = (pictures[names[1]], names[1]) if reference is None else (reference, "reference")
    truth = truth[:, :3]
    found = []
    for one in names[:1] if reference is None else names:
        picture = pictures[one][:, :3]
        if picture.shape == truth.shape and min(truth.shape[-2:]) >= SSIM_WINDOW:
            found.append(Figure(one, name, psnr_y(picture, truth), ssim_y(picture, truth)))
    return found


def write_page(
    path: Path, pictures: dict[str, Picture], figures: Sequence[Figure] = (), seams: Sequence[Seam] = ()
) -> None:
    """Write the page of two pictures, by name, whole or not at all; raises PictureError."""
    shown = [{"src": _address(picture), "name": printable(name)} for name, picture in pictures.items()]
    rows = "".join(
        f"<tr><th>{escape(printable(f.name))}</th><td>PSNR-Y {f.psnr:.2f} dB</td><td>SSIM {f.ssim:.4f}</td>"
        f"<td>against {escape(printable(f.truth))}</td></tr>"
        for f in figures
    )
    rows += "".join(
        f"<tr><th>{escape(printable(s.name))}</th><td>seams {s.score:.2f}</td>"
        f'<td colspan="2">edges at {s.borders} tile borders over those elsewhere</td></tr>'
        for s in seams
    )
    page = PAGE.format(
        title=escape(printable(" | ".join(pictures))),
        figures=f"<table>{rows}</table>" if rows else "",
        script=asset_path("compare_view.js").read_text("utf-8"),
        # Names are data: what could end the script must not be in it.
        pictures=json.dumps(shown).replace("<", "\\u003c"),
    )
    try:
        with temporary_beside(path) as temporary:
            temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise PictureError(f"the page {path} was not written: {error.strerror or error}") from error


def _address(picture: Picture) -> str:
    """Return the picture as a PNG of 8 bit in a data address."""
    pixels = (picture.pixels[0].clamp(0, 1).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels if pixels.shape[-1] > 1 else pixels[..., 0]).save(buffer, "PNG", icc_profile=picture.icc)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
