"""ComfyUI on a CPU, and this pack loaded by it, for scripts that its interpreter runs."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).parent.parent


def use_comfyui(folder: str) -> None:
    """Make ComfyUI importable, without the arguments of this script."""
    sys.argv = sys.argv[:1]
    sys.path.insert(0, folder)
    import comfy.cli_args

    comfy.cli_args.args.cpu = True


def load_pack() -> dict:
    """Return our node classes by id, loaded the way ComfyUI does."""
    spec = importlib.util.spec_from_file_location("pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["pack"] = module
    spec.loader.exec_module(module)
    listed = asyncio.run(asyncio.run(module.comfy_entrypoint()).get_node_list())
    return {node.GET_SCHEMA().node_id: node for node in listed}
