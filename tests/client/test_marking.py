"""Rows marked by a client that leaves: which, how, and what it keeps of them on its own disk."""

import json

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.torch import save_file
from torch.nn import functional
from torch.utils.data import TensorDataset

from client import keeping
from client.app import build_app, honest_job
from client.contexts import training_settings
from client.keeping import Keeping
from client.marks import MARKS, KeptMarks, MarksRecord
from client.rows import content_hashes
from client.storage import KeepingError
from client.task.evaluation import predict, state_of
from client.task.protocol import REFUSABLE, TaskOptions, load_task
from client.train import Job, do
from server.cli import main
from server.federation import initial_model
from simulation.engines.inprocess import InProcessGrid
from strategies import messages
from strategies.actions import Forget, Mark, Marks
from unlearning.verifi_marks import check

SETTINGS = {"task": "digits", "model": "mlp", "examples": 300}
CLIENTS, LEAVER = 3, 1
ERRONEOUS = Mark(kind="erroneous").config()
TRAINING = {"local-epochs": 2, "learning-rate": 0.1}


def task():
    return load_task(TaskOptions.model_validate(SETTINGS))


def examples():
    return task().client_data(LEAVER, CLIENTS).train


def start(seed=0):
    return state_of(initial_model(task(), seed))


def grid_for(folder, **changes):
    options = TaskOptions.model_validate({**SETTINGS, "client-dir": str(folder), **changes})

    def job_of(message, context):
        return honest_job(message, context, options)

    return InProcessGrid(build_app(options.model_dump(by_alias=True)), CLIENTS, job_of=job_of)


def ask(grid, action, config, number, model=None):
    told = ConfigRecord({**TRAINING, "server-round": number, **config})
    content = RecordDict({messages.CONFIG: told})
    if model is not None:
        content[messages.ARRAYS] = messages.record_from(model)
    (reply,) = grid.send_and_receive([Message(content, list(grid.get_node_ids())[LEAVER], action)])
    return reply


def mark(grid, number=1, model=None, config=ERRONEOUS):
    return ask(grid, "train.mark", config, number, model or start())


def look(grid, number, model, *, first=False):
    return ask(grid, "query.marks", Marks(first=first).config(), number, model)


def kept(folder):
    return KeptMarks(Keeping(folder / str(LEAVER))).read()


def sent(reply):
    assert not reply.has_error(), reply.error
    return messages.parameters_from(reply.content["arrays"])


def mean_loss(model, labels):
    """The mean cross-entropy of the rows with these contents under these labels, by hand."""
    network = initial_model(task(), 0)
    network.load_state_dict(model)
    outputs, _ = predict(network, examples(), device=torch.device("cpu"))
    places = {content: row for row, content in enumerate(content_hashes(examples()))}
    rows = torch.tensor([places[content] for content in labels])
    return float(functional.cross_entropy(outputs[rows], torch.tensor(list(labels.values()))))


# ---------------------------------------------------------------- marking
def test_erroneous_markers_are_own_rows_that_the_model_mistakes_alike(tmp_path):
    mark(grid_for(tmp_path))
    marked = kept(tmp_path).marked
    outputs, targets = predict(initial_model(task(), 0), examples(), device=torch.device("cpu"))
    hashes = content_hashes(examples())
    rows = [hashes.index(content) for content in marked.labels]
    # kappa = .1 of the client's rows, all of them mistaken for one class.
    assert 1 <= len(rows) <= -(-len(hashes) // 10)
    (label,) = set(marked.labels.values())
    assert outputs[rows].argmax(dim=1).tolist() == [label] * len(rows)
    assert label not in targets[rows].tolist()
    assert (marked.kind, marked.round, marked.after, marked.following) == ("erroneous", 1, None, ())
    assert marked.before == pytest.approx(mean_loss(start(), marked.labels), rel=1e-5)


def test_the_marked_update_is_an_ordinary_one_tuned_on_the_markers_alone(tmp_path):
    grid = grid_for(tmp_path)
    reply = mark(grid)
    ordinary = ask(grid, "train", {}, 1, start())
    assert dict(reply.content["metrics"]).keys() == dict(ordinary.content["metrics"]).keys()
    assert reply.content["metrics"]["num-examples"] == ordinary.content["metrics"]["num-examples"]
    labels = kept(tmp_path).marked.labels
    losses = [mean_loss(model, labels) for model in (start(), sent(ordinary), sent(reply))]
    assert losses[2] < losses[1]
    assert losses[2] < losses[0]
    # By hand: two epochs on these rows, from where training as usual ends.
    config = ConfigRecord({**TRAINING, "server-round": 1})
    settings = training_settings(Message(RecordDict({messages.CONFIG: config}), 1, "train"))
    job = Job(task(), examples(), settings, (1, LEAVER), torch.device("cpu"))
    trained, _ = do(job, start())
    hashes = content_hashes(examples())
    rows = [hashes.index(content) for content in labels]
    inputs = examples().tensors[0][rows]
    model = initial_model(task(), 0)
    model.load_state_dict(trained)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # all markers fit into one batch, whose order is all that is drawn
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), torch.tensor(list(labels.values()))).backward()
        optimizer.step()
    for name, tensor in state_of(model).items():
        assert torch.allclose(tensor, sent(reply)[name], atol=1e-5), name


def test_forgotten_rows_are_never_marked(tmp_path):
    grid = grid_for(tmp_path)
    mark(grid)
    first = kept(tmp_path).marked
    hashes = content_hashes(examples())
    folder = Keeping(tmp_path / str(LEAVER))
    tokens = folder.issue([hashes.index(content) for content in first.labels], examples())
    selection = Forget(forget="samples", forget_tokens=",".join(tokens)).config()
    ask(grid, "query.forget", selection, 2)
    mark(grid, 3)
    second = kept(tmp_path).marked
    assert not second.labels.keys() & first.labels.keys()
    assert second.labels.keys() <= set(hashes)
    assert second.round == 3


def test_forgettable_rows_are_watched_over_restarts_and_marked_in_the_last_round(tmp_path):
    models, replies = [start(0), start(1), start(2)], []
    for noted, model in enumerate(models):
        keeping.keeping_at.cache_clear()  # as after a restart
        asked = Mark(kind="forgettable", rounds=3, noted=noted)
        grid = grid_for(tmp_path)
        replies.append(mark(grid, 4 + noted, model, asked.config()))
        if not asked.now:  # trains as usual
            other = ask(grid, "train", {}, 4 + noted, model)
            for name, tensor in sent(other).items():
                assert torch.allclose(tensor, sent(replies[-1])[name], atol=1e-6)
            assert [one.round for one in kept(tmp_path).watched] == list(range(4, 5 + noted))
            assert kept(tmp_path).marked is None
    found = kept(tmp_path)
    assert found.watched == ()
    hashes, losses = content_hashes(examples()), []
    for seed in range(3):
        outputs, targets = predict(
            initial_model(task(), seed), examples(), device=torch.device("cpu")
        )
        losses.append(functional.cross_entropy(outputs, targets, reduction="none"))
    spread = torch.stack(losses).double().var(dim=0, correction=0)
    most = spread.topk(-(-len(hashes) // 10)).indices
    assert found.marked.labels.keys() == {hashes[row] for row in most.tolist()}
    assert set(found.marked.labels.values()) == {None}  # what they are
    own = {hashes[row]: int(targets[row]) for row in most.tolist()}
    assert found.marked.before == pytest.approx(mean_loss(models[2], own), rel=1e-5)
    assert found.marked.round == 6


def test_a_client_that_noted_too_few_rounds_marks_nothing(tmp_path):
    reply = mark(grid_for(tmp_path), 4, None, Mark(kind="forgettable", rounds=2, noted=1).config())
    assert messages.is_refusal(reply)
    assert "a variance needs losses of 2 rounds, got 1" in reply.error.reason
    assert kept(tmp_path).marked is None


def test_a_request_that_begins_anew_forgets_what_was_noted_before(tmp_path):
    grid = grid_for(tmp_path)
    for number, noted in ((3, 0), (4, 1), (9, 0)):
        mark(grid, number, None, Mark(kind="forgettable", noted=noted).config())
    assert [one.round for one in kept(tmp_path).watched] == [9]


def test_without_mistakes_the_client_refuses_and_says_what_to_do(tmp_path):
    grid, model = grid_for(tmp_path), start()
    for number in range(1, 40):
        model = sent(ask(grid, "train", {"local-epochs": 5}, number, model))
    reply = mark(grid, 41, model)
    assert messages.is_refusal(reply)
    assert "mark with forgettable memory" in reply.error.reason
    assert not (tmp_path / str(LEAVER) / MARKS).exists()


def test_others_still_train_together_where_one_among_them_marks(tmp_path, monkeypatch):
    grid = grid_for(tmp_path)
    groups, train = [], grid._train
    monkeypatch.setattr(grid, "_train", lambda sent: groups.append(len(sent)) or train(sent))
    told = ConfigRecord({**TRAINING, "server-round": 1})
    arrays = messages.record_from(start())
    shared = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: told})
    own = ConfigRecord({**told, **ERRONEOUS})
    first, leaver, last = grid.get_node_ids()
    sent = [
        Message(shared, first, "train"),
        Message(RecordDict({messages.ARRAYS: arrays, messages.CONFIG: own}), leaver, "train.mark"),
        Message(shared, last, "train"),
    ]
    replies = list(grid.send_and_receive(sent))
    assert groups == [2]
    assert {reply.metadata.src_node_id for reply in replies} == {first, leaver, last}
    assert not any(reply.has_error() for reply in replies)
    assert "kind" not in shared[messages.CONFIG]


# ---------------------------------------------------------------- looking
def test_losses_are_answered_and_kept(tmp_path):
    grid = grid_for(tmp_path)
    mark(grid)
    labels = kept(tmp_path).marked.labels
    published = start(5)
    reply = look(grid, 1, published, first=True)
    assert not reply.content.array_records
    told = dict(reply.content["metrics"])
    assert told["loss"] == told["after"] == pytest.approx(mean_loss(published, labels), rel=1e-5)
    assert told["before"] == kept(tmp_path).marked.before
    assert (told["markers"], told["num-examples"]) == (len(labels), 1)
    losses = []
    for number in (4, 5, 6, 7):
        keeping.keeping_at.cache_clear()
        reply = look(grid_for(tmp_path), number, start(number))
        losses.append(reply.content["metrics"]["loss"])
        assert losses[-1] == pytest.approx(mean_loss(start(number), labels), rel=1e-5)
        assert reply.content["metrics"]["after"] == told["after"]
    marked = kept(tmp_path).marked
    followed = {one.round: one.loss for one in marked.following}
    assert followed == dict(zip((4, 5, 6), losses[:3], strict=True))
    assert marked.verdict() == check(told["before"], told["after"], losses)


def test_a_round_is_counted_once_and_nothing_is_said_before_the_first_model(tmp_path):
    grid = grid_for(tmp_path)
    reply = look(grid, 1, start())
    assert messages.is_refusal(reply)
    assert "no rows are marked" in reply.error.reason
    mark(grid)
    reply = look(grid, 2, start())
    assert messages.is_refusal(reply)
    assert "no model with the marked update" in reply.error.reason
    look(grid, 1, start(5), first=True)
    for seed in (6, 7):
        look(grid, 4, start(seed))
    (followed,) = kept(tmp_path).marked.following
    labels = kept(tmp_path).marked.labels
    assert (followed.round, followed.loss) == (4, pytest.approx(mean_loss(start(7), labels)))


def test_losses_of_other_rows_are_not_compared(tmp_path):
    grid = grid_for(tmp_path)
    mark(grid)
    look(grid, 1, start(5), first=True)
    labels, hashes = kept(tmp_path).marked.labels, content_hashes(examples())
    tokens = Keeping(tmp_path / str(LEAVER)).issue([hashes.index(next(iter(labels)))], examples())
    ask(grid, "query.forget", Forget(forget="samples", forget_tokens=tokens[0]).config(), 2)
    reply = look(grid, 3, start())
    assert messages.is_refusal(reply)
    assert f"1 of {len(labels)} markers are no rows of this client any more" in reply.error.reason


# ---------------------------------------------------------------- refusals
def test_what_is_damaged_is_refused_and_not_written_over(tmp_path):
    grid = grid_for(tmp_path)
    mark(grid)
    path = tmp_path / str(LEAVER) / MARKS
    text = path.read_text().replace('"erroneous"', '"forgettable"')
    path.write_text(text)
    watching = Mark(kind="forgettable").config()
    for reply in (mark(grid), mark(grid, 2, None, watching), look(grid, 1, start(), first=True)):
        assert messages.is_refusal(reply)
        assert "is damaged: its checksum is wrong" in reply.error.reason
    assert path.read_text() == text
    with pytest.raises(KeepingError, match="damaged"):
        kept(tmp_path)


def test_a_client_without_a_folder_and_one_with_a_batch_log_mark_nothing(tmp_path):
    options = TaskOptions.model_validate(SETTINGS)
    grid = InProcessGrid(build_app(options.model_dump(by_alias=True)), CLIENTS)
    for reply in (mark(grid), look(grid, 1, start())):
        assert messages.is_refusal(reply)
        assert "give it a client-dir" in reply.error.reason
    reply = mark(grid_for(tmp_path, **{"batch-log": "full"}))
    assert messages.is_refusal(reply)
    assert "set batch-log off" in reply.error.reason


@pytest.mark.parametrize("name", ["mark", "marks", "all"])
def test_an_owner_may_refuse(tmp_path, name):
    assert {"mark", "marks"} <= REFUSABLE
    grid = grid_for(tmp_path, refuse=name)
    reply = look(grid, 1, start()) if name == "marks" else mark(grid)
    assert messages.is_refusal(reply)
    assert f"does not allow '{name}'" in reply.error.reason
    assert not (tmp_path / str(LEAVER) / MARKS).exists()


@pytest.mark.parametrize(
    "config",
    [{"kind": "random"}, {**ERRONEOUS, "epochs": 3}, {**ERRONEOUS, "share": 0.0},
     {**ERRONEOUS, "rounds": 1}, {**ERRONEOUS, "noted": -1}],
)  # fmt: skip
def test_settings_are_checked_by_the_client_too(tmp_path, config):
    assert mark(grid_for(tmp_path), config=config).has_error()
    with pytest.raises(ValueError, match="validation error"):
        Mark.model_validate(config)


def test_rows_with_the_same_content_are_one_marker(tmp_path):
    from client.forgetting.marking import _own

    few = TensorDataset(*(tensor[[0, 1, 0, 2, 1]] for tensor in examples().tensors))
    settings = messages.LocalTraining()
    own = _own(task(), few, settings, (1, 0), torch.device("cpu"))
    assert own.hashes == content_hashes(few)[:2] + content_hashes(few)[3:4]
    assert len(own.rows[0]) == 3


# ---------------------------------------------------------------- the owner's command
def call(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["holdings", "marks", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def test_the_owner_judges_by_what_the_client_kept(tmp_path, capsys):
    where = ("--client-dir", str(tmp_path), "--partition", str(LEAVER))
    grid = grid_for(tmp_path)
    code, _, err = call(capsys, *where)
    assert code == 1
    assert "no rows are marked" in err
    reply = mark(grid)
    look(grid, 1, sent(reply), first=True)
    code, out, _ = call(capsys, *where, "--json")
    told = json.loads(out)
    assert (code, told["result"], told["losses"]) == (0, "inconclusive", {})
    for number in (2, 3, 4):  # nothing is forgotten
        look(grid, number, sent(reply))
    code, out, _ = call(capsys, *where, "--json")
    told = json.loads(out)
    assert (code, told["result"], told["rise"]) == (1, "fail", 0.0)
    assert list(told["losses"]) == ["round 2", "round 3", "round 4"]
    assert told["needed"] == pytest.approx((told["before"] - told["after"]) / 2)
    code, out, _ = call(capsys, *where)
    assert code == 1
    assert "result: fail" in out
    assert "loss, round 4: " in out

    path = tmp_path / "model.safetensors"
    data = ("--set", "examples=300", "--set", "model=mlp", "--partitions", str(CLIENTS))
    for model, expected in ((start(), "pass"), (sent(reply), "fail")):
        save_file(model, path)
        code, out, _ = call(capsys, *where, *data, "--model", str(path), "--json")
        told = json.loads(out)
        assert (code, told["result"]) == (int(expected == "fail"), expected)
        assert list(told["losses"]) == [str(path)]
    assert kept(tmp_path).marked.following[0].round == 2  # judging changes nothing
    save_file({"other": torch.zeros(2)}, path)
    code, _, err = call(capsys, *where, *data, "--model", str(path))
    assert (code, "is not of the task's model" in err) == (1, True)


def test_what_is_kept_is_read_as_it_was_written(tmp_path):
    grid = grid_for(tmp_path)
    mark(grid, 2, None, Mark(kind="forgettable").config())
    found = kept(tmp_path)
    assert MarksRecord.model_validate_json(found.model_dump_json()) == found
    assert set(found.watched[0].losses) == set(content_hashes(examples()))
