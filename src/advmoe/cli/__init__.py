"""The command line: `main` runs one command, each of which is a module here."""

from advmoe.cli.main import main

__all__ = ["main"]
