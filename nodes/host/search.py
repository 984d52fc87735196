"""Other words for nodes in ComfyUI's search, where it has them."""

from __future__ import annotations

from collections.abc import Callable

from comfy_api.latest import io


def found_by(node: type[io.ComfyNode], words_of: Callable[[str], list[str]]) -> type[io.ComfyNode]:
    """Give the schema of `node` the words of its id; returns `node`.

    Schemas have had `search_aliases` since January 2026; an older one is left as it is.
    """
    define = node.define_schema.__func__

    def define_schema(cls) -> io.Schema:
        schema = define(cls)
        if hasattr(schema, "search_aliases"):
            schema.search_aliases = words_of(schema.node_id)
        return schema

    node.define_schema = classmethod(define_schema)
    return node
