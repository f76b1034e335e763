"""The batch log on a client's disk: what each batch changed, and which rows it held.

For amnesiac unlearning (``unlearning.amnesiac``; ``methods`` 6.1, 6.2, 6.6). Rows are known by
content (``client.rows``). Every run of a federation has a folder of its own, which holds

- ``index.json``: the rounds logged, how, the client's share in each, what the server was told to
  take back, and what it did;
- ``rows-HASH.safetensors``: contents of a round's rows, uint8, shape (n, 32); rounds share them;
- ``round-0001-000-HASH.safetensors``: batches of a round, in parts of bounded size.

The index is written last and names every file with its checksum; others do not count.
"""

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from client import batch_files as files
from client.batch_files import BatchLogError, File, Kind, Precision, Way
from client.rows import content_hashes
from client.storage import KeepingError, Record, locked, read_record, write_record
from client.train import Job, Observe
from strategies.archive import SUFFIX
from unlearning.amnesiac import LoggedUpdate, contribution, update_of
from unlearning.errors import RefusedRequestError
from unlearning.parameters import Parameters, byte_size, trained_names
from unlearning.partial_updates import FEW, MANY

log = logging.getLogger("secateur")

INDEX = "index.json"
NOT_LOGGED = "no batch is logged here; set batch-log before the first round"
PART_BYTES = 64 * 10**6
"""Updates held in memory before they are written."""


class Round(Record):
    """One round of the log."""

    number: int
    way: Way
    shapes: dict[str, list[int]]
    """Of the trained tensors, in the model's order."""
    rows: File
    parts: list[File]
    share: float | None = None
    """The client's weight in the round's average, once the server has told it."""
    dropped: bool = False
    """Whether its updates are gone, while its rows are known."""

    def with_share(self, share: float | None) -> "Round":
        """Return the round with a share that was told; ``None`` where nothing was."""
        return self if share is None else self.model_copy(update={"share": float(share)})

    def emptied(self) -> "Round":
        """Return the round without its updates."""
        return self.model_copy(update={"parts": [], "dropped": True})


class Claim(Record):
    """What the server was told to subtract; whether it did, it says later."""

    request: str
    samples: list[str]
    """Contents of rows."""
    through: int
    """The last round whose batches are in it."""


class Index(Record):
    """What ``index.json`` holds."""

    rounds: list[Round] = Field(default_factory=list)
    """Ascending."""
    claim: Claim | None = None
    """The newest, as long as the server has not said that it did; any older one it did not."""
    removed: list[str] = Field(default_factory=list)
    """Contents of rows whose batches were taken back, and deleted; not trained on since."""


@dataclass(frozen=True)
class TakenBack:
    """What a client asks the federation to subtract.

    Attributes
    ----------
    update
        ``Z_k = sum_t p_k^t sum_b Delta`` over the trained tensors.
    batches
        How many batches that is.
    first
        First round that is logged at all; what was before nobody here can tell.
    """

    update: dict[str, Tensor]
    batches: int
    first: int


@dataclass(frozen=True)
class BatchLog:
    """One client's log of one run.

    Attributes
    ----------
    folder
        Of the client's logs; made when something is logged.
    kind
        What is stored of an update: all but what is dropped at ``random``, or all but the smallest
        by ``magnitude`` in each tensor or the ``global`` ones; or it in ``full``.
    precision
        Of what is stored.
    limit
        Bytes of updates, and of all that other runs' logs take; 0 for no limit. To stay within it,
        logs of other runs are given up, those first that nothing was written to for longest, then
        this one's oldest rounds.
    run
        The federation's run, whose log has a folder of its own: updates of another one are of
        another model. Empty for ``folder`` itself.
    first, last
        Shares of entries dropped, at both ends of the model's depth.
    """

    folder: Path
    kind: Kind = "random"
    precision: Precision = "float16"
    limit: int = 0
    run: str = ""
    first: float = MANY
    last: float = FEW

    @property
    def home(self) -> Path:
        """Return the folder of this run's log."""
        return self.folder / self.run

    def told(self, shares: Mapping[int, float], taken_back: Collection[str] = ()) -> None:
        """Keep what the server says; all of it may be said any number of times.

        Parameters
        ----------
        shares
            The client's, by numbers of rounds; others are as they were.
        taken_back
            Requests by which something was taken back. If the client's claim is among them, its
            batches are deleted.

        Raises
        ------
        BatchLogError
            If one lies outside of [0, 1].
        """
        for share in shares.values():
            if not 0 <= share <= 1:
                raise BatchLogError(f"a client's share must lie in [0, 1], the server says {share}")
        if not (self.home / INDEX).exists():
            return
        with locked(self.home):
            index = self._index()
            rounds = [entry.with_share(shares.get(entry.number)) for entry in index.rounds]
            changed = index.model_copy(update={"rounds": rounds})
            if changed.claim is not None and changed.claim.request in taken_back:
                changed = self._purged(changed, changed.claim)
            if changed != index:
                self._write(changed)

    def end(self) -> None:
        """Give up all updates, where a client trains on without logging: rounds will be missing."""
        if not (self.home / INDEX).exists():
            return
        with locked(self.home):
            index = self._index()
            if not all(entry.dropped for entry in index.rounds):
                emptied = [entry.emptied() for entry in index.rounds]
                self._write(index.model_copy(update={"rounds": emptied}))

    @contextlib.contextmanager
    def recording(self, job: Job, model: nn.Module) -> Iterator[Observe]:
        """Log a round's steps; the round is in the log, whole, when this ends without an error.

        Rounds from this one on that are there already come from a course of the federation that
        it has left; they are replaced.
        """
        number, client = job.purpose
        with locked(self.home):
            index = self._begun(number)
            way = Way(
                kind=self.kind, precision=self.precision, first=self.first, last=self.last,
                seed=job.settings.seed, client=client,
            )  # fmt: skip
            recorder = _Recorder(self, index, number, way, model)
            yield recorder.step
            recorder.commit(content_hashes(job.examples))

    def take_back(
        self, like: Parameters, samples: frozenset[str] | None, request: str
    ) -> TakenBack:
        """Return what samples brought into the model, to be subtracted once.

        Nothing is deleted until the server says that it did (``told``): asked again, for whatever
        reason, the log says the same. Samples removed before are passed over.

        Parameters
        ----------
        like
            A model, for names, shapes and dtypes.
        samples
            Contents of rows; ``None`` for all that were ever logged.
        request
            What the server will call it by; another one than before means that what it was told
            then was not used, unless it said otherwise.

        Raises
        ------
        BatchLogError
            If there is no log, rounds that the samples were in are dropped, have no known share or
            are damaged.
        RefusedRequestError
            If all samples were removed before.
        """
        with self._opened(samples) as (index, wanted, rows, holding):
            if samples != frozenset() and not wanted:
                raise RefusedRequestError("already removed: all rows of this request")
            update, removed = contribution(like, self._entries(holding, rows, wanted), wanted)
            claim = Claim(request=request, samples=sorted(wanted), through=index.rounds[-1].number)
            if claim != index.claim:
                self._write(index.model_copy(update={"claim": claim}))
        return TakenBack(update, len(removed.batches), index.rounds[0].number)

    def check(self, samples: frozenset[str] | None) -> tuple[int, int]:
        """Return how many of some samples could be taken back, and the first round logged.

        Samples removed before are not counted; 0 and 0 where none is left. Nothing is changed.

        Raises
        ------
        BatchLogError
            As ``take_back`` would.
        """
        if samples is not None and samples <= set(self._index().removed):
            return 0, 0
        with self._opened(samples) as (index, wanted, _, holding):
            for entry in holding:
                for part in entry.parts:
                    files.load(self.home, part)
        return len(wanted), index.rounds[0].number if wanted else 0

    @contextlib.contextmanager
    def _opened(
        self, samples: frozenset[str] | None
    ) -> Iterator[tuple[Index, frozenset[str], dict[File, list[str]], list[Round]]]:
        """Give the index, samples not removed before, every round's rows, and rounds with them."""
        if not (self.home / INDEX).exists():
            raise BatchLogError(NOT_LOGGED)
        with locked(self.home):
            index = self._index()
            if not index.rounds:
                raise BatchLogError(NOT_LOGGED)
            lists = {entry.rows for entry in index.rounds}
            rows = {file: files.load_rows(self.home, file) for file in lists}
            asked = frozenset().union(*rows.values()) if samples is None else samples
            wanted = asked.difference(index.removed)
            holding = [entry for entry in index.rounds if not wanted.isdisjoint(rows[entry.rows])]
            self._check(holding)
            # What never entered an average need not be there.
            holding = [entry for entry in holding if entry.share]
            yield index, wanted, rows, holding

    # ------------------------------------------------------------ the index
    def _index(self) -> Index:
        return read_record(self.home / INDEX, Index) or Index()

    def _begun(self, number: int) -> Index:
        """Return the index as a round finds it."""
        index = self._index()
        rounds = [entry for entry in index.rounds if entry.number < number]
        claim = index.claim
        if claim is not None:  # rounds with these numbers will be others
            last = min(claim.through, number - 1)
            claim = claim.model_copy(update={"through": last}) if last > 0 else None
        return self._write(index.model_copy(update={"rounds": rounds, "claim": claim}))

    def _write(self, index: Index) -> Index:
        """Write the index, and delete every file that is not in it."""
        write_record(self.home / INDEX, index)
        named = {file.name for entry in index.rounds for file in (entry.rows, *entry.parts)}
        for path in self.home.glob(f"*{SUFFIX}"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        return index

    def _others(self, room: int) -> int:
        """Return the bytes of other runs' logs, after as many were given up as ``room`` asks for.

        A log that is being written to is left alone.
        """
        folders = [p.parent for p in self.folder.glob(f"*/{INDEX}") if p.parent != self.home]
        held = {folder: files.bytes_in(folder) for folder in sorted(folders, key=_written)}
        for folder in held:
            if sum(held.values()) > room:
                with contextlib.suppress(KeepingError), locked(folder, patience_s=0):
                    log.warning("batch log full: the log of run %s is dropped", folder.name)
                    for path in (folder / INDEX, *folder.glob(f"*{SUFFIX}")):
                        path.unlink(missing_ok=True)
                    held[folder] = 0
        return sum(held.values())

    def _check(self, holding: list[Round]) -> None:
        gone = [entry.number for entry in holding if entry.dropped and entry.share != 0]
        if gone:
            raise BatchLogError(
                f"batches of {_rounds(gone)} are needed and no longer there: the log was full or "
                "off; ask for another method"
            )
        unknown = [entry.number for entry in holding if entry.share is None]
        if unknown:
            raise BatchLogError(
                f"share unknown of {_rounds(unknown)}: the server did not tell this client its "
                "weight in the average; ask for another method"
            )

    # ------------------------------------------------------------ updates
    def _entries(
        self, rounds: Sequence[Round], rows: Mapping[File, Sequence[str]], wanted: frozenset[str]
    ) -> Iterator[LoggedUpdate]:
        for entry in rounds:
            for part in entry.parts:
                stored = files.load(self.home, part)
                for when in files.batches_in(stored, entry.number):
                    places = stored[files.key(when, files.ROWS)].tolist()
                    held = frozenset(rows[entry.rows][place] for place in places)
                    if not wanted.isdisjoint(held):
                        update = files.decoded(entry.way, entry.shapes, stored, when)
                        yield LoggedUpdate(when, held, update, float(entry.share or 0.0))

    def _purged(self, index: Index, claim: Claim) -> Index:
        """Return the index without what the server took back, which is deleted."""
        samples = frozenset(claim.samples)
        later: set[str] = set()
        rounds = []
        for entry in index.rounds:
            try:
                rows = files.load_rows(self.home, entry.rows)
                if entry.number > claim.through:  # and trained on again
                    later.update(rows)
                    rounds.append(entry)
                else:
                    rounds.append(self._without(entry, rows, samples))
            except BatchLogError as error:  # nor can it be used for anything
                log.warning("updates of round %d are dropped: %s", entry.number, error)
                rounds.append(entry.emptied())
        removed = sorted({*index.removed, *samples - later})
        return Index(rounds=rounds, removed=removed)

    def _without(self, entry: Round, rows: Sequence[str], samples: frozenset[str]) -> Round:
        """Return a round whose files hold nothing of batches with some samples."""
        if samples.isdisjoint(rows):
            return entry
        parts = []
        for place, part in enumerate(entry.parts):
            stored = files.load(self.home, part)
            batches = files.batches_in(stored, entry.number)
            left = tuple(
                files.key(when, "")
                for when in batches
                if samples.isdisjoint(rows[n] for n in stored[files.key(when, files.ROWS)].tolist())
            )
            if len(left) == len(batches):
                parts.append(part)
            elif left:
                kept = {name: stored[name] for name in stored if name.startswith(left)}
                parts.append(files.save(self.home, _stem(entry.number, place), kept))
        return entry.model_copy(update={"parts": parts})


class _Recorder:
    """Collects one round."""

    def __init__(
        self, kept: BatchLog, index: Index, number: int, way: Way, model: nn.Module
    ) -> None:
        self._log, self._index, self._number, self._way = kept, index, number, way
        self._model = model
        self._before = _trained(model)
        self._shapes = {name: list(tensor.shape) for name, tensor in self._before.items()}
        self._buffer: dict[str, Tensor] = {}
        self._size = 0
        self._parts: list[File] = []
        self._lost = False

    def step(self, epoch: int, batch: int, rows: Tensor) -> None:
        """Take note of what a step changed."""
        before, self._before = self._before, _trained(self._model)
        if self._lost:
            return
        when = (self._number, epoch, batch)
        stored = files.encoded(self._way, update_of(before, self._before), when)
        stored[files.ROWS] = rows.to(torch.int32)
        self._buffer |= {files.key(when, name): tensor for name, tensor in stored.items()}
        self._size += byte_size([stored])
        if self._size >= PART_BYTES:
            self._flush()

    def commit(self, hashes: Sequence[str]) -> None:
        """Put the round into the log."""
        self._flush()
        entry = Round(
            number=self._number,
            way=self._way,
            shapes=self._shapes,
            rows=files.save_rows(self._log.home, hashes),
            parts=self._parts,
        )
        # Rows that are trained on again are not removed any more.
        removed = set(self._index.removed).difference(hashes)
        rounds = [*self._index.rounds, entry.emptied() if self._lost else entry]
        changed = {"rounds": rounds, "removed": sorted(removed)}
        self._log._write(self._index.model_copy(update=changed))

    def _flush(self) -> None:
        if self._buffer:
            stem = _stem(self._number, len(self._parts))
            self._parts.append(files.save(self._log.home, stem, self._buffer))
            self._buffer, self._size = {}, 0
            self._make_room()

    def _make_room(self) -> None:
        limit, rounds = self._log.limit, list(self._index.rounds)
        own = sum(part.size for part in self._parts)
        held = own + sum(part.size for entry in rounds for part in entry.parts)
        if limit:
            held += self._log._others(limit - held)
        for place, entry in enumerate(rounds):
            if limit and held > limit and entry.parts:
                log.warning("batch log full: updates of round %d are dropped", entry.number)
                held -= sum(part.size for part in entry.parts)
                rounds[place] = entry.emptied()
        self._index = self._index.model_copy(update={"rounds": rounds})
        if limit and own > limit:
            log.warning("batch log too small for round %d: it is not logged", self._number)
            self._lost = True
            for part in self._parts:
                (self._log.home / part.name).unlink(missing_ok=True)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: state[name].detach().cpu().clone() for name in trained_names(state)}


def _written(folder: Path) -> int:
    """Return when a log was written to last, in nanoseconds; 0 where it is gone by now."""
    try:
        return (folder / INDEX).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _stem(number: int, place: int) -> str:
    return f"round-{number:04d}-{place:03d}"


def _rounds(numbers: list[int]) -> str:
    listed = ", ".join(map(str, numbers))
    return f"round {listed}" if len(numbers) == 1 else f"rounds {listed}"
