"""Models in files: what was handed in to be unlearned, checked.

    before            the model that the last round started from
    locals            one model a client, what it made of that round
    history           recorded rounds, where the method needs them (``strategies.archive``)

Models are read a tensor at a time and never held together; files are never written to. Those in
half precision are computed with in single, or many of them would not add up.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

import torch
from torch import Tensor

from strategies.archive import GLOBAL, SUFFIX, WEIGHT, Archive, SavedModel, saved_clients
from strategies.methods.interface import ServerLab
from unlearning import history
from unlearning.errors import (
    BenignMajorityError,
    ImpossibleRequestError,
    MissingNeedError,
    ParametersError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.history import shares
from unlearning.parameters import (
    Parameters,
    check_alike,
    check_finite,
    trained_names,
    weighted_mean,
)

Tell = Callable[[str], None]
"""Takes note of what is being done, for a person to see."""


class Rounds(Archive):
    """Recorded rounds that say which one is looked at.

    Parameters
    ----------
    left_out
        Rounds that are recorded, and are none of these.
    added
        Rounds that are not recorded, later than all that are: starts and clients' models.
    """

    def __init__(
        self,
        folder: Path,
        tell: Tell = lambda text: None,
        *,
        left_out: Collection[int] = (),
        added: Mapping[int, tuple[SavedModel, Mapping[str, SavedModel]]] | None = None,
    ) -> None:
        super().__init__(folder, wide=True)
        self._tell, self._left_out, self._added = tell, left_out, added or {}

    @property
    def rounds(self) -> Sequence[int]:
        """Return the numbers of the rounds, ascending."""
        recorded = (number for number in super().rounds if number not in self._left_out)
        return (*recorded, *self._added)

    def start(self, number: int) -> SavedModel:
        """Return the model that a round started from."""
        self._tell(f"round {number} of {self.rounds[-1]}")
        return self._added[number][0] if number in self._added else super().start(number)

    def models(self, number: int) -> Mapping[str, SavedModel]:
        """Return the models that entered a round's aggregate, by client."""
        return self._added[number][1] if number in self._added else super().models(number)

    def without_last(self) -> "Rounds":
        """Return the rounds but the last one."""
        return Rounds(self.folder, self._tell, left_out=self.rounds[-1:])

    def followed_by(self, start: SavedModel, models: Mapping[str, SavedModel]) -> "Rounds":
        """Return the rounds and one more."""
        return Rounds(self.folder, self._tell, added={self.rounds[-1] + 1: (start, models)})

    def check_names(self) -> None:
        """Raise ``ParametersError`` if a folder is not called as its round is looked up."""
        for path in sorted(self.folder.glob("round-*")):
            digits = path.name.removeprefix("round-")
            if digits.isdecimal() and (not int(digits) or path != self._round(int(digits))):
                raise ParametersError(
                    f"{path} is not the name of a round: they are round-0001, round-0002 and so on"
                )


MOST_ROUNDS = 10**6
"""No federation has as many; every one up to the last is looked for."""


@dataclass(frozen=True)
class Case:
    """Whom to forget, and what there is to do it with."""

    before: SavedModel
    locals_: Mapping[str, SavedModel]
    """What every client of the last round made of ``before``, sorted by client."""
    forgotten: tuple[str, ...]
    """Sorted; some of these clients, never all."""
    history: Rounds | None = None
    """The rounds as they are recorded, where they are."""
    last_is_recorded: bool = False
    """Whether the last of them is the round of ``before`` and the locals."""
    lab: ServerLab | None = None
    """What can be computed with ``--data`` and ``--task``."""
    tell: Tell = field(default=lambda text: None)

    @cached_property
    def others(self) -> tuple[str, ...]:
        """Return the clients of the last round that stay."""
        return tuple(client for client in self.locals_ if client not in self.forgotten)

    @cached_property
    def shares(self) -> Mapping[str, float]:
        """Return p_k: every client's share of the last round's weight."""
        return shares({client: model.weight for client, model in self.locals_.items()})

    @property
    def share(self) -> float:
        """Return p_F: the share of those to be forgotten."""
        return sum(self.shares[client] for client in self.forgotten)

    @property
    def sent(self) -> list[SavedModel]:
        """Return the models of those to be forgotten."""
        return [self.locals_[client] for client in self.forgotten]

    def average(self, clients: Sequence[str]) -> dict[str, Tensor]:
        """Return the average of some clients of the last round, by their examples."""
        self.tell(f"averaging {len(clients)} of {len(self.locals_)} models")
        models = [self.locals_[client] for client in clients]
        return weighted_mean(models, [model.weight for model in models])

    def recorded(self) -> Rounds:
        """Return all rounds; a method that needs them is not run without.

        That of the locals is the last of them, whether or not it is in the history too.
        """
        assert self.history is not None  # noqa: S101  read_case has looked
        if self.last_is_recorded:
            return self.history
        return self.history.followed_by(self.before, self.locals_)

    def laboratory(self) -> ServerLab:
        """Return what can be computed on data; a method that needs it is not run without."""
        assert self.lab is not None  # noqa: S101  the command has looked
        return self.lab

    def earlier(self) -> Rounds:
        """Return the rounds that an average of the others still holds.

        The one of the locals is not among them: what the forgotten clients sent in it is in no
        average of the others.
        """
        assert self.history is not None  # noqa: S101  read_case has looked
        return self.history.without_last() if self.last_is_recorded else self.history

    @cached_property
    def number(self) -> int:
        """Return the number of the last round: that of the locals."""
        return self.recorded().rounds[-1] if self.history is not None else 1

    def retained(self) -> tuple[str, ...]:
        """Return everybody who took part in any round and stays."""
        known = history.clients(self.history) if self.history is not None else frozenset()
        return tuple(sorted((known | self.locals_.keys()) - set(self.forgotten)))

    def files(self) -> Iterator[SavedModel]:
        """Yield everything that was handed in, file by file."""
        yield self.before
        yield from self.locals_.values()
        if self.history is not None:
            for number in self.history.rounds:
                yield self.history.start(number)
                yield from self.history.models(number).values()


def check_rounds(rounds: Rounds, clients: Collection[str]) -> None:
    """Raise unless all values that clients sent, or got, in these rounds are finite.

    For methods that try rounds and may pass over one; a sum shows by itself.
    """
    for number in rounds.rounds:
        check_values(rounds.start(number))
        for client, model in rounds.models(number).items():
            if client in clients:
                check_values(model)


def read_case(
    before: Path,
    locals_: Path,
    forget: Sequence[str],
    *,
    history: Path | None = None,
    lab: Callable[[SavedModel], ServerLab] | None = None,
    tell: Tell = lambda text: None,
) -> Case:
    """Return what files hold, and whom of it to forget.

    Raises
    ------
    ParametersError
        If a file is missing, is none, or does not fit the others.
    ImpossibleRequestError, BenignMajorityError
        If a client to be forgotten is not there, or nobody else is.
    MissingNeedError
        If there are no models of clients, or no rounds.
    """
    start = SavedModel(before, wide=True)
    if not trained_names(start.schema):
        raise ParametersError(
            f"{before} holds no weights, which are floating-point tensors; there is nothing to "
            "unlearn in it"
        )
    if _inside(before, locals_) and before.stem != GLOBAL:
        raise ParametersError(
            f"{before} lies among the clients' models and would be taken for one of them; move it, "
            f"or name it {GLOBAL}{SUFFIX}"
        )
    models = saved_clients(_folder(locals_, "clients' models"), wide=True)
    if not models:
        raise MissingNeedError(
            f"{locals_} holds no model; it must hold CLIENT{SUFFIX} of each client"
        )
    schema = start.schema
    for model in models.values():
        check_fits(schema, model, before)
    # As their files are called: a comma, for one, can be written as %2C.
    names = tuple(sorted({name if name in models else unquote(name) for name in forget}))
    if not names:
        raise ImpossibleRequestError("no client is named; give --forget ID, or several with commas")
    if unknown := [client for client in names if client not in models]:
        raise ImpossibleRequestError(
            f"there is no {', '.join(unknown)} in {locals_}, only {listed(list(models))}"
        )
    if len(names) == len(models):
        raise BenignMajorityError(
            f"all {len(models)} clients of {locals_} are to be forgotten: nobody would be left; "
            "keep one at least"
        )
    check_values(start)
    rounds = _read_history(history, start, tell) if history is not None else None
    return Case(
        start,
        models,
        names,
        rounds,
        last_is_recorded=rounds is not None and _is_last(start, rounds),
        lab=lab(start) if lab is not None else None,
        tell=tell,
    )


def _read_history(folder: Path, like: SavedModel, tell: Tell) -> Rounds:
    rounds = Rounds(_folder(folder, "recorded rounds"), tell)
    rounds.check_names()
    if rounds.rounds and rounds.rounds[-1] > MOST_ROUNDS:
        raise SecateurError(
            f"{rounds.folder}: round {rounds.rounds[-1]} is no round's number; they go from 1 to "
            f"{MOST_ROUNDS}"
        )
    if not rounds.rounds:
        raise MissingNeedError(
            f"{folder} holds no round; it must hold round-0001/{GLOBAL}{SUFFIX} and "
            f"round-0001/CLIENT{SUFFIX}, and so on"
        )
    schema = like.schema
    for number in rounds.rounds:
        start, models = rounds.start(number), rounds.models(number)
        if not models:
            raise MissingNeedError(f"{start.path.parent} holds no client's model")
        for model in (start, *models.values()):
            check_fits(schema, model, like.path)
    return rounds


def _is_last(before: SavedModel, rounds: Rounds) -> bool:
    """Return whether the last of some rounds is the one that started from ``before``.

    Raises
    ------
    RefusedRequestError
        If it is one before the last: what came after it is not in the models handed in.
    """
    for number in reversed(rounds.rounds):
        start = rounds.start(number)
        if all(torch.equal(tensor, start[name]) for name, tensor in before.items()):
            if number == rounds.rounds[-1]:
                return True
            raise RefusedRequestError(
                f"round {number} started from {before.path}, and {rounds.folder} goes on to round "
                f"{rounds.rounds[-1]}; give the last round's models, or the rounds until {number}"
            )
    return False


def warnings_about(case: Case, gap: str) -> list[str]:
    """Return what a person should know before trusting a result.

    Parameters
    ----------
    gap
        What a round means for the result that is not recorded; empty for nothing.
    """
    found = uncounted(case.locals_)
    if len(case.others) == 1:
        found.append(f"one retained client: the average of the others is {case.others[0]}'s model")
    if case.history is not None:
        numbers = case.history.rounds
        if gap and (gaps := sorted(set(range(1, numbers[-1])) - set(numbers))):
            text = listed([str(number) for number in gaps])
            found.append(f"round {text} not recorded: {gap}")
        if not case.last_is_recorded:
            found.append(f"the round of the locals is not recorded: it counts as {case.number}")
        known = history.clients(case.history)
        if absent := [client for client in case.forgotten if client not in known]:
            found.append(f"{', '.join(absent)} took part in no recorded round")
    return found


def uncounted(models: Mapping[str, SavedModel]) -> list[str]:
    """Return a warning if some files of one round have a weight and others do not."""
    untold = [client for client, model in models.items() if WEIGHT not in model.metadata]
    if not 0 < len(untold) < len(models):
        return []
    return [f"no {WEIGHT} in the files of {listed(untold)}: counted as 1 there"]


def check_values(model: SavedModel) -> None:
    """Raise ``ParametersError`` with the name of the file if it holds NaN or Inf."""
    try:
        check_finite(model)
    except ParametersError as error:
        raise ParametersError(f"{model.path}: {error}; leave it out or repair it") from error


def find_fault(case: Case) -> None:
    """Raise with the name of the first file that holds NaN or Inf; return if there is none.

    Every average of such models and every sum shows it, so files are looked through only then.
    """
    for model in case.files():
        check_values(model)


def check_fits(schema: Parameters, model: SavedModel, other: Path) -> None:
    """Raise ``ParametersError`` with the names of the files unless a model is like another."""
    try:
        check_alike(schema, model.schema)
    except ParametersError as error:
        raise ParametersError(f"{model.path} does not fit {other}: {error}") from error


def _folder(path: Path, holds: str) -> Path:
    if not path.is_dir():
        raise ParametersError(f"there is no folder {path} with {holds}")
    return path


def _inside(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def listed(names: Sequence[str], most: int = 8) -> str:
    """Return names as a list, cut short if it is long."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
