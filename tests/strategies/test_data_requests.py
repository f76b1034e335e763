"""Requests to forget a class or samples, through the wrapper and a Grid of scripted clients."""

import dataclasses

import pytest
import torch
from flwr.app import Message
from flwr.serverapp.strategy import FedAvg

from simulation.engines.inprocess import InProcessGrid
from strategies import messages
from strategies.actions import (
    Amnesiac,
    Ascend,
    Ascent,
    Batches,
    Forget,
    LabelFlip,
    Noisy,
    Rapid,
    Rcad,
)
from strategies.actions import Statistics as Question
from strategies.forgetting import needs_of
from strategies.loop import run_rounds
from strategies.memory import Memory
from strategies.methods.catalogue import MAKE
from strategies.methods.holders import Ball, ascending
from strategies.methods.masks import Mask
from strategies.methods.retraining import noisy, rapid, rcad
from strategies.rate_limit import RateLimit
from strategies.records import Phase
from strategies.recovery import Recovery
from tests.conftest import scripted_app
from tests.strategies.small import MODEL, client, federation, learning, play
from unlearning.catalogue import METHODS, Need, Target
from unlearning.errors import (
    BudgetError,
    RefusedRequestError,
)
from unlearning.parameters import byte_size, trained_names
from unlearning.routing import Request

CLIENTS = 5
ALL = tuple(map(client, range(CLIENTS)))
TOKEN = "0" * 32
OFFERS = frozenset({Need.CLASSES, Need.BATCH_LOG})
PLAY = (Rapid, Noisy, Rcad)


class Clients:
    """Clients that hold rows, do what they are asked, and note it.

    ``refuse`` maps a client to why it will not, ``away`` names those that cannot, per action.
    """

    def __init__(self, held=(1, 2, 3, 4, 5)):
        self.held = dict(enumerate(held))
        self.told = []
        self.refuse, self.away = {}, {}
        self.lists = {place: set() for place in range(len(held))}

        def trained(partition, number, model):
            told = [
                c.get("entries", 0)
                for kind, node, c in self.told
                if (kind, node) == ("train", partition)
            ]
            if told and told[-1] > len(self.lists[partition]):
                raise RuntimeError(messages.SHORTER)
            return learning()(partition, number, model)

        app = scripted_app(trained)
        for kind in (Ascent, LabelFlip, Amnesiac, Ascend, *PLAY):
            self._register(app.train, kind)
        for kind in (Forget, Batches, Question):
            self._register(app.query, kind)
        self.app = app
        self.grid = InProcessGrid(app, CLIENTS)
        self._send = self.grid.send_and_receive
        self.grid.send_and_receive = self._spy

    def _spy(self, outgoing, *, timeout=None):
        sent = list(outgoing)
        for message in sent:
            kind = message.metadata.message_type
            if kind in ("evaluate", "query.identity"):
                continue
            node = list(self.grid.contexts).index(message.metadata.dst_node_id)
            config = dict(message.content.config_records[messages.CONFIG])
            self.told.append((kind, node, config))
        return self._send(sent, timeout=timeout)

    def of(self, action, *, dry=False):
        """Return who was asked for an action, in order; for ``dry`` ones only if that is asked."""
        return [
            n for kind, n, config in self.told if (kind, config.get("dry", False)) == (action, dry)
        ]

    def config(self, action):
        return [c for kind, _, c in self.told if kind == action and not c.get("dry")]

    def _register(self, decorator, kind):
        @decorator(kind.action.partition(".")[2])
        def handle(message, context):
            partition = int(context.node_config["partition-id"])
            if partition in self.away.get(kind.action, ()):
                raise RuntimeError("not here")
            if partition in self.refuse.get(kind.action, ()):
                return messages.refusal(message, "its owner does not allow it")
            config = dict(message.content.config_records[messages.CONFIG])
            return Message(self._do(kind, partition, message, config), reply_to=message)

    def _do(self, kind, partition, message, config):
        rows = self.held.get(partition, 0)
        if kind in (Forget, Batches):
            told = {"first-round": 1} if kind is Batches else {}
            if kind is Forget:
                if not config["dry"]:
                    self.lists[partition].add((config["forget-class"], config["forget-tokens"]))
                told = {"entries": len(self.lists[partition])}
            return messages.evaluate_reply({"rows": rows, **told}, 1)
        start = messages.parameters_from(message.content.array_records[messages.ARRAYS])
        if kind in PLAY:
            return learning()(partition, int(config["server-round"]), start)
        if kind is Question:
            return self._statistics(start, rows if config["forget"] != "none" else 0)
        moved = {n: t + 1 if t.is_floating_point() and rows else t for n, t in start.items()}
        if kind is Amnesiac:
            return messages.train_reply(moved, {"batches": rows, "first-round": 1}, 1)
        return messages.train_reply(moved, {"rows": rows}, rows or 5)

    def _statistics(self, start, rows):
        like = {name: start[name] for name in trained_names(start)}
        sums = {f"{group}/{name}": torch.full(tensor.shape, float(rows + place))
                for place, group in enumerate(("forget", "remain"))
                for name, tensor in like.items()}  # fmt: skip
        if not rows:
            sums = {name: tensor * ("remain" in name) for name, tensor in sums.items()}
        counts = {"forget-count": rows, "remain-count": 5, "rows": rows}
        return messages.train_reply(sums, counts, 5 + rows)


def made(method, **more):
    methods = [MAKE[name]() for name in MAKE] if method is None else [method]
    others = [m for m in methods if m.name not in ("federaser", "fedrecover")]
    memory = Memory(needs_of(others) | {Need.LAST, Need.LEDGER})
    more = {"offers": OFFERS, "memory": memory} | more
    return federation("natural", others=others, **more)


def asked_for(method, *, target=Target.CLASS, holders=(), **more):
    entry = METHODS[method]
    kind = {"label": 1} if target is Target.CLASS else {"tokens": (TOKEN,)}
    if target is Target.SAMPLES and not holders:
        holders = (0,)
    promise = "exact" if entry.guarantee == "exact" else "approximate"
    return Request(target, tuple(map(client, holders)), "privacy", guarantee=promise,
                   method=method, **kind, **more)  # fmt: skip


def requested(clients, method, *, before=3, after=1, request=None, others_too=False, **more):
    """Train, ask, and go on; return the federation, the later records and all models."""
    wrapped = made(None if others_too else method, **more)
    _, models = play(wrapped, clients.grid, before)
    clients.told.clear()
    wrapped.request(request or asked_for(method.name))
    records, later = play(wrapped, clients.grid, before + after, played=before, model=models[-1])
    return wrapped, records, [models[-1], *later]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- holders drop first
@pytest.mark.parametrize("target", [Target.CLASS, Target.SAMPLES])
@pytest.mark.parametrize("name", ["retrain", "rapid-retraining", "noisy-gd", "rcad", "random-mask",
                                  "fisher-mask", "ascent", "amnesiac"])  # fmt: skip
def test_before_every_method_all_holders_drop_and_stay(name, target):
    clients = Clients()
    holders = () if target is Target.CLASS else (1, 3)
    request = asked_for(name, target=target, holders=holders)
    wrapped, records, models = requested(clients, MAKE[name](), after=3, request=request)
    done = records[0].unlearning
    named = tuple(map(client, holders)) or ALL
    assert (done.refused, done.method, done.clients) == (None, name, named)
    assert done.targets == (("class 1",) if target is Target.CLASS else ("1 sample",))
    assert records[0].phase is Phase.UNLEARN
    assert not same(models[0], models[1])
    # All holders drop before round 4 is trained, if all are willing; then the method asks.
    kinds = list(dict.fromkeys((kind, config["server-round"], config.get("dry"))
                               for kind, _, config in clients.told))  # fmt: skip
    assert kinds[:3] == [
        ("query.forget", 4, True), ("query.forget", 4, False), ("train", 4, None)]  # fmt: skip
    assert clients.of("query.forget") == (list(holders) or list(range(CLIENTS)))
    assert clients.of("query.forget", dry=True) == clients.of("query.forget")
    for config in clients.config("query.forget"):
        chosen = ("class", 1, "") if target is Target.CLASS else ("samples", -1, TOKEN)
        assert (config["forget"], config["forget-class"], config["forget-tokens"]) == chosen
    # Nobody leaves: all take part in the rounds that follow.
    assert set(wrapped.roster.statuses().values()) <= {"active"}
    assert records[1].participants == ALL
    assert wrapped.forgotten_classes == ({1} if target is Target.CLASS else set())
    assert done.guarantee == METHODS[name].guarantee
    # Every other than an exact one is followed by recovery.
    exact = METHODS[name].guarantee == "exact"
    assert records[1].phase is (Phase.TRAIN if exact else Phase.RECOVER)
    assert wrapped.forgettings == 1
    assert "forgettings" not in clients.config("query.forget")[0]  # nothing is forgotten yet
    assert not wrapped.busy


@pytest.mark.parametrize(
    ("method", "step", "rounds"),
    [
        (rapid(rapid_rate=0.25), Rapid, [1, 2]),
        (noisy(noise=0.25), Noisy, [5]),
        (rcad(strength=0.75), Rcad, [5, 6, 7, 8]),
    ],
)
def test_rounds_of_a_step_have_its_message_type_and_the_federations_settings(method, step, rounds):
    clients = Clients()
    _, records, _ = requested(clients, method, after=2)
    told = clients.config(step.action)
    assert [config["server-round"] for config in told] == [n for n in rounds for _ in ALL]
    assert all(method.step.config().items() <= config.items() for config in told)
    assert all("round" not in config and config["forgettings"] == 1 for config in told)
    assert len(clients.of("train")) == len(ALL) * len(records)  # ordinary rounds are as ever
    assert records[0].unlearning.rounds_asked == 2 + len(rounds)  # whether, to drop, and these


def test_rapid_retraining_costs_the_rounds_that_it_plays():
    wrapped = made(rapid())
    play(wrapped, Clients().grid, 6)  # served at the end of round 7: half of 7, rounded up
    assert wrapped.route(asked_for("rapid-retraining", most_rounds=4)).method == "rapid-retraining"
    with pytest.raises(BudgetError, match="4 rounds again, and 3 are allowed"):
        wrapped.route(asked_for("rapid-retraining", most_rounds=3))


def test_what_is_remembered_of_holders_is_purged():
    clients = Clients()
    wrapped = made(ascending())
    _, models = play(wrapped, clients.grid, 3)
    assert wrapped.memory.last.locals_.keys() == wrapped.memory.ledger.keys() == set(ALL)
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(1, 3)))
    config = messages.LocalTraining().to_record()
    records = []

    def on_round(record, model):
        records.append(record)
        if record.number == 4:
            kept = set(ALL) - {client(1), client(3)}
            assert wrapped.memory.last.locals_.keys() == wrapped.memory.ledger.keys() == kept

    run_rounds(wrapped, clients.grid, models[-1], rounds=4, played=3, train_config=config,
               on_round=on_round)  # fmt: skip
    assert records[0].unlearning.refused is None


@pytest.mark.parametrize("target", [Target.CLASS, Target.SAMPLES])
def test_recovery_is_judged_by_the_same_rows_before_and_after(target):
    # Without the class, accuracy was .5 all along; with it, .9. The model after round 4 is at .3,
    # then .47, which is within 2 points of .5 only once it is .49.
    wrapped = made(ascending(), recovery=Recovery(tolerance=0.02, cap=9))
    clients, seen = Clients(), []

    def measure(number, model):
        seen.append((number, model))
        if target is Target.CLASS and wrapped.forgotten_classes:
            return {"validation_accuracy": {4: 0.3, 5: 0.47}.get(number, 0.49) if number > 3 and not
                    same(model, before) else 0.5}  # fmt: skip
        return {"validation_accuracy": 0.9}

    models = []

    def note(record, model):
        records.append(record)
        models.append(model)

    records = []
    start = run_rounds(wrapped, clients.grid, MODEL, rounds=3, measure=measure, on_round=note)
    before = models[-1]
    wrapped.request(asked_for("ascent", target=target))
    run_rounds(wrapped, clients.grid, start, rounds=4, played=3, measure=measure, on_round=note)
    done = next(record.unlearning for record in records if record.unlearning is not None)
    assert done.recovery_target == pytest.approx((0.5 if target is Target.CLASS else 0.9) - 0.02)
    if target is Target.CLASS:
        assert (done.recovery_rounds, done.recovery_ended_by) == (2, "recovered")  # 5 and 6
        # The model from before is measured once more, after the class was forgotten.
        assert [number for number, model in seen if same(model, before)] == [3, 4]


# ---------------------------------------------------------------- who refuses, and who is away
def test_a_refusal_withdraws_the_request_and_changes_nothing():
    clients = Clients()
    clients.refuse["query.forget"] = {2}
    wrapped, records, models = requested(clients, ascending(), after=3)
    told = records[0].unlearning
    assert "client-0002: error" in told.refused
    assert "its owner does not allow it" in told.refused
    assert "client-0001" not in told.refused
    assert all(record.unlearning is None for record in records[1:])
    assert clients.of("query.forget", dry=True) == list(range(CLIENTS))  # once
    assert clients.of("query.forget") == clients.of("train.ascent") == []  # nobody has dropped it
    assert wrapped.forgetting.pending == []
    assert not wrapped.forgotten_classes
    assert set(wrapped.roster.statuses().values()) <= {"active"}
    # Rounds are what they are without a request.
    quiet = Clients()
    untouched = made(ascending())
    _, expected = play(untouched, quiet.grid, 6)
    assert all(same(a, b) for a, b in zip(models, expected[3:], strict=True))
    # It may be asked for again.
    clients.refuse.clear()
    wrapped.request(asked_for("ascent"))


def test_only_what_was_refused_is_withdrawn():
    # Retraining serves all who wait at once: a leaver, and holders of samples who refuse.
    clients = Clients()
    clients.refuse["query.forget"] = {3}
    method = MAKE["retrain"]()
    wrapped = made(method)
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("retrain", target=Target.SAMPLES, holders=(3,)))
    wrapped.request(asked_for("retrain", target=Target.SAMPLES, holders=(1,), most_rounds=9))
    wrapped.request(Request(Target.CLIENT, (client(4),), "privacy", method="retrain"))
    # Holder 1 has not refused, though it was asked for the same tokens.
    records, _ = play(wrapped, clients.grid, 6, played=3, model=models[-1])
    done = records[0].unlearning
    assert (done.refused, done.clients) == (None, (client(1), client(4)))
    (why,) = [text for text in done.warnings if text.startswith("not forgotten: 1 sample: ")]
    assert "client-0003" in why
    assert "its owner does not allow it" in why
    assert wrapped.forgetting.pending == []


@pytest.mark.parametrize("name", ["ascent", "retrain"])
@pytest.mark.parametrize("target", [Target.CLASS, Target.SAMPLES])
def test_whom_nobody_can_do_without_is_asked_again_later(name, target):
    # Of samples every holder that is named; of a class, anybody.
    clients = Clients()
    holders = (1, 2) if target is Target.SAMPLES else tuple(range(CLIENTS))
    clients.away["query.forget"] = {2} if target is Target.SAMPLES else set(holders)
    wrapped = made(MAKE[name]())
    _, models = play(wrapped, clients.grid, 3)
    clients.told.clear()
    named = holders if target is Target.SAMPLES else ()
    wrapped.request(asked_for(name, target=target, holders=named))
    first, later = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert "client-0002: error" in first[0].unlearning.refused
    assert len(wrapped.forgetting.pending) == 1
    assert clients.of(f"train.{name}") == []
    assert not wrapped.forgotten_classes
    clients.away.clear()
    again, _ = play(wrapped, clients.grid, 6, played=4, model=later[-1])
    assert again[0].unlearning.refused is None
    # Who has dropped its samples is not asked again.
    assert clients.of("query.forget") == list(holders)
    assert clients.of("query.forget", dry=True) == (2 if target is Target.CLASS else 1) * list(
        holders
    )
    assert wrapped.forgotten_classes == ({1} if target is Target.CLASS else set())


def test_whose_statistics_are_not_in_a_mask_is_told():
    clients = Clients()
    clients.away["query.statistics"] = {3}
    _, records, _ = requested(clients, MAKE["fisher-mask"]())
    done = records[0].unlearning
    assert done.refused is None
    (warning,) = [text for text in done.warnings if text.startswith("unheard:")]
    assert "query.statistics is without client-0003" in warning
    # The model to five clients, and sums of two sets, of trained tensors alone, back from four.
    size = byte_size([MODEL])
    trained = byte_size([{name: MODEL[name] for name in trained_names(MODEL)}])
    assert done.bytes_sent == 5 * size + 4 * 2 * trained
    assert "not here" in warning


def without(*numbers):
    return tuple(client(number) for number in range(CLIENTS) if number not in numbers)


@pytest.mark.parametrize("name", ["ascent", "retrain", "fisher-mask", "rcad"])
def test_who_is_away_when_a_class_is_forgotten_takes_part_again_once_it_has_dropped_it(name):
    clients = Clients()
    clients.away["query.forget"] = {2}
    wrapped, records, models = requested(clients, MAKE[name](), after=2)
    done = records[0].unlearning
    assert done.refused is None
    assert [w for w in done.warnings if w.startswith("away: client-0002")]
    assert wrapped.forgotten_classes == {1}
    # The method does without it, and so do all rounds: nobody asks it for anything but this.
    asked = [kind for kind, node, config in clients.told if node == 2]
    assert asked == len(records) * ["query.forget"]
    assert {record.participants for record in records} == {without(2)}
    # Until it answers; then all is as before.
    clients.away.clear()
    clients.told.clear()
    played = records[-1].number
    again, _ = play(wrapped, clients.grid, played + 2, played=played, model=models[-1])
    assert clients.of("query.forget") == [2]
    assert [record.participants for record in again] == [ALL, ALL]


@pytest.mark.parametrize("action", ["query.forget", "query.batches", "train.amnesiac"])
def test_whose_batches_are_in_the_model_must_be_there_to_take_them_back(action):
    clients = Clients()
    clients.away[action] = {2}
    wrapped, records, models = requested(clients, MAKE["amnesiac"]())
    refused = records[0].unlearning.refused
    if action == "query.forget":  # who has not dropped it yet is not even asked for more
        assert refused == "amnesiac needs every holder, and client-0002 is away"
    else:
        assert f"{action} needs an answer of everybody asked: client-0002" in refused
    assert wrapped.forgotten_classes == set()
    assert wrapped.memory.taken_back == ()
    clients.away.clear()
    played = records[-1].number
    again, _ = play(wrapped, clients.grid, played + 2, played=played, model=models[-1])
    assert again[0].unlearning.refused is None
    assert again[0].unlearning.settings["holders"] == CLIENTS


def test_who_is_barred_must_be_there_to_take_its_batches_back():
    # Client 2 is away while class 1 is forgotten otherwise, and so takes no part; then class 2 goes.
    clients = Clients()
    clients.away["query.forget"] = {2}
    wrapped = made(None)
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("ascent"))
    records, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert records[0].unlearning.refused is None
    wrapped.request(dataclasses.replace(asked_for("amnesiac"), label=2))
    played = records[-1].number
    later, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    assert client(2) not in later[0].participants
    (told,) = [r.unlearning.refused for r in later if r.unlearning is not None]
    assert told == "amnesiac needs every holder, and client-0002 is away"


def joining(clients, *late):
    """Hide clients that have not joined yet; they join when this is called again without them."""
    everybody = list(clients.grid.contexts)
    clients.grid.get_node_ids = lambda: [
        node for place, node in enumerate(everybody) if place not in late
    ]


@pytest.mark.parametrize("holders", [(), (0, 1)])
def test_who_joins_after_a_class_was_forgotten_drops_it_before_it_trains(holders):
    clients = Clients()
    joining(clients, 4)
    wrapped = made(ascending())
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("ascent", holders=holders))
    _, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    clients.told.clear()
    joining(clients)
    clients.away["query.forget"] = {4}
    played = wrapped.record.number
    records, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    if holders:  # of a request that names its holders nobody else is asked
        assert clients.of("query.forget") == []
        assert records[0].participants == ALL
        return
    assert clients.told[0][:2] == ("query.forget", 4)
    assert records[0].participants == without(4)
    clients.away.clear()
    clients.told.clear()
    records, _ = play(wrapped, clients.grid, played + 3, played=played + 1, model=models[-1])
    first = [(kind, node) for kind, node, _ in clients.told]
    assert first[0] == ("query.forget", 4)
    assert first.count(("query.forget", 4)) == 1
    assert all(record.participants == ALL for record in records)
    # It is told how often was forgotten so far, not of one time more.
    assert clients.config("query.forget")[0]["forgettings"] == wrapped.forgettings


def test_who_joins_between_a_request_for_a_class_and_its_time_is_asked_with_the_others():
    clients = Clients()
    joining(clients, 4)
    wrapped = made(MAKE["retrain"]())
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("retrain"))
    joining(clients)
    clients.told.clear()
    records, _ = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert records[0].unlearning.clients == ALL
    assert clients.of("query.forget") == list(range(CLIENTS))


# ---------------------------------------------------------------- another method
NEXT = {
    # Who refuses what; the method that is routed to first; the one after it.
    "query.batches": (Target.SAMPLES, OFFERS, "amnesiac", "fisher-mask"),
    "train.amnesiac": (Target.SAMPLES, OFFERS, "amnesiac", "fisher-mask"),
    "query.statistics": (Target.SAMPLES, {Need.CLASSES}, "fisher-mask", "label-flip"),
}


@pytest.mark.parametrize("action", NEXT)
def test_what_its_method_cannot_serve_goes_to_the_next_and_a_named_one_is_withdrawn(action):
    target, offers, method, after = NEXT[action]
    for named in (False, True):
        clients = Clients()
        clients.refuse[action] = {1}
        request = asked_for(method, target=target, holders=(1,))
        request = request if named else dataclasses.replace(request, method=None)
        wrapped = made(None, offers=frozenset(offers))
        _, models = play(wrapped, clients.grid, 3)
        assert wrapped.request(request).method == method
        records, _ = play(wrapped, clients.grid, 7, played=3, model=models[-1])
        first = records[0].unlearning
        assert (first.method, "client-0001" in first.refused) == (method, True)
        assert wrapped.forgetting.pending == []
        later = [r.unlearning for r in records[1:] if r.unlearning is not None]
        assert [(u.method, u.refused) for u in later] == ([] if named else [(after, None)])


@pytest.mark.parametrize("refuses", [True, False])
def test_a_holder_that_refuses_a_named_step_ends_the_request_and_one_that_is_away_does_not(refuses):
    clients = Clients()
    (clients.refuse if refuses else clients.away)["train.ascent"] = {1}
    wrapped, records, _ = requested(clients, MAKE["ascent"](), after=4)
    done = records[0].unlearning
    if refuses:
        assert "its owner does not allow it" in done.refused
        assert wrapped.forgetting.pending == []
        assert [r.unlearning for r in records[1:]] == [None] * 3
        return
    assert done.refused is None
    assert [
        w for w in done.warnings if w.startswith("unheard: train.ascent is without client-0001")
    ]


def test_a_class_whose_only_holder_is_away_waits_for_it():
    clients = Clients(held=(0, 0, 0, 0, 7))
    clients.away["query.forget"] = {4}
    wrapped, records, models = requested(clients, ascending())
    assert (
        "query.forget needs an answer of everybody asked: client-0004"
        in records[0].unlearning.refused
    )
    assert len(wrapped.forgetting.pending) == 1
    clients.away.clear()
    played = records[-1].number
    again, _ = play(wrapped, clients.grid, played + 2, played=played, model=models[-1])
    done = [r.unlearning for r in again if r.unlearning is not None]
    assert [(u.refused, u.settings["holders"]) for u in done] == [(None, 1)]


def test_every_refusal_of_a_round_is_told():
    clients = Clients()
    clients.refuse["query.forget"] = {1, 3}
    wrapped = made(ascending())
    _, models = play(wrapped, clients.grid, 3)
    for holder in (1, 3):
        wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(holder,)))
    records, _ = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    first = records[0].unlearning
    assert "client-0001" in first.refused
    (other,) = [text for text in first.warnings if text.startswith("not forgotten: 1 sample")]
    assert "client-0003" in other
    assert first.rounds_asked == 1  # each was asked once, for its own
    assert wrapped.forgetting.pending == []


def test_a_late_holder_is_held_to_what_it_dropped():
    # Client 2 drops its 3 rows a round later than the others, and then claims 300.
    clients = Clients(held=(4, 4, 3, 4, 4))
    wrapped = made(MAKE["fisher-mask"](), rate_limit=RateLimit(rounds=4))
    _, models = play(wrapped, clients.grid, 3)
    clients.told.clear()

    class Late(dict):
        def get(self, action, default=()):
            return {2} if action == "query.forget" and wrapped.record.number < 5 else default

    clients.away = Late()
    statistics = clients._statistics
    clients._statistics = lambda start, rows: statistics(start, 300 if rows == 3 else rows)
    wrapped.forgetting.last = 3  # the mask's time comes after round 7
    wrapped.request(asked_for("fisher-mask"))
    records, _ = play(wrapped, clients.grid, 7, played=3, model=models[-1])
    (done,) = [r.unlearning for r in records if r.unlearning is not None]
    assert (done.number, done.refused) == (7, None)
    assert [(n, c["server-round"]) for k, n, c in clients.told if k == "query.forget" and n == 2][
        -1
    ] == (2, 5)
    (told,) = [text for text in done.warnings if text.startswith("unheard:")]
    assert "query.statistics is without client-0002: no usable statistics" in told
    assert [w for w in done.warnings if w.startswith("unheard_holder: client-0002 dropped 3 rows")]


def test_what_nobody_holds_is_withdrawn_and_told():
    clients = Clients(held=(0,) * CLIENTS)
    wrapped, records, _ = requested(clients, ascending(), after=3)
    assert "none of 5 clients holds class 1" in records[0].unlearning.refused
    assert clients.of("query.forget", dry=True) == list(range(CLIENTS))
    assert clients.of("query.forget") == []
    assert wrapped.forgetting.pending == []
    assert not wrapped.forgotten_classes


@pytest.mark.parametrize("name", ["ascent", "fisher-mask", "amnesiac"])
def test_one_holder_among_many_is_heard(name):
    # Four clients hold nothing; the fifth has more than a thousand rows.
    clients = Clients(held=(0, 0, 0, 0, 1500))
    _, records, models = requested(clients, MAKE[name]())
    assert records[0].unlearning.refused is None
    assert not same(models[0], models[1])
    if name == "ascent":
        assert records[0].unlearning.settings["holders"] == 1


def test_a_leaver_that_refuses_to_help_is_still_forgotten_later():
    clients = Clients()
    clients.refuse["train.ascend"] = {4}
    wrapped = made(Ball(radius=0.5))
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(Request(Target.CLIENT, (client(4),), "privacy", guarantee="approximate",
                            method="pga", target_cooperates=True))  # fmt: skip
    records, _ = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert "client-0004" in records[0].unlearning.refused
    assert [entry.clients for entry in wrapped.forgetting.pending] == [(client(4),)]
    assert wrapped.roster.statuses()[client(4)] == "quarantined"


def lying(*liars):
    """Clients, by how many rows they hold, that claim a row more than they dropped."""
    clients = Clients()
    honest = clients._statistics

    def statistics(start, rows):
        content = honest(start, rows)
        if rows in liars:
            content[messages.METRICS]["forget-count"] = rows + 1
        return content

    clients._statistics = statistics
    return clients


def test_a_liars_statistics_are_left_out_and_named():
    wrapped, records, _ = requested(lying(3), Mask())
    done = records[0].unlearning
    assert done.refused is None
    assert done.settings["clients"] == CLIENTS - 1
    assert wrapped.forgetting.pending == []
    told = [warning for warning in done.warnings if warning.startswith("unheard")]
    assert told == [
        "unheard: query.statistics is without client-0002: no usable statistics: statistics claim "
        "4 samples, and there are at most 3",
        "unheard_holder: client-0002 dropped 3 rows, and no sums over them came in",
    ]


def test_statistics_of_too_few_refuse_the_request_for_now_and_change_nothing():
    wrapped, records, models = requested(lying(3, 4, 5), Mask())
    refused = records[0].unlearning.refused
    assert refused.startswith("fisher-mask needs usable statistics of 3 of 5 clients, and 2 sent")
    assert all(f"client-{n:04d}: no usable statistics" in refused for n in (2, 3, 4))
    assert len(wrapped.forgetting.pending) == 1
    quiet = Clients()
    _, expected = play(made(Mask()), quiet.grid, 4)
    assert same(models[-1], expected[-1])


def test_requests_for_data_name_known_clients():
    wrapped = made(ascending())
    play(wrapped, Clients().grid, 2)
    with pytest.raises(RefusedRequestError, match="no client is called client-0009"):
        wrapped.request(asked_for("ascent", holders=(9,)))
    assert not wrapped.busy


@pytest.mark.parametrize("name", ["ascent", "fisher-mask", "retrain"])
def test_a_class_that_there_is_none_of_is_refused_before_anybody_is_asked(name):
    clients = Clients()
    for more, words in (
        ({"offers": {Need.BATCH_LOG}}, "class 1 needs a task with classes"),
        ({"classes": 1}, "there is no class 1; classes are numbered from 0 to 0"),
    ):
        wrapped = made(MAKE[name](), **more)
        _, models = play(wrapped, clients.grid, 2)
        with pytest.raises(RefusedRequestError, match=words):
            wrapped.request(asked_for(name))
        play(wrapped, clients.grid, 3, played=2, model=models[-1])
        assert not wrapped.busy
    assert {kind for kind, _, _ in clients.told} == {"train"}


# ---------------------------------------------------------------- shares
def shares(clients, action="train"):
    """Return, round by round, what every client was told: its shares by round."""
    found = {}
    for kind, node, config in clients.told:
        if kind == action:
            told = dict(
                zip(
                    config.get(messages.SHARE_ROUND, ()),
                    config.get(messages.SHARE, ()),
                    strict=True,
                )
            )
            found.setdefault(config["server-round"], {})[node] = told
    return found


def weighed(number, *without):
    """Clients send 10 + k examples: the share of client k among all is (10 + k) / 60."""
    there = [k for k in range(CLIENTS) if k not in without]
    whole = sum(10 + k for k in there)
    return {k: {number: pytest.approx((10 + k) / whole if k in there else 0)}
            for k in range(CLIENTS)}  # fmt: skip


def test_clients_are_told_what_their_update_weighed():
    clients = Clients()
    play(made(ascending()), clients.grid, 3)
    assert shares(clients) == {1: {k: {} for k in range(CLIENTS)}, 2: weighed(1), 3: weighed(2)}


def failing(clients, number, partition):
    """Make a client's update of one round useless."""
    inner = clients._send

    def send(outgoing, *, timeout=None):
        replies = list(inner(outgoing, timeout=timeout))
        for reply in replies:
            content = reply.content if not reply.has_error() else {}
            if messages.ARRAYS in content and clients.told[-1][2]["server-round"] == number:
                node = list(clients.grid.get_node_ids()).index(reply.metadata.src_node_id)
                if node == partition:
                    del content[messages.METRICS]["num-examples"]
        return replies

    clients._send = send


def test_an_update_that_was_not_used_has_no_share():
    clients = Clients()
    failing(clients, 2, 4)
    play(made(ascending()), clients.grid, 4)
    found = shares(clients)
    # It may not have got the message of round 2, and so is told of round 1 once more.
    again = weighed(2, 4) | {4: {1: pytest.approx(14 / 60), 2: 0.0}}
    assert found == {1: found[1], 2: weighed(1), 3: again, 4: weighed(3)}


def test_who_is_away_for_long_is_told_of_every_round_that_asked_it():
    clients = Clients()
    wrapped = made(ascending())
    _, models = play(wrapped, clients.grid, 2)
    for number in (3, 4, 5):
        failing(clients, number, 4)
    play(wrapped, clients.grid, 7, played=2, model=models[-1])
    found = shares(clients)
    missed = {2: pytest.approx(14 / 60), 3: 0.0, 4: 0.0, 5: 0.0}
    assert found[6][4] == missed
    assert found[7] == weighed(6)


def test_a_step_is_told_the_share_of_the_round_before_it():
    clients = Clients()
    failing(clients, 4, 4)
    requested(clients, MAKE["amnesiac"]())
    # Before round 4 the last one is the third, which used everybody's update.
    assert shares(clients, "query.forget") == {4: weighed(3)}
    expected = weighed(4, 4) | {4: {3: pytest.approx(14 / 60), 4: 0.0}}
    assert shares(clients, "train.amnesiac") == {4: expected}


def test_who_sat_out_is_told_its_share_of_the_round_that_it_entered():
    clients = Clients()
    strategy = FedAvg(fraction_train=0.4, min_train_nodes=2, fraction_evaluate=0.0)
    play(made(ascending(), strategy=strategy), clients.grid, 8)
    last, told = {}, shares(clients)
    for number in sorted(told):
        asked = told[number]
        for node, share in asked.items():
            assert share == last.get(node, {})
        weight = sum(10 + node for node in asked)
        last |= {node: {number: pytest.approx((10 + node) / weight)} for node in asked}
    assert len(last) > 0


def test_without_a_batch_log_no_message_is_changed():
    clients = Clients()
    requested(clients, ascending(), offers={Need.CLASSES})
    assert {kind for kind, _, _ in clients.told} == {"train", "query.forget", "train.ascent"}
    assert all(messages.SHARE not in config for _, _, config in clients.told)
