"""The `tudsr` command, also as `python -m tudsr_core`: all modules with commands, then the parser."""

from . import cli_zoom  # noqa: F401 - adds its command
from .cli import main

if __name__ == "__main__":
    main()
