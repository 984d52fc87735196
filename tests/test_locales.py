"""The translations: none missing, none stale, and nothing lost in them that must stay as it is."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LANGUAGES = ["de", "es", "fr", "ja", "ko", "zh"]
# What is the same in every language: figures, names of files and folders, methods, what is typed.
STAYS = re.compile(
    r"\d[\d.,]*\d|\d|[\w-]+\.(?:ckpt|pth|pkl|json|safetensors)\b|models/\w+|`[^`]+`"
    r"|TUDSR|OMGSR|HYPIR|OSEDiff|PiSA-SR|InvSR|StableSR|SD2\.1(?:-base)?|SD-Turbo|SamplerCustom|KSampler"
    r"|\b(?:wavelet|adain|gaussian|uniform|centred|windowed|stride|ddpm|euler|omgsr)\b"
)


def maker():
    spec = importlib.util.spec_from_file_location("locales_make", ROOT / "locales" / "make.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = maker()


def words_of(language):
    return MAKE.read(ROOT / "locales" / language / MAKE.WORDS)


def test_english_has_every_node_input_and_output_of_the_frozen_schema():
    frozen = json.loads((ROOT / "tests" / "nodes" / "schema.json").read_text("utf-8"))
    known = MAKE.english()["nodeDefs.json"]
    assert known.keys() == frozen.keys(), "run: python locales/make.py, with COMFYUI_PATH set"
    for name, node in known.items():
        assert list(node["inputs"]) == frozen[name]["inputs"], f"{name}: run python locales/make.py"
        assert [output["name"] for output in node["outputs"].values()] == frozen[name]["names"], name


def test_every_language_is_there():
    assert MAKE.languages() == LANGUAGES


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_translation_is_missing_or_stale(language):
    words = words_of(language)
    assert MAKE.differences(words) == [], f"translate in locales/{language}/{MAKE.WORDS}, run python locales/make.py"
    folder = ROOT / "locales" / language
    assert {path.name for path in folder.iterdir()} == {*MAKE.english(), MAKE.WORDS}
    for name, content in MAKE.english().items():
        assert MAKE.read(folder / name) == MAKE.translate(content, words), f"{name}: run python locales/make.py"


@pytest.mark.parametrize("language", LANGUAGES)
def test_names_figures_and_options_stay(language):
    for text, translated in words_of(language).items():
        assert translated.strip() and translated == translated.strip()
        assert len(text) < 25 or translated != text, f"not translated: {text}"
        for kept in STAYS.findall(text):
            assert kept in translated, f"{kept} of {text!r} is lost in {translated!r}"


def test_signs_of_the_message_format_are_shown_as_they_are():
    text = "50 % of {all} | a@b"
    assert MAKE.escape(text) == "50 % of {'{'}all{'}'} {'|'} a{'@'}b"
    assert MAKE.unescape(MAKE.escape(text)) == text
    info = {"display_name": "a|b", "description": "", "input": {"required": {"x": ["INT", {"tooltip": "{1}"}]}}}
    made = MAKE.node_defs({"TUDSRx": info | {"output_name": [], "output_tooltips": []}, "Other": {}})
    assert list(made) == ["TUDSRx"] and made["TUDSRx"]["inputs"]["x"]["tooltip"] == "{'{'}1{'}'}"


def test_a_changed_widget_is_noticed(monkeypatch):
    words = words_of("de")
    changed = MAKE.english()
    node = changed["nodeDefs.json"]["TUDSRColorFix"]
    node["inputs"]["way"] = node["inputs"].pop("method") | {"name": "way"}
    monkeypatch.setattr(MAKE, "english", lambda: changed)
    assert MAKE.differences(words) == ["not translated: way"]
    del changed["nodeDefs.json"]["TUDSRCompare"]
    assert "not used: Compare Pictures" in MAKE.differences(words)
