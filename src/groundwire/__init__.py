"""Groundwire: PyTorch Lightning plugins for training under constraints."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("groundwire")
except PackageNotFoundError:  # the source tree on the path, without an installation
    __version__ = "0.0.0"

__all__ = ["__version__"]
