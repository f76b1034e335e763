"""Amnesiac unlearning: subtract what every batch with a forgotten sample once added.

    L. Graves, V. Nagisetty, V. Ganesh. "Amnesiac Machine Learning." AAAI 2021, arXiv:2010.10981.
    Partial logs: paper 002, eq. 4 and 7 (``methods`` 6.1, 6.2, 6.6).

While training, whoever holds the data records what each batch changed, and which samples it held:

    Delta_(e,b) = w_after - w_before
    w' = w - sum over batches with a forgotten sample of Delta_(e,b)

Buffers are not tracked. Where nearly every batch holds a forgotten sample, as for a class of 10 %
with batches of 128, w' is nearly the initial model: ``concentrated_batches`` keeps forgotten
samples together in few batches, a partial log (``unlearning.partial_updates``) takes less back,
and ``stop`` ends the subtraction, latest epoch first, once enough is forgotten.
"""

from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from unlearning.errors import ParametersError, RefusedRequestError
from unlearning.parameters import (
    Parameters,
    check_alike,
    check_finite,
    copied,
    difference,
    top_count,
    trained_names,
)
from unlearning.partial_updates import Stop

Batch = tuple[int, int, int]
"""Round, epoch and batch, each from 0."""


@dataclass(frozen=True)
class LoggedUpdate:
    """What one batch changed.

    Attributes
    ----------
    when
        Round, local epoch and batch.
    samples
        Identities of the samples in the batch.
    update
        ``w_after - w_before`` over the trained tensors: all of it, a part, or in half precision.
        Any mapping will do, such as one that reads a file.
    share
        Weight p_k of the client in that round's average; 1 where no average followed.
    """

    when: Batch
    samples: frozenset[Hashable]
    update: Parameters
    share: float = 1.0


@dataclass(frozen=True)
class Removed:
    """What earlier requests took out; to be handed to the next one.

    Attributes
    ----------
    samples
        Samples all of whose batches were subtracted.
    batches
        Batches that were subtracted, on behalf of any sample.
    """

    samples: frozenset[Hashable] = frozenset()
    batches: frozenset[Batch] = frozenset()


NOTHING = Removed()


def update_of(before: Parameters, after: Parameters) -> dict[str, Tensor]:
    """Return what a batch changed, whatever the optimiser: the difference of trained tensors."""
    return difference(
        {name: after[name] for name in trained_names(after)},
        {name: before[name] for name in trained_names(before)},
    )


def halved(update: Parameters) -> dict[str, Tensor]:
    """Return the update in half precision, for a log of half the size.

    Rounds by at most one part in 2048, or 2^-25 for entries under 2^-14.

    Raises
    ------
    ParametersError
        If an entry does not fit, that is from 65520 on.
    """
    result = {name: tensor.half() for name, tensor in update.items()}
    check_finite(result)
    return result


def affected(
    log: Iterable[LoggedUpdate], samples: Collection[Hashable], removed: Removed = NOTHING
) -> Iterator[LoggedUpdate]:
    """Yield the batches that hold one of the samples and were not subtracted yet.

    Raises
    ------
    RefusedRequestError
        If one of the samples was removed before: nothing of it is left to subtract.
    ParametersError
        If the log holds a batch twice.
    """
    wanted = frozenset(samples)
    again = removed.samples & wanted
    if again:
        names = ", ".join(sorted(map(str, again)))
        raise RefusedRequestError(f"already removed: {names}; ask for other samples only")
    seen: set[Batch] = set()
    for entry in log:
        if entry.when in seen:
            raise ParametersError(f"the log holds batch {entry.when} twice")
        seen.add(entry.when)
        if entry.when not in removed.batches and not entry.samples.isdisjoint(wanted):
            yield entry


def amnesiac(
    model: Parameters,
    log: Iterable[LoggedUpdate],
    samples: Collection[Hashable],
    removed: Removed = NOTHING,
    stop: Stop | None = None,
) -> tuple[dict[str, Tensor], Removed]:
    """Forget samples by subtracting the updates of their batches (eq. 4, 7).

    Parameters
    ----------
    model
        Model of today, of whoever kept the log.
    log
        Read once. Without ``stop`` one entry is held at a time.
    samples
        Samples to forget; nothing happens for those that no batch held.
    removed
        What earlier calls returned.
    stop
        Asked before every epoch, the latest first; at yes, what is left stays in the model. None
        subtracts all, which is what forgetting means.

    Returns
    -------
    tuple
        The model, and what is removed now. Samples whose batches are not all subtracted do not
        count as removed, but the batches that were are never subtracted again.

    Raises
    ------
    RefusedRequestError, ParametersError
        As ``affected``; also if an update does not fit the model or the result is not finite.
    """
    result = copied(model)
    batches: set[Batch] = set()
    entries = affected(log, samples, removed)
    if stop is None:
        for entry in entries:
            _subtract(result, entry)
            batches.add(entry.when)
    else:
        ordered = sorted(entries, key=lambda entry: entry.when, reverse=True)
        for _, epoch in groupby(ordered, key=lambda entry: entry.when[:2]):
            if stop(result):
                check_finite(result)
                return result, Removed(removed.samples, removed.batches | batches)
            for entry in epoch:
                _subtract(result, entry)
                batches.add(entry.when)
    check_finite(result)
    return result, Removed(removed.samples | set(samples), removed.batches | batches)


def _subtract(model: dict[str, Tensor], entry: LoggedUpdate) -> None:
    for name, tensor in _fitting(model, entry.update):
        model[name] -= tensor


def _fitting(model: Parameters, update: Parameters) -> Iterator[tuple[str, Tensor]]:
    trained = {name: model[name] for name in trained_names(model)}
    found = {
        name: tensor.to(trained[name].dtype) if name in trained else tensor
        for name, tensor in update.items()
    }
    check_alike(trained, found)
    yield from found.items()


def contribution(
    like: Parameters,
    log: Iterable[LoggedUpdate],
    samples: Collection[Hashable],
    removed: Removed = NOTHING,
) -> tuple[dict[str, Tensor], Removed]:
    """Return what a client sends to be forgotten, ``Z_k = sum_t p_k^t sum_b Delta`` (6.6).

    The server subtracts it by ``taken_back``. To first order only: what others made of the model
    since then is not revised.

    Parameters
    ----------
    like
        A model, for names, shapes and dtypes.
    log, samples, removed
        As of ``amnesiac``; each entry has the client's share in its round.

    Returns
    -------
    tuple
        Sum over the trained tensors, and what is removed now.

    Raises
    ------
    RefusedRequestError, ParametersError
        As ``amnesiac``; also if a share lies outside of [0, 1].
    """
    total = {name: torch.zeros_like(like[name]) for name in trained_names(like)}
    batches: set[Batch] = set()
    for entry in affected(log, samples, removed):
        if not 0 <= entry.share <= 1:
            raise ParametersError(f"a client's share must lie in [0, 1], got {entry.share}")
        for name, tensor in _fitting(like, entry.update):
            total[name] += entry.share * tensor
        batches.add(entry.when)
    check_finite(total)
    return total, Removed(removed.samples | set(samples), removed.batches | batches)


def taken_back(model: Parameters, sent: Parameters) -> dict[str, Tensor]:
    """Return ``w - Z_k``: the server's part.

    Raises
    ------
    ParametersError
        If Z_k does not cover the trained tensors, or the result is not finite.
    """
    result = copied(model)
    for name, tensor in _fitting(model, sent):
        result[name] -= tensor
    check_finite(result)
    return result


def concentrated_batches(
    size: int,
    forgotten: Collection[int],
    batch_size: int,
    share: float,
    generator: torch.Generator,
) -> list[Tensor]:
    """Divide an epoch's samples so that the forgotten ones lie in a share of the batches only.

    Parameters
    ----------
    size
        Number of samples n, at least 1; they are 0 to n - 1.
    forgotten
        Samples that may have to be forgotten.
    batch_size
        At least 1; the last batch may be smaller.
    share
        Share rho of the batches that hold forgotten samples, in (0, 1]: ``ceil(rho B)`` of B.
    generator
        Draws everything else.

    Returns
    -------
    list
        Index tensors, every sample in one of them. Exactly ``ceil(rho B)`` hold a forgotten one,
        none if nothing is to be forgotten.

    Raises
    ------
    ParametersError
        If a number is out of range, or the forgotten samples do not fit: more of them than
        places in those batches, or fewer than batches.
    """
    known = sorted(set(forgotten))
    if size < 1 or batch_size < 1 or not 0 < share <= 1:
        raise ParametersError(
            f"{size} samples in batches of {batch_size}, {share} of them concentrated: sizes must "
            "be at least 1 and the share in (0, 1]"
        )
    if known and not (known[0] >= 0 and known[-1] < size):
        raise ParametersError(f"samples are numbered from 0 to {size - 1}, got {known}")
    sizes = [min(batch_size, size - start) for start in range(0, size, batch_size)]
    count = top_count(len(sizes), share)
    # Full batches first: the last one may be too small to hold its part.
    full = torch.randperm(len(sizes) - 1, generator=generator).tolist()
    holding = [*full, len(sizes) - 1][:count] if known else []
    room = sum(sizes[place] for place in holding)
    if known and not count <= len(known) <= room:
        raise ParametersError(
            f"{len(known)} samples do not fit into {count} of {len(sizes)} batches, which take "
            f"{count} to {room}; choose another share"
        )
    return _filled(sizes, known, holding, size, generator)


def _filled(
    sizes: Sequence[int],
    forgotten: Sequence[int],
    holding: Sequence[int],
    size: int,
    generator: torch.Generator,
) -> list[Tensor]:
    apart = torch.zeros(size, dtype=torch.bool)
    apart[list(forgotten)] = True
    chosen, others = torch.nonzero(apart).reshape(-1), torch.nonzero(~apart).reshape(-1)
    chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    others = others[torch.randperm(len(others), generator=generator)]
    # One for each batch, and the rest on places drawn from what is left of them.
    places = [place for place in holding for _ in range(sizes[place] - 1)]
    drawn = torch.randperm(len(places), generator=generator)[: len(chosen) - len(holding)].tolist()
    held = [*holding, *(places[index] for index in drawn)]
    rows: list[list[int]] = [[] for _ in sizes]
    for place, sample in zip(held, chosen.tolist(), strict=True):
        rows[place].append(sample)
    rest = iter(others.tolist())
    for place, row in enumerate(rows):
        row.extend(next(rest) for _ in range(sizes[place] - len(row)))
    return [torch.tensor(row)[torch.randperm(len(row), generator=generator)] for row in rows]
