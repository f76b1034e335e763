"""The batch log of one training: what every batch with a row to forget has changed."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from unlearning.amnesiac import LoggedUpdate, halved, update_of
from unlearning.parameters import Parameters, byte_size, top_count
from unlearning.partial_updates import Dropping, kept_entries, kept_globally, partial
from unlearning.randomness import generator


@dataclass
class Log:
    """Watches a training and keeps, in half precision, what may have to be taken back.

    Attributes
    ----------
    tracked
        Numbers of the rows that may be asked to be forgotten. Batches without any are not kept.
    entries
        In the order of training.
    """

    tracked: frozenset[int]
    entries: list[LoggedUpdate] = field(default_factory=list)

    def wants(self, rows: Tensor) -> bool:
        """Return whether a tracked row is among these."""
        return not self.tracked.isdisjoint(rows.tolist())

    def saw(
        self, epoch: int, batch: int, rows: Tensor, before: Parameters, now: Parameters
    ) -> None:
        """Keep one batch."""
        update = halved(update_of(before, now))
        self.entries.append(LoggedUpdate((0, epoch, batch), frozenset(rows.tolist()), update))

    @property
    def nbytes(self) -> int:
        """Return the bytes of the updates."""
        return byte_size(entry.update for entry in self.entries)


def pruned(
    entries: Iterator[LoggedUpdate] | list[LoggedUpdate],
    shares: Mapping[str, float],
    dropping: Dropping | str,
    seed: int,
) -> Iterator[LoggedUpdate]:
    """Yield the log as it would be had a part of each update not been kept (``methods`` 6.2).

    Parameters
    ----------
    shares
        Tensor -> share q of its entries to drop.
    dropping
        ``random``, with a stream for each batch, or ``magnitude``; ``global`` drops the smallest of
        all tensors together, as many of all entries as the shares come to.
    """
    for entry in entries:
        wide = {name: tensor.float() for name, tensor in entry.update.items()}
        if dropping == "global":
            sizes = {name: tensor.numel() for name, tensor in wide.items()}
            dropped = sum(shares[name] * size for name, size in sizes.items())
            kept = kept_globally(wide, dropped / max(1, sum(sizes.values())))
        else:
            draw = generator(seed, "batch log", *entry.when)
            way: Dropping = "random" if dropping == "random" else "magnitude"
            kept = kept_entries(wide, shares, way, draw)
        yield LoggedUpdate(entry.when, entry.samples, partial(wide, kept), entry.share)


def kept_bytes(log: Log, shares: Mapping[str, float], dropping: Dropping | str) -> int:
    """Return the bytes that a log with these shares dropped would take, as ``pruned`` has them.

    Values are in half precision. What is dropped at random follows from a seed; of what is kept by
    magnitude the places are stored too, as one bit an entry (``client.batch_files``).
    """
    sizes = {name: tensor.numel() for e in log.entries[:1] for name, tensor in e.update.items()}
    if dropping == "global":
        dropped = sum(shares[name] * size for name, size in sizes.items())
        whole = sum(sizes.values())
        kept = whole - top_count(whole, dropped / max(1, whole))
    else:
        kept = sum(size - top_count(size, shares[name]) for name, size in sizes.items())
    places = 0 if dropping == "random" else sum(-(-size // 8) for size in sizes.values())
    return (2 * kept + places) * len(log.entries)
