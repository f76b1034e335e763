"""Every method of the catalogue through the wrapper, and where nothing of a client must be left."""

import copy
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAdam

from strategies import messages
from strategies.forgetting import needs_of
from strategies.memory import Memory
from strategies.methods.catalogue import MAKE
from strategies.methods.drift import Drift
from strategies.methods.fedup import BENIGN_RATE, FedUP
from strategies.methods.replay import FedEraser
from strategies.records import Phase
from tests.strategies.small import (
    GONE,
    MODEL,
    client,
    federation,
    forgotten_by,
    late,
    learning,
    play,
)
from unlearning import drift
from unlearning.catalogue import METHODS, SERVER, Need
from unlearning.errors import (
    MissingNeedError,
)
from unlearning.fedup import adaptive_rate
from unlearning.negative_gradients import delta
from unlearning.parameters import weighted_mean

ALL = [*SERVER]
ASKS = {
    "retrain": 5,
    "rollback": 5,
    "verifi": 2,
    "federaser": 2,  # rounds 1, 3 and 5, of which the first needs nobody
    "fedrecover": 5,  # T_w = max(s + 1, 5 // 10) = 3 first rounds and T_f = 2 last ones
}
"""How often each method asks clients after five rounds."""


# ---------------------------------------------------------------- all of them
def test_the_catalogue_and_what_can_be_run_are_the_same():
    assert MAKE.keys() == {name for name, entry in METHODS.items() if entry.federated}
    assert all(make().name == name for name, make in MAKE.items())


@pytest.mark.parametrize("name", ALL)
def test_every_method_forgets_through_the_wrapper(name, scripted_grid):
    asked = []
    wrapped, records, models = forgotten_by(name, scripted_grid(learning(asked), 7))
    done = records[0].unlearning
    assert done.refused is None
    assert (done.number, done.method, done.clients) == (5, name, GONE)
    assert done.guarantee == SERVER[name].guarantee
    assert records[0].phase is Phase.UNLEARN
    assert done.recovery_rounds == (None if SERVER[name].guarantee == "exact" else 2)
    for model in models[5:]:
        assert model.keys() == MODEL.keys()
        assert all(
            model[n].shape == t.shape and model[n].dtype == t.dtype for n, t in MODEL.items()
        )
        assert all(bool(torch.isfinite(t.double()).all()) for t in model.values())
    # Whoever is forgotten is asked nothing any more, by the method or after it.
    assert {p for p, _ in asked[4 * 7 :]} <= {0, 1, 2, 5, 6}
    assert wrapped.roster.statuses()[GONE[0]] == "banned"
    size = sum(t.nelement() * t.element_size() for t in MODEL.values())
    assert (done.bytes_sent > 0) == (done.rounds_asked > 0)
    assert done.bytes_sent <= 2 * size * 5 * done.rounds_asked
    assert done.rounds_asked == ASKS.get(name, 0)


def test_fedrecover_asks_as_often_as_its_schedule_says(scripted_grid):
    # Of nine rounds T_w = max(s + 1, 9 // 10) = 3 first ones, T_f = 2 last ones, and of those
    # between, every T_c = max(2, 9 // 8) = 2nd: rounds 1, 2, 3, 5, 7, 8 and 9. In the others clients
    # did not move, wherever they were, and so no estimate is abnormal.
    asked = []

    def reply(partition, number, model):
        asked.append((partition, number))
        step = 0.0 if number in (4, 6) else 0.01 * (partition + 1) * number
        moved = {n: t + step if t.is_floating_point() else t for n, t in model.items()}
        return messages.train_reply(moved, {}, 10)

    _, records, _ = forgotten_by("fedrecover", scripted_grid(reply, 7), before=8)
    assert records[0].unlearning.rounds_asked == 7
    staying = 5
    live, recovery = 8 * 7 + staying, 2 * staying
    assert [number for _, number in asked[live:-recovery:staying]] == [1, 2, 3, 5, 7, 8, 9]


@pytest.mark.parametrize("name", ALL)
def test_every_method_gives_the_same_model_for_the_same_seed_wherever_it_remembers(
    name, scripted_grid, tmp_path
):
    needs = needs_of([MAKE[name]()])
    results = []
    for folder in (None, tmp_path / "memory"):
        memory = Memory(needs, folder=folder)
        _, _, models = forgotten_by(name, scripted_grid(learning(), 7), memory=memory)
        results.append(models[-1])
    assert all(torch.equal(results[0][key], results[1][key]) for key in MODEL)


@pytest.mark.parametrize("name", ALL)
def test_a_request_whose_needs_were_not_recorded_is_refused_before_anything_changes(
    name, scripted_grid
):
    recorded = SERVER[name].needs - {Need.RETAINED}
    if not recorded:
        assert name in ("not", "natural")
        return
    wrapped = federation(name, memory=Memory(()), lab=None)
    play(wrapped, scripted_grid(learning(), 7), 2)
    before = copy.deepcopy(wrapped.roster.statuses())
    with pytest.raises(MissingNeedError, match=f"{name} needs "):
        wrapped.forget(GONE, "privacy")
    assert wrapped.roster.statuses() == before
    assert not wrapped.busy


# ---------------------------------------------------------------- what each makes of the rounds
def test_drift_takes_back_what_the_ledger_says(scripted_grid):
    grid = scripted_grid(learning(), 7)
    wrapped = federation(Drift(strength=0.7))
    _, models = play(wrapped, grid, 4)
    rows = [dict(wrapped.memory.ledger[c]) for c in GONE]
    wrapped.forget(GONE, "privacy")
    _, after = play(wrapped, grid, 4, played=4, model=models[-1])
    retained = [
        messages.parameters_from(learning()(n, 5, models[-1]).array_records["arrays"])
        for n in (0, 1, 2, 5, 6)
    ]
    others = weighted_mean(retained, [10, 11, 12, 15, 16])
    expected = drift.subtract(others, [rows], [(13 + 14) / (7 * 13)], 0.7)
    assert all(torch.allclose(after[0][key], expected[key], atol=1e-6) for key in MODEL)


def test_negative_gradients_subtract_every_recorded_round(scripted_grid):
    grid = scripted_grid(learning(), 7)
    wrapped = federation("negative-gradients")
    _, models = play(wrapped, grid, 4)
    memory = copy.deepcopy(wrapped.memory)
    wrapped.forget(GONE, "privacy")
    _, after = play(wrapped, grid, 4, played=4, model=models[-1])
    others = weighted_mean(
        [
            messages.parameters_from(learning()(n, 5, models[-1]).array_records["arrays"])
            for n in (0, 1, 2, 5, 6)
        ],
        [10, 11, 12, 15, 16],
    )
    expected = delta(others, memory.history, frozenset(GONE))
    assert all(torch.allclose(after[0][key], expected[key], atol=1e-5) for key in MODEL)


@pytest.mark.parametrize("name", ["retrain", "rollback"])
def test_exact_forgetting_is_training_without_them(name, scripted_grid):
    def never(partition, number, model):
        if client(partition) in GONE:
            raise RuntimeError("not here")
        return learning()(partition, number, model)

    _, expected = play(federation("natural"), scripted_grid(never, 7), 5)
    _, _, models = forgotten_by(name, scripted_grid(learning(), 7))
    assert all(torch.equal(models[-1][key], expected[-1][key]) for key in MODEL)


@pytest.mark.parametrize("strategy", [None, FedAdam], ids=["FedAvg", "FedAdam"])
def test_rollback_goes_back_to_before_they_joined(strategy, scripted_grid):
    grid = scripted_grid(late({3: 4, 4: 3}), 7)
    wrapped = federation("rollback", strategy=strategy(fraction_evaluate=0.0) if strategy else None)
    _, models = play(wrapped, grid, 6)
    wrapped.forget(GONE, "privacy")
    records, after = play(wrapped, grid, 6, played=6, model=models[-1])
    # What FedAdam remembers of rounds 1 and 2 was not kept: it goes back to the start.
    origin = 0 if strategy else 2
    assert records[0].unlearning.settings == {"rounds": 7 - origin, "from_round": origin}

    def never(partition, number, model):
        if client(partition) in GONE:
            raise RuntimeError("not here")
        return learning()(partition, number, model)

    again = federation("natural", strategy=strategy(fraction_evaluate=0.0) if strategy else None)
    _, expected = play(again, scripted_grid(never, 7), 7)
    assert all(torch.equal(after[-1][key], expected[-1][key]) for key in MODEL)


def test_leavers_among_alike_clients_are_cut_at_the_higher_rate(scripted_grid):
    def alike(partition, number, model):
        return messages.train_reply(
            {n: t + 0.01 * partition if t.is_floating_point() else t for n, t in model.items()},
            {},
            10,
        )

    rates = {}
    for cause in ("privacy", "malicious"):
        wrapped = federation(FedUP(rate="adaptive"))
        _, models = play(wrapped, scripted_grid(alike, 7), 2)
        wrapped.forget(GONE, cause)
        records, _ = play(wrapped, scripted_grid(alike, 7), 2, played=2, model=models[-1])
        settings = records[0].unlearning.settings
        rates[cause] = settings["rate"]
        assert settings["similarity"] > 0.95
    assert rates["privacy"] == BENIGN_RATE
    assert rates["malicious"] == pytest.approx(adaptive_rate(settings["similarity"]))


def test_clients_are_told_the_epochs_of_a_calibration(scripted_grid):
    grid = scripted_grid(learning(), 7)
    send, seen = grid.send_and_receive, []

    def spy(outgoing, *, timeout=None):
        sent = list(outgoing)
        if sent[0].metadata.message_type == "train":
            seen.append(dict(sent[0].content.config_records["config"]))
        return send(sent, timeout=timeout)

    grid.send_and_receive = spy
    forgotten_by(FedEraser(local_epochs=4), grid)
    calibrations = [c for c in seen if "local-epochs" in c]
    assert [(c["server-round"], c["local-epochs"]) for c in calibrations] == [(3, 2), (5, 2)]


# ---------------------------------------------------------------- the tutorial
def test_the_tutorial_wraps_a_strategy_that_then_forgets(scripted_grid):
    text = (Path(__file__).parents[2] / "docs" / "forgetting.md").read_text(encoding="utf-8")
    code = text.split("```python\n", 1)[1].split("```", 1)[0]
    assert len([line for line in code.splitlines() if line and "import" not in line]) <= 10
    names = {"grid": scripted_grid(learning(), 7), "initial_arrays": messages.record_from(MODEL)}
    exec(code, names)  # noqa: S102  the page's own example
    wrapped = names["strategy"]
    assert len(names["result"].train_metrics_clientapp) == 20
    client_of = wrapped.directory.clients()[2]
    request = names["Request"](names["Target"].CLIENT, (client_of,), cause="privacy")
    assert wrapped.request(request).method == "rollback"


# ---------------------------------------------------------------- erasure scope
def test_clients_are_told_to_clear_what_they_kept(scripted_grid):
    grid = scripted_grid(learning(), 7)
    send, told = grid.send_and_receive, []

    def spy(outgoing, *, timeout=None):
        sent = list(outgoing)
        if sent[0].metadata.message_type == "train":
            told.append({m.content.config_records["config"].get("forgettings", 0) for m in sent})
        return send(sent, timeout=timeout)

    grid.send_and_receive = spy
    forgotten_by("retrain", grid, before=2)
    # Two rounds, the one that forgets, and the retraining, which begins from a clean slate.
    assert told == [{0}, {0}, {0}, {1}, {1}, {1}]
    wrapped, _, models = forgotten_by("natural", grid, before=2)
    told.clear()
    play(wrapped, grid, 6, played=5, model=models[-1])
    assert told == [{1}]


def test_the_strategy_is_not_told_about_forgetting_before_it_happens(scripted_grid):
    wrapped = federation("fedup")
    config = messages.ConfigRecord({})
    wrapped.initial(MODEL, {})
    grid = scripted_grid(learning(), 7)
    arrays = messages.record_from(MODEL)
    assert isinstance(arrays, ArrayRecord)
    wrapped.configure_train(1, arrays, config, grid)
    assert "forgettings" not in config
