"""What the registry gets: metadata without complaint, an archive of what the pack needs, and that archive running."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from comfyui import PACK, Server, find
from PIL import Image

from tudsr_core.evaluation.measurement import example_path

COMFY = shutil.which("comfy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
# Beside code and templates: what says who may use it, what it is and what it asks for.
OUTSIDE_FOLDERS = {"__init__.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE", "CHANGELOG.md"}
OUTSIDE_FOLDERS |= {"SECURITY.md"}
FOLDERS = ("nodes/", "tudsr_core/", "locales/", "subgraphs/", "workflows/")
MAX_ZIP_BYTES = 9 * 2**20


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Return a copy of the repository under git, as a clone would be."""
    if COMFY is None:
        pytest.skip("no comfy-cli: pip install -e '.[dev]'")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=PACK, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not in a git repository, from which the archive is made")
    copy = tmp_path_factory.mktemp("registry") / "comfyui-tudsr"
    for name in filter(None, listed.stdout.decode("utf-8").split("\0")):
        if (PACK / name).is_file() and not (PACK / name).is_symlink():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PACK / name, copy / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(command, cwd=copy, check=True)
    return copy


def comfy(repository: Path, *arguments: str) -> str:
    """Return what `comfy` prints; it asks nothing, reports nothing and keeps its files in the copy's folder."""
    environment = os.environ | {"HOME": str(repository.parent), "DO_NOT_TRACK": "1", "NO_COLOR": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [COMFY, "--skip-prompt", "--no-json", *arguments],
        cwd=repository,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_registry_finds_nothing_to_complain_about(repository):
    said = comfy(repository, "node", "validate")
    assert "successfully" in said
    assert not [line for line in said.splitlines() if "warning" in line.lower() or "error" in line.lower()], said


@pytest.fixture(scope="module")
def archive(repository):
    comfy(repository, "node", "pack")
    return repository / "node.zip"


def test_the_archive_holds_what_the_nodes_need_and_nothing_else(archive):
    with zipfile.ZipFile(archive) as packed:
        names = {name for name in packed.namelist() if not name.endswith("/")}
    outside = {name for name in names if not name.startswith(FOLDERS)}
    assert outside == OUTSIDE_FOLDERS
    needed = {
        path.relative_to(PACK).as_posix()
        for folder in ("nodes", "tudsr_core", "locales", "subgraphs")
        for path in (PACK / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    needed = {name for name in needed if name != "locales/make.py" and not name.endswith("/words.json")}
    needed |= {f"workflows/{path.name}" for kind in ("json", "jpg") for path in (PACK / "workflows").glob(f"*.{kind}")}
    assert names - outside == needed
    assert archive.stat().st_size < MAX_ZIP_BYTES


def test_the_archive_runs_in_a_fresh_comfyui(archive, tmp_path):
    if (comfyui := find()) is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path / "custom_nodes" / "comfyui-tudsr")
    server = Server(comfyui, tmp_path)
    try:
        with Image.open(example_path()) as image:
            server.put_image("example.png", np.array(image.convert("RGB").crop((60, 20, 80, 36))))
        work = json.loads((PACK / "workflows" / "api" / "01-embedded-x8.json").read_text("utf-8"))
        (made,) = server.images(server.run(work), "4")
        assert made.shape[:2] == (128, 160) and made.std() > 3
        offered = server.get("/workflow_templates")["comfyui-tudsr"]
        assert sorted(offered) == sorted(path.stem for path in (PACK / "workflows").glob("*.json"))
    finally:
        server.stop()
