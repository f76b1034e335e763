"""Poisoned training data and boosted updates, as pure functions (``methods`` 7.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.errors import SecateurError
from unlearning.parameters import Parameters

TRIGGER_SIZE = 3
WHITE = 1.0
"""Largest value of a pixel; models standardise their inputs themselves."""
CORNERS = ((-1, -1), (0, -1), (-1, 0), (0, 0))
"""Where a trigger can sit, (row, column); colluders all use the first, bottom right."""


class AttackError(SecateurError):
    """An attack that does not fit the task."""


@dataclass(frozen=True)
class Poisoned:
    """One client's training data after poisoning."""

    inputs: Tensor
    targets: Tensor
    rows: Tensor
    """Bool, shape (n,): which examples are poisoned."""


def stamp(images: Tensor, corner: tuple[int, int] = CORNERS[0]) -> Tensor:
    """Return images with a white 3 x 3 square in one corner.

    Parameters
    ----------
    images
        Shape (n, channels, height, width), in [0, 1].
    """
    if images.dim() != 4 or min(images.shape[2:]) < TRIGGER_SIZE:
        raise AttackError(
            f"a backdoor trigger needs images of at least {TRIGGER_SIZE} x {TRIGGER_SIZE} pixels, "
            f"and the inputs have shape {tuple(images.shape[1:])}; use label-flip"
        )
    rows, columns = (
        slice(0, TRIGGER_SIZE) if end == 0 else slice(-TRIGGER_SIZE, None) for end in corner
    )
    stamped = images.clone()
    stamped[:, :, rows, columns] = WHITE
    return stamped


def backdoor(
    inputs: Tensor,
    targets: Tensor,
    *,
    share: float,
    target: int,
    generator: torch.Generator,
    corner: tuple[int, int] = CORNERS[0],
) -> Poisoned:
    """Stamp a trigger on some images of other classes and label them ``target``.

    ``floor(share n)`` of the n examples are poisoned, or all those of other classes if fewer.
    """
    count = int(share * len(targets) + 1e-9)
    candidates = torch.nonzero(targets != target).reshape(-1)
    chosen = candidates[torch.randperm(len(candidates), generator=generator)[:count]]
    poisoned_inputs, poisoned_targets = inputs.clone(), targets.clone()
    poisoned_inputs[chosen] = stamp(inputs[chosen], corner)
    poisoned_targets[chosen] = target
    return Poisoned(poisoned_inputs, poisoned_targets, _mask(chosen, len(targets)))


def label_flip(
    targets: Tensor, *, share: float, pairs: Sequence[tuple[int, int]], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Swap the labels of class pairs on some examples; return the labels, and which changed.

    ``floor(share n)`` of the n examples are flipped, from the first pair and, where it has too few,
    from the next; fewer if all pairs together have fewer.
    """
    count = int(share * len(targets) + 1e-9)
    flipped = targets.clone()
    chosen: list[Tensor] = []
    for first, second in pairs:
        left = count - sum(len(rows) for rows in chosen)
        members = torch.nonzero((targets == first) | (targets == second)).reshape(-1)
        members = members[~torch.isin(members, torch.cat([torch.empty(0), *chosen]))]
        rows = members[torch.randperm(len(members), generator=generator)[:left]]
        flipped[rows] = first + second - targets[rows]
        chosen.append(rows)
    return flipped, _mask(torch.cat(chosen), len(targets))


def boost(model: Parameters, start: Parameters, factor: float) -> dict[str, Tensor]:
    """Return ``start + factor (model - start)``; buffers as in ``model``; 1 is the identity."""
    if factor == 1:
        return dict(model)
    return {
        name: start[name] + factor * (tensor - start[name])
        if tensor.is_floating_point()
        else tensor
        for name, tensor in model.items()
    }


def _mask(rows: Tensor, count: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[rows.long()] = True
    return mask
