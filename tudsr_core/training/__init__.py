"""Training: data, and the loop that made the embedded model.

Must not know: the command line, ComfyUI.
"""

from .._lazy import public_names

__all__, __getattr__ = public_names(
    __name__,
    data="read_held_out",
)
