"""Attacks: how a simulated client poisons its data or its update. Never shipped to clients."""
