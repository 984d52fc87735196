"""One HTML file about a run, complete in itself: pictures before and after, seconds, errors, settings.

Small pictures of at most MAX_SHOWN rows are in it, so that a report on 10,000 pictures still opens.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from ..atomic_write import temporary_beside
from ..pictures import Picture, PictureError, read_picture
from ..untrusted import printable
from .jobs import Job, OpenJob
from .ledger import Outcome, Summary
from .manifest import Manifest, State

MAX_SHOWN = 500
SHOWN_PX = 160

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
td, th {{ text-align: left; padding: .4rem .7rem; border-bottom: 1px solid #8884; vertical-align: middle }}
td.number {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }}
td.name {{ overflow-wrap: anywhere }}
img {{ width: {px}px; height: {px}px; object-fit: contain; background: #8882; display: block }}
tr.failed td {{ background: #e5484d22 }}
details {{ margin: 1rem 0 }} summary {{ cursor: pointer }} .error {{ color: #d13438 }}
</style></head><body>
<h1>{title}</h1><p>{summary}</p>
<details><summary>Settings</summary><table>{settings}</table></details>
<table><thead><tr><th>before</th><th>after</th><th>picture</th><th>result</th><th>seconds</th></tr></thead>
<tbody>
{rows}
</tbody></table></body></html>
"""


@dataclass
class Row:
    """What the report says of one job; `shown` are the two small pictures as data addresses."""

    job: Job
    became: str = "not finished"
    seconds: float | None = None
    size: str = ""
    error: str = ""
    shown: tuple[str, str] | None = None


class Report:
    """Listens to a run (a `Listener`) and writes down how its pictures ended."""

    def __init__(self, jobs: Sequence[Job], settings: Mapping[str, object], manifest: Manifest | None = None) -> None:
        self.rows = [Row(job) for job in jobs]
        self.settings, self.manifest = settings, manifest
        self.summary: Summary | None = None
        self._room = MAX_SHOWN

    def left(self, number: int, job: Job, state: State) -> None:
        """Note what was there already."""
        row = self.rows[number - 1]
        row.became = "done before" if state is State.done else "kept"
        if self.manifest and state is State.done:
            row.seconds = self.manifest.record(job).seconds

    def begins(self, number: int, opened: OpenJob) -> None:
        """Nothing is known yet."""

    def wrote(self, number: int, outcome: Outcome) -> None:
        """Note a result, with small pictures while there is room for them."""
        row = self.rows[number - 1]
        row.became, row.seconds = "written", outcome.seconds
        if outcome.result:
            self._show(row, outcome.opened.picture, outcome.result)

    def failed(self, number: int, job: Job, error: Exception) -> None:
        """Note an error."""
        row = self.rows[number - 1]
        row.became, row.error = "failed", str(error)

    def ended(self, summary: Summary) -> None:
        """Note the sums."""
        self.summary = summary

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all; pictures that were made elsewhere are read. Raises PictureError."""
        for row in self.rows:
            if row.became in ("written", "done before") and not row.size and self._room:
                try:
                    self._show(row, read_picture(row.job.source), read_picture(row.job.output))
                except PictureError as error:
                    row.error = str(error)
        page = PAGE.format(
            title="Upscaled pictures",
            px=SHOWN_PX,
            summary=escape(self._sums()),
            settings="".join(_setting(name, value) for name, value in self.settings.items()),
            rows="\n".join(map(_row, self.rows)),
        )
        try:
            with temporary_beside(path) as temporary:
                temporary.write_text(page, encoding="utf-8")
        except OSError as error:
            raise PictureError(f"the report {path} was not written: {error.strerror or error}") from error

    def _sums(self) -> str:
        counts = Counter(row.became for row in self.rows)
        parts = [f"{len(self.rows)} pictures: " + ", ".join(f"{count} {what}" for what, count in counts.items())]
        if self.summary:
            parts.append(f"{self.summary.seconds:.0f} s")
            parts += [str(self.summary.stopped)] if self.summary.stopped else []
        return "; ".join(parts)

    def _show(self, row: Row, before: Picture, after: Picture) -> None:
        row.size = " to ".join(f"{width} x {height}" for height, width in (before.size, after.size))
        if self._room:
            self._room -= 1
            row.shown = small(before), small(after)


def small(picture: Picture) -> str:
    """Return a picture of at most SHOWN_PX a side as a data address; transparency lies on white."""
    step = max(1, max(picture.size) // (SHOWN_PX * 4))  # shrinking to four times the size need not be careful
    pixels = picture.pixels[0, :, ::step, ::step].clamp(0, 1)
    color, alpha = pixels[:3], pixels[3:]
    if len(alpha):
        color = color * alpha + 1 - alpha
    image = Image.fromarray((color.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    image.thumbnail((SHOWN_PX, SHOWN_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _setting(name: str, value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"<tr><th>{escape(printable(name))}</th><td class='name'>{escape(printable(text))}</td></tr>"


def _row(row: Row) -> str:
    shown = "".join(f"<td><img alt='' src='{address}'></td>" for address in row.shown or ()) or "<td></td><td></td>"
    names = "<br>".join(escape(printable(path)) for path in (row.job.source, row.job.output))
    error = f"<br><span class='error'>{escape(printable(row.error))}</span>" if row.error else ""
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    result = escape(", ".join(filter(None, [row.became, row.size])))
    cells = f"{shown}<td class='name'>{names}{error}</td><td>{result}</td><td class='number'>{seconds}</td>"
    return f"<tr class='failed'>{cells}</tr>" if row.error else f"<tr>{cells}</tr>"
