"""`python -m tudsr_core` is the `tudsr` command."""

from .cli import main

if __name__ == "__main__":
    main()
