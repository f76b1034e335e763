"""Requests that wait: who drops when, who holds up whom, and what may follow what."""

import dataclasses

import pytest
import torch

from strategies.forgetting import needs_of
from strategies.loop import run_rounds
from strategies.memory import Memory
from strategies.methods.catalogue import MAKE
from strategies.methods.holders import ascending
from strategies.rate_limit import RateLimit
from strategies.records import Phase
from tests.strategies.small import MODEL, client, federation, play
from tests.strategies.test_data_requests import (
    ALL,
    CLIENTS,
    OFFERS,
    TOKEN,
    Clients,
    asked_for,
    joining,
    made,
    requested,
    same,
    without,
)
from unlearning.catalogue import METHODS, Need, Target
from unlearning.errors import ImpossibleRequestError, MissingNeedError
from unlearning.parameters import trained_names
from unlearning.routing import Request


# ---------------------------------------------------------------- at once, and without the others
def leaving(number, method="retrain", **more):
    promise = "exact" if method and METHODS[method].guarantee == "exact" else "approximate"
    return Request(Target.CLIENT, (client(number),), "privacy", guarantee=promise, method=method,
                   **more)  # fmt: skip


def waits(wrapped):
    return [(entry.method, entry.clients) for entry in wrapped.forgetting.pending]


@pytest.mark.parametrize("target", [Target.CLASS, Target.SAMPLES])
def test_holders_drop_at_once_whatever_the_rate_limit_and_only_the_method_waits(target):
    clients = Clients()
    wrapped = made(ascending(), rate_limit=RateLimit(rounds=4))
    _, models = play(wrapped, clients.grid, 2)
    wrapped.request(asked_for("ascent", target=Target.SAMPLES))
    _, models = play(wrapped, clients.grid, 3, played=2, model=models[-1])
    clients.told.clear()
    holders = (1, 2)
    wrapped.request(asked_for("ascent", target=target, holders=holders))
    records, _ = play(wrapped, clients.grid, 7, played=3, model=models[-1])
    dropped = [c["server-round"] for c in clients.config("query.forget")]
    assert dropped == [4, 4]  # once, before round 4
    assert clients.told[3][0] == "query.forget"
    assert clients.told[4][:1] == ("train",)
    (served,) = [record for record in records if record.unlearning is not None]
    assert served.number == 7  # the last was in round 3, and four lie between two
    assert served.unlearning.settings["holders"] == 2


def test_samples_of_who_is_away_hold_up_nobody_else():
    clients = Clients()
    clients.away["query.forget"] = {4}
    wrapped = made(MAKE["retrain"]())
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("retrain", target=Target.SAMPLES, holders=(4,)))
    wrapped.request(leaving(0))
    records, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    done = records[0].unlearning
    assert (done.refused, done.clients) == (None, (client(0),))
    assert any("not forgotten: 1 sample" in w and "client-0004" in w for w in done.warnings)
    assert waits(wrapped) == [("retrain", (client(4),))]
    assert records[0].participants == without(0, 4)  # nor does it train on them meanwhile
    assert not wrapped.busy
    clients.away.clear()
    records, _ = play(wrapped, clients.grid, 5, played=4, model=models[-1])
    assert (records[0].unlearning.refused, waits(wrapped)) == (None, [])
    assert records[0].participants == without(0)


def test_samples_of_who_leaves_go_with_it():
    for name, gone in (("retrain", True), ("retrain", False), ("ascent", True)):
        clients = Clients()
        wrapped = made(None)
        _, models = play(wrapped, clients.grid, 3)
        clients.told.clear()
        wrapped.request(asked_for(name, target=Target.SAMPLES, holders=(4,)))
        wrapped.request(leaving(4))
        if gone:
            joining(clients, 4)
        records, _ = play(wrapped, clients.grid, 6, played=3, model=models[-1])
        assert waits(wrapped) == []
        assert clients.of("query.forget", dry=True) == clients.of("query.forget") == []
        done = [r.unlearning for r in records if r.unlearning and r.unlearning.refused is None]
        assert [(d.method, d.clients) for d in done] == [("retrain", (client(4),))]
        # Replaying serves both in one go; any other method has nothing left to do.
        assert ("1 sample" in done[0].targets) == (name == "retrain")
        assert not any("not forgotten" in text for text in done[0].warnings)


def test_holders_that_leave_after_they_dropped_are_not_waited_for():
    clients = Clients()
    wrapped = made(None, rate_limit=RateLimit(rounds=6))
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(leaving(0, "not"))
    _, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(4,)))
    records, played = [], wrapped.record.number

    def leave(record, model):
        records.append(record)
        if record.number == played + 1:
            assert wrapped.forgetting.pending[0].ready
            wrapped.request(leaving(4, "not"))

    run_rounds(wrapped, clients.grid, models[-1], rounds=9, played=played, on_round=leave)
    done = [r.unlearning for r in records if r.unlearning is not None]
    assert [(d.method, d.targets, d.refused) for d in done] == [("not", (client(4),), None)]
    assert any("has left" in text for text in done[0].warnings)
    assert waits(wrapped) == []


def test_a_refusal_delays_only_whom_it_was_about():
    clients = Clients()
    clients.away["train.ascent"] = set(range(CLIENTS))
    wrapped = made(ascending(), rate_limit=RateLimit(rounds=5))
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(1,)))
    records, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert "train.ascent needs an answer of everybody asked" in records[0].unlearning.refused
    clients.away.clear()
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(2,)))
    records, models = play(wrapped, clients.grid, 5, played=4, model=models[-1])
    served = [(r.number, r.unlearning.clients) for r in records if r.unlearning is not None]
    assert served == [(5, (client(2),)), (10, (client(1),))]


def test_who_allows_fewer_rounds_than_all_need_together_is_served_alone():
    clients = Clients()
    method = MAKE["rollback"]()
    wrapped = made(method)
    joining(clients, 4)
    _, models = play(wrapped, clients.grid, 4)
    joining(clients)
    _, models = play(wrapped, clients.grid, 5, played=4, model=models[-1])
    # Client 4 joined in round 5: without it two rounds are played again, without the class six.
    wrapped.request(leaving(4, "rollback", most_rounds=2))
    wrapped.request(asked_for("rollback"))
    records, _ = play(wrapped, clients.grid, 7, played=5, model=models[-1])
    done = [r.unlearning for r in records]
    assert [d.refused for d in done] == [None, None]
    assert [d.targets for d in done] == [(client(4),), ("class 1",)]
    assert [d.settings["rounds"] for d in done] == [2, 7]


def test_who_is_too_late_for_its_budget_is_withdrawn_and_the_others_served():
    clients = Clients()
    wrapped = made(MAKE["retrain"]())
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("retrain", most_rounds=4))
    wrapped.request(leaving(0))
    entry = wrapped.forgetting.pending[0]
    wrapped.forgetting.pending[0] = dataclasses.replace(entry, most_rounds=3)
    records, _ = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    done = records[0].unlearning
    assert (done.refused, done.targets, waits(wrapped)) == (None, (client(0),), [])
    assert any("class 1: retrain would play 4 rounds again" in text for text in done.warnings)


def test_requests_for_data_of_one_method_are_served_in_one_go_and_recovered_from_once():
    clients = Clients()
    wrapped = made(ascending(), rate_limit=RateLimit(rounds=5))
    _, models = play(wrapped, clients.grid, 3)
    before = models[-1]
    for number in (1, 2, 3):
        wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(number,)))
    clients.away["train.ascent"] = {2}
    records, models = play(wrapped, clients.grid, 6, played=3, model=before)
    done = [r.unlearning for r in records if r.unlearning is not None]
    assert done[0].clients == (client(1), client(3))
    assert clients.of("train.ascent")[:3] == [1, 2, 3]
    assert [text for text in done[0].warnings if "not forgotten: 1 sample" in text]
    # Each holder moves every weight by one, from the model that the one before it made.
    quiet = Clients()
    _, expected = play(made(ascending()), quiet.grid, 4)
    for name in trained_names(MODEL):
        assert torch.allclose(models[0][name], expected[-1][name] + 2)
    assert [r.phase for r in records[:4]] == [
        Phase.UNLEARN,
        Phase.RECOVER,
        Phase.RECOVER,
        Phase.TRAIN,
    ]


@pytest.mark.parametrize("target", [Target.CLASS, Target.SAMPLES])
def test_what_was_forgotten_exactly_is_not_forgotten_again(target):
    clients = Clients()
    wrapped, records, models = requested(clients, MAKE["retrain"](), others_too=True,
                                         request=asked_for("ascent", target=target))  # fmt: skip
    played = wrapped.record.number
    assert records[0].unlearning.method == "ascent"
    # Approximately is not exactly.
    wrapped.request(asked_for("retrain", target=target))
    records, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    assert (records[0].unlearning.method, records[0].unlearning.refused) == ("retrain", None)
    # Now it is.
    played = wrapped.record.number
    clients.told.clear()
    wrapped.request(asked_for("retrain", target=target))
    records, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    assert "forgotten exactly before, and not trained on since" in records[0].unlearning.refused
    assert wrapped.forgetting.pending == []
    assert {kind for kind, _, _ in clients.told} == {"train"}
    assert len(clients.of("train")) == CLIENTS  # one round
    # By others, or with more, it is a request of its own.
    played = wrapped.record.number
    more = asked_for("retrain", target=target, holders=(1,))
    if target is Target.SAMPLES:
        more = dataclasses.replace(asked_for("retrain", target=target), tokens=(TOKEN, "1" * 32))
    wrapped.request(more)
    records, _ = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    again = records[0].unlearning
    if target is Target.SAMPLES:
        assert again.refused is None
    else:  # everybody has forgotten the class, client 1 too
        assert "forgotten exactly before" in again.refused


@pytest.mark.parametrize("name", ["ascent", "retrain"])
def test_a_class_that_some_were_to_forget_is_not_forgotten_by_the_others(name):
    clients = Clients()
    request = asked_for(name, holders=(1, 3))
    wrapped, records, _ = requested(clients, MAKE[name](), request=request)
    assert records[0].unlearning.targets == ("class 1 of client-0001, client-0003",)
    assert clients.of("query.forget") == [1, 3]
    assert wrapped.forgotten_classes == set()  # measures go on as they were
    wrapped.request(asked_for(name))
    play(wrapped, clients.grid, wrapped.record.number + 1, played=wrapped.record.number)
    assert wrapped.forgotten_classes == {1}


# ---------------------------------------------------------------- clients that lose their lists
def test_clients_are_told_in_every_training_how_long_their_lists_were():
    clients = Clients()
    requested(clients, MAKE["retrain"](), after=2)
    told = [(c["server-round"], c.get("entries")) for c in clients.config("train")]
    # Rounds 1 to 4 are played again between rounds 4 and 5; before anybody dropped nothing is told.
    assert told == [(number, 1) for number in (4, 1, 2, 3, 4, 5) for _ in ALL]
    quiet = Clients()
    play(made(ascending()), quiet.grid, 2)
    assert all("entries" not in config for config in quiet.config("train"))


def test_who_lost_its_list_is_asked_again_and_takes_no_part_until_it_is_as_long_as_it_was():
    clients = Clients()
    wrapped, records, models = requested(clients, ascending(), after=2)
    played = wrapped.record.number
    clients.lists[2].clear()
    clients.told.clear()
    records, models = play(wrapped, clients.grid, played + 2, played=played, model=models[-1])
    assert "shorter than it was" in records[0].rejected[client(2)]
    assert [record.participants for record in records] == [without(2), ALL]
    assert clients.of("query.forget") == [2]
    # Samples cannot be dropped again by who lost its tokens: it stays out, and is asked each round.
    played += 2
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(2,)))
    _, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    played = wrapped.record.number

    class Keeps(set):
        def add(self, entry):
            if entry[0] >= 0:  # tokens mean nothing to it
                super().add(entry)

    clients.lists[2] = Keeps()
    records, _ = play(wrapped, clients.grid, played + 3, played=played, model=models[-1])
    assert [record.participants for record in records] == 3 * [without(2)]
    assert "had 2" in wrapped.data.barred[client(2)]


def test_who_comes_back_by_another_node_is_asked_again_for_all_that_it_dropped():
    clients = Clients()
    wrapped, _, models = requested(clients, ascending(), after=3)
    played = wrapped.record.number
    clients.told.clear()
    _, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    assert clients.of("query.forget") == []
    nodes = wrapped.data.reminders._nodes
    nodes[client(3)] += 1  # as if that had been its node when it dropped the class
    records, models = play(wrapped, clients.grid, played + 3, played=played + 1, model=models[-1])
    assert clients.of("query.forget") == [3]
    assert [record.participants for record in records] == 2 * [ALL]


# ---------------------------------------------------------------- an exact request that follows
@pytest.mark.parametrize("served", [True, False])
def test_who_was_or_is_to_be_forgotten_approximately_can_be_forgotten_exactly(served):
    clients = Clients()
    wrapped = made(None, rate_limit=RateLimit(rounds=1 if served else 3))
    _, models = play(wrapped, clients.grid, 3)
    gone = dataclasses.replace(leaving(0, "not"), cause="malicious")
    wrapped.request(gone)
    if served:
        _, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    with pytest.raises(ImpossibleRequestError, match="and only exact forgetting can follow"):
        wrapped.request(gone)
    with pytest.raises(ImpossibleRequestError, match="nothing of it alone can be forgotten"):
        wrapped.request(asked_for("retrain", target=Target.SAMPLES, holders=(0,)))
    follow = dataclasses.replace(leaving(0, None), guarantee="exact", cause="malicious")
    assert wrapped.request(follow).method == "rollback"
    with pytest.raises(ImpossibleRequestError, match="it waits to be forgotten exactly"):
        wrapped.request(follow)
    played = wrapped.record.number
    records, models = play(wrapped, clients.grid, played + 1, played=played, model=models[-1])
    done = [r.unlearning for r in records if r.unlearning is not None]
    assert [d.method for d in done] == [*(["not"] if not served else []), "rollback"]
    assert [(d.clients, d.refused) for d in done] == [((client(0),), None)] * len(done)
    assert wrapped.roster.statuses()[client(0)] == "banned"
    with pytest.raises(ImpossibleRequestError, match="it was forgotten exactly"):
        wrapped.request(follow)
    # It is as if the client had never been there.
    quiet = Clients()
    quiet.grid.get_node_ids = lambda: list(quiet.grid.contexts)[1:]
    _, expected = play(made(None), quiet.grid, wrapped.record.number)
    assert same(models[-1], expected[-1])


def test_who_was_withdrawn_can_be_asked_for_again():
    clients = Clients()
    wrapped = made(MAKE["retrain"]())
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(leaving(0, most_rounds=4))
    entry = wrapped.forgetting.pending[0]
    wrapped.forgetting.pending[0] = dataclasses.replace(entry, most_rounds=3)
    records, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    assert "4 rounds again by now, and 3 are allowed" in records[0].unlearning.refused
    assert (waits(wrapped), wrapped.busy) == ([], False)
    wrapped.request(leaving(0))
    records, _ = play(wrapped, clients.grid, 5, played=4, model=models[-1])
    assert records[0].unlearning.refused is None


# ---------------------------------------------------------------- what is left of the record
HISTORICAL = ("negative-gradients", "kd", "fast", "drift", "federaser", "fedrecover")


def remembering(**more):
    others = [MAKE[name]() for name in (*HISTORICAL, "ascent", "rollback")]
    memory = Memory(needs_of(others) | {Need.LAST})
    return federation("natural", others=others, memory=memory, offers=OFFERS, **more)


def which_would_serve(wrapped, number):
    """Return the methods that rest on the record and would forget a client, and why others not."""
    would, refused = set(), {}
    for name in HISTORICAL:
        try:
            wrapped.route(leaving(number, name))
        except MissingNeedError as error:
            refused[name] = str(error)
        else:
            would.add(name)
    return would, refused


def test_methods_that_rest_on_the_record_refuse_where_it_is_not_whole():
    clients = Clients()
    wrapped = remembering()
    _, models = play(wrapped, clients.grid, 3)
    assert which_would_serve(wrapped, 3) == (set(HISTORICAL), {})
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(3,)))
    records, models = play(wrapped, clients.grid, 8, played=3, model=models[-1])
    assert [r.number for r in records if r.unlearning] == [4]
    # What client 3 sent since is recorded, and does not make up for what was deleted.
    would, refused = which_would_serve(wrapped, 3)
    assert would == set()
    assert all(
        "client-0003, and what they sent until round 4 was del" in why for why in refused.values()
    )
    # Without another client all rounds are replayed, the third client's among them.
    would, refused = which_would_serve(wrapped, 1)
    assert would == {"negative-gradients", "kd", "fast", "drift"}
    assert refused.keys() == {"federaser", "fedrecover"}
    # Rounds that are played again are recorded anew.
    wrapped.request(leaving(0, "rollback"))
    _, models = play(wrapped, clients.grid, 9, played=wrapped.record.number, model=models[-1])
    assert which_would_serve(wrapped, 3) == (set(HISTORICAL), {})


def test_after_a_rollback_the_rounds_before_it_are_still_not_whole():
    clients = Clients()
    wrapped = remembering()
    joining(clients, 4)
    _, models = play(wrapped, clients.grid, 3)
    joining(clients)
    _, models = play(wrapped, clients.grid, 4, played=3, model=models[-1])
    wrapped.memory.forget({client(3), client(4)})
    assert wrapped.memory.purged == {client(3): 4, client(4): 4}
    wrapped.memory.rewind(3)
    assert wrapped.memory.purged == {client(3): 3}  # client 4 joined after round 3
    wrapped.memory.rewind(0)
    assert wrapped.memory.purged == {}


def test_a_request_that_waited_is_refused_once_the_record_is_not_whole():
    clients = Clients()
    wrapped = remembering()
    _, models = play(wrapped, clients.grid, 3)
    wrapped.request(asked_for("ascent", target=Target.SAMPLES, holders=(3,)))
    wrapped.request(leaving(1, "federaser"))
    records, _ = play(wrapped, clients.grid, 8, played=3, model=models[-1])
    done = [r.unlearning for r in records if r.unlearning is not None]
    assert [d.method for d in done] == ["ascent", "federaser"]
    assert "federaser needs the whole record of client-0003" in done[1].refused


def test_what_a_copy_forgets_is_whole_in_the_original():
    clients = Clients()
    wrapped = remembering()
    _, models = play(wrapped, clients.grid, 3)
    copy = wrapped.fork()
    copy.request(asked_for("ascent", target=Target.SAMPLES, holders=(3,)))
    play(copy, clients.grid, 4, played=3, model=models[-1])
    assert which_would_serve(copy, 3)[0] == set()
    assert which_would_serve(wrapped, 3) == (set(HISTORICAL), {})


def test_a_history_of_nobody_is_none():
    clients = Clients()
    wrapped = remembering()
    play(wrapped, clients.grid, 2)
    assert {Need.HISTORY, Need.LEDGER} <= wrapped.memory.available()
    wrapped.memory.forget(ALL)
    assert not {Need.HISTORY, Need.SAMPLED_HISTORY, Need.LEDGER} & wrapped.memory.available()
    assert wrapped.memory.history is None


def test_samples_go_with_a_holder_that_is_forgotten_exactly():
    clients = Clients()
    wrapped = made(None)
    _, models = play(wrapped, clients.grid, 3)
    clients.told.clear()
    request = asked_for("ascent", target=Target.SAMPLES, holders=(1,))
    wrapped.request(dataclasses.replace(request, method=None))
    wrapped.request(Request(Target.CLIENT, (client(1),), "privacy", method="rollback"))
    records, _ = play(wrapped, clients.grid, 7, played=3, model=models[-1])
    done = [r.unlearning for r in records if r.unlearning is not None and not r.unlearning.refused]
    assert [(u.method, u.clients) for u in done] == [("rollback", (client(1),))]
    assert wrapped.forgetting.pending == []
    assert {kind for kind, _, _ in clients.told} == {"train"}  # nobody was asked for anything else


def test_the_same_request_does_not_wait_twice():
    clients = Clients()
    wrapped = made(ascending())
    _, models = play(wrapped, clients.grid, 3)
    for _ in range(2):
        wrapped.request(asked_for("ascent"))
    assert len(wrapped.forgetting.pending) == 1
    records, _ = play(wrapped, clients.grid, 5, played=3, model=models[-1])
    done = [r.unlearning for r in records if r.unlearning is not None]
    assert [u.targets for u in done] == [("class 1",)]
    assert len(clients.of("train.ascent")) == CLIENTS
    # Once it was served it may be asked for again.
    wrapped.request(asked_for("ascent"))
    assert len(wrapped.forgetting.pending) == 1
