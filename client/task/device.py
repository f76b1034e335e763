"""Where tensors are computed."""

import functools

import torch

from unlearning.errors import SecateurError

WITHOUT_FLOAT64 = frozenset({"mps"})
"""Kinds of devices that do not know float64."""


def exact_device(device: torch.device) -> torch.device:
    """Return where to compute in float64 what ``device`` makes: there, or on the CPU."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


@functools.lru_cache
def choose_device(name: str) -> torch.device:
    """Return the device called ``name``; ``auto`` takes CUDA, else MPS, else the CPU.

    Raises
    ------
    SecateurError
        If the device is not there: training elsewhere instead would be a surprise.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SecateurError(
            f"device {name!r} is not available here; use auto, cpu, or one that is"
        ) from error
    return device
