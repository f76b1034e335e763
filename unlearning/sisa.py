"""SISA: train in shards and slices, so that a deletion retrains only what saw the rows.

    L. Bourtoule, V. Chandrasekaran, C. A. Choquette-Choo, H. Jia, A. Travers, B. Zhang, D. Lie,
    N. Papernot. "Machine Unlearning." IEEE S&P 2021, arXiv:1912.03817.

Rows are divided into S shards of r slices. A shard's model is trained on its first slice, then on
the first two, and so on, and kept after each: S r models. To forget rows, every shard that holds
one goes back to the model before the first slice concerned and goes on without them; the others
stay as they are. Predictions of the shards are averaged or voted on (``methods`` 6.5).

The result is exactly what training by the same division would have given without the rows. It is
for one data holder, be it a client; nothing here is federated.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters

Train = Callable[[Parameters, tuple[int, ...], tuple[int, int]], Parameters]
"""Model, rows, (shard, slice) -> model. Must draw all its randomness from the last argument and a
seed, and depend on nothing else; rows come in an order that is always the same."""
Aggregation = Literal["average", "vote"]
"""Of the shards' posteriors, or of their most likely classes."""
Checkpoints = Sequence[Sequence[Parameters]]
"""Of every shard, its model after each of its slices."""


@dataclass(frozen=True)
class Division:
    """Which rows lie where.

    Attributes
    ----------
    shards
        Shard -> slice -> rows, of the numbers that rows have at their holder. All shards have as
        many slices; a slice may be empty.
    """

    shards: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def rows(self) -> frozenset[int]:
        """Return all rows."""
        return frozenset(row for shard in self.shards for part in shard for row in part)


def divided(
    rows: Collection[int], shards: int, slices: int, generator: torch.Generator
) -> Division:
    """Divide rows uniformly at random; sizes differ by at most one.

    Parameters
    ----------
    rows
        Different numbers.
    shards, slices
        S and r, at least 1, ``S r`` at most the number of rows.

    Raises
    ------
    ParametersError
        If a row is there twice or the rows are too few.
    """
    if len(set(rows)) < len(rows):
        raise ParametersError("a row lies in one slice, and some are there more than once")
    parts = shards * slices
    if shards < 1 or slices < 1 or parts > len(rows):
        raise ParametersError(
            f"{len(rows)} rows cannot be divided into {shards} shards of {slices} slices; every "
            "slice needs a row"
        )
    known = sorted(rows)
    order = [known[place] for place in torch.randperm(len(known), generator=generator).tolist()]
    dealt = [tuple(order[part::parts]) for part in range(parts)]
    return Division(
        tuple(
            tuple(dealt[shard + shards * part] for part in range(slices)) for shard in range(shards)
        )
    )


def touched(division: Division, forgotten: Iterable[int]) -> dict[int, int]:
    """Return the shards that hold a forgotten row, each with the first slice that does.

    Checkpoints from that slice on have seen it.

    Raises
    ------
    ParametersError
        If a row is in no slice, as one that was forgotten before.
    """
    gone = frozenset(forgotten)
    unknown = sorted(gone - division.rows)
    if unknown:
        raise ParametersError(f"rows {unknown} are in no shard; they may be forgotten already")
    return {
        shard: next(place for place, part in enumerate(parts) if gone & set(part))
        for shard, parts in enumerate(division.shards)
        if any(gone & set(part) for part in parts)
    }


def without(division: Division, forgotten: Iterable[int]) -> Division:
    """Return the division with these rows gone and all others where they are."""
    gone = frozenset(forgotten)
    return Division(
        tuple(
            tuple(tuple(row for row in part if row not in gone) for part in parts)
            for parts in division.shards
        )
    )


def _continued(
    start: Parameters,
    division: Division,
    shard: int,
    train: Train,
    kept: Sequence[Parameters] = (),
) -> tuple[Parameters, ...]:
    """Return a shard's checkpoints, those of its first slices being at hand."""
    models, parts = list(kept), division.shards[shard]
    for place in range(len(kept), len(parts)):
        rows = tuple(row for part in parts[: place + 1] for row in part)
        before = models[-1] if models else start
        # A shard of which nothing is left has learned nothing.
        models.append(train(before, rows, (shard, place)) if rows else before)
    return tuple(models)


def trained(
    start: Parameters, division: Division, train: Train
) -> tuple[tuple[Parameters, ...], ...]:
    """Return the checkpoints of every shard.

    Parameters
    ----------
    start
        Initial model of every shard; without any influence of the rows.
    """
    return tuple(_continued(start, division, shard, train) for shard in range(len(division.shards)))


def unlearned(
    start: Parameters,
    division: Division,
    checkpoints: Checkpoints,
    forgotten: Collection[int],
    train: Train,
) -> tuple[Division, tuple[tuple[Parameters, ...], ...]]:
    """Return division and checkpoints as if the forgotten rows had never been there.

    Parameters
    ----------
    start, train
        What ``trained`` was given.
    checkpoints
        What it returned, or an earlier call of this.
    forgotten
        Rows of the division; none changes nothing.

    Returns
    -------
    tuple
        Checkpoints that saw no forgotten row are the same objects.

    Raises
    ------
    ParametersError
        If a row is unknown, or the checkpoints are not this division's.
    """
    shape = [len(parts) for parts in division.shards]
    if [len(models) for models in checkpoints] != shape:
        raise ParametersError(
            f"{shape} slices a shard need as many checkpoints, got "
            f"{[len(models) for models in checkpoints]}"
        )
    first = touched(division, forgotten)
    rest = without(division, forgotten)
    return rest, tuple(
        _continued(start, rest, shard, train, models[: first.get(shard, len(models))])
        for shard, models in enumerate(checkpoints)
    )


def members(division: Division, checkpoints: Checkpoints) -> dict[int, Parameters]:
    """Return the last model of every shard that has rows left; the others have no say.

    Raises
    ------
    MissingNeedError
        If no rows are left at all.
    """
    found: Mapping[int, Parameters] = {
        shard: checkpoints[shard][-1] for shard, parts in enumerate(division.shards) if any(parts)
    }
    if not found:
        raise MissingNeedError("every row is forgotten, and no shard has a model to predict with")
    return dict(found)


def aggregated(logits: Sequence[Tensor], how: Aggregation = "average") -> Tensor:
    """Return the shards' prediction: one score a class, of which the highest is predicted.

    Parameters
    ----------
    logits
        Of every member, shape (n, C) each; at least one.

    Returns
    -------
    Tensor
        Shape (n, C), rows summing to 1: the mean posterior, or the share of votes. ``argmax``
        breaks ties by the lower class.

    Raises
    ------
    MissingNeedError
        If there is no member.
    """
    if not logits:
        raise MissingNeedError("a prediction needs at least one shard")
    together = torch.stack(list(logits))
    match how:
        case "average":
            return together.softmax(dim=2).mean(dim=0)
        case "vote":
            votes = functional.one_hot(together.argmax(dim=2), together.shape[2])
            return votes.to(together.dtype).mean(dim=0)
        case _:
            assert_never(how)
