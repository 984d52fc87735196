"""Write the translations that ComfyUI serves: `python locales/make.py`, after any change of a node's words.

`en/nodeDefs.json` is asked of a ComfyUI and stays as it is where none is found; `en/main.json` and
`en/settings.json` are written by hand. Every other language has the files of `en`, each text replaced by
its translation in `LANGUAGE/words.json`, which ComfyUI does not read. Texts without a translation, and
translations that nothing uses any more, are named and nothing of that language is written.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORDS = "words.json"
SIGNS = re.compile(r"[{}@|]")  # what vue-i18n takes for its own


def read(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text("utf-8"))


def write(path: Path, content: Any) -> None:
    """Write a JSON file as people read it."""
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def escape(text: str) -> str:
    """Return `text` as a message of vue-i18n, which shows it as it is."""
    return SIGNS.sub(r"{'\g<0>'}", text)


def unescape(message: str) -> str:
    """Undo `escape`."""
    return re.sub(r"\{'(.)'\}", r"\1", message)


def node_defs(known: dict[str, dict]) -> dict[str, dict]:
    """Return `nodeDefs.json` for this pack's nodes of an `/object_info`."""
    return {name: _node_def(info) for name, info in sorted(known.items()) if name.startswith("TUDSR")}


def _node_def(info: dict) -> dict:
    inputs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    said = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": escape(info["display_name"]),
        "description": escape(info["description"]),
        "inputs": {name: _named(name, spec[1]["tooltip"]) for name, spec in inputs.items()},
        "outputs": {str(index): _named(name, tooltip) for index, (name, tooltip) in enumerate(said)},
    }


def _named(name: str, tooltip: str) -> dict[str, str]:
    return {"name": escape(name), "tooltip": escape(tooltip)}


def texts_of(content: Any) -> Iterator[str]:
    """Yield every text of a file's content."""
    if isinstance(content, str):
        yield unescape(content)
    else:
        for value in content.values():
            yield from texts_of(value)


def translate(content: Any, words: dict[str, str]) -> Any:
    """Return `content` with every text replaced by its translation."""
    if isinstance(content, str):
        return escape(words[unescape(content)])
    return {key: translate(value, words) for key, value in content.items()}


def english() -> dict[str, Any]:
    """Return the contents of the files of `en` by name."""
    return {path.name: read(path) for path in sorted((HERE / "en").glob("*.json"))}


def languages() -> list[str]:
    """Return every language but English."""
    return sorted(path.parent.name for path in HERE.glob(f"*/{WORDS}"))


def differences(words: dict[str, str]) -> list[str]:
    """Return what is not translated, and what is translated for nothing."""
    wanted = {text for content in english().values() for text in texts_of(content)}
    missing = [f"not translated: {text}" for text in sorted(wanted - words.keys())]
    return missing + [f"not used: {text}" for text in sorted(words.keys() - wanted)]


def ask_comfyui() -> dict[str, dict] | None:
    """Return `/object_info` of a ComfyUI with this pack, or None where none is found."""
    sys.path[:0] = [str(HERE.parent / "tests")]
    from comfyui import Server, find

    if (comfyui := find()) is None:
        return None
    server = Server(comfyui, Path(tempfile.mkdtemp()))
    try:
        return server.get("/object_info")
    finally:
        server.stop()


def main() -> None:
    if known := ask_comfyui():
        write(HERE / "en" / "nodeDefs.json", node_defs(known))
    failed = False
    for language in languages():
        words = read(HERE / language / WORDS)
        if lines := differences(words):
            print(language, *lines, sep="\n  ", file=sys.stderr)  # noqa: T201
            failed = True
            continue
        for name, content in english().items():
            write(HERE / language / name, translate(content, words))
    sys.exit(failed)


if __name__ == "__main__":
    main()
