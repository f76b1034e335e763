"""What the server remembers of past rounds: no more than the configured methods need."""

import copy
import logging
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from strategies.archive import (
    SUFFIX,
    Archive,
    SavedModel,
    file_bytes,
    file_name,
    save_model,
    saved_clients,
    size_of,
)
from unlearning import drift, history
from unlearning.catalogue import Need, with_implied
from unlearning.errors import SecateurError
from unlearning.history import History
from unlearning.parameters import Parameters, copied

log = logging.getLogger("secateur")

INTERVAL = 2
"""Rounds from one recorded round to the next where some are enough (FedEraser's default)."""
HISTORIES = frozenset({Need.HISTORY, Need.SAMPLED_HISTORY})
EVERY_UPDATE = HISTORIES | {Need.LAST, Need.LEDGER}
"""Needs for which every client's own update is looked at."""
IN_MEMORY = 2**28
"""Bytes of the last round, and of the ledger, beyond which they are kept on disk."""


@dataclass(frozen=True)
class LastRound:
    """Everything that one round's participants sent."""

    number: int
    previous: Parameters
    """Model that the round started from."""
    locals_: Mapping[str, Parameters]
    """Every screened participant's model, including those the round then quarantined."""
    weights: Mapping[str, float]
    """Their weights in the average."""

    def without(self, clients: Collection[str]) -> "LastRound":
        """Return the round without what some clients sent."""
        return LastRound(
            self.number,
            self.previous,
            {c: m for c, m in self.locals_.items() if c not in clients},
            {c: w for c, w in self.weights.items() if c not in clients},
        )


@dataclass
class Memory:
    """Remembers what ``needs`` asks for, and nothing else.

    Histories are always on disk; the last round and the ledger where they are large; and everything
    where ``folder`` is given.

    Attributes
    ----------
    needs
        What to remember.
    folder
        Where; a temporary folder that ends with this object by default.
    limit
        Most bytes of all that is remembered. A history that would grow beyond is given up, which
        is said in the log: methods that need it are refused from then on.
    interval
        Rounds from one recorded round to the next where ``SAMPLED_HISTORY`` is enough.
    forgetting
        rho of the ledger of pulls (``methods`` 1.9): 1 remembers all rounds alike.
    """

    needs: Collection[Need] = ()
    folder: Path | None = None
    limit: int | None = None
    interval: int = INTERVAL
    forgetting: float = 1.0
    initial: Parameters | None = field(default=None, init=False)
    last: LastRound | None = field(default=None, init=False)
    ledger: Mapping[str, Parameters] = field(default_factory=dict, init=False)
    checkpoints: dict[int, Parameters] = field(default_factory=dict, init=False)
    """Models by the number of rounds played until then."""
    first_rounds: dict[str, int] = field(default_factory=dict, init=False)
    """Client -> the first round that it took part in."""
    last_rounds: dict[str, int] = field(default_factory=dict, init=False)
    """Client -> the last round that it took part in."""
    shares: Mapping[str, tuple[int, float]] = field(default_factory=dict, init=False)
    """Client -> the last round whose average it entered, and its share of it."""
    taken_back: tuple[str, ...] = field(default=(), init=False)
    """Requests by which clients' batches were subtracted."""
    unlogged: Mapping[str, int] = field(default_factory=dict, init=False)
    """Client -> the first round that its batch log may tell wrongly of."""
    restarted: bool = field(default=False, init=False)
    """Whether rounds were undone that the ledger cannot tell from those before them."""
    purged: dict[str, int] = field(default_factory=dict, init=False)
    """Client -> the last round of which what it sent was deleted; its history and its row of the
    ledger tell nothing of the rounds up to then."""
    from_the_start: bool = field(default=True, init=False)
    """Whether the first round that it remembers started from the model of round 0."""
    given_up: str = field(default="", init=False)
    """Why there is no history any more, if so."""
    _archive: Archive | None = field(default=None, init=False)
    _temporary: Any = field(default=None, init=False)

    def start(self, model: Parameters) -> None:
        """Take note of the model of round 0.

        Raises
        ------
        SecateurError
            If the folder holds what another run remembered.
        """
        if self.folder is not None and any(self.folder.rglob("*.safetensors")):
            raise SecateurError(
                f"{self.folder} holds models of another run, which would be taken for this one's; "
                "choose an empty folder"
            )
        if self.needs and ({Need.INITIAL, Need.CHECKPOINTS} & set(self.needs)):
            self.initial = self._kept("initial", "initial", model)

    def remember(self, last: LastRound, aggregated: Collection[str]) -> None:
        """Take note of a round.

        Parameters
        ----------
        last
            What was sent.
        aggregated
            Whose updates entered the aggregate.
        """
        used = last.without(last.locals_.keys() - set(aggregated))
        self.joined(last.number, last.previous, list(used.locals_))
        if used.locals_:
            shares = history.shares(used.weights)
            self.shares = {**self.shares, **{c: (last.number, s) for c, s in shares.items()}}
        if Need.LEDGER in self.needs and used.locals_:
            self._add_to_ledger(used)
        self._record(used)
        if Need.LAST in self.needs:
            self.last = self._kept_round(last)

    def joined(self, number: int, previous: Parameters, clients: Collection[str]) -> None:
        """Take note of who took part in a round, which started from ``previous``."""
        new = [client for client in clients if client not in self.first_rounds]
        self.first_rounds |= dict.fromkeys(new, number)
        self.last_rounds |= dict.fromkeys(clients, number)
        if new and Need.CHECKPOINTS in self.needs and number > 1:
            self._keep_checkpoint(number - 1, previous)

    def available(self) -> frozenset[Need]:
        """Return what is there now."""
        found = set()
        if self.initial is not None:
            found.add(Need.INITIAL)
            if Need.CHECKPOINTS in self.needs:
                found.add(Need.CHECKPOINTS)
        if self.last is not None:
            found.add(Need.LAST)
        if self.ledger and not self.restarted:
            found.add(Need.LEDGER)
        recorded = self._archive.rounds if self._archive is not None and not self.given_up else ()
        if 1 in recorded and any(self._archive.models(number) for number in recorded):  # type: ignore[union-attr]
            found |= HISTORIES & set(self.needs)
        return frozenset(found)

    def samples(self, number: int) -> bool:
        """Say whether a round is one of those recorded where some are enough."""
        return (number - 1) % self.interval == 0

    def recorded_clients(self) -> frozenset[str]:
        """Return the clients whose models are in recorded rounds."""
        return history.clients(self._archive) if self._archive is not None else frozenset()

    @property
    def history(self) -> History | None:
        """Return the recorded rounds, if they are whole."""
        return self._archive if self.available() & HISTORIES else None

    def checkpoint(self, clients: Collection[str]) -> tuple[int, Parameters] | None:
        """Return the last model from before any of the clients first took part, and its round.

        Who is not known to have taken part does not count beside others; of nobody known, it is
        that of round 0. ``None`` where it was not remembered.
        """
        if self.initial is None:
            return None
        joined = min((self.first_rounds[c] for c in clients if c in self.first_rounds), default=1)
        older = [number for number in self.checkpoints if number < joined]
        return (max(older), self.checkpoints[max(older)]) if older else (0, self.initial)

    def forget(self, clients: Collection[str]) -> None:
        """Delete what clients sent, and every checkpoint that they had a part in."""
        self.purged |= {c: last for c, last in self.last_rounds.items() if c in clients}
        if self.last is not None:
            self.last = self._kept_round(self.last.without(clients))
        kept = {client: row for client, row in self.ledger.items() if client not in clients}
        self.ledger = self._kept_clients("ledger", kept)
        if self._archive is not None:
            self._archive.forget(sorted(clients))
        joined = [self.first_rounds[c] for c in clients if c in self.first_rounds]
        for number in [n for n in self.checkpoints if joined and n >= min(joined)]:
            self._drop_checkpoint(number)

    def purged_of(self, clients: Collection[str]) -> dict[str, int]:
        """Return up to which round what some clients sent was deleted, of those of whom it was."""
        return {client: last for client, last in self.purged.items() if client in clients}

    def rewind(self, number: int) -> None:
        """Drop what describes the rounds after ``number``: they were undone."""
        if self._archive is not None:
            for recorded in self._archive.rounds:
                if recorded > number:
                    self._archive.drop(recorded)
        for later in [played for played in self.checkpoints if played > number]:
            self._drop_checkpoint(later)
        self.first_rounds = {c: first for c, first in self.first_rounds.items() if first <= number}
        self.last_rounds = {c: last for c, last in self.last_rounds.items() if last <= number}
        self.purged = {  # what comes after is written anew
            c: min(last, number) for c, last in self.purged.items() if c in self.first_rounds
        }
        self.shares = {c: share for c, share in self.shares.items() if share[0] <= number}
        self.last = None
        if number and self.ledger:
            log.warning(
                "the ledger is given up: rounds after %d were undone, and it tells nothing of the "
                "others alone",
                number,
            )
        self.restarted = number > 0  # from round 0 on, it is written anew
        self.ledger = self._kept_clients("ledger", {})

    def adopt(self, other: "Memory") -> None:
        """Go on from what another memory holds of the rounds after those that this one does."""
        self.first_rounds = {**other.first_rounds, **self.first_rounds}
        self.last_rounds = {**self.last_rounds, **other.last_rounds}
        self.shares = {**self.shares, **other.shares}
        for number, model in other.checkpoints.items():
            if number not in self.checkpoints:
                self._keep_checkpoint(number, model)
        if other.given_up and not self.given_up:
            self._give_up(other.given_up)
        if other._archive is not None:
            for number in other._archive.rounds:
                start, models = other._archive.start(number), other._archive.models(number)
                weights = {client: model.weight for client, model in models.items()}
                self._record(LastRound(number, start, models, weights))
        if not self.restarted:
            self.ledger = self._kept_clients("ledger", other.ledger)
        if other.last is not None:
            self.last = self._kept_round(other.last)

    def share_of(self, clients: Collection[str]) -> float:
        """Return what clients had together of the last average that any of them entered."""
        entered = [self.shares[client] for client in clients if client in self.shares]
        newest = max((number for number, _ in entered), default=0)
        return sum(share for number, share in entered if number == newest)

    def bytes_held(self, needs: Collection[Need] | None = None) -> int:
        """Return the size of everything remembered, or of what is remembered for some needs."""
        wanted = set(Need) if needs is None else with_implied(needs)
        held: list[Parameters] = []
        if wanted & {Need.INITIAL, Need.CHECKPOINTS} and self.initial is not None:
            held.append(self.initial)
        if Need.CHECKPOINTS in wanted:
            held += self.checkpoints.values()
        if Need.LEDGER in wanted:
            held += self.ledger.values()
        if Need.LAST in wanted and self.last is not None:
            held += [self.last.previous, *self.last.locals_.values()]
        size = sum(map(size_of, held))
        if self._archive is not None and HISTORIES & wanted:
            recorded = self._archive.rounds
            every = 1 if Need.HISTORY in wanted else self.interval
            size += self._archive.bytes_held(n for n in recorded if (n - 1) % every == 0)
        return size

    def __deepcopy__(self, memo: dict[int, object]) -> "Memory":
        """Return a memory of its own that starts out the same; files are linked, not copied."""
        if self.folder is not None:
            raise SecateurError(
                "a federation that remembers in a folder cannot be copied: both would write to it; "
                "leave memory-dir out"
            )
        twin = copy.copy(self)
        twin.first_rounds, twin.last_rounds = dict(self.first_rounds), dict(self.last_rounds)
        twin.checkpoints, twin.purged = dict(self.checkpoints), dict(self.purged)
        twin._temporary = None
        if self._temporary is not None:
            old, new = self._root(), twin._root()
            shutil.copytree(old, new, copy_function=_link, dirs_exist_ok=True)

            def moved(model: Parameters) -> Parameters:
                if not isinstance(model, SavedModel):
                    return model
                return SavedModel(new / model.path.relative_to(old))

            twin.initial = None if self.initial is None else moved(self.initial)
            twin.checkpoints = {number: moved(m) for number, m in self.checkpoints.items()}
            twin.ledger = {client: moved(row) for client, row in self.ledger.items()}
            if self.last is not None:
                sent = {client: moved(m) for client, m in self.last.locals_.items()}
                twin.last = replace(self.last, previous=moved(self.last.previous), locals_=sent)
            if self._archive is not None:
                twin._archive = Archive(new / "history")
        return twin

    # ------------------------------------------------------------ where things are
    def _root(self) -> Path:
        """Return the folder of everything that is on disk."""
        if self.folder is not None:
            return self.folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="secateur-")
        return Path(self._temporary.name)

    def _home(self, place: str, models: Iterable[Parameters]) -> Path | None:
        """Return the folder of a place, or ``None`` where it is kept in memory.

        What was moved to disk once stays there, so that nothing is in both.
        """
        on_disk = self.folder is not None or (
            self._temporary is not None and (self._root() / place).exists()
        )
        if not on_disk and sum(map(size_of, models)) <= IN_MEMORY:
            return None
        folder = self._root() / place
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _kept(self, place: str, name: str, model: Parameters) -> Parameters:
        home = self._home(place, [model, *self.checkpoints.values()])
        if home is None:
            return copied(model)
        path = home / f"{name}{SUFFIX}"
        save_model(path, model)
        return SavedModel(path)

    def _kept_clients(
        self, place: str, models: Mapping[str, Parameters]
    ) -> Mapping[str, Parameters]:
        home = self._home(place, models.values()) if models else self._there(place)
        if home is None:
            return {client: in_memory(model) for client, model in models.items()}
        wanted = {file_name(client) for client in models}
        for path in home.glob(f"*{SUFFIX}"):
            if path.name not in wanted:
                path.unlink()
        for client, model in models.items():
            if not (isinstance(model, SavedModel) and model.path.parent == home):
                save_model(home / file_name(client), model)
        return dict(saved_clients(home))

    def _there(self, place: str) -> Path | None:
        if self.folder is None and self._temporary is None:
            return None
        home = self._root() / place
        return home if home.exists() else None

    def _kept_round(self, last: LastRound) -> LastRound:
        home = self._home("last", [last.previous, *last.locals_.values()])
        if home is None:
            sent = {client: in_memory(model) for client, model in last.locals_.items()}
            return replace(last, previous=in_memory(last.previous), locals_=sent)
        archive = Archive(home)
        archive.record(last.number, last.previous, last.locals_, last.weights)
        for number in archive.rounds:
            if number != last.number:
                archive.drop(number)
        return replace(
            last, previous=archive.start(last.number), locals_=archive.models(last.number)
        )

    # ------------------------------------------------------------ parts
    def _keep_checkpoint(self, played: int, model: Parameters) -> None:
        size = file_bytes(model)
        if self.limit is not None and self.bytes_held() + size > self.limit:
            # An earlier one serves as well: exact forgetting plays more rounds again from it.
            log.warning(
                "no checkpoint of round %d: it would take what is remembered over the limit of "
                "%.1f MB; raise memory-limit",
                played,
                self.limit / 1e6,
            )
            return
        self.checkpoints[played] = self._kept("checkpoints", _round(played), model)

    def _drop_checkpoint(self, played: int) -> None:
        del self.checkpoints[played]
        if (home := self._there("checkpoints")) is not None:
            (home / f"{_round(played)}{SUFFIX}").unlink(missing_ok=True)

    def _add_to_ledger(self, used: LastRound) -> None:
        sent, weights = used.locals_, used.weights
        home = self._home("ledger", sent.values())
        if home is None:
            self.ledger = drift.updated(self.ledger, sent, weights, self.forgetting)
            return
        self.ledger = self._kept_clients("ledger", self.ledger)
        rows = drift.updated_rows(self.ledger, sent, weights, self.forgetting, sent.keys())
        for client, row in rows:  # one at a time in memory
            save_model(home / file_name(client), row)
        self.ledger = saved_clients(home)

    def _record(self, used: LastRound) -> None:
        wanted = HISTORIES & set(self.needs)
        first = min(self.first_rounds.values(), default=0)
        if self.from_the_start and used.number == first > 1:
            # No round before made a model: this one started from w^0, where histories begin.
            used = replace(used, number=1)
        skipped = Need.HISTORY not in wanted and not self.samples(used.number)
        if not wanted or self.given_up or skipped or not used.locals_:
            return
        if self._archive is None:
            self._archive = Archive(self._root() / "history")
        size = file_bytes(used.previous) * (len(used.locals_) + 1)
        if self.limit is not None and self.bytes_held() + size > self.limit:
            self._give_up(
                f"round {used.number} would take it over the limit of {self.limit / 1e6:.1f} MB; "
                "raise memory-limit"
            )
            return
        self._archive.record(used.number, used.previous, used.locals_, used.weights)

    def _give_up(self, why: str, level: int = logging.WARNING) -> None:
        self.given_up = why
        if self._archive is not None:
            for number in self._archive.rounds:
                self._archive.drop(number)
        log.log(level, "the history of rounds is given up: %s", why)


def in_memory(model: Parameters) -> Parameters:
    """Return a model that needs no file; one that is in memory already is returned as it is."""
    return copied(model) if isinstance(model, SavedModel) else model


def _round(number: int) -> str:
    return f"round-{number:04d}"


def _link(source: str, target: str) -> str:
    """Give a file a second name; files are replaced, never written to, so both stay as they are."""
    os.link(source, target)
    return target
