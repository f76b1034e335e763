"""Random generators split by purpose, so that one draw never shifts another.

A run has one seed. Every use of randomness derives its own generator from that seed and from
what it is for, such as (seed, round, client, "shuffle"): adding a client or a feature leaves all
other streams as they were.
"""

import hashlib

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on every part of ``purpose``."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *purpose: str | int) -> torch.Generator:
    """Return a CPU generator for one purpose of one run."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
