"""The `tudsr` command: options, printing, exit codes. No logic of its own.

Must not know: ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    app="main",
)
