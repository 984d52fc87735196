"""Draws docs/house.svg, the rooms and the arrows between them, from the imports: `python docs/draw_house.py`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parent.parent
DRAWING = ROOT / "docs" / "house.svg"
CELLAR = ("untrusted", "atomic_write", "missing_packages", "assets", "_lazy", "__main__")
"""What every room may stand on; drawn as one strip without arrows."""
ABOUT = {
    "nodes": "ComfyUI's sockets and widgets",
    "nodes/host": "ComfyUI's models, VAE, memory",
    "cli": "the tudsr command",
    "batch": "folders of pictures",
    "degrading": "pictures made poor",
    "training": "data, loops",
    "evaluation": "metrics, the fixed measurement",
    "backends": "networks over diffusers",
    "models": "networks no library has",
    "weights": "files of weights, adapters",
    "methods": "the systems: plan and run",
    "prompts": "a text per tile",
    "pictures": "tensors, colour, files",
    "tiling": "where, how weighted, out of memory",
    "diffusion": "schedule, steps, chains",
    "vae": "exact tiled autoencoder",
}
WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 190, 50, 34, 62, 24


def room_of(path: Path) -> str:
    """Return the room of a file, such as `tiling` or `nodes/host`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "nodes":
        return "nodes/host" if parts[1] == "host" else "nodes"
    return parts[1]


def imported(path: Path) -> Iterator[Path]:
    """Yield the files or packages of this repository that `path` imports from."""
    folder = path.parent
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = folder
            for _ in range(node.level - 1):
                base = base.parent
            yield base.joinpath(*(node.module or "").split("."))


def arrows() -> dict[str, set[str]]:
    """Return the rooms that each room imports from, the cellar left out."""
    found: dict[str, set[str]] = {}
    files = [*(ROOT / "tudsr_core").rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]
    for path in sorted(file for file in files if file != ROOT / "tudsr_core" / "__init__.py"):
        room = room_of(path)
        if room in CELLAR:
            continue
        needs = found.setdefault(room, set())
        for target in imported(path):
            if target not in (ROOT, ROOT / "tudsr_core"):
                needs |= {room_of(target / "x.py" if target.is_dir() else target)} - {room, *CELLAR}
    return found


def reachable(graph: dict[str, set[str]], room: str) -> set[str]:
    """Return every room under `room`."""
    return graph[room].union(*(reachable(graph, below) for below in graph[room]))


def floors(graph: dict[str, set[str]]) -> dict[str, int]:
    """Return each room's floor: one above the highest room it stands on."""

    def floor(room: str) -> int:
        return 1 + max(map(floor, graph[room]), default=-1)

    return {room: floor(room) for room in graph}


def draw(graph: dict[str, set[str]]) -> str:
    """Return the SVG: a box per room, and arrows that no longer way says already."""
    levels: dict[int, list[str]] = {}
    for room, floor in sorted(floors(graph).items()):
        levels.setdefault(floor, []).append(room)
    wide = max(len(rooms) for rooms in levels.values()) * (WIDTH + GAP_X) - GAP_X
    at = {
        room: (
            MARGIN + (wide - len(rooms) * (WIDTH + GAP_X) + GAP_X) / 2 + place * (WIDTH + GAP_X),
            MARGIN + (max(levels) - floor) * (HEIGHT + GAP_Y),
        )
        for floor, rooms in levels.items()
        for place, room in enumerate(rooms)
    }
    lines = []
    for room, needs in sorted(graph.items()):
        for below in sorted(needs):
            if any(below in reachable(graph, other) for other in needs - {below}):
                continue
            (x0, y0), (x1, y1) = at[room], at[below]
            start, end = (x0 + WIDTH / 2, y0 + HEIGHT), (x1 + WIDTH / 2, y1 - 3)
            bend = (end[1] - start[1]) / 2
            lines.append(
                f'<path d="M{start[0]:g} {start[1]:g} C{start[0]:g} {start[1] + bend:g} {end[0]:g} {end[1] - bend:g} '
                f'{end[0]:g} {end[1]:g}" fill="none" stroke="#6b7a8c" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    for room, (x, y) in sorted(at.items()):
        fill = "#fdf0d8" if room.startswith("nodes") else "#e6eef7"
        lines.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7" fill="{fill}" stroke="#3c4a5a"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 21:g}" font-weight="600">{escape(room)}</text>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + 38:g}" font-size="11" fill="#46535f">{escape(ABOUT[room])}</text>'
        )
    bottom = MARGIN + (max(levels) + 1) * (HEIGHT + GAP_Y) - GAP_Y + 18
    lines.append(
        f'<rect x="{MARGIN}" y="{bottom:g}" width="{wide}" height="26" rx="7" fill="#eeeeea" stroke="#8a8a80"/>'
        f'<text x="{MARGIN + wide / 2:g}" y="{bottom + 17:g}" font-size="12">under every room: '
        f"{', '.join(CELLAR[:4])}</text>"
    )
    size = wide + 2 * MARGIN, bottom + 26 + MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]:g} {size[1]:g}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="14" text-anchor="middle">',
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" fill="#6b7a8c"/></marker></defs>',
            f'<rect width="{size[0]:g}" height="{size[1]:g}" fill="#ffffff"/>',
            *lines,
            "</svg>\n",
        ]
    )


if __name__ == "__main__":
    DRAWING.write_text(draw(arrows()), encoding="utf-8")
