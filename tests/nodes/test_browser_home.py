"""The pack where people are at home: their language on nodes, tooltips, settings and help; and the blueprint."""

from __future__ import annotations

import json
import os
import urllib.error
from pathlib import Path

import pytest
from browser import fit, load_graph, open_page, run_graph, shoot, wait_until_ready
from comfyui import PACK

TEMPLATE = PACK / "workflows" / "01-embedded-x8.json"
NODE_DEFS = {
    language: json.loads((PACK / "locales" / language / "nodeDefs.json").read_text("utf-8"))["TUDSRUpscale"]
    for language in ("de", "zh", "en")
}
SHOWN = """() => {
    const node = app.graph._nodes.find(n => n.type == 'TUDSRUpscale');
    return {
        title: LiteGraph.registered_node_types.TUDSRUpscale.title,
        says: LiteGraph.registered_node_types.TUDSRUpscale.nodeData.description,
        inputs: Object.fromEntries(node.inputs.map(i => [i.name, i.localized_name])),
        labels: Object.fromEntries(node.widgets.map(w => [w.name, w.label])),
        outputs: node.outputs.map(o => o.localized_name),
    };
}"""


def shot(page, name, tmp_path):
    """Save what the page shows where TUDSR_SCREENSHOTS says, to be looked at."""
    folder = Path(os.environ.get("TUDSR_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    shoot(page, folder / f"{name}.png")


def show_template(page):
    load_graph(page, json.loads(TEMPLATE.read_text("utf-8")))


def check_words(page, language):
    wanted, shown = NODE_DEFS[language], page.evaluate(SHOWN)
    assert (shown["title"], shown["says"]) == (wanted["display_name"], wanted["description"])
    for name, words in wanted["inputs"].items():
        assert shown["inputs"][name] == words["name"]
    for name, label in shown["labels"].items():
        assert label == wanted["inputs"][name]["name"]
    assert shown["outputs"] == [output["name"] for output in wanted["outputs"].values()]


def hover(page, name):
    """Point at a widget of the upscaler and return the tooltip that appears."""
    at = page.evaluate(
        """name => {
            const node = app.graph._nodes.find(n => n.type == 'TUDSRUpscale');
            const widget = node.widgets.find(w => w.name == name);
            const ds = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect();
            const at = [node.pos[0] + 90, node.pos[1] + widget.last_y + 10];
            return at.map((value, i) => (value + ds.offset[i]) * ds.scale + [box.x, box.y][i]);
        }""",
        name,
    )
    page.mouse.move(at[0] + 3, at[1])
    page.mouse.move(*at, steps=3)
    page.wait_for_selector(".node-tooltip", timeout=15000)
    return page.locator(".node-tooltip").inner_text()


def help_of(page, kind):
    """Open the help of a node as its toolbox does and return what the panel says."""
    page.evaluate(
        "kind => { app.canvas.selectItems([app.graph._nodes.find(n => n.type == kind)]) }",
        kind,
    )
    page.wait_for_timeout(800)
    button = page.locator("[data-testid='info-button'], .selection-toolbox button:has(.pi-question-circle)").first
    button.click(timeout=15000)
    page.wait_for_selector(".node-help-content table, .node-help-content img", timeout=20000)
    page.wait_for_timeout(1500)
    return page.locator(".node-help-content").inner_text()


@pytest.mark.parametrize("language", ["de", "zh"])
def test_the_template_and_its_help_are_in_the_language_of_the_browser(browser_server, tmp_path, language):
    """German is none of the frontend's own languages, Chinese is one."""
    with open_page(browser_server.url, language={"de": "de-DE", "zh": "zh-CN"}[language]) as page:
        show_template(page)
        check_words(page, language)
        shot(page, f"{language}-template", tmp_path)
        assert hover(page, "window") == NODE_DEFS[language]["inputs"]["window"]["tooltip"]
        shot(page, f"{language}-tooltip", tmp_path)
        run_graph(page)
        text = help_of(page, "TUDSRUpscale")
        # Help is in the frontend's language, which later ones (1.49) keep to English where they lack the browser's.
        spoken = NODE_DEFS[page.evaluate("() => app.extensionManager.setting.get('Comfy.Locale')")]
        assert spoken["display_name"] in text and spoken["inputs"]["native_size"]["name"] in text
        pictures = "() => [...document.querySelectorAll('.node-help-content img')].map(i => i.naturalWidth > 0)"
        assert page.evaluate(pictures) == [True]
        shot(page, f"{language}-help", tmp_path)


def test_the_language_is_switched_in_the_settings(browser_server, tmp_path):
    switch = "async language => { await app.extensionManager.setting.set('Comfy.Locale', language) }"
    with open_page(browser_server.url) as page:
        show_template(page)
        check_words(page, "en")
        page.evaluate(switch, "zh")
        try:
            page.reload()
            wait_until_ready(page)
            show_template(page)
            check_words(page, "zh")
            page.evaluate("async () => { await app.extensionManager.command.execute('Comfy.ShowSettingsDialog') }")
            page.get_by_text("TUDSR", exact=True).first.click()
            names = json.loads((PACK / "locales" / "zh" / "settings.json").read_text("utf-8"))
            for setting in names.values():
                page.get_by_text(setting["name"]).first.wait_for(timeout=10000)
            page.get_by_text("放大", exact=True).first.wait_for(timeout=10000)
            assert all(page.get_by_text(setting["name"]).first.is_visible() for setting in names.values())
            shot(page, "zh-settings", tmp_path)
        finally:
            page.evaluate(switch, "en")


def test_help_without_a_translation_is_english(browser_server):
    with open_page(browser_server.url, language="de-DE") as page:
        page.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('TUDSRPlan')) }")
        fit(page)
        assert "Shows what an upscale will do, before anything runs" in help_of(page, "TUDSRPlan")


def blueprint_of(server):
    """Return the id of the blueprint, or skip where ComfyUI offers none."""
    try:
        offered = server.get("/global_subgraphs")
    except urllib.error.HTTPError:
        pytest.skip("this ComfyUI offers no subgraphs of packs")
    return next(number for number, one in offered.items() if one["name"] == "Upscale x8 (TUDSR)")


def test_the_blueprint_is_offered_placed_and_runs(browser_server, tmp_path):
    number = blueprint_of(browser_server)
    data = json.loads(browser_server.get(f"/global_subgraphs/{number}")["data"])
    assert data == json.loads((PACK / "subgraphs" / "Upscale x8 (TUDSR).json").read_text("ascii"))
    with open_page(browser_server.url) as page:
        page.evaluate("() => app.graph.clear()")
        page.wait_for_timeout(500)
        page.mouse.dblclick(900, 500)
        page.wait_for_function("() => document.activeElement?.tagName == 'INPUT'", timeout=15000)
        page.keyboard.type("Upscale x8 (TUDSR)", delay=30)
        page.wait_for_timeout(1200)
        shot(page, "blueprint-search", tmp_path)
        page.keyboard.press("Enter")
        page.wait_for_function("() => app.graph._nodes.some(n => n.subgraph)", timeout=15000)
        placed = page.evaluate(
            """() => {
                const node = app.graph._nodes.find(n => n.subgraph);
                const load = LiteGraph.createNode('LoadImage'), save = LiteGraph.createNode('SaveImage');
                app.graph.add(load); app.graph.add(save);
                load.widgets.find(w => w.name == 'image').value = 'example.png';
                load.pos = [node.pos[0] - 400, node.pos[1]]; save.pos = [node.pos[0] + 400, node.pos[1]];
                load.connect(0, node, 0); load.connect(1, node, 1); node.connect(0, save, 0);
                return {title: node.title, widgets: Object.fromEntries(node.widgets.map(w => [w.name, w.value]))};
            }"""
        )
        assert placed == {"title": "Upscale x8 (TUDSR)", "widgets": {"tile": 0, "color_fix": "wavelet"}}
        fit(page)
        run_graph(page)
        page.wait_for_function(
            "() => app.graph._nodes.find(n => n.type == 'SaveImage').imgs?.[0]?.naturalWidth == 1600"
        )
        shot(page, "blueprint", tmp_path)
