"""What templates say about weights agrees with what `tudsr download` knows."""

import json
import re

import pytest
from comfyui import PACK

from tudsr_core.weights.known_files import KNOWN_FILES, known_file

TEMPLATES = sorted((PACK / "workflows").glob("*.json"))


def nodes(path):
    return json.loads(path.read_text("utf-8"))["nodes"]


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_every_known_file_that_a_template_loads_is_offered_from_its_address(path):
    for node in nodes(path):
        values = [value for value in node.get("widgets_values") or [] if isinstance(value, str)]
        loaded = [file for file in KNOWN_FILES if file.name in values and file.url]
        links = {link["name"]: link for link in node.get("properties", {}).get("models", [])}
        for file in loaded:
            assert (links[file.name]["url"], links[file.name]["directory"]) == (file.url, file.folder)
        assert links.keys() <= set(values), "the frontend shows links of what is chosen only"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_links_are_whole_and_their_digests_are_those_of_the_list(path):
    for node in nodes(path):
        for link in node.get("properties", {}).get("models", []):
            assert {"name", "url", "directory"} <= link.keys()
            assert link["url"].startswith(("https://huggingface.co/", "https://github.com/"))
            assert link.keys() & {"hash", "hash_type"} in (set(), {"hash", "hash_type"})
            if "hash" in link:
                assert link["hash_type"] == "SHA256" and re.fullmatch("[0-9a-f]{64}", link["hash"])
            known = known_file(link["name"])
            if known and known.digest and known.digest.startswith("sha256:"):
                assert link["hash"] == known.digest.removeprefix("sha256:")


def test_one_file_has_one_link():
    links = {}
    for path in TEMPLATES:
        for node in nodes(path):
            for link in node.get("properties", {}).get("models", []):
                assert links.setdefault(link["name"], link) == link
    assert links
