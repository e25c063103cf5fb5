"""Stage 7, command line: python -m gatepack, where the gatepack command is not on the path."""

from gatepack.cli import app

app()
