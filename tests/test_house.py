"""The layout's rules: who may import whom, and what must stay equal."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("tudsr_core", "nodes", "tests", "bench", "workflows")
CORE = ROOT / "tudsr_core"

# A module may import only from ranks below its own.
RANKS = [
    {"untrusted", "image", "schedule", "known_files", "vae_graph", "vae_planes", "vae_reach"},
    {"download", "files", "pickles", "tiles", "vae_layers"},
    {"metadata", "methods", "raster"},
    {
        "color",
        "metrics",
        "stage_tiles",
        "prompts",
        "vae_stream",
        "filter_bank",
        "models.swin",
        "tensor_files",
        "models.unet_blocks",
        "png",
        "tiff",
    },
    {
        "adapters",
        "clip_tokens",
        "edits",
        "lora_config",
        "networks",
        "plan",
        "models.embedded_config",
        "models.fill",
        "models.ram",
        "prompters",
        "vae_tiling",
        "sweep",
    },
    {"captions", "formats", "models.dape", "models.embedded", "models.invsr", "reading", "writing"},
    {"checkpoints", "pipeline", "sd21"},
    {"sampling"},
    {"zoom"},
    {"batch"},
    {"local"},
    {"inspection"},
    {"training.data", "training.degradations", "training.identity"},
    {"evaluation", "training.embedded", "training.bank"},
    {"console"},
    {"cli_files", "cli_zoom"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names}
ONLY_INSIDE_FUNCTIONS = {
    "diffusers",
    "peft",
    "accelerate",
    "timm",
    "transformers",
    "skimage",
    "sklearn",
    "tifffile",
    "imagecodecs",
}


def modules():
    return sorted(path for path in CORE.rglob("*.py") if path.name != "__init__.py")


def name_of(path):
    return ".".join(path.relative_to(CORE).with_suffix("").parts)


def own_imports(path):
    """Names of our modules that `path` imports, relative imports resolved."""
    package = ("tudsr_core", *path.relative_to(CORE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            inside = ".".join([*base[1:], *filter(None, [node.module])])
            yield from ([inside] if inside in RANK else [f"{inside}.{alias.name}".lstrip(".") for alias in node.names])


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_only_go_down(path):
    assert name_of(path) in RANK, "give the new module a rank"
    for imported in own_imports(path):
        if imported.rpartition(".")[2].startswith("__"):
            continue
        assert RANK[imported] < RANK[name_of(path)], f"{name_of(path)} must not import {imported}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_core_knows_no_comfyui_and_keeps_heavy_imports_lazy(path):
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            top = name.split(".")[0]
            assert top not in {"comfy", "comfy_api", "folder_paths", "server", "nodes", "tudsr_core"}
            assert not (top in ONLY_INSIDE_FUNCTIONS and node in tree.body), f"import {top} inside the function"


def test_the_pack_imports_without_comfyui():
    for node in ast.parse((ROOT / "__init__.py").read_text("utf-8")).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert node.module == "__future__"


def test_the_readme_names_the_command_that_ci_runs():
    assert (ROOT / ".ci" / "run").read_text("utf-8").strip().splitlines()[-1] == "make test"
    assert "make test" in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_files_stay_small(path):
    assert len(path.read_text("utf-8").splitlines()) <= 350


def text_files_without_encoding(tree):
    """Yield calls that open a text file, or a child's text output, in whatever encoding the machine has."""
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        given = {keyword.arg for keyword in call.keywords}
        mode = call.args[-1].value if call.args and isinstance(call.args[-1], ast.Constant) else None
        text = {
            "read_text": not call.args,
            "write_text": len(call.args) < 2,
            "open": not call.args or (isinstance(mode, str) and set(mode) <= set("rwaxt+")),
            "run": bool(given & {"text", "universal_newlines"}),
            "Popen": bool(given & {"text", "universal_newlines"}),
            "check_output": bool(given & {"text", "universal_newlines"}),
        }
        if text.get(name) and "encoding" not in given:
            yield call


@pytest.mark.parametrize("folder", OURS)
def test_every_text_file_names_its_encoding(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for call in text_files_without_encoding(ast.parse(path.read_text("utf-8"))):
            pytest.fail(f'{path.relative_to(ROOT)}:{call.lineno} opens text without encoding="utf-8"')
