"""Runs `inside_comfyui.py` in ComfyUI's interpreter and reports each of its checks."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui import find
from published import write_for_comfyui

SCRIPT = Path(__file__).parent / "inside_comfyui.py"
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    comfyui = find()
    if comfyui is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    files = write_for_comfyui(tmp_path_factory.mktemp("published"))
    command = [python, str(SCRIPT), str(comfyui), str(files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=comfyui)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", CHECKS)
def test_inside_comfyui(results, check):
    assert results[check] is None, results[check]
