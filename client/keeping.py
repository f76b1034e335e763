"""A data owner's own folder: which rows tokens stand for, and which are never trained on again.

``tokens.json`` maps tokens, which the owner hands out and a request names, to contents of rows.
``forgotten.json`` holds contents of rows, and classes, that training leaves out for ever; entries
are added to it and never removed. Rows are known by content (``client.rows``), so that neither a
restart nor another import or order of the data brings one back, and a row's duplicates go with it.
"""

import functools
import hashlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from flwr.app import Context
from pydantic import Field, ValidationError

from client import rows
from client.storage import KeepingError, Record, locked, read_record, write_record
from client.task.protocol import Examples, TaskOptions, size_of
from strategies import messages
from strategies.actions import PATTERN, Selection
from unlearning.errors import RefusedRequestError

Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Token = Annotated[str, Field(pattern=rf"^{PATTERN}$")]
Class = Annotated[str, Field(pattern=r"^[0-9]+$")]

TOKENS, FORGOTTEN = "tokens.json", "forgotten.json"
KEPT_RESULTS = 4
"""Data sets of one client whose rest is remembered."""
OWN = ("client-dir", "refuse", "batch-log", "batch-log-precision", "batch-log-limit")
"""Settings in which a SuperNode's ``node-config`` wins over the run's."""


class Tokens(Record):
    """What ``tokens.json`` holds."""

    rows: dict[Token, Hash] = Field(default_factory=dict)


class When(Record):
    """Since when, and for which request, something is forgotten."""

    round: int
    request: str


class Forgotten(Record):
    """What ``forgotten.json`` holds."""

    rows: dict[Hash, When] = Field(default_factory=dict)
    classes: dict[Class, When] = Field(default_factory=dict)

    @property
    def length(self) -> int:
        """Return the number of entries."""
        return len(self.rows) + len(self.classes)


class Keeping:
    """One client's folder.

    Parameters
    ----------
    folder
        Made when something is first written to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._state: tuple[int, ...] | None = None
        self._forgotten = Forgotten()
        self._results: list[tuple[Examples, Forgotten, Examples]] = []

    # ------------------------------------------------------------ training
    def forgotten(self) -> Forgotten:
        """Return what must not be trained on, as it is on the disk now.

        Raises
        ------
        KeepingError
            If the file is unreadable, damaged, gone, or lacks what was in it before.
        """
        path = self.folder / FORGOTTEN
        state = _state(path)
        if state is None and (self._state is not None or _state(self.folder / TOKENS) is not None):
            raise KeepingError(f"{path} is gone; put back a copy, and never delete it alone")
        if state != self._state:
            found = read_record(path, Forgotten) or Forgotten()
            lost = self._forgotten.rows.keys() - found.rows.keys()
            if lost or self._forgotten.classes.keys() - found.classes.keys():
                raise KeepingError(
                    f"{path} lacks what was in it before; put back the newest copy, for what is "
                    "forgotten stays so"
                )
            self._forgotten, self._state = found, state
        return self._forgotten

    def check_length(self, entries: int) -> None:
        """Raise ``RefusedRequestError`` if the list has fewer entries than the server saw in it.

        Entries are never removed: the list was deleted with its folder, or is an old copy.
        """
        here = self.forgotten().length
        if here < entries:
            raise RefusedRequestError(
                f"{messages.SHORTER}: {self.folder / FORGOTTEN} has {here} entries, and had "
                f"{entries}; put back the newest copy"
            )

    def without_forgotten(self, examples: Examples) -> Examples:
        """Return the rows that may be trained on.

        The same object while nothing changes; ``examples`` itself if none of it is forgotten.
        """
        forgotten = self.forgotten()
        if not forgotten.rows and not forgotten.classes:
            return examples
        for known, when, result in self._results:
            if known is examples and when is forgotten:
                return result
        kept = self.allowed(examples)
        result = examples if len(kept) == size_of(examples) else rows.subset(examples, kept)
        self._results.append((examples, forgotten, result))
        del self._results[:-KEPT_RESULTS]
        return result

    def allowed(self, examples: Examples) -> list[int]:
        """Return the rows that may be trained on, by their places."""
        forgotten = self.forgotten()
        barred = {
            row for number in forgotten.classes for row in rows.rows_of_class(examples, int(number))
        }
        hashes = rows.content_hashes(examples) if forgotten.rows else ()
        barred.update(row for row, content in enumerate(hashes) if content in forgotten.rows)
        return [row for row in range(size_of(examples)) if row not in barred]

    # ------------------------------------------------------------ selecting
    def contents(self, selection: Selection, examples: Examples) -> frozenset[str]:
        """Return the contents of the rows that a selection means, also of rows that are away."""
        if selection.forget == "samples":
            tokens = self._tokens().rows
            return frozenset(tokens[token] for token in selection.tokens if token in tokens)
        hashes = rows.content_hashes(examples)
        return frozenset(hashes[row] for row in self.select(selection, examples))

    def select(self, selection: Selection, examples: Examples) -> list[int]:
        """Return the rows that a selection means, forgotten or not, by their places, ascending.

        Tokens not known here are another client's. Duplicates of a row are selected with it.
        """
        match selection.forget:
            case "none":
                return []
            case "all":
                return list(range(size_of(examples)))
            case "class":
                return rows.rows_of_class(examples, selection.forget_class)
            case "samples":
                wanted = self.contents(selection, examples)
                hashes = rows.content_hashes(examples) if wanted else ()
                return [row for row, content in enumerate(hashes) if content in wanted]

    def parts(self, selection: Selection, examples: Examples) -> tuple[Examples, Examples]:
        """Return the rows that a selection means, and the others that may be trained on."""
        chosen = self.select(selection, examples)
        apart = set(chosen)
        remain = [row for row in self.allowed(examples) if row not in apart]
        return rows.subset(examples, chosen), rows.subset(examples, remain)

    # ------------------------------------------------------------ forgetting
    def forget(
        self, selection: Selection, examples: Examples, number: int, request: str = ""
    ) -> int:
        """Never train on the rows of a selection again; on the disk before this returns.

        Parameters
        ----------
        number
            The round.
        request
            Which request this is for.

        Returns
        -------
        int
            How many rows the selection means, forgotten before or not: those in ``examples``, and
            those that tokens stand for and are away. A class is written where there are none, too:
            rows of it may come later.

        Raises
        ------
        KeepingError
            If a selection does not fit the data, before anything is written: every training asks
            for what is on the list.
        """
        with locked(self.folder):
            count = self.count(selection, examples)
            known, when = self.forgotten(), When(round=number, request=request)
            if selection.forget == "class":
                added: dict[str, When] = {}
                classes = {str(selection.forget_class): when} | known.classes
            else:
                added = dict.fromkeys(sorted(self.contents(selection, examples)), when)
                classes = known.classes
            changed = Forgotten(rows=added | known.rows, classes=classes)
            if changed != known:
                write_record(self.folder / FORGOTTEN, changed)
        return count

    def count(self, selection: Selection, examples: Examples) -> int:
        """Return how many rows a selection means, as ``forget`` does; nothing is written."""
        chosen = self.select(selection, examples)
        if selection.forget != "samples" or not (known := self.contents(selection, examples)):
            return len(chosen)
        return len(chosen) + len(known.difference(rows.content_hashes(examples)))

    def issue(
        self, places: Sequence[int], examples: Examples, *, seed: int | None = None
    ) -> list[str]:
        """Return a token for each of some rows; a row that has one keeps it.

        Parameters
        ----------
        places
            Of rows in ``examples``.
        seed
            Of a simulation, whose tokens are the same in every run; drawn at random without.
        """
        count = size_of(examples)
        outside = [place for place in places if not 0 <= place < count]
        if outside:
            raise KeepingError(f"rows are numbered from 0 to {count - 1}, got {outside[0]}")
        hashes = rows.content_hashes(examples)
        with locked(self.folder):
            self._ensure_forgotten()
            tokens = dict(self._tokens().rows)
            of = {content: token for token, content in tokens.items()}
            for place in places:
                content = hashes[place]
                if content not in of:
                    of[content] = token = self._token(content, seed)
                    tokens[token] = content
            write_record(self.folder / TOKENS, Tokens(rows=tokens))
        return [of[hashes[place]] for place in places]

    def _token(self, content: str, seed: int | None) -> str:
        if seed is None:
            return secrets.token_hex(16)
        text = f"{seed}\x1ftoken\x1f{self.folder.name}\x1f{content}"
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _tokens(self) -> Tokens:
        return read_record(self.folder / TOKENS, Tokens) or Tokens()

    def _ensure_forgotten(self) -> None:
        """Write the empty list, so that a missing one is noticed from now on."""
        self.forgotten()
        if self._state is None:
            write_record(self.folder / FORGOTTEN, Forgotten())


def _state(path: Path) -> tuple[int, ...] | None:
    """Return what changes whenever a file is replaced; ``None`` where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KeepingError(f"{path} cannot be read: {error.strerror or error}") from error
    return found.st_ino, found.st_mtime_ns, found.st_size


# ---------------------------------------------------------------- whose
@functools.cache
def keeping_at(client_dir: str, partition: int | None = None) -> Keeping:
    """Return what a client keeps, the same object every time.

    Parameters
    ----------
    partition
        Of a simulated client, which has a folder of its own in ``client_dir``.
    """
    root = Path(client_dir)
    return Keeping(root if partition is None else root / str(partition))


def keeping_of(own: TaskOptions, context: Context) -> Keeping | None:
    """Return what the client of a context keeps, given its ``own_options``; it may be nothing."""
    if not own.client_dir:
        return None
    return keeping_at(own.client_dir, context.node_config.get(messages.PARTITION))


def own_options(options: TaskOptions, context: Context) -> TaskOptions:
    """Return the options with what the SuperNode's ``node-config`` says in their place.

    Raises
    ------
    KeepingError
        If it says what cannot be.
    """
    own = tuple((key, context.node_config[key]) for key in OWN if key in context.node_config)
    return _merged(options, own) if own else options


@functools.lru_cache(maxsize=8)
def _merged(options: TaskOptions, own: tuple[tuple[str, object], ...]) -> TaskOptions:
    try:
        return TaskOptions.model_validate({**options.model_dump(by_alias=True), **dict(own)})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise KeepingError(f"node-config: {faults}") from error
