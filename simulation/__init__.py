"""Experiments: attacks, scenarios, engines and reports."""
