"""What a node says for people to read, shown on the node by `web/js/node_text.js` and kept in ComfyUI's history.

A node that always has something to say returns it as `ui=ui.PreviewText(text)`. Whatever the pack
logs as a warning while a node runs is added, so that it is seen by those who never open the log:
to say something on a node, call `log.warning`, in the core or here.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from comfy_api.latest import io

PACK = __name__.rpartition(".nodes.")[0]


class _Collector(logging.Handler):
    """Keeps the distinct messages of one thread: ComfyUI's own requests are served by others."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.mine, self.lines = threading.get_ident(), []

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if record.thread == self.mine and line not in self.lines:
            self.lines.append(line)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Yield the list that the pack's warnings of this thread are added to meanwhile."""
    logger, collector = logging.getLogger(PACK), _Collector()
    logger.addHandler(collector)
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)


def shows_warnings(node: type[io.ComfyNode]) -> type[io.ComfyNode]:
    """Make `node` show what the pack warns of while it runs, below what it says itself; returns `node`."""
    run = node.execute.__func__

    @functools.wraps(run)
    def execute(cls, *args: Any, **kwargs: Any) -> io.NodeOutput:
        with collected_warnings() as lines:
            output = run(cls, *args, **kwargs)
        if lines:
            said = output.ui or {}
            said = dict(said if isinstance(said, dict) else said.as_dict())
            output.ui = said | {"text": ["\n".join([*said.get("text", ()), *(f"Note: {line}" for line in lines)])]}
        return output

    node.execute = classmethod(execute)
    return node
