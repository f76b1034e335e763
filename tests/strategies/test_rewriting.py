"""Rounds that are played again take the places of those they undo in what is remembered."""

import pytest
import torch

from client.task.evaluation import state_of
from client.task.protocol import load_task
from server.federation import build_federation, initial_model
from simulation.commands import grid_of
from simulation.scenario import load_scenario
from strategies import averaging
from strategies.forgetting import needs_of
from strategies.loop import run_rounds
from strategies.memory import Memory
from strategies.methods.catalogue import MAKE
from strategies.methods.replay import FedEraser
from strategies.methods.retraining import ReplayError
from strategies.rewriting import Rewriting
from tests.strategies.small import (
    GONE,
    MODEL,
    approximately,
    client,
    everything,
    federation,
    late,
    learning,
    play,
    without_gone,
)
from unlearning.catalogue import Need, Target
from unlearning.parameters import trained_names
from unlearning.plan import Answer
from unlearning.routing import Request


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def remembered(memory):
    """Return everything that a memory holds, as plain values."""
    history = memory.history
    return {
        "last": (
            memory.last.number,
            dict(memory.last.previous),
            {c: dict(m) for c, m in memory.last.locals_.items()},
            memory.last.weights,
        ),
        "ledger": {c: dict(row) for c, row in memory.ledger.items()},
        "history": {
            n: (
                dict(history.start(n)),
                {c: dict(m) for c, m in history.models(n).items()},
                history.weights(n),
                history.total(n),
            )
            for n in history.rounds
        },
        "checkpoints": {n: dict(m) for n, m in memory.checkpoints.items()},
        "first": memory.first_rounds,
        "last rounds": memory.last_rounds,
        "shares": memory.shares,
    }


def alike(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[k], other[k]) for k in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(alike, one, other))
    return one == other


@pytest.mark.parametrize("on_disk", [False, True])
def test_after_exact_forgetting_the_memory_is_that_of_a_federation_without_them(
    on_disk, scripted_grid, tmp_path
):
    joins = {5: 3, 6: 2}

    def reply(partition, number, model):
        return late(joins)(partition, number, model)

    def never(partition, number, model):
        return late(joins | {3: 99, 4: 99})(partition, number, model)

    folder = tmp_path / "memory" if on_disk else None
    wrapped = federation(
        "retrain",
        others=everything(),
        memory=Memory(needs_of(everything()), folder=folder),
        quorum=0.4,
    )
    grid = scripted_grid(reply, 7)
    _, models = play(wrapped, grid, 4)
    wrapped.forget(GONE, "privacy")
    play(wrapped, grid, 6, played=4, model=models[-1])
    expected = federation(
        "retrain", others=everything(), memory=Memory(needs_of(everything())), quorum=0.4
    )
    play(expected, scripted_grid(never, 7), 6)
    found, wanted = remembered(wrapped.memory), remembered(expected.memory)
    assert {key for key in wanted if not alike(found[key], wanted[key])} == set()
    assert wrapped.memory.available() == expected.memory.available()


def test_a_client_whose_first_round_was_one_played_again_is_rolled_back_to_before_it(
    scripted_grid,
):
    # Client 6 answers in no live round before 6, but in those played again in round 5.
    live = []

    def reply(partition, number, model):
        if partition == 6 and number < 6 and not live:
            raise RuntimeError("away")
        return learning()(partition, number, model)

    grid = scripted_grid(reply, 7)
    wrapped = federation("rollback")
    _, models = play(wrapped, grid, 4)
    wrapped.request(Request(Target.CLIENT, (client(3),), "privacy", method="rollback"))
    live.append(True)
    _, models = play(wrapped, grid, 7, played=4, model=models[-1])
    assert wrapped.memory.first_rounds[client(6)] == 1
    wrapped.request(Request(Target.CLIENT, (client(6),), "privacy", method="rollback"))
    records, models = play(wrapped, grid, 8, played=7, model=models[-1])
    assert records[0].unlearning.settings == {"rounds": 8, "from_round": 0}

    def never(partition, number, model):
        if partition in (3, 6):
            raise RuntimeError("not here")
        return learning()(partition, number, model)

    _, expected = play(federation("natural"), scripted_grid(never, 7), 8)
    assert same(models[-1], expected[-1])


def test_whoever_trains_in_a_plan_alone_has_a_part_in_the_model_too(scripted_grid):
    # VeriFi's rounds continue from today's model: client 6 enters it in round 3, not in round 5.
    live = []

    def reply(partition, number, model):
        if partition == 6 and number < 5 and not live:
            raise RuntimeError("away")
        if partition == 6 and live and number == 3 and len(live) == 1:
            live.append("live")
            raise RuntimeError("away")
        return learning()(partition, number, model)

    grid = scripted_grid(reply, 7)
    wrapped = federation("verifi", others=everything(), memory=Memory(needs_of(everything())))
    _, models = play(wrapped, grid, 2)
    wrapped.forget([client(3)], "privacy")
    live.append("plan")
    play(wrapped, grid, 3, played=2, model=models[-1])
    assert wrapped.memory.first_rounds[client(6)] == 3
    assert wrapped.memory.checkpoint([client(6)])[0] == 2


@pytest.mark.parametrize("every", [False, True])
def test_checkpoints_are_made_again_from_the_rounds_played_again(every, scripted_grid):
    joins = {5: 3, 6: 4}

    def without(*gone):
        return scripted_grid(late(joins | dict.fromkeys(gone, 99)), 7)

    def remembering():
        needs = needs_of(everything()) if every else needs_of([MAKE["rollback"]()])
        return federation("rollback", memory=Memory(needs))

    wrapped, grid = remembering(), scripted_grid(late(joins), 7)
    assert Rewriting(wrapped.memory, 9).wants(1) is every
    _, models = play(wrapped, grid, 5)
    wrapped.request(Request(Target.CLIENT, (client(3),), "privacy", method="rollback"))
    _, models = play(wrapped, grid, 6, played=5, model=models[-1])
    expected = remembering()
    _, clean = play(expected, without(3), 6)
    assert same(models[-1], clean[-1])
    assert sorted(wrapped.memory.checkpoints) == [2, 3]
    assert all(same(model, clean[n]) for n, model in wrapped.memory.checkpoints.items())
    assert wrapped.memory.first_rounds == expected.memory.first_rounds
    # They serve the next request, which goes back no further than it must.
    wrapped.request(Request(Target.CLIENT, (client(6),), "privacy", method="rollback"))
    records, models = play(wrapped, grid, 7, played=6, model=models[-1])
    assert records[0].unlearning.settings == {"rounds": 4, "from_round": 3}
    _, clean = play(remembering(), without(3, 6), 7)
    assert same(models[-1], clean[-1])
    assert list(wrapped.memory.checkpoints) == [2, 3]  # both from before client 6
    wrapped.request(Request(Target.CLIENT, (client(5),), "privacy", method="rollback"))
    records, models = play(wrapped, grid, 8, played=7, model=models[-1])
    assert records[0].unlearning.settings == {"rounds": 6, "from_round": 2}
    _, clean = play(remembering(), without(3, 5, 6), 8)
    assert same(models[-1], clean[-1])
    assert list(wrapped.memory.checkpoints) == [2]


@pytest.mark.parametrize("name", ["federaser", "fedrecover"])
def test_a_replayed_model_is_the_sum_of_what_is_remembered_of_it(name, scripted_grid):
    grid = scripted_grid(learning(), 7)
    method = FedEraser(interval=1) if name == "federaser" else name
    wrapped = federation(method, others=everything(), memory=Memory(needs_of(everything())))
    _, models = play(wrapped, grid, 5)
    wrapped.forget(GONE, "privacy")
    records, models = play(wrapped, grid, 6, played=5, model=models[-1])
    assert records[0].unlearning.method == name
    history = wrapped.memory.history
    # w^6 = w^0 + the sum over rounds of the weighted mean of the updates, which is what methods
    # that subtract updates rely on; likewise the rows of the ledger sum to zero.
    for tensor in trained_names(MODEL):
        total = MODEL[tensor].double()
        for number in history.rounds:
            if number > 6:
                continue
            weights = history.weights(number)
            assert not set(GONE) & weights.keys()
            for one, weight in weights.items():
                update = history.models(number)[one][tensor] - history.start(number)[tensor]
                total = total + weight / sum(weights.values()) * update
        torch.testing.assert_close(total.float(), models[0][tensor], rtol=1e-4, atol=1e-5)
        rows = sum(row[tensor] for row in wrapped.memory.ledger.values())
        assert float(rows.abs().max()) < 1e-5
    # And so the methods that rest on it serve the next request.
    assert wrapped.request(approximately("negative-gradients", 6)).method == "negative-gradients"
    assert wrapped.forgetting.available() >= {Need.LEDGER, Need.HISTORY, Need.LAST}


def test_rolled_back_to_a_checkpoint_the_ledger_is_given_up_and_the_history_goes_on(
    scripted_grid, caplog
):
    grid = scripted_grid(late({3: 3, 4: 3}), 7)
    wrapped = federation("rollback", others=everything(), memory=Memory(needs_of(everything())))
    _, models = play(wrapped, grid, 4)
    wrapped.forget(GONE, "privacy")
    _, models = play(wrapped, grid, 6, played=4, model=models[-1])
    assert "the ledger is given up: rounds after 2 were undone" in caplog.text
    assert Need.LEDGER not in wrapped.memory.available()
    expected = federation("rollback", others=everything(), memory=Memory(needs_of(everything())))
    play(expected, scripted_grid(without_gone, 7), 6)
    found, wanted = remembered(wrapped.memory), remembered(expected.memory)
    differ = {key for key in wanted if not alike(found[key], wanted[key])}
    assert differ == {"ledger", "checkpoints"}
    assert list(found["checkpoints"]) == [2]  # from before they joined: still good
    # Training again from round 0 makes it whole.
    wrapped.request(Request(Target.CLIENT, (client(6),), "privacy", method="retrain"))
    play(wrapped, grid, 7, played=6, model=models[-1])
    assert Need.LEDGER in wrapped.memory.available()


def test_a_replay_that_fails_leaves_the_memory_as_it_was(scripted_grid):
    live = []

    def deaf(partition, number, model):
        if live and number <= 3:
            raise RuntimeError("busy")
        return learning()(partition, number, model)

    grid = scripted_grid(deaf, 7)
    wrapped = federation("retrain", others=everything(), memory=Memory(needs_of(everything())))
    _, models = play(wrapped, grid, 3)
    before = remembered(wrapped.memory)["history"]
    live.append(True)
    wrapped.forget(GONE, "privacy")
    records, _ = play(wrapped, grid, 3, played=3, model=models[-1])
    assert "rounds made no model" in records[0].unlearning.refused
    after = remembered(wrapped.memory)["history"]
    assert alike({n: after[n] for n in before}, before)
    assert issubclass(ReplayError, Exception)


@pytest.mark.parametrize(
    ("needs", "wanted"),
    [
        ([], []),
        ([Need.INITIAL, Need.CHECKPOINTS], []),
        ([Need.LAST], [4]),
        ([Need.SAMPLED_HISTORY], [1, 4]),
        ([Need.SAMPLED_HISTORY, Need.LAST], [1, 4]),
        ([Need.LEDGER], [1, 2, 3, 4]),
        ([Need.SAMPLED_HISTORY, Need.HISTORY], [1, 2, 3, 4]),
    ],
)
def test_no_more_is_written_aside_than_is_needed(needs, wanted):
    memory = Memory(needs, interval=3)
    memory.start(MODEL)
    rewriting = Rewriting(memory, 4)
    assert [number for number in (1, 2, 3, 4) if rewriting.wants(number)] == wanted
    for number in (1, 2, 3, 4):
        sent = {"w": torch.full((2,), float(number))}
        rewriting.note(number, MODEL, [Answer("a", sent, num_examples=1)])
    # Memory grows with what is needed, not with the rounds: of the last round and the ledger each
    # one, and models that rounds started from only as checkpoints, of which round 1 needs none.
    recorded = rewriting.aside.history or rewriting.aside._archive
    every = [n for n in wanted if {Need.HISTORY, Need.SAMPLED_HISTORY} & set(needs)]
    assert (list(recorded.rounds) if recorded is not None else []) == every
    assert rewriting.aside.checkpoints == {}
    rewriting.apply(0)
    assert memory.first_rounds == {"a": 1}
    assert memory.last_rounds == {"a": 4}
    if Need.LAST in needs:
        assert memory.last.number == 4
        assert memory.last.locals_["a"]["w"].tolist() == [4.0, 4.0]


def test_for_logs_every_round_is_wanted_and_no_more_remembered():
    memory = Memory([])
    memory.start(MODEL)
    rewriting = Rewriting(memory, 2, logged=True)
    for number in (1, 2):
        assert rewriting.wants(number)
        sent = [
            Answer(who, {"w": torch.ones(2)}, num_examples=n) for who, n in (("a", 1), ("b", 3))
        ]
        rewriting.note(number, MODEL, sent)
    assert rewriting.shares == {1: {"a": 0.25, "b": 0.75}, 2: {"a": 0.25, "b": 0.75}}
    assert (rewriting.aside.last, rewriting.aside.history) == (None, None)
    assert rewriting.aside.last_rounds == {"a": 2, "b": 2}


@pytest.mark.parametrize("method", ["retrain", "fedup", "negative-gradients"])
def test_means_are_streamed_unless_somebody_needs_every_update(method, monkeypatch):
    averaged = []
    average = averaging.average

    def spy(replies, previous, screen):
        averaged.append("mean")
        return average(replies, previous, screen)

    monkeypatch.setattr(averaging, "average", spy)
    scenario = load_scenario("demo", {"rounds": 2, "local-epochs": 1, "detector": "none"})
    settings = scenario.settings.model_copy(
        update={"method": method, "ready_methods": "retrain", "rate_limit": 1}
    )
    scenario = scenario.model_copy(update={"settings": settings})
    task = load_task(settings.task_options())
    model = initial_model(task, settings.seed)
    wrapped = build_federation(settings, model)
    grid = grid_of(scenario)
    run_rounds(wrapped, grid, state_of(model), rounds=3, train_config=settings.to_record())
    averaged.clear()
    request = Request(Target.CLIENT, wrapped.directory.clients()[:1], "privacy", method="retrain")
    wrapped.request(request)
    run_rounds(
        wrapped, grid, state_of(model), rounds=4, played=3, train_config=settings.to_record()
    )
    # Round 4, and rounds 1 to 4 again: what FedUP needs is the last of them alone.
    assert len(averaged) == {"retrain": 5, "fedup": 3, "negative-gradients": 0}[method]
