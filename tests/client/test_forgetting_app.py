"""The ClientApp that forgets and refuses, on every engine."""

import json
import re
import shutil

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import TensorDataset

from client import rows
from client.app import build_app, honest_job
from client.holdings import _opened
from client.keeping import FORGOTTEN, Keeping, keeping_at
from client.refusals import refusals
from client.task.evaluation import state_of
from client.task.protocol import TaskOptions, load_task
from server.cli import main
from server.federation import initial_model
from simulation.engines.inprocess import InProcessGrid
from strategies import messages
from strategies.actions import Amnesiac, Batches, Ffmu, Forget, Rapid, named
from strategies.exchange import Reply
from strategies.screen import missing

SETTINGS = {"task": "digits", "model": "mlp", "examples": 90}
CLIENTS = 3
CLASS_3 = Forget(forget="class", forget_class=3).config()
ALL = Amnesiac(forget="all", request="r").config()


def start():
    return state_of(initial_model(load_task(TaskOptions.model_validate(SETTINGS)), 0))


def grid_for(*, batch, **changes):
    options = TaskOptions.model_validate({**SETTINGS, **changes})

    def job_of(message, context):
        return honest_job(message, context, options)

    app = build_app(options.model_dump(by_alias=True))
    return InProcessGrid(app, CLIENTS, job_of=job_of if batch else None)


def ask(grid, action, config, model=None, node=0):
    """Send one message and return the reply."""
    content = RecordDict({messages.CONFIG: ConfigRecord(dict(config))})
    if model is not None:
        content[messages.ARRAYS] = messages.record_from(model)
    (reply,) = grid.send_and_receive([Message(content, list(grid.get_node_ids())[node], action)])
    return reply


def shared(shares):
    """What a message says of shares by round."""
    return {messages.SHARE: list(shares.values()), messages.SHARE_ROUND: list(shares)}


def train(grid, number, model=None, **config):
    return ask(grid, "train", {"server-round": number, **config}, model or start())


def count(reply):
    assert not reply.has_error(), reply.error
    return reply.content["metrics"]["num-examples"]


both = pytest.mark.parametrize("batch", [True, False])


@both
def test_a_class_is_not_trained_on_again_also_by_a_new_app(tmp_path, batch):
    where = {"client-dir": str(tmp_path)}
    grid = grid_for(batch=batch, **where)
    before = count(train(grid, 1))
    reply = ask(grid, "query.forget", {**CLASS_3, "server-round": 2, "request": "r-7"})
    forgotten = reply.content["metrics"]["rows"]
    assert 0 < forgotten < before
    assert not reply.content.array_records
    for again in (grid, grid_for(batch=batch, **where)):
        assert count(train(again, 2)) == before - forgotten
    kept = json.loads((tmp_path / "0" / FORGOTTEN).read_text())["content"]
    assert kept["classes"] == {"3": {"round": 2, "request": "r-7"}}
    assert [path.name for path in tmp_path.iterdir()] == ["0"]  # nobody else was asked


@both
def test_without_forgotten_rows_training_is_as_if_they_had_never_been(tmp_path, batch):
    grid = grid_for(batch=batch, **{"client-dir": str(tmp_path)})
    options = TaskOptions.model_validate(SETTINGS)
    examples = load_task(options).client_data(0, CLIENTS).train
    ask(grid, "query.forget", CLASS_3)
    found = messages.parameters_from(train(grid, 1).content["arrays"])
    rest = Keeping(tmp_path / "0").without_forgotten(examples)
    assert not bool((rest.tensors[1] == 3).any())
    from client.app import training_settings
    from client.train import Job, do

    config = RecordDict({messages.CONFIG: ConfigRecord({"server-round": 1})})
    settings = training_settings(Message(config, 1, "train"))
    model, _ = do(Job(load_task(options), rest, settings, (1, 0), torch.device("cpu")), start())
    for name, tensor in model.items():
        assert torch.allclose(found[name], tensor, atol=1e-5)


def test_a_forgotten_class_is_not_evaluated_on_and_nothing_else_changes(tmp_path):
    grid, model = grid_for(batch=False, **{"client-dir": str(tmp_path)}), start()
    options = TaskOptions.model_validate(SETTINGS)
    task = load_task(options)
    inputs, targets = task.client_data(0, CLIENTS).test.tensors
    ask(grid, "query.forget", CLASS_3)
    metrics = ask(grid, "evaluate", {"server-round": 1}, model).content["metrics"]
    network = initial_model(task, 0).eval()
    right = (network(inputs).argmax(dim=1) == targets)[targets != 3]
    assert 0 < len(right) < len(targets)
    assert metrics["num-examples"] == len(right)
    assert metrics["accuracy"] == pytest.approx(right.float().mean().item())
    for number in set(targets.tolist()):
        ask(grid, "query.forget", Forget(forget="class", forget_class=number).config())
    assert messages.is_refusal(ask(grid, "evaluate", {"server-round": 1}, model))


def test_zero_rows_are_an_answer_and_no_fault(tmp_path):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path)})
    reply = ask(grid, "query.forget", Forget(forget="samples", forget_tokens="0" * 32).config())
    assert dict(reply.content["metrics"]) == {"rows": 0, "entries": 0, "num-examples": 1}


@both
def test_a_client_that_forgot_all_refuses_to_train_and_others_go_on(tmp_path, batch):
    grid = grid_for(batch=batch, **{"client-dir": str(tmp_path)})
    reply = ask(grid, "query.forget", Forget(forget="all").config())
    assert reply.content["metrics"]["rows"] > 1
    assert count(reply) == 1  # who holds more than others weighs no more
    reply = train(grid, 1)
    assert messages.is_refusal(reply)
    assert "every row of this client is forgotten" in reply.error.reason
    assert count(ask(grid, "train", {"server-round": 1}, start(), node=1)) > 0


def test_a_client_whose_data_have_no_classes_refuses_one_and_trains_on(tmp_path):
    own = {"task": "tests.client.central.test_central:regression", "learning-rate": 0.001}
    task = load_task(TaskOptions.model_validate({**SETTINGS, **own}))
    grid = grid_for(batch=False, **own, **{"client-dir": str(tmp_path)})
    model = state_of(task.build_model())
    reply = ask(grid, "query.forget", CLASS_3)
    assert messages.is_refusal(reply)
    assert "no numbers of classes; name samples instead" in reply.error.reason
    assert not list(tmp_path.rglob(FORGOTTEN))
    assert count(train(grid, 1, model)) == 20


@both
def test_a_client_that_keeps_nothing_promises_nothing(batch):
    grid = grid_for(batch=batch)
    reply = ask(grid, "query.forget", CLASS_3)
    assert messages.is_refusal(reply)
    assert "give it a client-dir" in reply.error.reason


@both
def test_a_damaged_list_stops_the_client_and_is_no_refusal(tmp_path, batch):
    grid = grid_for(batch=batch, **{"client-dir": str(tmp_path)})
    ask(grid, "query.forget", CLASS_3)
    (tmp_path / "0" / FORGOTTEN).write_text("")
    for reply in (train(grid, 1), ask(grid, "query.forget", CLASS_3)):
        assert reply.has_error()
        assert not messages.is_refusal(reply)
        assert "is damaged" in reply.error.reason


# ---------------------------------------------------------------- refusals
@both
@pytest.mark.parametrize(
    ("refuse", "action", "config", "named"),
    [
        ("samples, class", "query.forget", CLASS_3, "class"),
        ("forget", "query.forget", CLASS_3, "forget"),
        ("amnesiac", "train.amnesiac", ALL, "amnesiac"),
        ("all", "train.amnesiac", ALL, "all"),
    ],
)
def test_what_the_owner_does_not_allow_is_refused_by_name(
    tmp_path, batch, refuse, action, config, named
):
    grid = grid_for(batch=batch, **{"client-dir": str(tmp_path), "refuse": refuse})
    reply = ask(grid, action, config, start())
    assert messages.is_refusal(reply)
    assert reply.error.reason == f"refused: this client's owner does not allow '{named}'"
    assert missing(Reply("client-0000", 1, reply)) == f"error 6: {reply.error.reason}"
    assert not list(tmp_path.iterdir())
    assert count(train(grid, 1)) > 0  # training is not forgetting


@pytest.mark.parametrize("action", named())
@pytest.mark.parametrize("config", [CLASS_3, {}])
def test_every_action_can_be_refused_by_its_name_or_by_what_it_selects(action, config):
    done = []

    def answered(refuse):
        app = ClientApp(mods=[refusals(lambda context: TaskOptions(refuse=refuse))])
        kind, _, name = action.partition(".")

        @getattr(app, kind)(name)
        def handle(message, context):
            done.append(refuse)
            return Message(RecordDict(), reply_to=message)

        return not messages.is_refusal(ask(InProcessGrid(app, 1), action, config))

    assert not answered("all")
    assert not answered(named()[action])
    assert answered("class") == (config != CLASS_3)
    assert answered("samples")
    assert answered("")
    assert set(done) == {"samples", ""} | ({"class"} if config != CLASS_3 else set())


def test_what_is_not_named_is_not_refused_and_an_owner_has_the_last_word(tmp_path):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path), "refuse": "samples,ascend"})
    assert count(ask(grid, "query.forget", CLASS_3)) > 0
    next(iter(grid.contexts.values())).node_config["refuse"] = "class"
    assert messages.is_refusal(ask(grid, "query.forget", CLASS_3))
    assert not messages.is_refusal(ask(grid, "query.forget", CLASS_3, node=1))


def test_a_crash_is_no_refusal():
    reply = ask(grid_for(batch=False), "train.nosuch", {}, start())
    assert reply.has_error()
    assert not messages.is_refusal(reply)


# ---------------------------------------------------------------- batch log
@both
def test_a_log_changes_no_model_and_takes_all_back(tmp_path, batch):
    logged = grid_for(batch=batch, **{"client-dir": str(tmp_path), "batch-log": "full",
                                      "batch-log-precision": "float32"})  # fmt: skip
    plain = grid_for(batch=False)
    model = start()
    for number, share in ((1, {}), (2, shared({1: 1.0}))):
        config = {"local-epochs": 2, "momentum": 0.9, **share}
        expected = messages.parameters_from(train(plain, number, model, **config).content["arrays"])
        model = messages.parameters_from(train(logged, number, model, **config).content["arrays"])
        assert all(torch.equal(model[name], expected[name]) for name in model)
    refused = ask(logged, "train.amnesiac", ALL, model)
    assert messages.is_refusal(refused)
    assert "share unknown of round 2" in refused.error.reason
    reply = ask(logged, "train.amnesiac", {**ALL, **shared({2: 1.0})}, model)
    back = messages.parameters_from(reply.content["arrays"])
    assert all(torch.allclose(back[n], t, atol=1e-4, rtol=0) for n, t in start().items())
    assert dict(reply.content["metrics"]).keys() == {"batches", "first-round", "num-examples"}
    repeated = ask(logged, "train.amnesiac", ALL, model)
    again = messages.parameters_from(repeated.content["arrays"])
    assert all(torch.equal(again[name], tensor) for name, tensor in back.items())
    told = ask(logged, "query.batches", {**ALL, "taken-back": ["q", "r"]})
    assert told.content["metrics"]["rows"] == 0
    again = ask(logged, "train.amnesiac", ALL, model)
    assert again.error.reason == "refused: already removed: all rows of this request"


@both
def test_a_client_without_a_log_refuses_amnesiac_unlearning(tmp_path, batch):
    grid = grid_for(batch=batch, **{"client-dir": str(tmp_path)})
    reply = ask(grid, "train.amnesiac", ALL, start())
    assert messages.is_refusal(reply)
    assert "no batch is logged" in reply.error.reason


@pytest.mark.parametrize("log", ["off", "random"])
def test_who_holds_nothing_of_what_is_asked_for_needs_no_log(tmp_path, log):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path), "batch-log": log})
    others = Batches(forget="samples", forget_tokens="0" * 32).config()
    reply = ask(grid, "query.batches", others)
    assert dict(reply.content["metrics"]) == {"rows": 0, "first-round": 0, "num-examples": 1}
    refused = ask(grid, "query.batches", {**ALL, "forget": "class", "forget-class": 3})
    assert messages.is_refusal(refused)
    assert "no batch is logged" in refused.error.reason


def test_rounds_without_a_log_end_it(tmp_path):
    logged, off = (
        grid_for(batch=False, **{"client-dir": str(tmp_path), "batch-log": kind})
        for kind in ("random", "off")
    )
    train(logged, 1)
    train(off, 2, **shared({1: 1.0}))
    train(logged, 3)
    reply = ask(logged, "train.amnesiac", {**ALL, **shared({1: 1.0, 3: 1.0})}, start())
    assert messages.is_refusal(reply)
    assert "batches of round 1 are needed" in reply.error.reason


@pytest.mark.parametrize("action", [Rapid(), Ffmu()], ids=lambda action: action.action)
def test_training_of_another_kind_which_is_not_logged_ends_it(tmp_path, action):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path), "batch-log": "random"})
    train(grid, 1)
    ready = ask(grid, "query.batches", {**ALL, **shared({1: 1.0})})
    assert count(ready) == 1
    told = ready.content["metrics"]
    assert (told["first-round"], told["rows"]) == (1, count(train(grid, 2)))
    ask(grid, action.action, {"server-round": 3, **action.config()}, start())
    for question in ("query.batches", "train.amnesiac"):
        reply = ask(grid, question, {**ALL, **shared({1: 1.0, 2: 1.0})}, start())
        assert messages.is_refusal(reply)
        assert "batches of rounds 1, 2 are needed and no longer there" in reply.error.reason


def test_a_share_is_of_the_round_that_it_names(tmp_path):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path), "batch-log": "random"})
    for number, shares in ((1, {}), (2, {}), (2, {1: 0.25}), (3, {}), (5, {2: 0.5, 4: 0.75})):
        train(grid, number, **(shared(shares) if shares else {}))
    index = json.loads((tmp_path / "0/batches/1/index.json").read_text())["content"]
    assert {entry["number"]: entry["share"] for entry in index["rounds"]} == {
        1: 0.25, 2: 0.5, 3: None, 5: None}  # fmt: skip


def test_a_log_without_a_folder_is_no_log(tmp_path):
    reply = train(grid_for(batch=True, **{"batch-log": "random"}), 1)
    assert "give it a client-dir" in reply.error.reason


# ---------------------------------------------------------------- on Ray
@pytest.mark.ray
def test_on_ray_a_refusal_arrives_and_what_is_forgotten_stays_so(tmp_path):
    from simulation.engines import ray

    options = {**SETTINGS, "client-dir": str(tmp_path), "refuse": "samples"}
    app = build_app(TaskOptions.model_validate(options).model_dump(by_alias=True))
    found = {}

    def play(grid):
        from strategies.directory import wait_for_nodes

        wait_for_nodes(grid, CLIENTS, patience_s=250)
        found["refused"] = ask(grid, "query.forget", Forget(
            forget="samples", forget_tokens="0" * 32).config())  # fmt: skip
        found["no log"] = ask(grid, "train.amnesiac", ALL, start())
        found["before"] = train(grid, 1)
        found["rows"] = ask(grid, "query.forget", CLASS_3)
        found["after"] = train(grid, 2)
        found["all"] = ask(grid, "query.forget", Forget(forget="all").config())
        found["none"] = train(grid, 3)

    ray.run(play, app, CLIENTS, cpus=1)
    assert found["refused"].error.reason == "refused: this client's owner does not allow 'samples'"
    assert messages.is_refusal(found["no log"])
    forgotten = found["rows"].content["metrics"]["rows"]
    assert 0 < forgotten == count(found["before"]) - count(found["after"])
    assert "every row of this client is forgotten" in found["none"].error.reason
    assert messages.is_refusal(found["none"])


# ---------------------------------------------------------------- the owner's commands
def call(capsys, *arguments):
    with pytest.raises(SystemExit) as done:
        main(["holdings", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


DATA = ("--set", "examples=90", "--partition", "1", "--partitions", "3")


def test_an_owner_names_rows_and_sees_that_they_are_left_out(tmp_path, capsys, monkeypatch):
    folder = ("--client-dir", str(tmp_path))
    code, out, _ = call(capsys, "issue", *folder, *DATA, "--rows", "3,17", "--json")
    issued = json.loads(out)
    assert (code, [entry["row"] for entry in issued]) == (0, [3, 17])
    tokens = [entry["token"] for entry in issued]
    assert all(re.fullmatch("[0-9a-f]{32}", token) for token in tokens)
    code, out, _ = call(capsys, "issue", *folder, *DATA, "--rows", "17")
    assert (code, out) == (0, f"17\t{tokens[1]}\n")

    grid = grid_for(batch=False, **{"client-dir": str(tmp_path)})
    selection = Forget(forget="samples", forget_tokens=",".join(tokens)).config()
    reply = ask(grid, "query.forget", {**selection, "server-round": 5, "request": "r"}, node=1)
    assert reply.content["metrics"]["rows"] == 2

    code, out, _ = call(capsys, "list", *folder, "--partition", "1", "--json")
    kept = json.loads(out)
    assert (code, kept["classes"]) == (0, {})
    assert list(kept["rows"].values()) == [{"round": 5, "request": "r"}] * 2
    code, out, _ = call(capsys, "list", *folder, "--partition", "1")
    assert out.endswith("0 classes and 2 rows are forgotten\n")

    code, out, _ = call(capsys, "check", *folder, *DATA, "--json")
    counts = json.loads(out)
    assert (code, counts["left_out"], counts["forgotten_but_trained"]) == (0, 2, 0)

    def wrong(keeping, examples):
        """All rows, and wrong hashes remembered of them."""
        copy = TensorDataset(*examples.tensors)
        rows._remember(copy, ("0" * 64,) * len(copy))
        return copy

    monkeypatch.setattr(Keeping, "without_forgotten", wrong)
    code, out, _ = call(capsys, "check", *folder, *DATA, "--json")
    counts = json.loads(out)
    assert (code, counts["trained"], counts["forgotten_but_trained"]) == (1, counts["rows"], 2)


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["issue", *DATA, "--rows", "3x"], 2, "--rows takes numbers, such as 3,17, got '3x'"),
        (["issue", *DATA, "--rows", "900"], 1, "rows are numbered from 0 to"),
        (["check", "--set", "alpha"], 2, "--set takes KEY=VALUE, got 'alpha'"),
        (["check", "--set", "alpha=0"], 2, "settings: alpha"),
        (["check", "--task", "nosuch"], 1, "there is no task 'nosuch'"),
        (["check", "--partition", "3", "--partitions", "3"], 2, "is none of --partitions 3"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, arguments, code, text):
    found, _, err = call(capsys, *arguments, "--client-dir", str(tmp_path / "folder"))
    assert (found, len(err.splitlines())) == (code, 1)
    assert text in err
    assert not (tmp_path / "folder").exists()


def test_a_client_with_its_own_data_has_the_folder_itself(tmp_path):
    keeping, examples = _opened(tmp_path, "digits", [], -1, 1)
    assert keeping.folder == tmp_path
    assert len(examples) > 1000


def test_logged_clients_are_trained_one_by_one_and_it_is_said(tmp_path, caplog):
    caplog.set_level("INFO", logger="secateur")
    count(train(grid_for(batch=True, **{"client-dir": str(tmp_path), "batch-log": "random"}), 1))
    assert "not trained in batches: a batch log looks at every step" in caplog.text


def test_a_dry_question_is_answered_as_the_real_one_and_writes_nothing(tmp_path):
    grid = grid_for(batch=False, **{"client-dir": str(tmp_path)})
    before = count(train(grid, 1))
    dry = ask(grid, "query.forget", Forget(forget="class", forget_class=3, dry=True).config())
    assert list(tmp_path.iterdir()) == []
    assert count(train(grid, 2)) == before
    done = ask(grid, "query.forget", CLASS_3)
    before, after = dict(dry.content["metrics"]), dict(done.content["metrics"])
    assert (before.pop("entries"), after.pop("entries")) == (0, 1)
    assert before == after
    assert dry.content["metrics"]["rows"] > 0
    # A damaged list could not be added to.
    (tmp_path / "0" / FORGOTTEN).write_text("?")
    assert ask(
        grid, "query.forget", Forget(forget="class", forget_class=4, dry=True).config()
    ).has_error()
    refusing = grid_for(batch=False, **{"client-dir": str(tmp_path), "refuse": "class"})
    reply = ask(refusing, "query.forget", Forget(forget="class", forget_class=3, dry=True).config())
    assert messages.is_refusal(reply)


@both
@pytest.mark.parametrize("lost", ["folder", "list"])
def test_a_list_that_is_shorter_than_the_server_saw_it_stops_training(tmp_path, batch, lost):
    where = {"client-dir": str(tmp_path)}
    reply = ask(grid_for(batch=batch, **where), "query.forget", CLASS_3)
    entries = reply.content["metrics"]["entries"]
    assert entries == 1
    grid = grid_for(batch=batch, **where)
    kept = count(train(grid, 1, entries=entries))
    if lost == "folder":
        shutil.rmtree(tmp_path / "0")
    else:
        (tmp_path / "0" / FORGOTTEN).unlink()  # no tokens were issued, so it need not be there
    keeping_at.cache_clear()  # a new process
    reply = train(grid_for(batch=batch, **where), 2, entries=entries)
    assert messages.is_refusal(reply)
    assert f"{messages.SHORTER}: " in reply.error.reason
    assert "has 0 entries, and had 1; put back the newest copy" in reply.error.reason
    # Nor does it train without any folder, nor is anything missed once the class is dropped again.
    assert messages.is_refusal(train(grid_for(batch=batch), 2, entries=entries))
    again = grid_for(batch=batch, **where)
    ask(again, "query.forget", CLASS_3)
    assert count(train(again, 3, entries=entries)) == kept
