"""One federation: the Flower ServerApp, its settings and the command line."""
