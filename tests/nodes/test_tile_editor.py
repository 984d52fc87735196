"""The tile prompt editor in a real browser: extract, click a tile, edit, queue; the edit is in what ran."""

from __future__ import annotations

import json
import os
from pathlib import Path
from uuid import uuid4

import pytest
from browser import fit, load_graph, open_page, run_graph, shoot, wait_until_ready
from PIL import Image

from tudsr_core.prompts.edits import read_edits

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


CASES = json.loads((Path(__file__).parents[1] / "edits_cases.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=["litegraph", "vue"])
def page(request, browser_server):
    with open_page(browser_server.url, vue=request.param == "vue") as page:
        page.server = browser_server
        yield page


def open_graph(page):
    """Open the graph in a new tab, with an id of its own, as saved workflows have: later frontends tell tabs by it."""
    if not hasattr(page, "workflow"):
        page.workflow = as_workflow(page)
    load_graph(page, page.workflow | {"id": str(uuid4())})


def as_workflow(page):
    """Return GRAPH in the frontend's own form."""
    text = page.evaluate(
        "async api => {"
        " await app.loadApiJson(JSON.parse(api), 'tiles'); return JSON.stringify(app.graph.serialize()) }",
        json.dumps(GRAPH),
    )
    workflow = json.loads(text)
    for node in workflow["nodes"]:
        node["pos"] = {"1": [0, 0], "2": [0, 420], "3": [340, 0]}[str(node["id"])]
    return workflow


def stage_point(page, x, y):
    """Return page coordinates of a point of the shown picture, given as parts of its sides."""
    return page.evaluate(
        """([x, y]) => {
            const editor = app.canvas.graph._nodes.find(n => n.tudsrEditor).tudsrEditor;
            const box = editor.stage.getBoundingClientRect(), frame = editor.frame();
            const zoom = box.width / editor.stage.clientWidth;
            return [box.x + (frame.x + x * frame.w) * zoom, box.y + (frame.y + y * frame.h) * zoom];
        }""",
        [x, y],
    )


def says(page):
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.locator(".tudsr-tiles .says").first.text_content()


def edits(page):
    """Return the text that travels in the workflow."""
    return page.evaluate(
        """() => {
            const node = app.canvas.graph._nodes.find(n => n.tudsrEditor);
            return node.serialize().widgets_values[node.widgets.findIndex(w => w.name === 'edits')];
        }"""
    )


def shown_edits(page):
    """Return the text in the plain box, as a person sees it."""
    page.evaluate("() => new Promise(done => setTimeout(done, 100))")
    return page.evaluate(
        """() => {
            const node = app.canvas.graph._nodes.find(n => n.tudsrEditor);
            const vue = document.querySelectorAll(`[data-node-id="${node.id}"] textarea`);
            const labelled = [...vue].find(box => box.parentElement.textContent.trim() === 'edits');
            return (labelled ?? node.widgets.find(w => w.name === 'edits').inputEl).value;
        }"""
    )


def say(page, x, text):
    """Click the tile at `x` of the first row and type what it says."""
    page.mouse.click(*stage_point(page, x, 0.1))
    page.keyboard.press("Control+a")
    page.keyboard.type(text)


def undo(page, keys="Control+z"):
    """Press the keys with nothing focused, and wait until the graph has been replaced."""
    page.evaluate("() => { document.activeElement.blur(); app.graph._nodes[0].beforeUndo = true }")
    page.keyboard.press(keys)
    page.wait_for_function("() => !app.graph._nodes.some(n => n.beforeUndo)", timeout=10000)
    page.wait_for_timeout(500)


def extract(page):
    """Press the editor's own button; returns the message of an error dialog, or None."""
    page.evaluate(
        "() => { window.ended = null; app.api.addEventListener('execution_success', () => { window.ended = 1 }) }"
    )
    press(page, "extract")
    page.wait_for_function("() => window.ended || document.querySelector('.p-dialog')", timeout=60000)
    page.wait_for_timeout(500)
    dialog = page.locator(".p-dialog")
    return dialog.first.text_content() if dialog.count() else None


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
        }"""
    )
    page.mouse.move(*stage_point(page, 0.35, 0.1))
    assert says(page) == "2 (edited): cup rim, gold line"


def test_the_editor_can_extract_by_itself(page):
    open_graph(page)
    assert extract(page) is None
    page.locator(".tudsr-tiles .stage").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.locator(".tudsr-tiles textarea").input_value() == "cup rim"


def test_undo_and_redo(page):
    open_graph(page)
    run_graph(page)
    say(page, 0.1, "oak grain")
    page.mouse.click(*stage_point(page, 0.95, 0.1))
    press(page, "clear")
    both = edits(page)
    assert both.endswith("1: oak grain\n4-")

    undo(page)  # the text typed is one step, the button another
    assert edits(page).endswith("1: oak grain") and shown_edits(page) == edits(page)
    page.mouse.move(*stage_point(page, 0.95, 0.1))
    assert says(page) == "4: dark background"
    undo(page)
    assert edits(page) == shown_edits(page) == ""
    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1: table edge"
    undo(page, "Control+y")
    undo(page, "Control+Shift+z")
    assert edits(page) == shown_edits(page) == both
    page.mouse.move(*stage_point(page, 0.95, 0.1))
    assert says(page) == "4 (edited): — only the shared words —"

    undo(page)
    say(page, 0.35, "gold rim")  # an edit after an undo keeps those that were undone to
    assert edits(page).endswith("1: oak grain\n2: gold rim")
    assert shown_edits(page) == edits(page)
    run_graph(page)
    inputs, told = last_run(page)
    assert inputs["edits"] == edits(page)
    assert told["prompts"][:2] == ["photo, oak grain, clean, 8k", "photo, gold rim, clean, 8k"]

    undo(page)
    page.mouse.click(*stage_point(page, 0.1, 0.1))  # looking at a tile is no step, and forgets nothing
    undo(page)
    assert edits(page) == shown_edits(page) == ""
    page.mouse.click(*stage_point(page, 0.1, 0.1))
    undo(page, "Control+y")
    undo(page, "Control+y")
    assert edits(page).endswith("1: oak grain\n2: gold rim")


def test_keys_pressed_on_the_canvas_leave_the_box_alone(page):
    open_graph(page)
    run_graph(page)
    say(page, 0.1, "oak grain")
    page.evaluate("() => { document.activeElement.blur(); document.execCommand('undo') }")
    assert edits(page).endswith("1: oak grain")
    assert page.locator(".tudsr-tiles textarea").input_value() == "oak grain"


def test_a_copy_has_its_own_edits(page):
    open_graph(page)
    run_graph(page)
    say(page, 0.1, "oak grain")
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(n => n.tudsrEditor);
            app.canvas.selectItems([node]);
            app.canvas.copyToClipboard();
            app.canvas.graph_mouse[0] = node.pos[0] + 600;
            app.canvas.pasteFromClipboard();
            app.graph.remove(node);
        }"""
    )
    fit(page)
    assert edits(page).endswith("1: oak grain")
    assert "Run once" in says(page)
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(n => n.tudsrEditor);
            const plan = app.graph._nodes.find(n => n.type === 'TUDSRTilePlan');
            plan.connect(0, node, node.inputs.findIndex(i => i.name === 'plan'));
        }"""
    )
    assert extract(page) is None
    say(page, 0.35, "gold rim")
    assert edits(page).endswith("1: oak grain\n2: gold rim")


def test_tabs_keep_their_edits(page):
    open_graph(page)
    run_graph(page)
    say(page, 0.1, "oak grain")
    page.evaluate("() => document.activeElement.blur()")
    first = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    open_graph(page)
    assert edits(page) == "" and "Run once" in says(page)
    run_graph(page)
    say(page, 0.35, "gold rim")
    page.evaluate("() => document.activeElement.blur()")
    second = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")

    for path, x, told in [(first, 0.1, "1 (edited): oak grain"), (second, 0.35, "2 (edited): gold rim")] * 2:
        switch_tab(page, path)
        page.mouse.move(*stage_point(page, x, 0.1))
        assert says(page) == told
        page.mouse.move(*stage_point(page, 0.45 - x, 0.1))
        assert "edited" not in says(page)
    say(page, 0.1, "steel")
    assert edits(page).endswith("1: steel\n2: gold rim")


def switch_tab(page, path):
    """Show an open workflow, as a click on its tab does, and its subgraph, if it has one."""
    page.evaluate(
        """async path => {
            const tracker = app.extensionManager.workflow;
            tracker.activeWorkflow.changeTracker.checkState();
            const tab = tracker.getWorkflowByPath(path);
            await app.loadGraphData(JSON.parse(JSON.stringify(tab.activeState)), true, true, tab);
            const root = app.rootGraph ?? app.graph, subgraph = root._nodes.find(n => n.isSubgraphNode?.())?.subgraph;
            if (subgraph && app.canvas.graph === root) app.canvas.setGraph(subgraph);
        }""",
        path,
    )
    page.wait_for_timeout(800)
    fit(page)
    if "Run once" in says(page):  # the frontend keeps no outputs of a run that is quicker than the queue's answer
        assert extract(page) is None


def test_inside_a_subgraph(page):
    open_graph(page)
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(n => n.tudsrEditor);
            app.canvas.selectItems([node]);
            const { subgraph } = app.graph.convertToSubgraph(new Set([node]));
            app.canvas.setGraph(subgraph);
        }"""
    )
    page.wait_for_timeout(800)
    fit(page)
    assert extract(page) is None  # said "Prompt has no outputs"
    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1: table edge"
    say(page, 0.1, "oak grain")
    run_graph(page)
    inputs, told = last_run(page)
    assert inputs["edits"] == edits(page) and told["prompts"][0] == "photo, oak grain, clean, 8k"
    say(page, 0.35, "gold rim")
    undo(page)
    page.mouse.move(*stage_point(page, 0.35, 0.1))
    assert edits(page).endswith("1: oak grain") and says(page) == "2: cup rim"

    inner = page.evaluate("() => app.extensionManager.workflow.activeWorkflow.path")
    open_graph(page)
    switch_tab(page, inner)
    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1 (edited): oak grain"
    page.evaluate("() => app.canvas.setGraph(app.rootGraph ?? app.graph)")


def node_corner(page):
    """Zoom out a little; return the page coordinates of the corner by which the node is resized."""
    page.evaluate(
        "() => { const ds = app.canvas.ds; ds.scale *= 0.75; ds.offset = [100, 100]; app.canvas.setDirty(true, true) }"
    )
    page.wait_for_timeout(500)
    return page.evaluate(
        """() => {
            const node = app.graph._nodes.find(n => n.tudsrEditor), ds = app.canvas.ds;
            const vue = document.querySelector(`[data-node-id="${node.id}"]`)?.getBoundingClientRect();
            if (vue) return [vue.right - 3, vue.bottom - 3];
            const at = app.canvas.canvas.getBoundingClientRect();
            return [0, 1].map(i => (node.pos[i] + node.size[i] + ds.offset[i]) * ds.scale + [at.x, at.y][i] - 3);
        }"""
    )


def test_reload_and_resize(page):
    open_graph(page)
    run_graph(page)
    say(page, 0.1, "oak grain")
    page.evaluate("() => document.activeElement.blur()")
    page.wait_for_timeout(1500)
    page.reload()
    wait_until_ready(page)
    fit(page)
    assert edits(page).endswith("1: oak grain")
    assert extract(page) is None
    page.mouse.move(*stage_point(page, 0.1, 0.1))
    assert says(page) == "1 (edited): oak grain"

    x, y = node_corner(page)
    before = page.locator(".tudsr-tiles .stage").bounding_box()
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 100, y + 80, steps=4)
    page.mouse.up()
    page.wait_for_timeout(500)
    after = page.locator(".tudsr-tiles .stage").bounding_box()
    assert after["width"] > before["width"] + 50 and after["height"] > before["height"] + 30
    fit(page)
    page.mouse.move(*stage_point(page, 0.95, 0.95))
    assert says(page) == "12: linen"


def test_connected_edits_are_shown_and_not_changed(page):
    open_graph(page)
    page.evaluate(
        """() => {
            const source = LiteGraph.createNode('PrimitiveStringMultiline');
            app.graph.add(source);
            source.pos = [0, 900];
            source.widgets[0].value = '1: from elsewhere';
            const node = app.graph._nodes.find(n => n.tudsrEditor);
            source.connect(0, node, node.inputs.findIndex(i => i.name === 'edits'));
        }"""
    )
    run_graph(page)
    fit(page)
    assert "connected node" in says(page)
    page.mouse.click(*stage_point(page, 0.1, 0.1))
    box = page.locator(".tudsr-tiles textarea")
    assert box.is_disabled() and box.input_value() == "from elsewhere"
    assert edits(page) == ""


def test_961_tiles_and_long_texts(page):
    open_graph(page)
    grid = " ".join(str(48 * i) for i in range(31))
    facts = {
        "picture": None,
        "aspect": 1,
        "boxes": [[x / 31.5, y / 31.5, (x + 1.5) / 31.5, (y + 1.5) / 31.5] for y in range(31) for x in range(31)],
        "found": ["word, " * 200] * 961,
        "header": f"# grid 1504x1504, tile 64x64, rows {grid}, columns {grid}",
        "edits": "",
    }
    text = "\n".join([facts["header"], *(f"{i}+ {'long ' * 200}" for i in range(1, 962))])
    milliseconds = page.evaluate(
        """async ([facts, text]) => {
            const node = app.graph._nodes.find(n => n.tudsrEditor), start = performance.now();
            app.nodeOutputs[String(node.id)] = { tudsr_tiles: [facts] };
            node.widgets.find(w => w.name === 'edits').value = text;
            node.tudsrEditor.sync();
            node.tudsrEditor.select(960);
            node.tudsrEditor.hover(3);
            return performance.now() - start;
        }""",
        [facts, text],
    )
    assert milliseconds < 3000  # about 150 on the machine it was written on; it must not look frozen
    page.mouse.move(*stage_point(page, 0.01, 0.01))
    assert says(page).startswith("1 (edited): word, long long")
    box = page.locator(".tudsr-tiles .says").bounding_box()
    assert box["height"] < 80


def test_a_picture_that_the_server_no_longer_has(page):
    page.route("**/view?*", lambda route: route.fulfill(status=404))
    try:
        open_graph(page)
        run_graph(page)
        assert "no longer has the picture" in says(page)
        assert page.locator(".tudsr-tiles img").evaluate("e => getComputedStyle(e).visibility") == "hidden"
        page.mouse.move(*stage_point(page, 0.1, 0.1))
        assert says(page) == "1: table edge"
    finally:
        page.unroute("**/view?*")


def test_text_rules_equal_those_of_python(page):
    told = page.evaluate(
        """async cases => {
            const list = await app.api.getExtensions();
            const { readEdits, writeEdits, applyEdit, fitEdits } =
                await import(list.find(path => path.endsWith('/tile_edits.js')));
            const lines = edits => [...edits].map(([tile, { kind, text }]) => [tile + 1, kind, text]);
            const edit = one => one && { kind: one[0], text: one[1] };
            const byTile = edits => new Map(edits.map(([tile, ...one]) => [tile - 1, edit(one)]));
            return {
                reads: cases.reads.map(one => lines(readEdits(one.text).byTile)),
                unreadable: cases.unreadable.map(one => lines(readEdits(one.text).byTile)),
                headers: cases.headers.map(one => readEdits(one.text).header),
                fits: cases.fits.map(one => lines(fitEdits(readEdits(one.text), one.grid)).sort((a, b) => a[0] - b[0])),
                says: cases.says.map(one => applyEdit(one.found, edit(one.edit))),
                writes: cases.writes.map(one => writeEdits({ byTile: byTile(one.edits) })),
            };
        }""",
        CASES,
    )
    wanted = {"reads": "edits", "unreadable": "edits", "headers": "header", "fits": "edits", "says": "says"}
    for table, name in {**wanted, "writes": "text"}.items():
        for case, made in zip(CASES[table], told[table], strict=True):
            assert made == case[name], (table, case)
    kept = page.evaluate(
        """async () => {
            const list = await app.api.getExtensions();
            const { readEdits, writeEdits } = await import(list.find(path => path.endsWith('/tile_edits.js')));
            return writeEdits(readEdits('# mine\\n1: a\\nunreadable\\n2-'));
        }"""
    )
    assert kept == "# mine\nunreadable\n1: a\n2-"
