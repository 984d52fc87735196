"""The tile prompt editor in a real browser: extract, click a tile, edit, queue; the edit is in what ran."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from browser import fit, load_graph, open_page, run_graph, shoot
from PIL import Image

from tudsr_core.edits import read_edits

THINGS = ["table edge", "cup rim", "steam", "dark background", "spoon", "coffee foam", "porcelain", "shadow"]
THINGS += ["saucer", "reflection", "napkin", "linen"]  # three rows of four
GRAPH = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
    "2": {
        "class_type": "TUDSRTilePlan",
        "inputs": {
            "scale": 8.0,
            "width": 0,
            "height": 0,
            "tile": 512,
            "overlap": 128,
            "spacing": "even",
            "steps": 50,
            "image": ["1", 0],
        },
    },
    "3": {
        "class_type": "TUDSRTilePromptsFromStrings",
        "inputs": {
            "strings": "\n".join(THINGS),
            "prefix": "photo",
            "suffix": "clean, 8k",
            "negative": "blur",
            "edits": "",
            "plan": ["2", 0],
            "image": ["1", 0],
        },
    },
}


@pytest.fixture(scope="module")
def page(browser_server):
    with open_page(browser_server.url) as page:
        page.server = browser_server
        yield page


def open_graph(page):
    text = page.evaluate(
        "async api => {"
        " await app.loadApiJson(JSON.parse(api), 'tiles'); return JSON.stringify(app.graph.serialize()) }",
        json.dumps(GRAPH),
    )
    workflow = json.loads(text)
    for node in workflow["nodes"]:
        node["pos"] = {"1": [0, 0], "2": [0, 420], "3": [340, 0]}[str(node["id"])]
    load_graph(page, workflow)


def stage_point(page, x, y):
    """Return page coordinates of a point of the shown picture, given as parts of its sides."""
    return page.evaluate(
        """([x, y]) => {
            const editor = app.graph._nodes.find(n => n.tudsrEditor).tudsrEditor;
            const box = editor.stage.getBoundingClientRect(), frame = editor.frame();
            const zoom = box.width / editor.stage.clientWidth;
            return [box.x + (frame.x + x * frame.w) * zoom, box.y + (frame.y + y * frame.h) * zoom];
        }""",
        [x, y],
    )


def says(page):
    return page.evaluate("() => document.querySelector('.tudsr-tiles .says').textContent")


def edits(page):
    return page.evaluate("() => app.graph._nodes.find(n => n.tudsrEditor).widgets.find(w => w.name === 'edits').value")


def press(page, action):
    page.locator(f".tudsr-tiles button[data-action={action}]").click()


def last_run(page):
    """Return the executed graph and what the prompts node told."""
    history = list(page.server.get("/history").values())
    newest = max(history, key=lambda one: one["prompt"][0])
    (output,) = [one["tudsr_tiles"][0] for one in newest["outputs"].values() if "tudsr_tiles" in one]
    (node,) = [one for one in newest["prompt"][2].values() if one["class_type"] == "TUDSRTilePromptsFromStrings"]
    return node["inputs"], output


def test_extract_click_edit_queue(page, tmp_path):
    open_graph(page)
    assert "Run once" in says(page)
    run_graph(page)
    assert page.evaluate("() => document.querySelectorAll('.p-toast-message').length") == 0
    assert "Point at a tile" in says(page)

    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1: table edge"
    page.mouse.move(*stage_point(page, 0.95, 0.95))
    assert says(page) == "12: linen"

    page.mouse.click(*stage_point(page, 0.35, 0.1))
    assert page.locator(".tudsr-tiles textarea").input_value() == "cup rim"
    page.locator(".tudsr-tiles textarea").fill("a white porcelain rim")
    page.mouse.click(*stage_point(page, 0.1, 0.9))
    press(page, "add")
    page.keyboard.type("wooden table")
    page.mouse.click(*stage_point(page, 0.95, 0.1))
    press(page, "clear")
    made = read_edits(edits(page))
    assert {i: (e.kind, e.text) for i, e in made.by_tile.items()} == {
        1: ("replace", "a white porcelain rim"),
        8: ("add", "wooden table"),
        3: ("clear", ""),
    }
    assert made.plan and made.picture

    run_graph(page)
    inputs, told = last_run(page)
    assert inputs["edits"] == edits(page)
    assert told["prompts"][1] == "photo, a white porcelain rim, clean, 8k"
    assert told["prompts"][8] == "photo, saucer, wooden table, clean, 8k"
    assert told["prompts"][3] == "photo, clean, 8k"
    assert told["prompts"][0] == "photo, table edge, clean, 8k"

    page.mouse.click(*stage_point(page, 0.35, 0.1))
    page.mouse.move(*stage_point(page, 0.1, 0.9))
    assert says(page) == "9 (edited): saucer, wooden table"
    target = Path(os.environ.get("TUDSR_EDITOR_SCREENSHOT", tmp_path / "editor.png"))
    fit(page)
    page.mouse.move(*stage_point(page, 0.1, 0.9))
    page.wait_for_timeout(500)
    shoot(page, target)
    with Image.open(target) as picture:
        assert len(picture.convert("RGB").getcolors(10**6)) > 3000


def test_edits_travel_in_the_workflow_and_survive_a_new_grid(page):
    open_graph(page)
    run_graph(page)
    page.mouse.click(*stage_point(page, 0.1, 0.1))
    page.locator(".tudsr-tiles textarea").fill("oak grain")
    saved = page.evaluate("() => JSON.stringify(app.graph.serialize())")
    assert "1: oak grain" in saved
    assert "tudsr_tiles" not in saved and "data:image" not in saved
    page.evaluate("async text => { await app.loadGraphData(JSON.parse(text)) }", saved)
    fit(page)
    assert edits(page).endswith("1: oak grain")

    # Larger tiles: fewer of them, so the strings must fit too; the first still covers about the same.
    page.evaluate(
        """() => {
            const set = (type, name, value) =>
                app.graph._nodes.find(n => n.type === type).widgets.find(w => w.name === name).value = value;
            set('TUDSRTilePlan', 'tile', 576);
            set('TUDSRTilePlan', 'overlap', 64);
            set('TUDSRTilePromptsFromStrings', 'strings', 'one thing');
        }"""
    )
    run_graph(page)
    _, told = last_run(page)
    assert told["prompts"][0] == "photo, oak grain, clean, 8k" and told["prompts"][1] == "photo, one thing, clean, 8k"
    assert told["edits"] == "1: oak grain"
    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1 (edited): oak grain"

    page.mouse.click(*stage_point(page, 0.1, 0.1))
    press(page, "restore")
    assert edits(page) == ""
    assert says(page) == "1: one thing"


def test_typing_in_the_plain_box_moves_the_editor(page):
    open_graph(page)
    run_graph(page)
    page.evaluate(
        """() => {
            const widget = app.graph._nodes.find(n => n.tudsrEditor).widgets.find(w => w.name === 'edits');
            widget.value = '2+ gold line';
            widget.callback(widget.value);
        }"""
    )
    page.mouse.move(*stage_point(page, 0.35, 0.1))
    assert says(page) == "2 (edited): cup rim, gold line"


def test_the_editor_can_extract_by_itself(page):
    open_graph(page)
    page.evaluate(
        "() => { window.ended = null; app.api.addEventListener('execution_success', () => { window.ended = 1 }) }"
    )
    press(page, "extract")
    page.wait_for_function("() => window.ended", timeout=60000)
    page.wait_for_timeout(500)
    page.locator(".tudsr-tiles .stage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tudsr-tiles textarea").input_value() == "cup rim"
