"""Entry point of the command ``groundwire``."""

from groundwire.recipes.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
