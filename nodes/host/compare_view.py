"""The browser's view of two pictures, which the pack shares with the pages of `tudsr compare`."""

from __future__ import annotations

import sys

from ...tudsr_core.assets import asset_path


def serve_view() -> None:
    """Offer the view to `web/js/compare.js`, which asks for `/tudsr/compare_view.js`.

    Nothing happens where nodes run without ComfyUI's server, which has then not been imported.
    """
    server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
    if server is None:
        return
    from aiohttp import web

    @server.routes.get("/tudsr/compare_view.js")
    async def view(request: web.Request) -> web.Response:
        text = asset_path("compare_view.js").read_text("utf-8")
        return web.Response(text=text, content_type="text/javascript", headers={"Cache-Control": "no-cache"})
