"""On PYTHONPATH, makes everything unimportable that ComfyUI does not require itself."""

import sys

for name in ("diffusers", "tifffile", "imagecodecs", "typer", "rich", "peft", "accelerate"):
    sys.modules[name] = None  # Python's own mark for "not to be imported"
sys.stderr.write("tests: nothing but what ComfyUI requires can be imported\n")
