"""Training: data, and the loop that made the embedded model.

Must not know: the command line, ComfyUI.
"""
