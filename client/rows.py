"""What tells one row of a data set from another, whatever its place: the hash of its content."""

import hashlib
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from client.storage import KeepingError
from client.task.evaluation import batches, gather
from client.task.protocol import Examples, size_of
from unlearning.errors import RefusedRequestError

HASHED_AT_ONCE = 1024
"""Rows of a data set that is not in memory."""
COMPARED = 16
"""Rows that are read twice, to see whether they stay the same."""

_known: dict[int, tuple[weakref.ref[Examples], tuple[str, ...]]] = {}


class NoClassesError(KeepingError, RefusedRequestError):
    """A class is to be forgotten where targets are no numbers of classes; nothing was written."""


def content_hashes(examples: Examples) -> tuple[str, ...]:
    """Return each row's SHA-256 over dtype, shape and bytes of its input and target, in hex.

    Computed once per data set object. Survives restarts, other imports and other orders of the
    data; another precision, or another way to prepare inputs, is another content.

    Raises
    ------
    KeepingError
        If a row is not the same when it is read twice, as where inputs are augmented at random.
    """
    if (known := _recall(examples)) is not None:
        return known
    if not isinstance(examples, TensorDataset):
        _check_constant(examples)
    return _remember(examples, tuple(_hashes(examples, size_of(examples))))


def subset(examples: Examples, rows: Sequence[int]) -> Examples:
    """Return some rows of a data set, in the order given; tensors in memory stay such."""
    chosen: Examples
    if isinstance(examples, TensorDataset):
        places = torch.tensor(rows, dtype=torch.int64)
        chosen = TensorDataset(*(tensor[places] for tensor in examples.tensors))
    else:
        chosen = Subset(examples, list(rows))
    if (hashes := _recall(examples)) is not None:
        _remember(chosen, tuple(hashes[row] for row in rows))
    return chosen


def rows_of_class(examples: Examples, number: int) -> list[int]:
    """Return the rows whose target is a class.

    Raises
    ------
    NoClassesError
        If targets are not numbers of classes.
    """
    targets = gather(examples)[1]
    if not len(targets):
        return []
    if targets.is_floating_point() or targets.is_complex() or targets[0].numel() != 1:
        raise NoClassesError(
            f"class {number} is to be forgotten, and this task's targets, {targets.dtype} of shape "
            f"{tuple(targets.shape[1:])}, are no numbers of classes; name samples instead"
        )
    return torch.nonzero(targets.reshape(-1) == number).reshape(-1).tolist()


def _recall(examples: Examples) -> tuple[str, ...] | None:
    found = _known.get(id(examples))
    return found[1] if found is not None and found[0]() is examples else None


def _remember(examples: Examples, hashes: tuple[str, ...]) -> tuple[str, ...]:
    key = id(examples)
    # Another object may get the id once this one is gone.
    _known[key] = weakref.ref(examples, lambda _: _known.pop(key, None)), hashes
    return hashes


def _check_constant(examples: Examples) -> None:
    few = Subset(examples, list(range(min(COMPARED, size_of(examples)))))
    if list(_hashes(few, COMPARED)) != list(_hashes(few, COMPARED)):
        raise KeepingError(
            "this task's rows differ from one reading to the next, so that none can be told again; "
            "let the task return rows as they are stored, and augment them in its model"
        )


def _hashes(examples: Examples, count: int) -> Iterator[str]:
    if not count:
        return
    for inputs, targets in batches(examples, min(HASHED_AT_ONCE, max(1, count)), None):
        form = f"{inputs.dtype}{tuple(inputs.shape[1:])}{targets.dtype}{tuple(targets.shape[1:])}"
        for left, right in zip(_bytes(inputs), _bytes(targets), strict=True):
            yield hashlib.sha256(b"\x1f".join((form.encode(), left, right))).hexdigest()


def _bytes(tensor: Tensor) -> Iterator[bytes]:
    rows = tensor.detach().cpu().reshape(len(tensor), -1).contiguous().view(torch.uint8)
    return (row.tobytes() for row in rows.numpy())
