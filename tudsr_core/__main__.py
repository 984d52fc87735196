"""`python -m tudsr_core` and the `tudsr` command, whose own packages may be missing."""

from __future__ import annotations

from .missing_packages import needs


def main() -> None:
    """Run the command; where what it is made of is missing, end with one line."""
    try:
        from .cli import main as run
    except ImportError as error:
        raise SystemExit(f"error: tudsr {needs(error)}") from None
    run()


if __name__ == "__main__":
    main()
