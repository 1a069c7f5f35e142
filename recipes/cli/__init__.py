"""The command ``groundwire``: LightningCLI's `fit`, `validate`, `test`, `predict`, and `ls`, `cp`, `check`, `compare`."""

from groundwire.recipes.cli.main import main

__all__ = ["main"]
