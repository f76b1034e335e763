"""Clients that mark rows before they leave, through the wrapper and a Grid of scripted clients."""

import math

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from simulation.engines.inprocess import InProcessGrid
from strategies import messages
from strategies.actions import Marks
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting
from strategies.marking import PATIENCE, ask_leaver, judge
from strategies.methods.catalogue import MAKE
from strategies.records import MarkCheck
from strategies.roster import Status
from tests.conftest import scripted_app
from tests.strategies.small import approximately, client, federation, learning, play
from unlearning.catalogue import Target
from unlearning.errors import (
    BudgetError,
    ImpossibleRequestError,
    RefusedRequestError,
    UnsafeMethodError,
)
from unlearning.routing import Request

LEAVER, CLIENTS = 2, 7
TOLD = {"loss": 1.0, "before": 0.9, "after": 0.5, "markers": 3}


def request(kind="erroneous", number=LEAVER, **more):
    return Request(Target.CLIENT, (client(number),), "privacy", marks=kind, **more)


def same(left, right):
    return all(torch.equal(left[name], right[name]) for name in right)


class Script:
    """A grid whose clients learn, and whose leaver marks; all that it is asked is noted.

    ``marking`` says in which rounds it does not mark, and what it does instead; ``answers`` what it
    answers to ``query.marks``, by round, metrics or an exception.
    """

    def __init__(self, *, marking=None, answers=None, train=None):
        self.asked, self.models, self.forgettings = [], {}, []
        reply = train or learning()
        app = scripted_app(reply)

        @app.train("mark")
        def mark(message, context):
            config = dict(message.content[messages.CONFIG])
            number = int(config[messages.SERVER_ROUND])
            partition = int(context.node_config["partition-id"])
            asked = {key: config[key] for key in ("kind", "share", "epochs", "rounds", "noted")}
            self.asked.append(("train.mark", partition, number, asked))
            model = messages.parameters_from(message.content[messages.ARRAYS])
            match (marking or {}).get(number):
                case None:
                    return Message(reply(partition, number, model), reply_to=message)
                case "silent":
                    raise RuntimeError("out of reach")
                case why:
                    return messages.refusal(message, why)

        @app.query("marks")
        def marks(message, context):
            config = dict(message.content[messages.CONFIG])
            number = int(config[messages.SERVER_ROUND])
            partition = int(context.node_config["partition-id"])
            self.asked.append(("query.marks", partition, number, {"first": config["first"]}))
            self.forgettings.append(config.get(messages.FORGETTINGS, 0))
            self.models[number] = messages.parameters_from(message.content[messages.ARRAYS])
            found = (answers or {}).get(number, TOLD)
            if isinstance(found, Exception):
                raise found
            return Message(messages.evaluate_reply(found, 1), reply_to=message)

        self.grid = InProcessGrid(app, CLIENTS)

    def rounds(self, action):
        return [number for asked, _, number, _ in self.asked if asked == action]


def played(script, kind="erroneous", *, after=2, rounds=8, wrapped=None, also=()):
    """Train, ask for marks, and go on; return the federation, records and models by round."""
    wrapped = wrapped or federation("fedup", others=[MAKE["rollback"](), MAKE["natural"]()])
    records, models = play(wrapped, script.grid, after)
    wrapped.request(request(kind))
    for other in also:
        wrapped.request(other)
    more, later = play(wrapped, script.grid, rounds, played=after, model=models[-1])
    return wrapped, [*records, *more], [*models, *later]


def test_a_leaver_marks_in_the_next_round_leaves_and_is_asked_for_three_rounds():
    losses = {5: 0.6, 6: 0.75, 7: 0.65}
    script = Script(answers={n: {**TOLD, "loss": loss} for n, loss in losses.items()})
    wrapped, records, models = played(script)
    mark = {"kind": "erroneous", "share": 0.1, "epochs": 2, "rounds": 3, "noted": 0}
    assert script.asked == [
        ("train.mark", LEAVER, 3, mark),
        ("query.marks", LEAVER, 3, {"first": True}),
        *(("query.marks", LEAVER, number, {"first": False}) for number in (5, 6, 7)),
    ]
    assert script.forgettings == [0, 1, 1, 1]
    for number in (3, 5, 6, 7):
        assert same(script.models[number], models[number])
    assert client(LEAVER) in records[3].participants
    assert client(LEAVER) not in records[4].participants
    record = records[4].unlearning
    assert (record.method, record.refused, record.clients) == ("rollback", None, (client(LEAVER),))
    # .9 - .5 = .4 was won, half of which must be lost again: .75 - .5 = .25 is more.
    (found,) = record.marks
    assert found.losses == losses
    assert (found.client, found.kind, found.marked) == (client(LEAVER), "erroneous", 3)
    assert (found.before, found.after, found.markers) == (0.9, 0.5, 3)
    assert (found.rise, found.needed) == (pytest.approx(0.25), pytest.approx(0.2))
    assert (found.result, found.reason) == ("pass", "")
    assert wrapped.roster.entry(client(LEAVER)).status is Status.BANNED
    assert not wrapped.busy


def test_apart_from_the_marks_all_is_as_if_it_had_been_asked_a_round_later():
    _, records, models = played(Script())
    plain = federation("fedup", others=[MAKE["rollback"](), MAKE["natural"]()])
    grid = Script().grid
    first, before = play(plain, grid, 3)
    plain.request(Request(Target.CLIENT, (client(LEAVER),), "privacy"))
    second, later = play(plain, grid, 8, played=3, model=before[-1])
    assert len(models) == len([*before, *later])
    for found, expected in zip(models, [*before, *later], strict=True):
        assert same(found, expected)
    for found, expected in zip(records, [*first, *second], strict=True):
        assert found.participants == expected.participants
        assert (found.rejected, found.note) == (expected.rejected, expected.note)


def test_others_are_asked_for_what_they_always_are_and_share_its_content():
    wrapped = federation("fedup", others=[MAKE["rollback"]()])
    grid = Script().grid
    _, models = play(wrapped, grid, 2)
    wrapped.request(request())
    arrays = messages.record_from(models[-1])
    sent = wrapped.configure_train(3, arrays, messages.LocalTraining().to_record(), grid)
    nodes = {m.metadata.dst_node_id: m for m in sent}
    marked = nodes.pop(wrapped.directory.node(client(LEAVER)))
    assert marked.metadata.message_type == "train.mark"
    assert {m.metadata.message_type for m in nodes.values()} == {"train"}
    (shared,) = {id(m.content) for m in nodes.values()}
    assert id(marked.content) != shared
    other = next(iter(nodes.values())).content
    assert "kind" not in other[messages.CONFIG]
    assert marked.content[messages.ARRAYS] is other[messages.ARRAYS]
    assert dict(other[messages.CONFIG]).items() <= dict(marked.content[messages.CONFIG]).items()


def test_rounds_are_watched_before_forgettable_rows_are_marked():
    script = Script()
    _, records, _ = played(script, "forgettable", rounds=6)
    asked = [(n, told["noted"]) for action, _, n, told in script.asked if action == "train.mark"]
    assert asked == [(3, 0), (4, 1), (5, 2)]
    assert script.rounds("query.marks") == [5, 7, 8, 9]  # beyond the last round, until it is over
    assert len(records) == 10
    assert records[6].unlearning.marks[0].marked == 5


def test_only_rounds_with_a_usable_reply_count():
    script = Script(marking={4: "silent", 6: "silent"})
    _, records, _ = played(script, "forgettable", rounds=10)
    asked = [(n, told["noted"]) for action, _, n, told in script.asked if action == "train.mark"]
    assert asked == [(3, 0), (4, 1), (5, 1), (6, 2), (7, 2)]
    assert "out of reach" in records[4].rejected[client(LEAVER)]
    assert records[8].unlearning.marks[0].marked == 7


def test_who_is_not_sampled_is_asked_when_it_is():
    strategy = FedAvg(fraction_train=0.3, fraction_evaluate=0.0, min_train_nodes=2)
    script = Script()
    wrapped = federation("fedup", others=[MAKE["rollback"](), MAKE["natural"]()], strategy=strategy)
    _, records, _ = played(script, wrapped=wrapped, rounds=30)
    sampled = [r.number for r in records[3:] if client(LEAVER) in r.asked]
    assert script.rounds("train.mark") == sampled[:1]
    assert sampled[0] > 3  # otherwise this shows nothing
    assert records[sampled[0] + 1].unlearning.clients == (client(LEAVER),)


def test_a_client_that_refuses_stays_and_the_request_is_withdrawn_with_its_reason(caplog):
    script = Script(marking={3: "no row with a high loss is mistaken; use forgettable memory"})
    wrapped, records, models = played(script, rounds=5)
    record = records[3].unlearning
    assert record.refused.startswith("client-0002 did not mark rows: error ")
    assert "refused: no row with a high loss" in record.refused
    assert "use forgettable memory" in record.refused
    (found,) = record.marks
    assert (found.result, found.marked, found.reason) == ("inconclusive", None, record.refused)
    assert "round 3: request withdrawn: client-0002 did not mark rows" in caplog.text
    assert script.rounds("train.mark") == [3]
    assert not script.rounds("query.marks")
    assert wrapped.roster.may_take_part(client(LEAVER))
    assert client(LEAVER) in records[4].participants
    assert not wrapped.busy
    assert len(records) == 6
    # As it may do by the next request, which is served.
    wrapped.request(request("forgettable"))
    more, _ = play(wrapped, script.grid, 9, played=5, model=models[-1])
    assert more[4 - 1].unlearning.refused is None


def test_a_client_that_is_excluded_before_it_marked_leaves_without_marks():
    script = Script(marking={3: "silent"})
    plain = Request(Target.CLIENT, (client(LEAVER),), "privacy")
    wrapped, records, _ = played(script, also=[plain], rounds=6)
    assert not script.asked
    served = records[3].unlearning  # the other request
    assert served.refused is None
    (found,) = served.marks
    assert (found.marked, found.result) == (None, "inconclusive")
    assert found.reason == "client-0002 was excluded before it had marked rows"
    assert not wrapped.marking.waiting


def test_what_cannot_be_served_any_more_once_it_is_marked_is_withdrawn():
    script = Script()
    wrapped = federation("fedup", others=[MAKE["rollback"](), MAKE["natural"]()])
    _, models = play(wrapped, script.grid, 2)
    wrapped.request(request(most_rounds=3))  # rounds 1 and 2, and the next
    assert wrapped.marking.waiting
    records, _ = play(wrapped, script.grid, 6, played=2, model=models[-1])
    assert "would play 4 rounds again, and 3 are allowed" in records[0].unlearning.refused
    assert wrapped.roster.may_take_part(client(LEAVER))
    assert client(LEAVER) in records[1].participants


def test_what_is_withdrawn_after_it_was_taken_up_is_told_and_not_waited_for(monkeypatch):
    real = Forgetting.affordable

    def too_many(self, method, served, number, remembers):
        if any(entry.clients == (client(LEAVER),) for entry in served):
            return (), {entry: BudgetError("too many rounds by now") for entry in served}
        return real(self, method, served, number, remembers)

    monkeypatch.setattr(Forgetting, "affordable", too_many)
    wrapped, records, _ = played(Script())
    (done,) = [r.unlearning for r in records if r.unlearning is not None]
    assert done.refused == "too many rounds by now"
    (told,) = done.marks
    assert "stays excluded: its request was withdrawn after it had marked rows" in told.reason
    assert (wrapped.marking.marked, wrapped.forgetting.pending, wrapped.busy) == ([], [], False)


def test_a_leaver_that_says_nothing_under_its_marks_is_forgotten_and_not_asked_again():
    script = Script(answers={3: RuntimeError("gone")})
    wrapped, records, _ = played(script)
    (found,) = records[4].unlearning.marks
    assert (found.result, found.marked, found.after) == ("inconclusive", 3, None)
    assert found.reason.startswith("no loss under the model with the marks: error")
    assert "gone" in found.reason
    assert script.rounds("query.marks") == [3]
    assert not wrapped.busy


@pytest.mark.parametrize(
    ("loss", "result"), [(0.6, "inconclusive"), (0.8, "pass")], ids=["no-rise", "rise"]
)
def test_a_leaver_that_answers_once_is_believed_where_that_is_enough(loss, result):
    gone = RuntimeError("gone")
    script = Script(answers={5: gone, 6: {**TOLD, "loss": loss}, 7: gone})
    _, records, _ = played(script)
    (found,) = records[4].unlearning.marks
    assert (found.losses, found.result) == ({6: loss}, result)
    assert found.reason.startswith("no answer in 2 of 3 rounds: ") == (result == "inconclusive")


def test_a_leaver_that_is_not_connected_is_not_waited_for():
    wrapped, script = federation("fedup"), Script()
    _, models = play(wrapped, script.grid, 1)
    config = messages.LocalTraining().to_record()
    config[messages.SERVER_ROUND] = 1

    def ask():
        where = script.grid, wrapped.directory
        return ask_leaver(client(LEAVER), Marks(), models[-1], config, *where, deadline_s=1.0)

    assert ask() == {name: float(value) for name, value in TOLD.items()}
    del script.grid.contexts[wrapped.directory.node(client(LEAVER))]
    assert ask() == "client-0002 is not connected"
    assert script.rounds("query.marks") == [1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [({"loss": 1.0}, "the answer lacks after, before, markers"),
     ({**TOLD, "after": math.nan}, "metric 'after' is nan")],
)  # fmt: skip
def test_answers_are_screened(answer, reason):
    _, records, _ = played(Script(answers={3: answer}))
    (found,) = records[4].unlearning.marks
    assert found.reason == f"no loss under the model with the marks: {reason}"
    assert found.before is None


def test_marks_that_another_unlearning_may_have_undone_are_made_again():
    script = Script()
    other = Request(Target.CLIENT, (client(5),), "privacy")
    wrapped, records, _ = played(script, also=[other], rounds=8)
    assert records[3].unlearning.clients == (client(5),)
    assert not records[3].unlearning.marks
    assert script.rounds("train.mark") == [3, 4]
    assert script.rounds("query.marks") == [4, 6, 7, 8]
    assert records[5].unlearning.marks[0].marked == 4
    assert wrapped.roster.statuses()[client(LEAVER)] == "banned"


def test_rounds_without_a_model_are_none_of_the_window():
    def train(partition, number, model):
        if number == 6:
            raise RuntimeError("nobody is here")
        return learning()(partition, number, model)

    script = Script(train=train)
    _, records, _ = played(script, rounds=9)
    assert records[6].note
    assert script.rounds("query.marks") == [3, 5, 7, 8]
    assert records[4].unlearning.marks[0].result == "pass"


def test_marks_go_with_whatever_method_serves_the_request():
    wrapped = federation("fedup", others=[MAKE["natural"]()])
    script = Script(answers={n: {**TOLD, "loss": 0.55} for n in (5, 6, 7)})
    _, models = play(wrapped, script.grid, 2)
    wrapped.request(request(guarantee="approximate", method="natural"))
    records, _ = play(wrapped, script.grid, 8, played=2, model=models[-1])
    record = records[1].unlearning
    assert (record.method, record.marks[0].result) == ("natural", "fail")


def test_a_federation_does_not_wait_for_ever_for_a_leaver_that_never_answers(caplog):
    script = Script(marking=dict.fromkeys(range(3, 60), "silent"))
    wrapped, records, _ = played(script, rounds=4)
    # Its request was made in round 2.
    assert records[-1].number == 2 + PATIENCE
    assert len(wrapped.marking.waiting) == 1
    assert wrapped.roster.may_take_part(client(LEAVER))
    assert "round 22: client-0002 is asked again to mark rows: error" in caplog.text


def test_a_copy_of_a_federation_goes_its_own_way():
    wrapped = federation("fedup", others=[MAKE["rollback"](), MAKE["natural"]()])
    script = Script()
    _, models = play(wrapped, script.grid, 2)
    wrapped.request(request())
    twin = wrapped.fork()
    play(wrapped, script.grid, 8, played=2, model=models[-1])
    assert len(twin.marking.waiting) == 1
    records, _ = play(twin, Script().grid, 8, played=2, model=models[-1])
    assert records[1].unlearning.marks[0].result == "pass"


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"cause": "malicious"}, UnsafeMethodError, "marks are the leaver's word"),
        ({"clients": (client(1), client(2))}, ImpossibleRequestError, "2 are named; ask once"),
        ({"target_cooperates": False}, ImpossibleRequestError, "does not cooperate"),
        (
            {"target": Target.CLASS, "label": 1},
            ImpossibleRequestError,
            "a class is to be forgotten",
        ),
        ({"target": Target.SAMPLES, "tokens": ("0" * 32,)}, ImpossibleRequestError, "samples is"),
        ({"target": Target.BACKDOOR}, ImpossibleRequestError, "a backdoor is to be forgotten"),
        ({"clients": (client(9),)}, ImpossibleRequestError, "no client is called client-0009"),
        ({"method": "magic"}, ImpossibleRequestError, "there is no method 'magic'"),
    ],
)
def test_marks_are_refused_where_they_make_no_sense(changes, kind, message):
    wrapped = federation("fedup", others=[MAKE["rollback"]()])
    script = Script()
    play(wrapped, script.grid, 2)
    asked = {"target": Target.CLIENT, "clients": (client(2),), "cause": "privacy"} | changes
    with pytest.raises(kind, match=message):
        wrapped.request(Request(**asked, marks="erroneous"))
    assert not wrapped.marking.waiting
    assert wrapped.roster.may_take_part(client(2))


def test_nobody_is_asked_twice_and_ffmus_clients_are_not_asked():
    wrapped = federation("fedup", others=[MAKE["rollback"]()])
    play(wrapped, Script().grid, 2)
    assert wrapped.request(request()).method == "rollback"
    with pytest.raises(ImpossibleRequestError, match="is to leave already"):
        wrapped.request(request("forgettable"))
    quantised = federation("retrain", strategy=FFMU(rounds=4, fraction_evaluate=0.0))
    play(quantised, Script().grid, 1)
    with pytest.raises(RefusedRequestError, match="carry no marks; leave marks out"):
        quantised.request(request())


def test_who_marks_cooperates_unless_it_is_said():
    assert request().target_cooperates
    assert not Request(Target.CLIENT, (client(1),), "privacy").target_cooperates
    wrapped = federation("fedup", others=[MAKE["natural"]()])
    play(wrapped, Script().grid, 2)
    assert wrapped.request(request(guarantee="approximate")).method == "fedup"
    assert approximately("fedup", 1).marks == ""


def check_of(losses, before=1.0, after=0.6):
    return MarkCheck("a", "erroneous", 3, 2, before, after, dict(enumerate(losses)))


@pytest.mark.parametrize(
    ("found", "over", "result", "reason"),
    [
        # Half of .4 must come back.
        (check_of([0.7, 0.81, 0.6]), True, "pass", ""),
        (check_of([0.7, 0.79, 0.6]), True, "fail", ""),
        (check_of([0.9]), False, "pass", ""),
        (check_of([0.7]), False, "inconclusive", "the window of the check is not over"),
        (check_of([0.7]), True, "inconclusive", "no answer in 1 of 3 rounds: away"),
        (check_of([2.0, 2, 2], after=1.0), True, "inconclusive", "the marked update did not lower"),
    ],
)
def test_verdicts(found, over, result, reason):
    judge(found, ["away"], over=over)
    assert found.result == result
    assert found.reason.startswith(reason)
    assert bool(found.reason) == bool(reason)
    assert found.needed == pytest.approx((found.before - found.after) / 2)
