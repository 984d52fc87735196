"""What is installed: requirements that move nothing, dependencies that are declared, and files that are packed."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import comfyui
import pytest
import resolve
from PIL import Image

ROOT = Path(__file__).parent.parent
# Of ComfyUI's requirements.txt (0.3.64 to 0.33.0), what this pack may ask for.
OF_COMFYUI = {"torch", "numpy", "safetensors", "pillow"}

needs_registry = pytest.mark.skipif(
    not os.environ.get("TUDSR_TEST_REGISTRY"), reason="asks a package registry: set TUDSR_TEST_REGISTRY=1"
)


def names(lines):
    return {
        re.split(r"[^\w.-]", line.strip(), maxsplit=1)[0].lower() for line in lines if re.match(r"\w", line.strip())
    }


def dependencies(of="dependencies"):
    """Return what is always installed, or what an extra installs."""
    declared = re.search(rf"^{of} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.S | re.M)
    return re.findall(r'"([^"]+)"', declared.group(1))


def test_requirements_are_names_of_what_comfyui_has():
    """A bound could move what is installed, and another package could bring others: names alone cannot."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z]+", line) for line in lines), "only names, without bounds"
    assert set(lines) <= OF_COMFYUI
    assert dependencies() == lines, "comfy-cli --fast-deps reads pyproject.toml instead"


def test_comfyui_still_requires_them():
    found = comfyui.find()
    if found is None:
        pytest.skip("no ComfyUI: set COMFYUI_PATH (and COMFYUI_PYTHON), or install one that `comfy which` finds")
    required = names((found / "requirements.txt").read_text("utf-8").splitlines())
    assert names((ROOT / "requirements.txt").read_text("utf-8").splitlines()) <= required


def test_declared_minima_are_the_versions_that_were_run():
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    declared = dict(
        re.findall(r'"([a-z-]+)>=([\d.]+)"', project[project.index("dependencies") : project.index("[tool")])
    )
    lowest = dict(re.findall(r"^([a-z-]+)==([\d.]+)$", (ROOT / "tests" / "lowest.txt").read_text("utf-8"), re.M))
    del declared["ruff"]  # formats the code, runs no test
    assert declared == lowest
    assert names(dependencies()) <= names(dependencies("cli")) <= lowest.keys(), "every dependency has a minimum"


def test_every_extra_brings_what_the_command_needs():
    for extra in ("sd", "train", "metrics", "ray"):
        assert "comfyui-tudsr[cli]" in dependencies(extra)
    assert "comfyui-tudsr[sd,train,metrics,ray]" in dependencies("dev")


def registry_entry():
    """Return `[project]` and `[tool.comfy]`."""
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    read = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    return read["project"], read["tool"]["comfy"]


def test_addresses_name_one_repository_and_publishing_waits_for_its_owner():
    project, comfy = registry_entry()
    repository = project["urls"]["Repository"]
    raw = repository.replace("https://github.com/", "https://raw.githubusercontent.com/")
    assert {"Documentation", "Bug Tracker"} <= project["urls"].keys()
    assert all(url.startswith(repository) for url in project["urls"].values())
    assert (ROOT / project["urls"]["Documentation"].removeprefix(f"{repository}/blob/main/")).is_file()
    for name in ("Icon", "Banner"):
        assert (ROOT / comfy[name].removeprefix(f"{raw}/main/")).is_file()
    if "github.com/OWNER/" in repository:
        assert "! grep -n github.com/OWNER pyproject.toml" in (ROOT / ".github/workflows/publish.yml").read_text(
            "utf-8"
        )


def test_icon_and_banner_have_the_registrys_shapes_and_are_not_installed():
    _, comfy = registry_entry()
    icon, banner = (ROOT / "docs" / comfy[name].rpartition("/")[2] for name in ("Icon", "Banner"))
    with Image.open(icon) as image:
        assert image.width == image.height <= 400
    with Image.open(banner) as image:
        assert image.width * 9 == image.height * 21
    assert max(path.stat().st_size for path in (icon, banner)) < 150_000
    assert "/docs/" in (ROOT / ".comfyignore").read_text("utf-8").splitlines()


@needs_registry
@pytest.mark.parametrize("packages", resolve.ENVIRONMENTS.values(), ids=resolve.ENVIRONMENTS)
def test_installing_the_requirements_moves_nothing(packages, tmp_path):
    _, changes = resolve.changes(packages, ROOT / "requirements.txt", tmp_path)
    assert changes == []


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return the names of the files in the wheel and in the sdist, built by setuptools itself."""
    pytest.importorskip("setuptools", minversion="77", reason="building needs setuptools 77, as pyproject.toml says")
    folder = tmp_path_factory.mktemp("build")
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    leave = shutil.ignore_patterns("__pycache__")
    for name in ("tudsr_core", "tests", "nodes"):
        shutil.copytree(ROOT / name, folder / name, ignore=leave)
    script = "from setuptools import build_meta as build; build.build_wheel('dist'); build.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = (folder / "dist").glob("*.whl"), (folder / "dist").glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as packed, tarfile.open(sdist) as tarred:
        return set(packed.namelist()), {name.partition("/")[2] for name in tarred.getnames()}


def test_wheel_and_sdist_carry_every_file_of_the_library(built):
    wheel, sdist = built
    ours = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "tudsr_core").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {
        "tudsr_core/models/README.md",
        *(f"tudsr_core/assets/{name}.safetensors" for name in ("embedded", "downsampler")),
    } <= ours
    assert {name for name in wheel if not name.startswith("comfyui_tudsr-")} == ours
    assert ours <= sdist


def test_the_sdist_holds_no_tests_because_they_need_the_whole_repository(built):
    assert not [name for name in built[1] if name.startswith(("tests", "nodes"))]


def test_what_comfyui_is_given_holds_translations_help_and_blueprints():
    """`comfy node pack` takes what git tracks and .comfyignore does not name."""
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("not a git checkout")

    def listed(*options):
        command = ["git", "ls-files", *options]
        return set(subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8").stdout.splitlines())

    packed = listed() - listed("--cached", "--ignored", "--exclude-from=.comfyignore")
    made = {path.relative_to(ROOT).as_posix() for path in (ROOT / "locales").rglob("*.json")}
    assert {name for name in made if not name.endswith("words.json")} == {
        name for name in packed if name.startswith("locales/")
    }
    for folder in ("nodes/web", "subgraphs"):
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert files and files <= packed
    assert not [name for name in packed if name.startswith(("tests/", "bench/"))]
