"""What a client keeps of its marks, in its own folder: ``marks.json`` (``methods`` 2.10).

Which rows are markers, by content, under which labels; their losses under models that came from
the server; and, before marking, the losses of all rows. It is there for as long as the owner wants
to judge by it, whatever the server says.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from client.keeping import Hash, Keeping
from client.storage import Record, locked, read_record, write_record
from unlearning.errors import MissingNeedError
from unlearning.verifi_marks import WINDOW, Check, Kind, check

MARKS = "marks.json"

Finite = Annotated[float, Field(allow_inf_nan=False)]


class Watched(Record):
    """The loss of every row under the model that one round started from."""

    round: int
    losses: dict[Hash, Finite]


class Followed(Record):
    """The mean loss on the markers under the model of one round."""

    round: int
    loss: Finite


class Marked(Record):
    """What was marked."""

    kind: Kind
    round: int
    """In which it was marked."""
    labels: dict[Hash, int | None] = Field(min_length=1)
    """What every marker is marked as; ``None`` for what it is."""
    before: Finite
    """Mean loss on the markers under the model that marking started from."""
    after: Finite | None = None
    """The same under the first published model that has the marked update in it."""
    following: tuple[Followed, ...] = ()
    """The same since the client left."""

    def verdict(self) -> Check:
        """Return what the losses so far say.

        Raises
        ------
        MissingNeedError
            If there is none yet under the model with the marked update.
        """
        if self.after is None:
            raise MissingNeedError(
                "no model with the marked update in it was sent here, so there is nothing to "
                "compare losses to"
            )
        return check(self.before, self.after, [one.loss for one in self.following])


class MarksRecord(Record):
    """What ``marks.json`` holds."""

    watched: tuple[Watched, ...] = ()
    """The newest rounds, in order."""
    marked: Marked | None = None


class KeptMarks:
    """The marks in one client's folder.

    Methods raise ``KeepingError`` if the file is damaged, or cannot be read or written.
    """

    def __init__(self, keeping: Keeping) -> None:
        self._folder = keeping.folder

    def read(self) -> MarksRecord:
        """Return what is there; nothing where no file is."""
        return read_record(self._folder / MARKS, MarksRecord) or MarksRecord()

    def marked(self) -> Marked:
        """Return what was marked.

        Raises
        ------
        MissingNeedError
            If nothing was.
        """
        found = self.read().marked
        if found is None:
            raise MissingNeedError(f"no rows are marked in {self._folder}; nothing can be checked")
        return found

    def watch(
        self, number: int, losses: Mapping[str, float], *, anew: bool, most: int
    ) -> tuple[Watched, ...]:
        """Add the losses of round ``number``, and return those of the newest ``most`` rounds.

        ``anew`` drops what was noted before.
        """
        with locked(self._folder):
            known = self.read()
            earlier = () if anew else tuple(one for one in known.watched if one.round < number)
            watched = (*earlier, Watched(round=number, losses=dict(losses)))[-most:]
            self._write(MarksRecord(watched=watched, marked=known.marked))
        return watched

    def mark(self, marked: Marked) -> None:
        """Keep what was marked, in the place of all that was kept before."""
        with locked(self._folder):
            self.read()  # a damaged file is not written over
            self._write(MarksRecord(marked=marked))

    def follow(self, number: int, loss: float, *, first: bool) -> Marked:
        """Add the loss under the model of round ``number``, and return what is kept now.

        ``first`` says that this model is the first with the marked update in it. Rounds past the
        window are not kept: they do not count.
        """
        with locked(self._folder):
            known, found = self.read(), self.marked()
            if first:
                changed = found.model_copy(update={"after": loss, "following": ()})
            else:
                others = [one for one in found.following if one.round != number]
                rounds = sorted([*others, Followed(round=number, loss=loss)], key=_round)
                changed = found.model_copy(update={"following": tuple(rounds[:WINDOW])})
            self._write(MarksRecord(watched=known.watched, marked=changed))
        return changed

    def _write(self, record: MarksRecord) -> None:
        write_record(self._folder / MARKS, record)


def _round(followed: Followed) -> int:
    return followed.round
