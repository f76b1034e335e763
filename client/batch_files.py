"""Files of the batch log: updates, pruned and packed, and the contents of rows.

What is dropped at random follows from a seed and is not stored. What is kept by magnitude is stored
as one bit an entry: less than a list of places as soon as one entry in 32 is kept.
"""

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from client.storage import Record, sync
from strategies.archive import SUFFIX, SavedModel, save_model
from unlearning.amnesiac import Batch, halved
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import Parameters
from unlearning.partial_updates import (
    kept_entries,
    kept_globally,
    packed,
    shares_by_depth,
    unpacked,
)
from unlearning.randomness import generator

Kind = Literal["random", "magnitude", "global", "full"]
Precision = Literal["float16", "float32"]
ROWS = "rows"


class BatchLogError(MissingNeedError):
    """A request needs batches that were not logged, or whose files are lost or damaged."""


class File(Record):
    """A file of the log."""

    name: str
    sha256: str
    size: int
    """In bytes."""


class Way(Record):
    """How updates are stored; what is dropped at random follows from it."""

    kind: Kind
    precision: Precision
    first: float
    last: float
    """Shares of the entries that are dropped from the first and the last layer."""
    seed: int
    client: int


# ---------------------------------------------------------------- updates
def encoded(way: Way, update: Parameters, when: Batch) -> dict[str, Tensor]:
    """Return what is stored of an update over the trained tensors."""
    masks: dict[str, Tensor] = {}
    if way.kind == "full":
        values = dict(update)
    else:
        kept = _kept(way, update, when)
        values = packed(update, kept)
        masks = {} if way.kind == "random" else {n: _bits(mask) for n, mask in kept.items()}
    values = halved(values) if way.precision == "float16" else values
    return {f"value/{n}": t for n, t in values.items()} | {f"kept/{n}": t for n, t in masks.items()}


def decoded(
    way: Way, shapes: Mapping[str, Sequence[int]], stored: Parameters, when: Batch
) -> dict[str, Tensor]:
    """Return what ``encoded`` was given, with 0 for what it dropped.

    Parameters
    ----------
    shapes
        Of the trained tensors, in the model's order.
    stored
        A part of the log, as ``numbered`` wrote it.
    """
    values = {name: stored[key(when, f"value/{name}")] for name in shapes}
    match way.kind:
        case "full":
            return values
        case "random":
            like = {
                name: torch.empty(tuple(shape), device="meta") for name, shape in shapes.items()
            }
            kept = _kept(way, like, when)
        case _:
            kept = {n: _mask(stored[key(when, f"kept/{n}")], shape) for n, shape in shapes.items()}
    return unpacked(values, kept)


def _kept(way: Way, update: Parameters, when: Batch) -> dict[str, Tensor]:
    if way.kind == "global":
        return kept_globally(update, (way.first + way.last) / 2)
    shares = shares_by_depth(update, way.first, way.last)
    if way.kind == "magnitude":
        return kept_entries(update, shares, "magnitude")
    draw = generator(way.seed, "batch log", way.client, *when)
    return kept_entries(update, shares, "random", draw)


def _bits(mask: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))


def _mask(bits: Tensor, shape: Sequence[int]) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count)).bool().reshape(tuple(shape))


def key(when: Batch, name: str) -> str:
    """Return the name of a tensor of a batch in its round's files."""
    return f"{when[1]}.{when[2]}/{name}"


def batches_in(stored: Parameters, number: int) -> list[Batch]:
    """Return the batches that a part of a round holds, ascending."""
    heads = {name.partition("/")[0] for name in stored}
    pairs = (head.split(".") for head in heads)
    return sorted((number, int(epoch), int(batch)) for epoch, batch in pairs)


# ---------------------------------------------------------------- files
def save(folder: Path, stem: str, tensors: Parameters) -> File:
    """Write a file named by its content, on the disk when this returns."""
    staged = folder / f"{stem}{SUFFIX}"
    save_model(staged, tensors)
    data = staged.read_bytes()
    checksum = hashlib.sha256(data).hexdigest()
    path = folder / f"{stem}-{checksum[:16]}{SUFFIX}"
    staged.replace(path)
    sync(path)
    return File(name=path.name, sha256=checksum, size=len(data))


def load(folder: Path, file: File) -> SavedModel:
    """Return a file's tensors, read one by one.

    Raises
    ------
    BatchLogError
        If it is gone, or is not what was written.
    """
    path = folder / file.name
    try:
        with path.open("rb") as opened:
            checksum = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise BatchLogError(f"{path} cannot be read: {error.strerror}; put back a copy") from error
    if checksum != file.sha256:
        raise BatchLogError(f"{path} is damaged: its checksum is wrong; put back a copy")
    try:
        return SavedModel(path)
    except ParametersError as error:
        raise BatchLogError(f"{error}; put back a copy") from error


def bytes_in(folder: Path) -> int:
    """Return the size of a folder's files; of those that go meanwhile, nothing."""
    total = 0
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def save_rows(folder: Path, hashes: Sequence[str]) -> File:
    """Write contents of rows, uint8 of shape (n, 32)."""
    data = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(-1, 32)
    return save(folder, ROWS, {ROWS: torch.from_numpy(data.copy())})


def load_rows(folder: Path, file: File) -> list[str]:
    """Return what ``save_rows`` was given."""
    return [row.tobytes().hex() for row in load(folder, file)[ROWS].numpy()]
