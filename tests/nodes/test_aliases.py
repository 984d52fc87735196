"""The words under which nodes are found, without ComfyUI."""

import json
from pathlib import Path

from nodes.aliases import ALIASES, aliases_of

SCHEMA = Path(__file__).with_name("schema.json")


def test_every_node_has_other_words():
    assert ALIASES.keys() == json.loads(SCHEMA.read_text("utf-8")).keys()
    for node in ALIASES:
        words = aliases_of(node)
        assert len(words) == len(set(words)) >= 2 and all(word == word.strip() != "" for word in words)
    assert "super-resolution" in aliases_of("TUDSRUpscale")
