"""``python -m server``: the ``secateur`` command."""

from server.cli import main

main()
