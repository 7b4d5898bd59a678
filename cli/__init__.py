"""The command line. No logic of its own: it reads arguments, calls the package, prints."""

from .main import main

__all__ = ["main"]
