"""What people have set on the pack's page of ComfyUI's settings (`web/js/settings.js`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args

PREVIEWS = "TUDSR.Upscaling.Previews"


def setting(name: str, default: Any) -> Any:
    """Return a setting as the browser has stored it, or `default`.

    A server with several users has settings for each of them and does not say whose run this is:
    there it is always `default`.
    """
    if args.multi_user:
        return default
    try:
        stored = json.loads((Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json").read_bytes())
    except (OSError, ValueError):
        return default
    return stored.get(name, default) if isinstance(stored, dict) else default
