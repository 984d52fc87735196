"""On PYTHONPATH, makes unimportable what ComfyUI does not require itself, or what TUDSR_TEST_WITHOUT names."""

import os
import sys

ALL = "diffusers tifffile imagecodecs OpenEXR typer rich peft accelerate"
chosen = os.environ.get("TUDSR_TEST_WITHOUT")
for name in (chosen or ALL).split():
    sys.modules[name] = None  # Python's own mark for "not to be imported"
if not chosen:
    sys.stderr.write("tests: nothing but what ComfyUI requires can be imported\n")
