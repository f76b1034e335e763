"""Measured comparisons with other ways to run the same federation; never tests."""
