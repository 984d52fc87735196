"""A person's first minute: drop the template on the canvas, press Run, see the picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

from browser import fit, open_page, run_graph, shoot
from comfyui import PACK
from PIL import Image

TEMPLATE = PACK / "workflows" / "01-embedded-x8.json"


def test_drop_the_template_run_and_see_the_picture(browser_server, tmp_path):
    with open_page(browser_server.url) as page:
        drop(page, TEMPLATE)
        assert page.evaluate("() => app.graph._nodes.map(n => n.type)").count("TUDSRUpscale") == 1
        assert page.evaluate("() => app.graph._nodes.filter(n => n.has_errors).length") == 0
        run_graph(page)
        assert page.evaluate("() => document.querySelectorAll('.p-toast-message').length") == 0
        shown = page.evaluate("() => app.graph._nodes.find(n => n.type == 'SaveImage').imgs[0].naturalWidth")
        assert shown == 1600
        fit(page)
        target = Path(os.environ.get("TUDSR_SCREENSHOT", tmp_path / "browser.png"))
        shoot(page, target)
        with Image.open(target) as picture:
            assert len(picture.convert("RGB").getcolors(10**6)) > 5000


def drop(page, path: Path) -> None:
    """Drop a file on the canvas, as from a file manager."""
    page.evaluate(
        """([name, text]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([text], name, {type: 'application/json'}));
            const canvas = document.querySelector('#graph-canvas');
            for (const kind of ['dragenter', 'dragover', 'drop'])
                canvas.dispatchEvent(new DragEvent(kind, {dataTransfer: transfer, bubbles: true, cancelable: true}));
        }""",
        [path.name, json.dumps(json.loads(path.read_text("utf-8")))],
    )
    page.wait_for_function("() => app.graph._nodes.some(n => n.type == 'TUDSRUpscale')", timeout=20000)
    page.wait_for_timeout(1000)
