"""Decisions per round: the wrapper strategy and the small rules it applies."""
