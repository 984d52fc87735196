"""ComfyUI's page in a real Chromium, driven by Playwright."""

from __future__ import annotations

import io
import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from comfyui import find
from PIL import Image

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update"]


def chromium() -> str | None:
    """Return the installed browser, or None."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def comfyui_for_browser() -> Path:
    """Return ComfyUI's folder; skips the test where it, Chromium or Playwright is missing."""
    if (comfyui := find()) is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    pytest.importorskip("playwright", reason="no Playwright: pip install playwright")
    return comfyui


@contextmanager
def plain_page(url: str, width: int, height: int, language: str = "en-US"):
    """Yield a Playwright page of any address; skips the test where Chromium or Playwright is missing.

    `language` is the browser's own.
    """
    if chromium() is None:
        pytest.skip("no Chromium: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height}, locale=language)
            page.set_default_navigation_timeout(120000)
            page.goto(url)
            yield page
        finally:
            browser.close()


def color_at(page, x: int, y: int) -> tuple[int, int, int]:
    """Return the colour of one pixel of what the page shows."""
    with Image.open(io.BytesIO(page.screenshot())) as shot:
        return shot.convert("RGB").getpixel((x, y))


@contextmanager
def open_page(url: str, width: int = 1500, height: int = 860, vue: bool = False, language: str = "en-US"):
    """Yield a Playwright page that shows ComfyUI with all nodes registered.

    `vue` turns on the nodes drawn by Vue; skips the test where the frontend has no complete ones.
    """
    with plain_page(url, width, height, language) as page:
        wait_until_ready(page)
        # The map lies over the corner where long nodes end.
        page.evaluate("async () => { await app.extensionManager.setting.set('Comfy.Minimap.Visible', false) }")
        use_vue_nodes(page, vue)
        yield page


def wait_until_ready(page) -> None:
    """Wait until a page that was opened or reloaded can take a workflow."""
    page.wait_for_function(
        "() => window.app?.graph && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 100",
        timeout=90000,
    )
    page.wait_for_timeout(1500)


def use_vue_nodes(page, on: bool) -> None:
    """Have nodes drawn by Vue, or by litegraph; the server keeps the setting for pages opened later."""
    version = page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__ ?? ''")
    if on and [int(part) for part in version.split(".")[:2]] < [1, 35]:
        pytest.skip(f"the Vue nodes of frontend {version} are not complete")
    page.evaluate("async on => { await app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on) }", on)
    page.wait_for_timeout(500)
    assert page.evaluate("() => LiteGraph.vueNodesMode") is on


def load_graph(page, workflow: dict) -> None:
    """Open a UI workflow on the canvas and show all of it."""
    page.evaluate("async text => { await app.loadGraphData(JSON.parse(text)) }", json.dumps(workflow))
    fit(page)


def fit(page) -> list[float]:
    """Zoom so that the whole graph is visible; returns its box on the page, left, top, right, bottom."""
    box = page.evaluate(
        """() => {
            const box = n => [n.pos[0], n.pos[1] - 40, n.pos[0] + n.size[0], n.pos[1] + n.size[1]];
            const boxes = app.canvas.graph._nodes.map(box);
            const [x0, y0] = [0, 1].map(i => Math.min(...boxes.map(b => b[i])) - 30);
            const [x1, y1] = [2, 3].map(i => Math.max(...boxes.map(b => b[i])) + 30);
            const ds = app.canvas.ds, el = app.canvas.canvas, ratio = window.devicePixelRatio || 1;
            const [w, h] = [el.width / ratio - 80, el.height / ratio - 110];
            ds.scale = Math.min(w / (x1 - x0), h / (y1 - y0), 1.5);
            ds.offset = [70 / ds.scale - x0 + (w / ds.scale - (x1 - x0)) / 2, 50 / ds.scale - y0];
            app.canvas.setDirty(true, true);
            const at = el.getBoundingClientRect(), place = (v, i) => (v + ds.offset[i]) * ds.scale + [at.x, at.y][i];
            return [place(x0, 0), place(y0, 1), place(x1, 0), place(y1, 1)];
        }"""
    )
    page.wait_for_timeout(800)
    return box


def run_graph(page, seconds: float = 180) -> None:
    """Queue the graph on the canvas and wait for its end; raises AssertionError with the server's message."""
    page.evaluate(
        """() => {
            window.ended = null;
            app.api.addEventListener('execution_success', () => { window.ended = 'success' });
            app.api.addEventListener('execution_error', e => { window.ended = e.detail.exception_message });
        }"""
    )
    page.evaluate("async () => { await app.queuePrompt(0, 1) }")
    page.wait_for_function("() => window.ended", timeout=seconds * 1000)
    ended = page.evaluate("() => window.ended")
    assert ended == "success", ended
    page.wait_for_timeout(2500)


def shoot(page, path: Path) -> None:
    """Save what the page shows; `.jpg` is compressed."""
    options = {"type": "jpeg", "quality": 82} if path.suffix == ".jpg" else {}
    page.screenshot(path=str(path), **options)
