"""One machine with all the data: training, the log, every method, and what is measured."""

import dataclasses

import pytest
import torch
from torch.nn import functional

from client.batch_files import Way, encoded, save
from client.central.case import rows_named
from client.central.log import Log, kept_bytes, pruned
from client.central.methods import METHODS
from client.central.run import Target, forgotten, initial_model, prepared, retraining
from client.central.settings import SettingsError, Training, Tuning, read, tables
from client.central.training import fit, training_rate, tuning_rate
from client.task.evaluation import gather
from client.task.protocol import Split, TaskError, TaskOptions
from client.train import Job, do
from tests.client.forgetting.small import CLASSES, CPU, Regression, Small, same
from unlearning.amnesiac import LoggedUpdate, amnesiac
from unlearning.certificates import NotCertifiedError
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.parameters import copied, trained_names
from unlearning.partial_updates import shares_by_depth

TRAINING = Training(local_epochs=4, batch_size=10, learning_rate=0.1, momentum=0)
OPTIONS = TaskOptions(task="tests.client.central.test_central:small", device="cpu")


def small(options):
    return Small(Small.mlp if options.model == "mlp" else None)


class Lacking(Small):
    """Nobody has rows of class 2, though the network knows it."""

    def client_data(self, partition, partitions):
        rows = gather(super().client_data(partition, partitions).train)
        known = torch.utils.data.TensorDataset(*(part[rows[1] < 2] for part in rows))
        return Split(known, known)


def lacking(options):
    return Lacking()


def regression(options):
    return Regression()


@pytest.fixture(scope="module")
def ready():
    """A trained model with class 0 to forget, and its log."""
    return prepared(OPTIONS, TRAINING, Target(0), logs=True)


def ran(name, ready, tune=0, **settings):
    method = METHODS[name]
    return forgotten(*ready, method, method.settings(**settings), Tuning(epochs=tune))


def test_rcad_without_strength_is_fine_tuning_as_in_training_bit_for_bit():
    training = TRAINING.model_copy(
        update={"momentum": 0.9, "weight_decay": 0.01, "learning_rate_milestones": "2,3"}
    )
    ready = prepared(OPTIONS, training, Target(0))
    (expected,) = ran("finetune", ready, tune=4).models
    made = {
        (source, strength): ran("rcad", ready, source=source, strength=strength).models[0]
        for source in ("remain", "forget")
        for strength in (0, 0.5)
    }
    assert same(made["remain", 0], expected)
    assert same(made["forget", 0], expected)
    assert not same(made["remain", 0.5], expected)
    assert not same(made["forget", 0.5], made["remain", 0.5])


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_training_is_a_clients_round_bit_for_bit(optimizer):
    task, settings = Small(), TRAINING.model_copy(update={"optimizer": optimizer, "momentum": 0.5})
    data = task.client_data(0, 1).train
    start = initial_model(task, 3)
    found = fit(
        task,
        start,
        gather(data),
        settings,
        epochs=4,
        rate=lambda _: 0.1,
        purpose=(5, 6),
        device=CPU,
    )
    assert same(found, do(Job(task, data, settings, (5, 6), CPU), start)[0])


def test_rates_of_fine_tuning_are_those_of_training_in_fewer_epochs():
    """Milestones at 4 and 6 of 8 are at 2 and 3 of 4."""
    settings = Training(local_epochs=8, learning_rate=1.0, learning_rate_milestones="4,6")
    train, tune = training_rate(settings), tuning_rate(settings, Tuning(), 4)
    assert [train(u) for u in (0, 3.99, 4, 6)] == pytest.approx([1, 1, 0.1, 0.01])
    assert [tune(u) for u in (0, 1.99, 2, 3, 9)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    constant = tuning_rate(settings, Tuning(schedule="constant", learning_rate=0.3), 4)
    assert [constant(u) for u in (0, 3)] == [0.3, 0.3]


def test_rates_are_asked_at_every_step_and_taken():
    """With a rate of 0 from the second half of an epoch on, only its first half moves the model."""
    task = Small(Small.mlp)
    rows = gather(task.client_data(0, 1).train)
    start, asked = initial_model(task, 0), []

    def rate(epoch):
        asked.append(epoch)
        return 0.1 if epoch < 0.5 else 0.0

    whole = fit(task, start, rows, TRAINING, epochs=2, rate=rate, purpose=(0, 0), device=CPU)
    assert asked == pytest.approx([place / 6 for place in range(12)])
    order = torch.randperm(60, generator=torch.Generator().manual_seed(_order()))
    model = task.build_model()
    model.load_state_dict(start)
    for chosen in torch.split(order, 10)[:3]:
        leaves = list(model.parameters())
        loss = functional.cross_entropy(model(rows[0][chosen]), rows[1][chosen])
        with torch.no_grad():
            for leaf, slope in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                leaf.sub_(0.1 * slope)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor)


def _order():
    from client.train import order_seed

    return order_seed(TRAINING, (0, 0), 0)


def test_rows_to_forget_are_kept_together():
    settings = TRAINING.model_copy(update={"concentration": 0.5})
    case, _ = prepared(OPTIONS, settings, Target(0), logs=True)
    # 20 rows of the class in half of 6 batches, in each of 4 epochs.
    assert len(case.log.entries) == 12
    assert len(prepared(OPTIONS, TRAINING, Target(0), logs=True)[0].log.entries) == 24


@pytest.mark.parametrize("rows", [0, 5])
def test_training_that_cannot_be_is_told(rows):
    task = Small()
    inputs, targets = gather(task.client_data(0, 1).train)
    error, rate = (MissingNeedError, 0.1) if not rows else (ParametersError, 1e30)
    with pytest.raises(error, match="training"):
        fit(
            task, initial_model(task, 0), (inputs[:rows], targets[:rows]), TRAINING, epochs=3,
            rate=lambda _: rate, purpose=(0, 0), device=CPU,
        )  # fmt: skip


# ---------------------------------------------------------------- the log


def test_taking_back_the_whole_log_returns_to_the_start(ready):
    """Every batch held a row of the class; updates are in half precision, 24 of them."""
    case, _ = ready
    outcome = ran("amnesiac", ready)
    for name in trained_names(case.start):
        torch.testing.assert_close(
            outcome.models[0][name], case.start[name], rtol=0, atol=24 * 2**-11 * 0.2
        )
    assert outcome.made.notes["batches_subtracted"] == 24


def test_a_partial_log_that_drops_nothing_is_the_whole_one(ready):
    whole = ran("amnesiac", ready).models[0]
    for dropping in ("random", "magnitude", "global"):
        partial = ran("partial-amnesiac", ready, first=0, last=0, dropping=dropping).models[0]
        assert same(whole, partial)
    nothing = ran("partial-amnesiac", ready, first=1, last=1)
    assert same(nothing.models[0], ready[0].model)
    assert nothing.made.notes["log_bytes"] == 0


def test_the_log_is_pruned_by_depth_batch_by_batch(ready):
    case, _ = ready
    shares = shares_by_depth(case.model, 0.8, 0.2)
    kept = list(pruned(case.log.entries, shares, "random", 0))
    for name, share in shares.items():
        size = case.model[name].numel()
        nonzero = [int((entry.update[name] != 0).sum()) for entry in kept]
        assert max(nonzero) <= size - int(share * size)
    first, second = (entry.update["0.weight"] != 0 for entry in kept[:2])
    assert not torch.equal(first, second)
    again = list(pruned(case.log.entries, shares, "random", 0))
    assert all(same(one.update, other.update) for one, other in zip(kept, again, strict=True))


@pytest.mark.parametrize("kind", ["random", "magnitude", "global"])
@pytest.mark.parametrize(("first", "last"), [(0.8, 0.2), (0.3, 0.3), (0, 0), (1, 1)])
def test_a_partial_log_takes_what_its_files_take(kind, first, last, ready, tmp_path):
    """Bytes of a file of the batch log after its header, of which there is one in every file."""
    if kind == "global" and first != last:
        first = last  # a client's log knows one share for all tensors then
    case, _ = ready
    shares = shares_by_depth(case.model, first, last)
    way = Way(kind=kind, precision="float16", first=first, last=last, seed=0, client=0)
    found = 0
    for number, entry in enumerate(case.log.entries):
        wide = {name: tensor.float() for name, tensor in entry.update.items()}
        save(tmp_path, str(number), encoded(way, wide, entry.when))
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        found += len(data) - 8 - int.from_bytes(data[:8], "little")
    assert kept_bytes(case.log, shares, kind) == found


def test_only_batches_with_tracked_rows_are_logged():
    log = Log(frozenset({3}))
    assert log.wants(torch.tensor([1, 3]))
    assert not log.wants(torch.tensor([1, 2]))
    log.saw(2, 1, torch.tensor([3]), {"w": torch.zeros(2)}, {"w": torch.tensor([1.0, 0.5])})
    (entry,) = log.entries
    assert (entry.when, entry.samples) == ((0, 2, 1), frozenset({3}))
    model, _ = amnesiac({"w": torch.ones(2)}, log.entries, {3})
    assert model["w"].tolist() == [0.0, 0.5]
    assert log.nbytes == 4


def test_a_model_from_a_file_has_no_log(ready):
    case, grade = ready
    with pytest.raises(MissingNeedError, match="leave --start out"):
        ran("amnesiac", (dataclasses.replace(case, log=None), grade))


def test_taking_back_may_end_once_the_rows_are_not_recognised():
    """The second epoch made the whole model; without it every row is taken for one of class 0."""
    case, grade = prepared(OPTIONS, TRAINING, Target(1))
    trained = {name: case.model[name] for name in trained_names(case.model)}
    entries = [LoggedUpdate((0, epoch, 0), frozenset(case.rows), trained) for epoch in (0, 1)]
    logged = dataclasses.replace(case, log=Log(frozenset(case.rows), entries)), grade
    assert ran("amnesiac", logged).made.notes["batches_subtracted"] == 2
    some = ran("amnesiac", logged, stop="target")
    assert some.made.notes["batches_subtracted"] == 1
    assert some.unlearned["forget_train"] == 0
    assert some.unlearned["classes"] == [1, 0, 0]


# ---------------------------------------------------------------- methods

QUICK = {
    "noisy-gd": {"steps": 10},
    "pcmu": {"rounds": 2, "uncertified": True},
    "macforget": {"steps": 3},
    "ascent": {"learning_rate": 0.1},
    "label-flip": {"learning_rate": 0.1},
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_forgets_a_class_repeats_and_leaves_its_inputs_alone(name, ready):
    case, _ = ready
    model, start = copied(case.model), copied(case.start)
    once = ran(name, ready, **QUICK.get(name, {}))
    again = ran(name, ready, **QUICK.get(name, {}))
    assert same(case.model, model)
    assert same(case.start, start)
    assert len(once.models) == len(again.models)
    assert all(same(*pair) for pair in zip(once.models, again.models, strict=True))
    assert once.unlearned == again.unlearned
    for measure in ("test", "retained", "worst", "forget_train", "forget_test"):
        assert 0 <= once.unlearned[measure] <= 1
    changes = name not in ("finetune", "pcmu")
    assert same(once.models[0], model) != changes or name == "pcmu"


@pytest.mark.parametrize("name", [n for n in METHODS if n != "tfidf"])
def test_every_method_but_one_forgets_rows(name):
    ready = prepared(OPTIONS, TRAINING, Target(None, (1, 4, 5)), logs=True)
    outcome = ran(name, ready, **QUICK.get(name, {}))
    assert outcome.unlearned["forget_test"] is None
    assert outcome.unlearned["forget_train"] is not None
    assert outcome.unlearned["retained"] == outcome.unlearned["test"]


def test_pruning_by_class_needs_a_class():
    ready = prepared(OPTIONS, TRAINING, Target(None, (1, 4, 5)))
    with pytest.raises(MissingNeedError, match="give --forget-class"):
        ran("tfidf", ready)


def test_retraining_without_rows_to_forget_is_the_training_itself():
    ready = prepared(OPTIONS, TRAINING, Target())
    assert same(ran("retrain", ready).models[0], ready[0].model)
    measures, _ = retraining(*ready)
    assert measures == ready[1]((ready[0].model,))


def test_masks_zero_as_many_entries_as_they_say(ready):
    case, _ = ready
    size = sum(case.model[name].numel() for name in trained_names(case.model))
    for name in ("fisher-mask", "random-mask"):
        outcome = ran(name, ready, rate=0.1)
        zeroed = outcome.made.notes["zeroed"]
        assert zeroed == -(-size // 10)
        now_zero = sum(int((outcome.models[0][n] == 0).sum()) for n in trained_names(case.model))
        before_zero = sum(int((case.model[n] == 0).sum()) for n in trained_names(case.model))
        assert now_zero - before_zero == pytest.approx(zeroed, abs=before_zero)
    assert set(_zero_channels(ran("grad-mask", ready, rate=0.1).models[0])) == {1}
    bias_kept = ran("grad-mask", ready, rate=0.1).models[0]["0.bias"]
    assert torch.equal(bias_kept, case.model["0.bias"])


def _zero_channels(model):
    return [int((model["0.weight"].flatten(1) == 0).all(dim=1).sum())]


def test_of_everything_the_rest_is_no_statistics(ready):
    """Without rows that remain, scores are of the rows to forget alone; noise has nothing."""
    every = prepared(OPTIONS, TRAINING, Target(None, tuple(range(60))))
    assert ran("fisher-mask", every, tune=5).tuned == []
    with pytest.raises(MissingNeedError, match="at least one sample"):
        ran("fisher-noise", every)


def test_exact_methods_say_so_and_others_do_not(ready):
    exact = {n for n in METHODS if ran(n, ready, **QUICK.get(n, {})).made.guarantee == "exact"}
    assert exact == {"retrain", "sisa", "rapid-retraining"}
    told = ran("noisy-gd", ready, steps=10).made.guarantee
    assert told.startswith("Renyi divergence of order a at most")
    assert ran("noisy-gd", ready, steps=10, noise=0).made.guarantee == "none"
    assert ran("rapid-retraining", ready, begin="current").made.guarantee == "none"


def test_shards_are_those_of_training_without_the_rows(ready):
    """Retraining what saw the rows gives the ensemble that never saw them."""
    outcome = ran("sisa", ready, shards=2, slices=2)
    assert len(outcome.models) == 2
    assert len(outcome.made.before) == 2
    few = prepared(OPTIONS, TRAINING, Target(None, (7,)))
    one = ran("sisa", few, shards=4, slices=2)
    untouched = [same(a, b) for a, b in zip(one.models, one.made.before, strict=True)]
    assert sorted(untouched) == [False, True, True, True]
    assert one.made.notes["shards_retrained"] == 1


def test_what_nothing_certifies_is_refused_unless_asked_for(ready):
    with pytest.raises(NotCertifiedError, match="uncertified=true"):
        ran("pcmu", ready, rounds=2, local="full")
    outcome = ran("pcmu", ready, rounds=2, uncertified=True)
    assert outcome.made.warnings[-1].startswith("not_certified")


def test_the_jackknife_warns_of_too_many_rows(ready):
    assert any("5%" in text for text in ran("ij", ready).made.warnings)
    few = prepared(OPTIONS, TRAINING, Target(None, (1,)))
    for scope in ("last", "diag"):
        assert ran("ij", few, scope=scope).made.warnings == ()


def test_fine_tuning_follows_on_the_rows_that_remain(ready):
    case, _ = ready
    outcome = ran("finetune", ready, tune=3)
    assert len(outcome.tuned) == 3
    assert outcome.after == outcome.tuned[-1]
    expected = fit(
        case.task, case.model, case.holding.remain, TRAINING, epochs=3,
        rate=lambda _: 0.1, purpose=(1, 0), device=CPU,
    )  # fmt: skip
    assert same(outcome.models[0], expected)
    assert len(ran("fisher-mask", ready, tune=None).tuned) == 5


# ---------------------------------------------------------------- measures


def test_measures_are_shares_of_rows(ready):
    case, grade = ready
    found = grade((case.model,))
    inputs, targets = gather(Small().server_data().test)
    right = case.holding.forward(case.model, inputs).argmax(dim=1) == targets
    assert found["test"] == pytest.approx(float(right.double().mean()))
    assert found["retained"] == pytest.approx(float(right[targets != 0].double().mean()))
    per_class = [float(right[targets == n].double().mean()) for n in range(CLASSES)]
    assert found["classes"] == pytest.approx(per_class)
    assert found["worst"] == min(per_class[1:])
    assert found["worst_class"] == 1 + per_class[1:].index(min(per_class[1:]))
    assert found["forget_test"] == per_class[0]


def test_several_models_are_averaged_by_probability(ready):
    case, grade = ready
    always = {n: torch.zeros_like(t) for n, t in case.model.items()} | {
        "5.bias": torch.tensor([0.0, 50.0, 0.0])
    }
    alone, both = grade((always,)), grade((case.model, always, always))
    assert alone["classes"] == both["classes"] == [0, 1, 0]


def test_a_task_without_classes_is_measured_where_it_can_be():
    options = TaskOptions(task="tests.client.central.test_central:regression", device="cpu")
    case, grade = prepared(
        options, TRAINING.model_copy(update={"learning_rate": 0.001}), Target(None, (2,))
    )
    assert set(grade((case.model,)).values()) == {None}


def test_several_models_of_a_task_without_classes_are_averaged(monkeypatch):
    """Predictions b and 3 b for every row: their mean is 2 b."""
    seen = []
    monkeypatch.setattr(Regression, "metrics", lambda *told: seen.append(told[1]) or {})
    case, grade = prepared(
        TaskOptions(task="tests.client.central.test_central:regression", device="cpu"),
        TRAINING.model_copy(update={"learning_rate": 0.001}), Target(None, (2,)),
    )  # fmt: skip
    low = {n: torch.zeros_like(t) for n, t in case.model.items()} | {"1.bias": torch.tensor([0.5])}
    high = low | {"1.bias": torch.tensor([1.5])}
    grade((low, high))
    assert [outputs.tolist() for outputs in seen] == [[[1.0]] * len(grade.test[0]), [[1.0]]]


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("text", "rows"), [("1,5,7-9", (1, 5, 7, 8, 9)), (" 3 ", (3,)), ("2-2,0", (0, 2))]
)
def test_rows_are_named_by_number_and_range(text, rows):
    assert rows_named(text) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((text, "names no rows") for text in ("", "x", "3-", "-3", "1,,2")),
        *((text, "names a row twice") for text in ("1,1", "1-3,2")),
        ("1,5-3", "5-3 runs backwards"),
        ("0-99999999999", "row from 100,000,000 on"),
    ],
)
def test_rows_that_are_not_named_so(text, message):
    with pytest.raises(SettingsError, match=message):
        rows_named(text)


def test_targets_that_there_are_not():
    with pytest.raises(ParametersError, match="0 to 2, got 3"):
        prepared(OPTIONS, TRAINING, Target(3))
    with pytest.raises(ParametersError, match="no row 60"):
        prepared(OPTIONS, TRAINING, Target(None, (60,)))
    with pytest.raises(MissingNeedError, match="no training row is of class 2"):
        prepared(
            OPTIONS.model_copy(update={"task": "tests.client.central.test_central:lacking"}),
            TRAINING,
            Target(2),
        )
    with pytest.raises(TaskError, match="no task"):
        prepared(TaskOptions(task="nosuch"), TRAINING, Target(0))


def test_trained_models_are_kept_and_found_again(tmp_path):
    case, _ = prepared(OPTIONS, TRAINING, Target(0), work=tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    stages = []
    again, _ = prepared(
        OPTIONS,
        TRAINING,
        Target(1),
        work=tmp_path / "kept",
        tell=lambda stage, _: stages.append(stage),
    )
    assert same(again.model, case.model)
    assert not stages
    for other in ({"local_epochs": 2}, {"learning_rate": 0.2}, {"seed": 1}):
        changed = TRAINING.model_copy(update=other)
        assert not same(
            prepared(OPTIONS, changed, Target(0), work=tmp_path / "kept")[0].model, case.model
        )
    assert same(prepared(OPTIONS, TRAINING, Target(0), start=path)[0].model, case.model)
    with pytest.raises(ParametersError, match="not of the task's model"):
        prepared(OPTIONS.model_copy(update={"model": "mlp"}), TRAINING, Target(0), start=path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ParametersError, match="cannot be read"):
        prepared(OPTIONS, TRAINING, Target(0), start=path)


def test_settings_are_in_tables_and_all_faults_are_told():
    found = tables(["rate=0.1", "training.epochs=3", "tune.schedule=constant"])
    assert found == {"": {"rate": 0.1}, "training": {"epochs": 3}, "tune": {"schedule": "constant"}}
    assert read(Training, found["training"]).local_epochs == 3
    for pair in ("rate", "=3", "sharp.rate=1"):
        with pytest.raises(SettingsError):
            tables([pair])
    with pytest.raises(SettingsError) as told:
        read(METHODS["fisher-mask"].settings, {"rate": 2, "rat": 1})
    assert "rate = 2" in str(told.value)
    assert "unknown key 'rat'" in str(told.value)
    assert "most-samples" in str(told.value)


def test_where_macforget_takes_no_step_a_warning_tells(ready):
    case, _ = ready
    unseen = case.holding.test[0]
    holding = dataclasses.replace(case.holding, forget=(unseen, case.holding.test[1]))
    idle = dataclasses.replace(case, holding=holding)  # as sure of these as of those: the same
    method = METHODS["macforget"]
    made = method.run(method.settings(), idle)
    assert made.notes["steps"] == 0
    assert made.warnings[0].startswith("unmoved: ")
    assert all(torch.equal(made.models[0][name], t) for name, t in case.model.items())
    made = method.run(method.settings(), case)
    assert bool(made.warnings) == (made.notes["steps"] == 0)
