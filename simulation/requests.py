"""What a scenario asks to be forgotten, and when; and what the data's owner does for it."""

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from client.keeping import keeping_at
from client.task.protocol import Task, TaskOptions, size_of
from strategies.directory import client_name
from unlearning.catalogue import DATA, METHODS, Target
from unlearning.errors import SecateurError
from unlearning.randomness import generator
from unlearning.routing import Cause, Promise, Request
from unlearning.verifi_marks import Kind

Number = Annotated[int, Field(ge=0)]


class RowsError(SecateurError):
    """Rows that the client named does not have."""

    exit_code = 2


class Asked(BaseModel):
    """One request, as a ``[[requests]]`` table says it."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    round: int = Field(ge=1)
    """After which it is asked."""
    target: Target
    clients: tuple[Number, ...] = ()
    """Partitions: whom to forget, or who holds the class or samples; of a class, empty for all."""
    label: int | None = Field(None, ge=0)
    """Of a class."""
    rows: tuple[Number, ...] = ()
    """Of samples: their places in the training data of the one client named."""
    samples: int | None = Field(None, ge=1)
    """In the place of ``rows``: how many are drawn from the seed."""
    cause: Cause = "privacy"
    guarantee: Promise | None = None
    """``None`` for what the cause calls for."""
    method: str | None = None
    """``None`` to have one chosen."""
    most_rounds: int | None = Field(None, ge=1)
    """Rounds that may be played again for it."""
    marks: Kind | None = None
    """How the one client named marks rows before it leaves; ``None`` if it does not."""
    cooperates: bool | None = None
    """Whether those concerned answer; ``None`` for what is usual: who leaves does not, holders of a
    class or samples do."""
    drops: bool | None = None
    """Whether they at least drop the data; ``None`` if they do whenever they answer."""

    @model_validator(mode="after")
    def _check_target(self) -> Self:
        if self.target in DATA and self.cause == "malicious":
            raise ValueError(
                f"forgetting {_kind(self.target)} trusts those who hold them, and cause = "
                "malicious says not to; forget the clients (target = client)"
            )
        if (self.target is Target.CLASS) != (self.label is not None):
            raise ValueError(
                f"label = {self.label} with target = {self.target}: a class, and nothing else, is "
                "named by its label"
            )
        named = bool(self.rows) + (self.samples is not None)
        if named != (self.target is Target.SAMPLES):
            raise ValueError(
                f"rows = {list(self.rows)} and samples = {self.samples} with target = "
                f"{self.target}: samples, and nothing else, are named by rows or by their number, "
                "not by both"
            )
        if self.target is Target.SAMPLES and len(self.clients) != 1:
            raise ValueError(
                f"clients = {list(self.clients)}: rows are numbered at their holder; name that one "
                "client, and ask once for each"
            )
        if self.target not in DATA and not self.clients:
            raise ValueError(f"target = {self.target} names nobody; give its partitions as clients")
        if self.marks is not None and (
            self.target is not Target.CLIENT or self.cause != "privacy" or len(self.clients) != 1
        ):
            raise ValueError(
                f"marks = {self.marks} with target = {self.target}, cause = {self.cause} and "
                f"clients = {list(self.clients)}: one client that leaves for privacy marks rows, "
                "nobody else; ask once for each, or leave marks out"
            )
        if self.method is not None and self.method not in METHODS:
            raise ValueError(
                f"there is no method {self.method!r}; choose one of {', '.join(METHODS)}, or leave "
                "it out to have one chosen"
            )
        return self

    @property
    def holder(self) -> int:
        """Return the partition that holds the samples."""
        (found,) = self.clients
        return found


def _kind(target: Target) -> str:
    return "a class" if target is Target.CLASS else "samples"


def rows_of(asked: Asked, place: int, task: Task, clients: int, seed: int) -> tuple[int, ...]:
    """Return the places of the samples in their holder's training data, none twice, ascending.

    Parameters
    ----------
    asked
        Samples are asked to be forgotten.
    place
        Of the request among the scenario's; no two of them draw the same numbers.
    clients
        Into how many partitions the data are divided.

    Raises
    ------
    RowsError
        If the holder has no such rows.
    """
    count = size_of(task.client_data(asked.holder, clients).train)
    last = max(asked.rows, default=0)
    if last >= count or (asked.samples or 0) > count:
        wanted = f"samples = {asked.samples}" if asked.samples else f"row {last}"
        raise RowsError(
            f"requests: {wanted} of {client_name(asked.holder)}, which has {count} rows, numbered "
            "from 0; ask for fewer, or of another client"
        )
    if asked.samples is None:
        return tuple(sorted(set(asked.rows)))
    draw = generator(seed, "samples to forget", place, asked.holder)
    return tuple(sorted(torch.randperm(count, generator=draw)[: asked.samples].tolist()))


def request_of(
    asked: Asked, rows: Sequence[int], task: Task, options: TaskOptions, clients: int
) -> Request:
    """Return the request as the federation hears it.

    Of samples it hears tokens alone, which their holder's owner issues here, in the client's own
    folder.

    Parameters
    ----------
    rows
        What ``rows_of`` found, where samples are asked for.
    options
        With a ``client_dir``, where samples are asked for.
    clients
        Into how many partitions the data are divided.
    """
    tokens: list[str] = []
    if asked.target is Target.SAMPLES:
        examples = task.client_data(asked.holder, clients).train
        keeping = keeping_at(options.client_dir, asked.holder)
        tokens = keeping.issue(rows, examples, seed=options.seed)
    return Request(
        asked.target,
        tuple(map(client_name, asked.clients)),
        asked.cause,
        guarantee=asked.guarantee,
        method=asked.method,
        most_rounds=asked.most_rounds,
        target_cooperates=asked.cooperates,
        target_drops=asked.drops,
        label=asked.label,
        tokens=tuple(tokens),
        marks=asked.marks or "",
    )
