"""Detectors: from one round's updates to the clients that look malicious."""
