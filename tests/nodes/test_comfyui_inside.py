"""Runs the `inside_*.py` scripts in ComfyUI's interpreter and reports each of their checks."""

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import find
from published import write_for_comfyui

SCRIPTS = [
    Path(__file__).parent / name
    for name in (
        "inside_multidiffusion.py",
        "inside_tiled.py",
        "inside_upscaler.py",
        "inside_adapters.py",
        "inside_vae.py",
        "inside_vae_nodes.py",
        "inside_cfw.py",
        "inside_regions.py",
        "inside_tile_texts.py",
        "inside_tile_prompts.py",
        "inside_prompters.py",
        "inside_refusals.py",
        "inside_widgets.py",
        "inside_stablesr.py",
        "inside_folders.py",
        "inside_degrading.py",
        "inside_pictures.py",
    )
]
CHECKS = [
    (script.name, node.name)
    for script in SCRIPTS
    for node in ast.parse(script.read_text("utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


def linked(folder):
    """Return `folder` with links to what reads deep pictures, which ComfyUI's interpreter may not have."""
    for name in ("tifffile", "imagecodecs", "OpenEXR"):
        spec = importlib.util.find_spec(name)
        place = Path(spec.submodule_search_locations[0] if spec.submodule_search_locations else spec.origin)
        (folder / place.name).symlink_to(place)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    comfyui = find()
    if comfyui is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    files = write_for_comfyui(tmp_path_factory.mktemp("published"))
    environment = os.environ | {"TUDSR_TEST_PACKAGES": str(linked(tmp_path_factory.mktemp("packages")))}
    found = {}
    for script in SCRIPTS:
        command = [python, str(script), str(comfyui), str(files)]
        done = subprocess.run(command, capture_output=True, cwd=comfyui, encoding="utf-8", env=environment)
        assert done.returncode == 0, done.stderr[-3000:]
        found[script.name] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(("script", "check"), CHECKS)
def test_inside_comfyui(results, script, check):
    assert results[script][check] is None, results[script][check]
