"""Layer-wise partial updates: touch, or remember, only a part of each layer.

Paper 002, layer-wise partial unlearning (``methods`` 6). Two ways to leave entries out:

- of a *logged* update, a share q_l of each layer is dropped, so that less is subtracted later and
  less is stored (6.2);
- of a *step* of training, only the entries in a 0/1 selection S_(l,e) of share phi_l are taken,
  and S moves from epoch to epoch, so that all entries have their turn (6.3, 6.4):

      w_l <- w_l - a S_(l,e) g_l

Shares are linear in depth. The paper prints neither numbers nor the pattern; ends of 0.8 and 0.2,
the comb and its shift by one are this project's. A layer's bias has the share of its weight.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal, assert_never

import torch
from torch import Tensor

from unlearning.distillation import Forward, Loss
from unlearning.errors import ParametersError
from unlearning.gradients import batches, check_rows, clipped, gradient
from unlearning.parameters import (
    Parameters,
    check_alike,
    check_finite,
    top_count,
    top_mask,
    trained_names,
)
from unlearning.randomness import generator as derived_generator

MANY, FEW = 0.8, 0.2
"""Shares at the two ends of the network (``methods`` 6.2, 6.3)."""

Dropping = Literal["random", "magnitude"]
"""Which entries of a logged update are dropped: a uniform draw, or the smallest in magnitude."""
Pattern = Literal["comb", "block", "random"]
"""How the entries selected in an epoch lie in the flattened tensor: spread evenly and moving by
one; next to each other and moving by their number; like a block, but of shuffled entries."""
Stop = Callable[[Parameters], bool]
"""Model -> whether it has forgotten enough, or may not be pushed any further."""


# ---------------------------------------------------------------- depth


def layers(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group tensors by layer, that is by all of the name but its last part, in the order given."""
    found: dict[str, tuple[str, ...]] = {}
    for name in names:
        layer = name.rpartition(".")[0]
        found[layer] = (*found.get(layer, ()), name)
    return found


def depth_schedule(count: int, first: float, last: float) -> tuple[float, ...]:
    """Return one share a layer: ``first + (last - first) (l - 1) / (L - 1)`` (``methods`` 6.2).

    Parameters
    ----------
    count
        Layers L, at least 0. A single one has the mean of both ends, as every other number of
        layers has on average; so a schedule and its reflection agree there too.
    first, last
        Shares of the first and the last layer, in [0, 1].

    Raises
    ------
    ParametersError
        If a share is out of range.
    """
    if not (0 <= first <= 1 and 0 <= last <= 1):
        raise ParametersError(f"shares must lie in [0, 1], got {first} and {last}")
    if count == 1:
        return ((first + last) / 2,)
    # Weighing both ends, rather than adding to one, reaches both exactly.
    ways = [place / (count - 1) for place in range(count)]
    return tuple((1 - way) * first + way * last for way in ways)


def shares_by_depth(model: Parameters, first: float = MANY, last: float = FEW) -> dict[str, float]:
    """Return each trained tensor's share, by the depth of its layer in the model's order.

    The defaults are those of logged updates and of label flipping, whose early layers are touched
    most; ascent has ``first=FEW, last=MANY``. Errors are those of ``depth_schedule``.
    """
    grouped = layers(trained_names(model))
    schedule = depth_schedule(len(grouped), first, last)
    return {
        name: share
        for names, share in zip(grouped.values(), schedule, strict=True)
        for name in names
    }


# ---------------------------------------------------------------- logged updates


def kept_entries(
    update: Parameters,
    shares: Mapping[str, float],
    dropping: Dropping,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Choose what a logged update keeps (``methods`` 6.2).

    Parameters
    ----------
    update
        What a batch changed, over the trained tensors.
    shares
        Tensor -> share q of its entries to drop, in [0, 1]: ``ceil(q n)`` of n.
    dropping
        ``random`` draws from ``generator``, tensor by tensor in the update's order;
        ``magnitude`` drops the smallest, of equals the one with the lower row-major index.

    Returns
    -------
    dict
        Bool tensors, true where an entry is kept.

    Raises
    ------
    ParametersError
        If names differ, a share is out of range, there is nothing to draw from, or magnitudes are
        not finite.
    """
    if update.keys() != shares.keys():
        missing = ", ".join(sorted(update.keys() ^ shares.keys()))
        raise ParametersError(f"an update and its shares differ in their tensors: {missing}")
    kept = {}
    for name, tensor in update.items():
        count = top_count(tensor.numel(), shares[name])
        match dropping:
            case "magnitude":
                kept[name] = ~top_mask(-tensor.abs(), count)
            case "random":
                if generator is None:
                    raise ParametersError("random dropping needs a generator to draw from")
                order = torch.randperm(tensor.numel(), generator=generator)
                kept[name] = (order >= count).reshape(tensor.shape)
            case _:
                assert_never(dropping)
    return kept


def kept_globally(update: Parameters, share: float) -> dict[str, Tensor]:
    """Choose as ``kept_entries`` by magnitude, but ``ceil(q P)`` of all P entries together.

    Layers of small updates lose more than others. Of equals the ones in earlier tensors go first.
    """
    if not update:
        return {}
    sizes = [tensor.numel() for tensor in update.values()]
    magnitudes = torch.cat([tensor.abs().reshape(-1) for tensor in update.values()])
    kept = ~top_mask(-magnitudes, top_count(magnitudes.numel(), share))
    parts = torch.split(kept, sizes)
    return {
        name: part.reshape(tensor.shape)
        for (name, tensor), part in zip(update.items(), parts, strict=True)
    }


def partial(update: Parameters, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the update with 0 wherever an entry is not kept."""
    return {name: tensor.masked_fill(~kept[name], 0) for name, tensor in update.items()}


def packed(update: Parameters, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the kept entries alone, per tensor as a vector in row-major order.

    Where ``kept`` follows from a seed, nothing else has to be stored.
    """
    return {name: tensor[kept[name]] for name, tensor in update.items()}


def unpacked(values: Parameters, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what ``partial`` returned, from what ``packed`` returned.

    Raises
    ------
    ParametersError
        If there are not as many values as entries kept.
    """
    found = {}
    for name, vector in values.items():
        places = kept[name]
        if vector.numel() != int(places.sum()):
            raise ParametersError(
                f"tensor {name} has {vector.numel()} values for {int(places.sum())} entries"
            )
        found[name] = torch.zeros(places.shape, dtype=vector.dtype)
        found[name][places] = vector
    return found


# ---------------------------------------------------------------- selected steps


def selected_count(size: int, share: float) -> int:
    """Return ``floor(phi n)``, at least 1 (``methods`` 6.3); none for a share of 0.

    A product that is an integer up to rounding error is not pushed under it.
    """
    if not 0 <= share <= 1:
        raise ParametersError(f"a share must lie in [0, 1], got {share}")
    if share == 0:
        return 0
    return min(size, max(1, int(share * size + 1e-9)))


def selection(
    shape: tuple[int, ...],
    share: float,
    epoch: int = 0,
    pattern: Pattern = "comb",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return S_(l,e), the entries of one tensor that an epoch's steps move.

    With u selected of n entries, the comb selects i where ``floor((i + 1) u / n) >
    floor(i u / n)``. Whatever the pattern, ``ceil(n / u)`` consecutive epochs select every entry,
    and n epochs later the selection is the same.

    Parameters
    ----------
    share
        Share phi of the entries, in [0, 1].
    epoch
        Counted from 0.
    generator
        ``random`` shuffles with it; to move on, it has to start from the same state every epoch.

    Returns
    -------
    Tensor
        Bool, ``selected_count`` entries true.

    Raises
    ------
    ParametersError
        If the share is out of range, the epoch is negative or there is nothing to draw from.
    """
    if epoch < 0:
        raise ParametersError(f"epochs are counted from 0, got {epoch}")
    size = torch.Size(shape).numel()
    count = selected_count(size, share)
    places = torch.arange(size)
    match pattern:
        case "comb":
            first = (places + 1) * count // max(size, 1) > places * count // max(size, 1)
            chosen = torch.roll(first, epoch % max(size, 1))
        case "block":
            chosen = torch.roll(places < count, epoch * count % max(size, 1))
        case "random":
            if generator is None:
                raise ParametersError("a random selection needs a generator to draw from")
            block = torch.roll(places < count, epoch * count % max(size, 1))
            chosen = block[torch.randperm(size, generator=generator)]
        case _:
            assert_never(pattern)
    return chosen.reshape(shape)


def selections(
    model: Parameters,
    shares: Mapping[str, float],
    epoch: int = 0,
    pattern: Pattern = "comb",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return the ``selection`` of each tensor in ``shares``.

    The seed of ``random`` gives every tensor a stream of its own, the same in all epochs.
    """
    return {
        name: selection(
            tuple(model[name].shape),
            share,
            epoch,
            pattern,
            derived_generator(seed, "selection", name),
        )
        for name, share in shares.items()
    }


def stepped(
    model: Parameters,
    step: Parameters,
    rate: float,
    selected: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return ``w - rate S step``; a negative rate ascends.

    Entries not selected keep their bits, whatever the step holds there. It is the step that is
    masked, not the gradient, so that an optimiser's memory moves nothing either. Tensors without a
    step, such as buffers, are copies.
    """
    result = {name: tensor.detach().clone() for name, tensor in model.items()}
    for name, tensor in step.items():
        moved = torch.sub(result[name], tensor, alpha=rate)
        result[name] = (
            moved if selected is None else torch.where(selected[name], moved, result[name])
        )
    return result


def train_partially(
    model: Parameters,
    forward: Forward,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    learning_rate: float,
    batch_size: int,
    generator: torch.Generator,
    shares: Mapping[str, float] | None = None,
    pattern: Pattern = "comb",
    seed: int = 0,
    longest: float | None = None,
    stop: Stop | None = None,
) -> dict[str, Tensor]:
    """Return the model after gradient steps that move only an epoch's selected entries.

    Plain stochastic gradient descent, without momentum (``methods`` 6.3).

    Parameters
    ----------
    inputs, targets
        n rows each; without rows the model stays as it is.
    epochs
        At most as many passes over the rows, each in a new order.
    learning_rate
        Step a; a negative one ascends.
    generator
        Draws the orders.
    shares
        Trained tensor -> share phi of its entries that a step moves. ``None`` moves all, and so
        do shares of 1, bit for bit. Tensors not named stay.
    pattern, seed
        See ``selections``.
    longest
        Bound on the norm of a whole gradient, before entries are selected.
    stop
        Asked before every epoch, also the first, and at yes there are no more.

    Raises
    ------
    ParametersError
        If rows or names do not match, a number is out of range or the result is not finite.
    """
    check_rows(inputs, targets)
    current = {name: tensor.detach().clone() for name, tensor in model.items()}
    trained = trained_names(model)
    unknown = sorted(set() if shares is None else shares.keys() - set(trained))
    if unknown:
        raise ParametersError(f"no trained tensors to select from: {', '.join(unknown)}")
    if not len(inputs):
        return current
    for epoch in range(epochs):
        if stop is not None and stop(current):
            break
        chosen = None if shares is None else selections(model, shares, epoch, pattern, seed)
        for rows, wanted in batches(inputs, targets, batch_size, generator):
            step = gradient(current, forward, loss, rows, wanted)
            if longest is not None:
                step = clipped(step, longest)
            if shares is not None:
                step = {name: step[name] for name in shares}
            current = stepped(current, step, learning_rate, chosen)
    check_finite(current)
    return current


# ---------------------------------------------------------------- at the server


def merged(model: Parameters, answer: Parameters, share: float) -> dict[str, Tensor]:
    """Return ``w + share (w' - w)`` over the trained tensors (``methods`` 6.6).

    Parameters
    ----------
    model
        Global model w, which the client started from. Buffers are its own.
    answer
        What the client made of it.
    share
        The client's weight p_k in an average, in [0, 1], or 1 to take its model over.

    Raises
    ------
    ParametersError
        If models differ or hold NaN or Inf, or the share is out of range.
    """
    if not 0 <= share <= 1:
        raise ParametersError(f"a client's share must lie in [0, 1], got {share}")
    check_alike(model, answer)
    check_finite(answer)
    result = {name: tensor.clone() for name, tensor in model.items()}
    for name in trained_names(model):
        result[name] = torch.lerp(result[name], answer[name], share)
    check_finite(result)
    return result
