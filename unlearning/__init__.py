"""Arithmetic on model parameters: no framework, no files, no clock."""
