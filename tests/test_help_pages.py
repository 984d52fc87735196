"""Help pages in other languages, where the frontend looks for them, and as complete as the English ones.

It asks for `docs/NODE/LANGUAGE.md` and, if there is none, for `docs/NODE.md`; it takes a picture that either of
them names from `docs/`.
"""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "nodes" / "web" / "docs"
NODES = ["TUDSRUpscale", "TUDSRLoadEmbedded", "TUDSRLoadAdapter", "TUDSRExtractTilePrompts", "TUDSRMultiDiffusion"]
LANGUAGES = sorted(path.parent.name for path in (ROOT / "locales").glob("*/words.json"))
PAGES = [(node, language) for node in NODES for language in LANGUAGES]
SCHEMA = json.loads((ROOT / "tests" / "nodes" / "schema.json").read_text("utf-8"))


def text_of(node, language=None):
    return (DOCS / node / f"{language}.md" if language else DOCS / f"{node}.md").read_text("utf-8")


def tables(text):
    """Return the tables of a page, each as rows of cells, without the line below its head."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.M)
    rows = [[line.strip("|\n").split("|") for line in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in row] for index, row in enumerate(table) if index != 1] for table in rows]


def prose(text):
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def test_every_language_has_the_five_pages():
    assert LANGUAGES == ["de", "es", "fr", "ja", "ko", "zh"]
    found = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.glob("*/*"))
    assert found == sorted(f"{node}/{language}.md" for node, language in PAGES)


@pytest.mark.parametrize("path", sorted(DOCS.rglob("*.md")), ids=lambda path: path.relative_to(DOCS).as_posix())
def test_pictures_and_links_of_a_page_are_there(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8")):
        assert target.startswith("https://") or (DOCS / target).is_file(), target


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_a_translated_page_has_every_input_under_its_name_on_the_node(node, language):
    names = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text("utf-8"))[node]
    english, translated = tables(text_of(node)), tables(text_of(node, language))
    assert text_of(node, language).startswith(f"# {names['display_name']}\n")
    assert [len(table) for table in translated] == [len(table) for table in english]
    assert {len(row) for table in translated for row in table} == {len(row) for table in english for row in table}
    if not SCHEMA[node]["inputs"]:
        return
    documented = []
    for row, other in zip(english[0][1:], translated[0][1:], strict=True):
        inputs = row[0].split(", ")
        documented += inputs
        for name, cell in zip(inputs, other[0].split(", "), strict=True):
            label = names["inputs"][name]["name"]
            assert cell == (f"`{name}`" if label == name else f"{label} `{name}`")
    assert sorted(documented) == sorted(SCHEMA[node]["inputs"]), "the English page must name every input"


@pytest.mark.parametrize(("node", "language"), PAGES)
def test_what_is_typed_stays_in_a_translated_page(node, language):
    english, translated = text_of(node), text_of(node, language)
    fences = r"^```.*?^```$"
    assert re.findall(fences, english, re.M | re.S) == re.findall(fences, translated, re.M | re.S)
    spans = set(re.findall(r"`[^`]+`", prose(english)))
    assert spans <= set(re.findall(r"`[^`]+`", prose(translated)))
    for kept in re.findall(r"\]\([^)]+\)|[\w.-]+\.co[/\w.-]*|[\w]+\.com/[\w/.-]+|\b\d{2,}\b", prose(english)):
        assert kept in translated, kept
