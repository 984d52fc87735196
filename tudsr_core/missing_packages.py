"""What to say when a package that only the command line and the library need is not installed."""

from __future__ import annotations

EXTRAS = {
    "transformers": "sd",
    "peft": "train",
    "accelerate": "train",
    "tomli": "train",
    "ray": "ray",
    "skimage": "metrics",
    "sklearn": "metrics",
}
BY_ITSELF = {"pyiqa"}  # in no extra: its licence is non-commercial
PACKAGES = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}


def needs(error: ImportError) -> str:
    """Return `needs <package>; run: pip install ...`; raises `error` itself if it is no package of others."""
    top = (error.name or "").partition(".")[0]
    if top in ("", "tudsr_core"):
        raise error
    broken = "" if isinstance(error, ModuleNotFoundError) else f", which cannot be imported ({error})"
    install = top if top in BY_ITSELF else f"'comfyui-tudsr[{EXTRAS.get(top, 'cli')}]'"
    return f"needs {PACKAGES.get(top, top)}{broken}; run: pip install {install}"
