"""The command line, ``lit-dpo``."""

from lit_dpo.cli.app import main

__all__ = ["main"]
