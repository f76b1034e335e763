"""VeriFi's marks in a federation: a client that leaves marks rows first, and checks afterwards.

Training messages to the leaver are replaced by ``train.mark``, until its marked update is in a
published model; then its request is taken up as any other. Once it is served, the leaver is asked
for its loss on the markers under the model of every round of the check's window
(``unlearning.verifi_marks``). What it answers is its word.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from strategies import messages
from strategies.actions import Mark, Marks
from strategies.directory import Directory
from strategies.exchange import match
from strategies.records import MarkCheck, RoundRecord, UnlearningRecord
from strategies.roster import Roster
from strategies.screen import Screen
from unlearning.errors import ImpossibleRequestError, ParametersError, RefusedRequestError
from unlearning.parameters import Parameters
from unlearning.routing import Request
from unlearning.verifi_marks import WINDOW, check

log = logging.getLogger("flwr")

PATIENCE = 20
"""Rounds without progress for which a leaver that has yet to mark keeps a federation going."""
ANSWERED = frozenset({"loss", "before", "after", "markers"})
"""Metrics of an answer to ``query.marks``."""
Question = Callable[[str, Marks], dict[str, float] | str]
"""Client and settings -> metrics of its answer, or why there is none."""
TakeUp = Callable[[Request], object]
"""Takes a request up as any other."""


@dataclass(eq=False)
class Leaver:
    """A client that marks before it leaves.

    Attributes
    ----------
    progress
        Round of the request, or of the last reply that could be used.
    noted
        Rounds whose losses it noted.
    asked
        Round in which it was last asked to mark.
    left
        Rounds of the window that are still to come.
    """

    request: Request
    check: MarkCheck
    progress: int
    noted: int = 0
    asked: int | None = None
    left: int = WINDOW
    silences: list[str] = field(default_factory=list)

    def action(self) -> Mark:
        """Return what to ask it for."""
        return Mark.model_validate({"kind": self.request.marks, "noted": self.noted})


class Marking:
    """Whoever marks, marked and left, or is checked.

    Parameters
    ----------
    directory
        Names the client behind a node.
    roster
        Who may take part.
    """

    def __init__(self, directory: Directory, roster: Roster) -> None:
        self._directory = directory
        self._roster = roster
        self.waiting: list[Leaver] = []
        """Those who have yet to mark."""
        self.marked: list[Leaver] = []
        """Those whose request was taken up, and is not served."""
        self.checked: list[Leaver] = []
        """Those whose window is open."""

    def wait(self, request: Request, number: int) -> None:
        """Ask the client of a request to mark, from the round after ``number`` on.

        Raises
        ------
        ImpossibleRequestError
            If it is asked to already.
        """
        (client,) = request.clients
        if any(leaver.check.client == client for leaver in self.waiting):
            raise ImpossibleRequestError(f"{client} is to leave already, once it has marked rows")
        self.waiting.append(Leaver(request, MarkCheck(client, request.marks), number))

    def busy(self, number: int) -> bool:
        """Say whether rounds should go on after round ``number`` for somebody who marks."""
        return bool(self.checked) or any(
            number - leaver.progress < PATIENCE for leaver in self.waiting
        )

    # ------------------------------------------------------------ a round of training
    def instead(self, outgoing: Sequence[Message], number: int) -> list[Message]:
        """Return the messages of round ``number``, those to whoever has yet to mark replaced.

        The others keep the content that they share.
        """
        due = {leaver.check.client: leaver for leaver in self.waiting}
        for message in outgoing:
            leaver = due.get(self._directory.client(message.metadata.dst_node_id))
            if leaver is None or message.metadata.message_type != messages.TRAIN:
                continue
            leaver.asked, action = number, leaver.action()
            messages.tell(message, action.config())
            message.metadata.message_type = action.action
        return list(outgoing)

    # ------------------------------------------------------------ after a round
    def settle(
        self,
        record: RoundRecord,
        ask: Question,
        take_up: TakeUp,
        pending: Collection[str] = (),
    ) -> None:
        """Go on with everybody, now that the round's model is published.

        Parameters
        ----------
        record
            The round's; unlearnings in it are told what is known of marks, and a request that is
            withdrawn is one that was refused.
        ask
            Sends the published model.
        take_up
            May raise ``RefusedRequestError``.
        pending
            Clients whose requests wait to be served.
        """
        if self.checked and not record.note:
            for leaver in list(self.checked):
                self._look(leaver, record.number, ask)
        self._open(record.unlearning)
        for leaver in [one for one in self.marked if one.check.client not in pending]:
            why = "its request was withdrawn after it had marked rows"
            self._withdraw(leaver, record, f"{leaver.check.client} stays excluded: {why}")
        for leaver in [*self.waiting]:
            self._go_on(leaver, record, ask, take_up)

    def _open(self, unlearning: UnlearningRecord | None) -> None:
        """Open the windows of those who were forgotten in this round."""
        if unlearning is None or unlearning.refused is not None:
            return
        for leaver in [one for one in self.marked if one.check.client in unlearning.clients]:
            self.marked.remove(leaver)
            unlearning.marks.append(leaver.check)
            if leaver.check.after is not None:
                self.checked.append(leaver)

    def _go_on(self, leaver: Leaver, record: RoundRecord, ask: Question, take_up: TakeUp) -> None:
        client, number = leaver.check.client, record.number
        why = record.rejected.get(client, record.note)
        if not self._roster.may_take_part(client):
            self._withdraw(leaver, record, f"{client} was excluded before it had marked rows")
        elif leaver.asked == number and messages.REFUSED in why:
            self._withdraw(leaver, record, f"{client} did not mark rows: {why}")
        elif leaver.asked == number and (record.note or client not in record.participants):
            log.warning("round %d: %s is asked again to mark rows: %s", number, client, why)
        elif leaver.asked == number:
            leaver.progress = number
            if not leaver.action().now:
                leaver.noted += 1
            elif record.unlearning is not None and record.unlearning.refused is None:
                # Whatever was changed, the marked update may be gone from the model.
                log.warning(
                    "round %d: %s is asked again to mark rows: others were forgotten meanwhile",
                    number,
                    client,
                )
            else:
                self._leave(leaver, record, ask, take_up)

    def _leave(self, leaver: Leaver, record: RoundRecord, ask: Question, take_up: TakeUp) -> None:
        self._begin(leaver, record.number, ask)
        try:
            take_up(leaver.request)
        except RefusedRequestError as error:
            self._withdraw(leaver, record, str(error))
        else:
            self.waiting.remove(leaver)
            self.marked.append(leaver)

    def _begin(self, leaver: Leaver, number: int, ask: Question) -> None:
        found = leaver.check
        found.marked = number
        answer = ask(found.client, Marks(first=True))
        if isinstance(answer, str):
            found.reason = f"no loss under the model with the marks: {answer}"
            log.warning("round %d: marks of %s: %s", number, found.client, found.reason)
            return
        found.before, found.after = answer["before"], answer["after"]
        found.markers = int(answer["markers"])
        found.reason = "the window of the check is not over"

    def _look(self, leaver: Leaver, number: int, ask: Question) -> None:
        """Ask for the loss under one round's model; judge once that was the window's last."""
        found = leaver.check
        answer = ask(found.client, Marks())
        if isinstance(answer, str):
            leaver.silences.append(answer)
        else:
            found.losses[number] = answer["loss"]
        leaver.left -= 1
        judge(found, leaver.silences, over=leaver.left == 0)
        if leaver.left == 0:
            self.checked.remove(leaver)
            told = f"{found.result} {found.reason}".rstrip()
            log.info("round %d: marks of %s: %s", number, found.client, told)

    def _withdraw(self, leaver: Leaver, record: RoundRecord, why: str) -> None:
        (self.waiting if leaver in self.waiting else self.marked).remove(leaver)
        request, found = leaver.request, leaver.check
        found.reason = why
        log.warning("round %d: request withdrawn: %s", record.number, why)
        if record.unlearning is None:
            record.unlearning = UnlearningRecord(
                record.number,
                request.method or "",
                request.cause,
                request.clients,
                targets=request.clients,
                refused=why,
            )
        record.unlearning.marks.append(found)


def judge(found: MarkCheck, silences: Collection[str], *, over: bool) -> None:
    """Fill in what the losses so far say, and why that is nothing, if so.

    Parameters
    ----------
    found
        With ``before`` and ``after``.
    silences
        Why the leaver gave no answer, round by round.
    over
        Whether the window is.
    """
    if found.before is None or found.after is None:
        return
    try:
        verdict = check(found.before, found.after, list(found.losses.values()))
    except ParametersError as error:
        found.reason = str(error)
        return
    found.rise, found.needed, found.result = verdict.rise, verdict.needed, verdict.result
    found.reason = ""
    if found.result != "inconclusive":
        return
    if not verdict.needed > 0:
        found.reason = "the marked update did not lower the loss in the average"
    elif not over:
        found.reason = "the window of the check is not over"
    else:
        told = "; ".join(dict.fromkeys(silences))
        found.reason = f"no answer in {len(silences)} of {WINDOW} rounds: {told}"


def ask_leaver(
    client: str,
    action: Marks,
    model: Parameters,
    config: ConfigRecord,
    grid: Grid,
    directory: Directory,
    deadline_s: float,
) -> dict[str, float] | str:
    """Send one client a model and return what it says of its marks, or why it says nothing.

    The client need not be one that may take part.
    """
    online, node = directory.refresh(grid), directory.node(client)
    if node not in online:  # to be waited for until the deadline otherwise
        return f"{client} is not connected"
    content = RecordDict(
        {
            messages.ARRAYS: messages.record_from(model),
            messages.CONFIG: ConfigRecord({**config, **action.config()}),
        }
    )
    question = Message(content, node, action.action)
    received = grid.send_and_receive([question], timeout=deadline_s)
    screened = Screen().check(match([question], received, directory), None)
    for answer in screened.answers:
        if lacking := sorted(ANSWERED - answer.metrics.keys()):
            return f"the answer lacks {', '.join(lacking)}"
        return {name: float(value) for name, value in answer.metrics.items()}
    return screened.rejected[client]
