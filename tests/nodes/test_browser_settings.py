"""The pack's settings: they act on what is new, and on nothing that someone has saved."""

from __future__ import annotations

import json

import pytest
from browser import open_page, run_graph
from comfyui import PACK

TEMPLATE = PACK / "workflows" / "01-embedded-x8.json"
SMALL = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "example.png"}},
    "2": {"class_type": "TUDSRLoadEmbedded", "inputs": {}},
    "3": {
        "class_type": "TUDSRStageOne",
        "inputs": {"image": ["1", 0], "model": ["2", 0], "vae": ["2", 2], "conditioning": ["2", 3], "factor": 2.0},
    },
    "4": {"class_type": "PreviewImage", "inputs": {"images": ["3", 0]}},
}
VALUES = """type => app.graph._nodes.filter(n => n.type == type)
    .map(n => ['tile', 'color_fix'].map(name => n.widgets.find(w => w.name == name)?.value))"""
ADD = "type => { const node = LiteGraph.createNode(type); app.graph.add(node); return node.id }"


@pytest.fixture
def page(browser_server):
    with open_page(browser_server.url) as page:
        page.evaluate("() => app.graph.clear()")
        yield page
        for name, value in (("Tile", 0), ("ColorFix", "wavelet"), ("Previews", True)):
            choose(page, name, value)


def choose(page, name, value):
    page.evaluate(
        "async ([name, value]) => { await app.extensionManager.setting.set(name, value) }",
        [f"TUDSR.Upscaling.{name}", value],
    )


def test_a_new_node_starts_with_what_is_chosen(page):
    for kind in ("TUDSRUpscale", "TUDSRStageTwo"):
        page.evaluate(ADD, kind)
        assert page.evaluate(VALUES, kind) == [[0, "wavelet"]]
    choose(page, "Tile", 530)
    choose(page, "ColorFix", "adain")
    for kind in ("TUDSRUpscale", "TUDSRStageOne", "TUDSRUpscaleFolder"):
        page.evaluate(ADD, kind)
        assert page.evaluate(VALUES, kind)[-1] == [512, "adain"]
    assert page.evaluate(VALUES, "TUDSRUpscale")[0] == [0, "wavelet"], "nodes that are there stay"
    page.evaluate(ADD, "TUDSRPlan")
    page.evaluate(ADD, "TUDSRMultiDiffusion")
    assert page.evaluate(VALUES, "TUDSRPlan") == [[512, None]]
    assert page.evaluate(VALUES, "TUDSRMultiDiffusion") == [[512, None]], "has a default of its own"
    choose(page, "ColorFix", "no such fix")
    page.evaluate(ADD, "TUDSRStageTwo")
    assert page.evaluate(VALUES, "TUDSRStageTwo")[-1] == [512, "wavelet"]


def test_what_is_saved_or_copied_keeps_its_values(page):
    choose(page, "Tile", 768)
    choose(page, "ColorFix", "adain")
    workflow = json.loads(TEMPLATE.read_text("utf-8"))
    page.evaluate("async text => { await app.loadGraphData(JSON.parse(text)) }", json.dumps(workflow))
    assert page.evaluate(VALUES, "TUDSRUpscale") == [[0, "wavelet"]]
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(n => n.type == 'TUDSRUpscale');
            app.canvas.selectItems([node]);
            app.canvas.copyToClipboard();
            app.canvas.pasteFromClipboard();
        }"""
    )
    assert page.evaluate(VALUES, "TUDSRUpscale") == [[0, "wavelet"]] * 2
    page.evaluate("async api => { await app.loadApiJson(JSON.parse(api), 'small') }", json.dumps(SMALL))
    assert page.evaluate(VALUES, "TUDSRStageOne") == [[0, "wavelet"]], "the file does not say, so it is the node's own"
    page.evaluate(ADD, "TUDSRStageTwo")
    assert page.evaluate(VALUES, "TUDSRStageTwo") == [[768, "adain"]]
    page.evaluate("async () => { await app.loadGraphData(JSON.parse(JSON.stringify(app.graph.serialize()))) }")
    assert page.evaluate(VALUES, "TUDSRStageTwo") == [[768, "adain"]]


def test_previews_are_sent_or_not(page):
    page.evaluate(
        """() => { window.previews = 0; app.api.addEventListener('b_preview', () => { window.previews += 1 }) }"""
    )
    for wanted, factor in ((False, 2.0), (True, 3.0)):
        choose(page, "Previews", wanted)
        small = json.loads(json.dumps(SMALL))
        small["3"]["inputs"]["factor"] = factor
        page.evaluate("async api => { await app.loadApiJson(JSON.parse(api), 'small') }", json.dumps(small))
        run_graph(page)
        assert (page.evaluate("() => window.previews") > 0) is wanted


def test_the_settings_are_those_that_are_translated(page):
    shown = page.evaluate(
        """() => Object.fromEntries(Object.values(app.ui.settings.settingsParamLookup ?? {})
            .filter(s => s.id.startsWith('TUDSR.'))
            .map(s => [s.id.replaceAll('.', '_'), {name: s.name, tooltip: s.tooltip}]))"""
    )
    assert shown == json.loads((PACK / "locales" / "en" / "settings.json").read_text("utf-8"))
    options = page.evaluate("() => app.ui.settings.settingsParamLookup['TUDSR.Upscaling.ColorFix'].options")
    page.evaluate(ADD, "TUDSRUpscale")
    assert options == page.evaluate("() => app.graph._nodes[0].widgets.find(w => w.name == 'color_fix').options.values")
