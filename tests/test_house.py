"""The layout's rules: who may import whom, and what must stay equal."""

import ast
import graphlib
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("tudsr_core", "nodes", "tests", "bench", "workflows", "locales")
CORE = ROOT / "tudsr_core"

# What each room may import from, itself aside; a room knows only rooms above it. `untrusted`,
# `missing_packages`, `atomic_write`, `degrading` and `_lazy` are rooms of one file.
ROOMS = {
    "_lazy": "",
    "missing_packages": "",
    "untrusted": "",
    "atomic_write": "",
    "assets": "",
    "diffusion": "",
    "tiling": "",
    "vae": "",
    "pictures": "untrusted missing_packages atomic_write",
    "prompts": "untrusted assets pictures tiling",
    "methods": "untrusted atomic_write pictures tiling diffusion prompts",
    "weights": "untrusted atomic_write assets diffusion methods",
    "models": "untrusted assets pictures weights",
    "backends": "untrusted tiling diffusion vae methods weights models",
    "batch": "untrusted missing_packages atomic_write pictures tiling methods",
    "degrading": "atomic_write pictures models batch",
    "evaluation": "assets atomic_write pictures tiling methods untrusted",
    "training": "untrusted atomic_write pictures diffusion methods weights models backends evaluation",
    "cli": "untrusted missing_packages pictures diffusion prompts methods weights models backends batch degrading "
    "evaluation training",
    "__main__": "missing_packages cli",
}
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
    "OpenEXR",
    "ray",
}


def modules():
    return sorted(path for path in CORE.rglob("*.py") if path != CORE / "__init__.py")


def name_of(path):
    return ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix(".__init__")


def own_imports(path, root):
    """Yield `(dotted module, names)` of every relative import in `path`, the module relative to `root`."""
    package = path.relative_to(root).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join([*base, *filter(None, [node.module])]), [alias.name for alias in node.names]


def test_a_room_knows_only_rooms_above_it():
    seen = set()
    for room, known in ROOMS.items():
        assert set(known.split()) <= seen, f"{room} is listed before what it uses"
        seen.add(room)
    assert {name_of(path).partition(".")[0] for path in modules()} == seen, "give the new room its row"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_imports_between_rooms_go_one_way_and_through_public_names(path):
    own = name_of(path).partition(".")[0]
    for module, names in own_imports(path, CORE):
        room, _, inside = module.partition(".")
        if not room:
            assert set(names) == {"__version__"}, f"{names} must be imported from a room"
        elif room != own:
            assert room == "_lazy" or room in ROOMS[own].split(), f"{own} must not know {room}"
            assert not inside, f"import {names} from the room: from ..{room} import ..."
            if (CORE / room).is_dir() and room != "assets":
                public = importlib.import_module(f"tudsr_core.{room}").__all__
                assert set(names) <= set(public), f"{set(names) - set(public)} is not public in {room}"


def test_arrows_inside_a_room_go_one_way():
    graph = {}
    for path in modules():
        needs = graph.setdefault(name_of(path), set())
        for module, names in own_imports(path, CORE):
            named = {module, *(f"{module}.{name}" for name in names)}
            needs |= {name for name in named if (CORE / name.replace(".", "/")).with_suffix(".py").exists()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"these modules need each other: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("room", [room for room in ROOMS if (CORE / room).is_dir()])
def test_a_room_says_what_it_owns_and_must_not_know_and_has_what_it_names(room):
    package = importlib.import_module(f"tudsr_core.{room}")
    if room == "assets":
        return
    assert len(package.__doc__.strip().splitlines()[0]) > 20 and "Must not know:" in package.__doc__
    for name in getattr(package, "__all__", ()):
        assert not name.startswith("_") and getattr(package, name) is not None
        assert not (CORE / room / f"{name}.py").exists(), f"{room}.{name} is a module too"


def test_what_talks_to_comfyuis_internals_knows_no_node():
    for path in sorted((ROOT / "nodes" / "host").glob("*.py")):
        for module, _ in own_imports(path, ROOT):
            assert module.startswith(("nodes.host", "tudsr_core")), f"{path.name} must not import {module}"


def body_lines(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("folder", ["tudsr_core", "nodes"])
def test_functions_stay_short(folder):
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert body_lines(node) <= 40, f"{path.relative_to(ROOT)}: {node.name} has {body_lines(node)} lines"


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


def test_the_drawing_shows_the_rooms_as_they_are():
    spec = importlib.util.spec_from_file_location("draw_house", ROOT / "docs" / "draw_house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.DRAWING.read_text("utf-8") == module.draw(module.arrows()), "run: python docs/draw_house.py"


def test_the_design_names_files_that_exist():
    text = (ROOT / "docs" / "design.md").read_text("utf-8")
    for line in text.splitlines():
        if not (line.startswith("|") and "`" in line and ".py" in line) or line.startswith("| system"):
            continue
        folder = ""
        for name in re.findall(r"`([\w/]+\.(?:py|js|json|toml|txt))`", line):
            places = [ROOT, CORE, ROOT / "tests", ROOT / "nodes", CORE / folder, ROOT / folder]
            assert any((place / name).is_file() for place in places), f"{name} in: {line}"
            folder = name.rpartition("/")[0] or folder


def prose():
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", prose(), ids=lambda path: path.name)
def test_links_and_pictures_of_the_documentation_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text("utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text("utf-8")
    assert len(text.splitlines()) <= 90
    for page in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{page.name})" in text
