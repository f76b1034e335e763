"""Unlearning of models in files: what the pure functions give, bit for bit, or one line and nothing."""

import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.func import functional_call
from torch.nn import functional

from client.task.protocol import load_task
from server.cli import main
from server.offline_methods import METHODS_OF_FILES
from strategies.archive import SavedModel, file_name
from strategies.methods.fedup import last_layer
from unlearning import (
    distillation,
    drift,
    fast,
    federaser,
    fedrecover,
    fedup,
    negation,
    negative_gradients,
    retraining,
    verifi,
)
from unlearning.catalogue import SERVER
from unlearning.history import MemoryHistory, Past
from unlearning.parameters import mean, weighted_mean
from unlearning.plan import Answer, carry_out
from unlearning.randomness import generator
from unlearning.routing import NEED_MAJORITY

CLIENTS = ("ann", "bob", "cem", "dee", "eve", "fay g")
GONE = ("bob", "eve")
OTHERS = ("ann", "cem", "dee", "fay g")
WEIGHTS = {client: 10.0 + place for place, client in enumerate(CLIENTS)}
NAMES = ("first.weight", "last.weight")
ROUNDS = (1, 2, 3)
ABSENT = {1: {"eve"}, 2: {"cem"}, 3: set()}
"""Who sat out which round; so eve joined in round 2."""


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, inputs):
        return self.last(functional.relu(self.norm(self.first(inputs))))


TASK = """
from torch.nn import functional
from tests_offline_net import Net

class Task:
    build_model = Net
    def client_data(self, partition, partitions): ...
    def server_data(self): ...
    def loss(self, outputs, targets): return functional.cross_entropy(outputs, targets)
    def metrics(self, outputs, targets):
        return {"accuracy": float((outputs.argmax(dim=1) == targets).float().mean())}

def make(options): return Task()
"""


def trained(client, number, start):
    """What a client makes of a model in a round; with eyes on who pulls where."""
    draw = torch.Generator().manual_seed(100 * CLIENTS.index(client) + number)
    size = 0.3 if client in GONE else 0.1
    return {
        name: start[name] + size * torch.randn(start[name].shape, generator=draw)
        if start[name].is_floating_point() and name != "norm.running_var"
        else start[name] + 1
        for name in sorted(start)  # files come in another order
    }


def played():
    """Three rounds of a federation: round -> (start, models, weights)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    past = {}
    for number in ROUNDS:
        present = [client for client in CLIENTS if client not in ABSENT[number]]
        sent = {client: trained(client, number, model) for client in present}
        weights = {client: WEIGHTS[client] for client in present}
        past[number] = Past(model, sent, weights)
        model = weighted_mean(list(sent.values()), list(weights.values()))
    return past


PAST = played()
BEFORE, LOCALS = PAST[3].start, PAST[3].models
ORDER = {"order": json.dumps(list(BEFORE))}
RETAINED = weighted_mean([LOCALS[c] for c in OTHERS], [WEIGHTS[c] for c in OTHERS])
SHARES = [WEIGHTS[client] / sum(WEIGHTS.values()) for client in GONE]
DRAW = torch.Generator().manual_seed(8)
INPUTS = torch.randn(20, 6, generator=DRAW)
TARGETS = torch.randint(3, (20,), generator=DRAW)


def write(folder, past, metadata=ORDER):
    """Write the last round, and all of them, as other frameworks would."""
    (folder / "locals").mkdir(parents=True, exist_ok=True)
    save_file(BEFORE, folder / "before.safetensors", metadata)
    for client, model in LOCALS.items():
        told = {**metadata, "num_examples": f"{WEIGHTS[client]:g}"}
        save_file(model, folder / "locals" / file_name(client), told)
    for number, (start, models, weights) in past.items():
        place = folder / f"history/round-{number:04d}"
        place.mkdir(parents=True)
        save_file(start, place / "global.safetensors", metadata)
        for client, model in models.items():
            told = {**metadata, "num_examples": f"{weights[client]:g}"}
            save_file(model, place / file_name(client), told)
    save_file({"inputs": INPUTS, "targets": TARGETS}, folder / "data.safetensors")


@pytest.fixture(scope="session")
def _files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    write(folder, {n: (p.start, p.models, p.weights) for n, p in PAST.items()})
    return folder


@pytest.fixture
def here(_files, tmp_path, monkeypatch):
    """A folder with files of its own, to be in."""
    for path in _files.rglob("*.safetensors"):
        target = tmp_path / path.relative_to(_files)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    module = type(sys)("tests_offline_net")
    module.Net = Net
    monkeypatch.setitem(sys.modules, "tests_offline_net", module)
    monkeypatch.delitem(sys.modules, "tests_offline_task", raising=False)
    (tmp_path / "tests_offline_task.py").write_text(TASK, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    load_task.cache_clear()  # it knows the task by a name that the next test gives to another


USUAL = ("--before", "before.safetensors", "--locals", "locals", "--out", "out.safetensors")
HISTORY = ("--history", "history")
DATA = ("--data", "data.safetensors", "--task", "tests_offline_task:make")
ANSWERS = ("--answers", "answers")


def call(capsys, *arguments):
    """Run the command in this process; return exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as done:
        main(["unlearn", *arguments])
    captured = capsys.readouterr()
    return done.value.code, captured.out, captured.err


def unlearn(capsys, method, *arguments, forget="bob,eve"):
    """Run the command and return its report and the model that it wrote."""
    code, out, err = call(capsys, method, *USUAL, "--forget", forget, "--json", *arguments)
    assert code == 0, err
    assert err == ""
    return json.loads(out), load_file("out.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(
        torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in other
    )


def masked(rate, score="abs", names=NAMES, seed=0):
    flagged = mean([LOCALS[client] for client in GONE])
    masks = fedup.conflict_mask(
        fedup.disagreement(flagged, RETAINED, names),
        BEFORE,
        rate,
        score=score,
        flagged=flagged,
        generator=generator(seed, "random pruning"),
    )
    return fedup.prune(RETAINED, masks), {n: int(mask.sum()) for n, mask in masks.items()}


def adaptive():
    return fedup.adaptive_rate(
        fedup.similarity([last_layer(LOCALS[client], NAMES) for client in OTHERS])
    )


def ledger(memory):
    rows = {}
    for past in PAST.values():
        rows = drift.updated(rows, past.models, past.weights, memory)
    return [rows[client] for client in GONE]


EARLIER = MemoryHistory({number: PAST[number] for number in (1, 2)})
"""What the average of the others still holds: it lacks what was sent in the last round."""
ALL = weighted_mean([LOCALS[c] for c in CLIENTS], [WEIGHTS[c] for c in CLIENTS])


def forward(model, inputs):
    return functional_call(Net().eval(), dict(model), (inputs,))


def accuracy(model):
    with torch.no_grad():
        return float((forward(model, INPUTS).argmax(dim=1) == TARGETS).float().mean())


def repaired(model):
    return distillation.fine_tune(
        model, forward, functional.cross_entropy, INPUTS, TARGETS,
        epochs=2, learning_rate=0.05, batch_size=8, generator=generator(0, "repair"),
    )  # fmt: skip


def distilled():
    return distillation.kd_unlearn(
        RETAINED, EARLIER, frozenset(GONE), forward, INPUTS,
        epochs=2, batch_size=8, generator=generator(4, "distillation"),
    )  # fmt: skip


SERVER_ONLY = {
    "fedup": (["fedup"], lambda: masked(adaptive())),
    "fixed rate": (["fedup", "--set", "rate=0.3"], lambda: masked(0.3)),
    "everything": (["fedup", "--set", "rate=1"], lambda: masked(1.0)),
    "nothing": (["fedup", "--set", "rate=0"], lambda: masked(0.0)),
    "signed": (["fedup", "--set", "rate=0.3", "--set", "score=signed"], lambda: masked(0.3, "signed")),
    "diff": (["fedup", "--set", "rate=0.3", "--set", "score=diff"], lambda: masked(0.3, "diff")),
    "malmag": (["fedup", "--set", "rate=0.3", "--set", "score=malmag"], lambda: masked(0.3, "malmag")),
    "natural score": (["fedup", "--set", "score=natural"], lambda: masked(0.0)),
    "random score": (["fedup", "--set", "rate=0.3", "--set", "score=random"], lambda: masked(0.3, "random")),
    "random": (["random", "--set", "rate=0.3"], lambda: masked(0.3, "random")),
    "random, another seed": (["random", "--set", "rate=0.3", "--set", "seed=7"], lambda: masked(0.3, "random", seed=7)),
    "biases": (
        ["fedup", "--set", "rate=0.3", "--set", "prune-bias=true"],
        lambda: masked(0.3, names=(*NAMES, "first.bias", "last.bias")),
    ),
    "order": (["fedup", "--set", "rate=0.3", "--set", "order=last.weight"], lambda: masked(0.3, names=("last.weight",))),
    "drift": (["drift", *HISTORY], lambda: (drift.subtract(RETAINED, [ledger(1.0)], [sum(SHARES)]), {})),
    "drift, set": (
        ["drift", *HISTORY, "--set", "strength=1", "--set", "memory=0.5"],
        lambda: (drift.subtract(RETAINED, [ledger(0.5)], [sum(SHARES)], 1.0), {}),
    ),
    "not": (["not"], lambda: (negation.negate(RETAINED, ("first.weight", "first.bias")), {})),
    "not, layers": (
        ["not", "--set", "layers=last.weight,norm.bias"],
        lambda: (negation.negate(RETAINED, ("last.weight", "norm.bias")), {}),
    ),
    "not, order": (
        ["not", "--set", "order=last.weight,first.weight"],
        lambda: (negation.negate(RETAINED, ("last.weight", "last.bias")), {}),
    ),
    "delta": (
        ["negative-gradients", *HISTORY, "--set", "strength=0.5"],
        lambda: (negative_gradients.delta(RETAINED, EARLIER, frozenset(GONE), 0.5), {}),
    ),
    "loo": (
        ["negative-gradients", "--set", "variant=loo"],
        lambda: (negative_gradients.leave_one_out(ALL, [LOCALS[c] for c in GONE], SHARES), {}),
    ),
    "raw": (
        ["negative-gradients", "--set", "variant=raw", "--set", "strength=0.7"],
        lambda: (negative_gradients.raw(ALL, [LOCALS[c] for c in GONE], SHARES, 0.7), {}),
    ),
    "natural": (["natural"], lambda: (RETAINED, {})),
    "verifi": (["verifi"], lambda: (scaled(False), {})),
    "verifi, strong": (["verifi", "--set", "strong=true"], lambda: (scaled(True), {})),
    "fast": (
        ["fast", *HISTORY, *DATA, "--set", "epochs=2", "--set", "learning-rate=0.05", "--set", "batch-size=8"],
        lambda: (fast.fast(RETAINED, EARLIER, frozenset(GONE), accuracy, repaired)[0], {}),
    ),
    "kd": (["kd", *HISTORY, *DATA, "--set", "epochs=2", "--set", "batch-size=8", "--set", "seed=4"], lambda: (distilled(), {})),
}  # fmt: skip


def scaled(strong, rounds=1, ask=None):
    plan = verifi.scale_to_unlearn(
        BEFORE, RETAINED, [LOCALS[c] for c in GONE], SHARES, OTHERS,
        first_round=4, rounds=rounds, strong=strong,
    )  # fmt: skip
    return carry_out(plan, ask)


# ---------------------------------------------------------------- results
def test_every_method_of_the_catalogue_works_on_files():
    assert METHODS_OF_FILES.keys() == SERVER.keys()
    asking = {"federaser", "fedrecover", "retrain", "rollback"}
    assert {arguments[0] for arguments, _ in SERVER_ONLY.values()} | asking == SERVER.keys()


@pytest.mark.parametrize("kind", SERVER_ONLY)
def test_a_result_is_the_pure_functions_bit_for_bit(kind, here, capsys):
    arguments, oracle = SERVER_ONLY[kind]
    expected, zeroed = oracle()
    report, model = unlearn(capsys, *arguments)
    assert same(model, expected)
    assert report["zeroed"] == zeroed
    assert list(SavedModel(here / "out.safetensors")) == list(BEFORE)


@pytest.mark.parametrize("kind", SERVER_ONLY)
def test_a_result_is_the_same_every_time_and_inputs_stay_as_they_are(kind, here, capsys):
    arguments, _ = SERVER_ONLY[kind]
    before = digest(here)
    unlearn(capsys, *arguments)
    first = (here / "out.safetensors").read_bytes()
    unlearn(capsys, *arguments, "--force", forget="eve, bob ,eve")
    assert (here / "out.safetensors").read_bytes() == first
    (here / "out.safetensors").unlink()
    assert digest(here) == before


def digest(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("name", SERVER)
def test_a_guarantee_is_that_of_the_catalogue(name, here, capsys):
    arguments = [*HISTORY, *DATA] + (["--answers", "answers"] if name in ASKING else [])
    report = by_files(capsys, here, name, *arguments)[0]
    assert report["guarantee"] == SERVER[name].guarantee
    assert report["guarantee"] == ("exact" if name in ("retrain", "rollback") else "none")
    assert report["safe_when_target_lies"] == SERVER[name].safe


def test_the_report_has_the_keys_that_were_promised(here, capsys):
    report, _ = unlearn(capsys, "fedup", "--set", "rate=0.25")
    assert report["method"] == "fedup"
    assert report["forgotten"] == list(GONE)
    assert report["retained"] == list(OTHERS)
    # 8 x 6 and 3 x 8 weights: a quarter of 48 and of 24.
    assert report["zeroed"] == {"first.weight": 12, "last.weight": 6}
    assert report["settings"] == {
        "order": [], "rate": 0.25, "prune_bias": False, "seed": 0, "score": "abs", "rate_chosen": "fixed",
    }  # fmt: skip
    assert 0 < report["seconds"] < 60
    assert report["guarantee"] == "none"
    assert report["warnings"] == []
    assert report["conflict_percentiles"] == {"bob": 1.0, "eve": 1.0}


def test_an_adaptive_rate_is_told(here, capsys):
    settings = unlearn(capsys, "fedup")[0]["settings"]
    assert settings["rate"] == adaptive()
    assert (settings["rate_chosen"], settings["last"]) == ("adaptive", "last.weight")


def test_without_json_there_is_a_summary_for_people(here, capsys):
    code, out, err = call(capsys, "fedup", *USUAL, "--forget", "bob,eve", "--set", "rate=0.25")
    assert code == 0
    assert err == ""
    assert "fedup forgot bob, eve; 4 of the last round stay" in out
    assert "18 of 72 weights zeroed (25.0%)" in out
    assert "guarantee: none; measure what is left" in out
    assert "exact" not in out
    assert "model: out.safetensors" in out


def test_scaling_goes_on_with_answers_where_asked_to(here, capsys):
    _, model, _ = by_files(capsys, here, "verifi", *ANSWERS, *HISTORY, "--set", "rounds=3")
    assert same(model, scaled(False, rounds=3, ask=answer))


# ---------------------------------------------------------------- asking by files
def answer(ask):
    return [
        Answer(c, trained(c, ask.config["round"], ask.arrays), num_examples=WEIGHTS[c])
        for c in ask.to
    ]


def by_files(capsys, folder, method, *arguments, forget="bob,eve", clients=CLIENTS):
    """Run the command, do what it asks for, and run it again, until it is done."""
    questions = []
    while True:
        code, out, err = call(capsys, method, *USUAL, "--forget", forget, "--json", *arguments)
        if code == 0:
            return json.loads(out), load_file(folder / "out.safetensors"), questions
        assert code == 1
        assert out == ""
        assert not (folder / "out.safetensors").exists()
        number = len(questions) + 1
        place = folder / f"answers/ask-{number:04d}"
        question = json.loads((place / "ask.json").read_text(encoding="utf-8"))
        assert question["ask"] == number
        assert f"secateur: waiting for {', '.join(question['to'])} to answer ask {number}: " in err
        assert err.count("\n") == 1
        questions.append(question)
        start = load_file(place / "global.safetensors")
        for client in set(question["to"]) & set(clients):
            told = {"num_examples": str(WEIGHTS[client])}
            save_file(trained(client, question["round"], start), place / file_name(client), told)


WHOLE = MemoryHistory(PAST)
ASKING = {
    "retrain": lambda: retraining.retrain(PAST[1].start, OTHERS, 3),
    # eve joined in round 2, bob took part from the first on.
    "rollback": lambda: retraining.retrain(PAST[1].start, OTHERS, 3),
    "federaser": lambda: federaser.federaser(WHOLE, GONE, OTHERS),
    "fedrecover": lambda: fedrecover.fedrecover(WHOLE, GONE, OTHERS),
}


@pytest.mark.parametrize("name", ASKING)
def test_a_plan_is_carried_on_from_answers_in_files(name, here, capsys):
    asked = []

    def ask(question):
        asked.append(question)
        return answer(question)

    expected = carry_out(ASKING[name](), ask)
    _, model, questions = by_files(capsys, here, name, *HISTORY, *ANSWERS)
    assert same(model, expected)
    assert [(q["action"], q["round"], tuple(q["to"])) for q in questions] == [
        (q.action, q.config["round"], q.to) for q in asked
    ]
    assert [q["config"] for q in questions] == [dict(q.config) for q in asked]


def test_rollback_starts_where_they_joined_and_retraining_at_the_beginning(here, capsys):
    report, model, questions = by_files(capsys, here, "rollback", *HISTORY, *ANSWERS, forget="eve")
    assert [q["round"] for q in questions] == [2, 3]
    assert report["settings"] == {"answers": "all", "rounds": 2, "from_round": 1}
    stay = [client for client in CLIENTS if client != "eve"]
    plan = retraining.retrain(PAST[2].start, stay, 2, first_round=2)
    assert same(model, carry_out(plan, answer))


def test_rollback_is_refused_where_it_would_not_be_exact(here, capsys):
    for path in (here / "history/round-0002").iterdir():
        path.unlink()
    (here / "history/round-0002").rmdir()
    arguments = (*USUAL, *HISTORY, *ANSWERS, "--forget", "eve")
    code, _, err = call(capsys, "rollback", *arguments)
    assert (code, "rollback is exact only if every round is recorded" in err) == (1, True)
    for path in (here / "history/round-0003").iterdir():
        path.unlink()
    (here / "history/round-0003").rmdir()
    code, _, err = call(capsys, "rollback", *arguments)
    assert (code, "must know when they first took part" in err) == (1, True)
    (here / "history/round-0001").rename(here / "history/round-0007")
    code, _, err = call(capsys, "retrain", *arguments)
    assert (code, "the first round recorded is 7; give a history with round-0001" in err) == (
        1,
        True,
    )
    assert not (here / "answers").exists()


def test_fewer_answers_are_enough_only_where_that_was_said(here, capsys):
    arguments = ("retrain", *USUAL, *HISTORY, *ANSWERS, "--forget", "bob,eve", "--json")
    call(capsys, *arguments)
    place = here / "answers/ask-0001"
    model = trained("ann", 1, PAST[1].start)
    save_file(model, place / "ann.safetensors", {"num_examples": "3"})
    code, _, err = call(capsys, *arguments)
    assert (code, "waiting for cem, dee, fay g to answer ask 1" in err) == (1, True)
    assert not (here / "answers/ask-0002").exists()
    code, _, err = call(capsys, *arguments, "--set", "answers=enough")
    assert (code, "waiting for ann, cem, dee, fay g to answer ask 2" in err) == (1, True)
    assert same(load_file(here / "answers/ask-0002/global.safetensors"), model)
    save_file(trained("dee", 2, model), here / "answers/ask-0002/dee.safetensors")
    code, _, err = call(capsys, *arguments, "--set", "answers=enough")
    assert (code, "to answer ask 3" in err) == (1, True)
    start = load_file(here / "answers/ask-0003/global.safetensors")
    assert same(start, trained("dee", 2, model))
    save_file(trained("ann", 3, start), here / "answers/ask-0003/ann.safetensors")
    code, out, _ = call(capsys, *arguments, "--set", "answers=enough")
    assert code == 0
    warnings = json.loads(out)["warnings"]
    for ask, one in ((1, "cem, dee, fay g"), (2, "ann, cem, fay g"), (3, "cem, dee, fay g")):
        told = [w for w in warnings if w.startswith(f"ask {ask}: 1 of 4 clients answered; without")]
        assert len(told) == 1
        assert all(name in told[0] for name in one.split(", "))


@pytest.mark.parametrize("name", SERVER)
def test_half_or_more_are_forgotten_only_by_what_needs_no_majority(name, here, capsys):
    # Three of six; floor((6 - 1) / 2) = 2.
    arguments = (*USUAL, *HISTORY, *ANSWERS, "--forget", "ann,bob,eve")
    code, _, err = call(capsys, name, *arguments, *(DATA if name in ("fast", "kd") else ()))
    assert ("3 of 6 participants are to be forgotten" in err) is (name in NEED_MAJORITY)
    if name in NEED_MAJORITY:
        assert code == 1
        assert not (here / "out.safetensors").exists()


def test_an_answer_that_comes_late_is_not_mixed_in(here, capsys):
    arguments = (
        "retrain",
        *USUAL,
        *HISTORY,
        *ANSWERS,
        "--forget",
        "bob,eve",
        "--set",
        "answers=enough",
    )
    call(capsys, *arguments)
    save_file(trained("ann", 1, PAST[1].start), here / "answers/ask-0001/ann.safetensors")
    call(capsys, *arguments)
    save_file(trained("dee", 1, PAST[1].start), here / "answers/ask-0001/dee.safetensors")
    code, _, err = call(capsys, *arguments)
    assert code == 1
    assert "ask-0002 holds another question than the one to be asked now" in err


def test_answers_of_another_question_are_refused(here, capsys):
    arguments = (*USUAL, *HISTORY, *ANSWERS, "--json")
    call(capsys, "retrain", *arguments, "--forget", "bob,eve")
    code, _, err = call(capsys, "retrain", *arguments, "--forget", "bob")
    assert (code, "holds another question" in err) == (1, True)


def test_answers_that_are_there_before_their_question_are_refused(here, capsys):
    place = here / "answers/ask-0001"
    place.mkdir(parents=True)
    for client in OTHERS:
        save_file(trained(client, 1, PAST[3].start), place / file_name(client))
    arguments = (*USUAL, *HISTORY, *ANSWERS, "--forget", "bob,eve")
    code, _, err = call(capsys, "retrain", *arguments)
    assert (code, "ask-0001 holds an answer of ann, cem, dee, fay g and no question" in err) == (
        1,
        True,
    )
    assert not (place / "ask.json").exists()
    assert not (here / "answers/ask-0002").exists()


def test_a_question_that_is_no_text_is_another_one(here, capsys):
    arguments = (*USUAL, *HISTORY, *ANSWERS, "--forget", "bob,eve")
    call(capsys, "retrain", *arguments)
    (here / "answers/ask-0001/ask.json").write_bytes(b"\xff\xfe")
    code, _, err = call(capsys, "retrain", *arguments)
    assert (code, "ask-0001 holds another question" in err) == (1, True)


BAD_ANSWERS = {
    "of the forgotten": (("bob", lambda m: m), "bob.safetensors is of a client that was not asked"),
    "of a stranger": (("zoe", lambda m: m), "zoe.safetensors is of a client that was not asked"),
    "with NaN": (
        ("ann", lambda m: m | {"last.bias": m["last.bias"] * math.nan}),
        "ann.safetensors: tensor last.bias holds values that are not finite",
    ),
    "of another shape": (
        ("ann", lambda m: m | {"last.bias": torch.zeros(4)}),
        "ann.safetensors does not fit answers/ask-0001/global.safetensors: tensor last.bias is (3,)",
    ),
}


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_answers_that_cannot_be_used(kind, here, capsys):
    (client, change), message = BAD_ANSWERS[kind]
    arguments = ("retrain", *USUAL, *HISTORY, *ANSWERS, "--forget", "bob,eve")
    call(capsys, *arguments)
    place = here / "answers/ask-0001"
    for other in OTHERS:
        save_file(trained(other, 1, PAST[1].start), place / file_name(other))
    save_file(change(trained("ann", 1, PAST[1].start)), place / file_name(client))
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert not (here / "out.safetensors").exists()


# ---------------------------------------------------------------- what cannot be used
def rewrite(path, change, **metadata):
    """Save a model again, changed."""
    told = dict(SavedModel(Path(path)).metadata) | metadata
    save_file(change(load_file(path)), path, told)


def spoil(name, value):
    def change(model):
        model[name].reshape(-1)[0] = value
        return model

    return change


def cut(path):
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


def empty(folder):
    for path in Path(folder).rglob("*.safetensors"):
        path.unlink()


def retask(part, other):
    """Change the task, which is the user's own code."""
    path = Path("tests_offline_task.py")
    path.write_text(path.read_text(encoding="utf-8").replace(part, other), encoding="utf-8")
    load_task.cache_clear()


def flatten_all():
    for path in [Path("before.safetensors"), *Path("locals").iterdir()]:
        rewrite(
            path, lambda m: {name.replace("weight", "kernel"): tensor for name, tensor in m.items()}
        )


USUAL_LOCAL = "locals/cem.safetensors"
FEDUP = ["fedup"]
BAD = {
    # what was given
    "unknown method": (["prune"], 2, "there is no method 'prune'; choose one of fedup, drift"),
    "unknown client": ([*FEDUP, "--forget", "zoe,bob"], 1, "there is no zoe in locals, only ann, bob, cem"),
    "path as a client": ([*FEDUP, "--forget", "../bob"], 1, "there is no ../bob in locals"),
    "the global model": ([*FEDUP, "--forget", "global"], 1, "there is no global in locals"),
    "nobody": ([*FEDUP, "--forget", " , "], 1, "no client is named; give --forget ID"),
    "everybody": (["natural", "--forget", ",".join(CLIENTS)], 1, "all 6 clients of locals are to be forgotten"),
    "half": ([*FEDUP, "--forget", "ann,bob,cem"], 1, "3 of 6 participants are to be forgotten, but at most 2"),
    "half, random": (["random", "--forget", "ann,bob,cem"], 1, "at most 2"),
    "half, drift": (["drift", *HISTORY, "--forget", "ann,bob,cem"], 1, "at most 2"),
    "rate": ([*FEDUP, "--set", "rate=1.5"], 2, "rate = 1.5 is outside [0, 1]; give a share, or adaptive"),
    "negative rate": ([*FEDUP, "--set", "rate=-0.1"], 2, "rate = -0.1 is outside [0, 1]"),
    "rate that is none": ([*FEDUP, "--set", "rate=nan"], 2, "rate = nan is outside [0, 1]"),
    "rate in words": ([*FEDUP, "--set", "rate=much"], 2, "rate = 'much'"),
    "unknown setting": ([*FEDUP, "--set", "rates=0.1"], 2, "unknown key 'rates'; its settings are order, rate"),
    "setting of another": (["natural", "--set", "rate=0.1"], 2, "unknown key 'rate'; it has no settings"),
    "setting without a value": ([*FEDUP, "--set", "rate"], 2, "--set takes KEY=VALUE, got 'rate'"),
    "score": ([*FEDUP, "--set", "score=best"], 2, "score = 'best'"),
    "strength": (["drift", *HISTORY, "--set", "strength=-1"], 2, "strength = -1"),
    "endless strength": (["drift", *HISTORY, "--set", "strength=inf"], 2, "strength = inf"),
    "memory": (["drift", *HISTORY, "--set", "memory=0"], 2, "memory = 0"),
    "variant": (["negative-gradients", "--set", "variant=half"], 2, "variant = 'half'"),
    "interval": (["federaser", *HISTORY, "--set", "interval=0"], 2, "interval = 0"),
    "two faults": ([*FEDUP, "--set", "rate=2", "--set", "x=1"], 2, "unknown key 'x'"),
    "order": ([*FEDUP, "--set", "order=first.weight,no.such"], 1, "order names 'no.such', and the model has no such tensor of"),
    "order of counters": ([*FEDUP, "--set", "order=norm.num_batches_tracked"], 1, "order names 'norm.num_batches_tracked'"),
    "layers": (["not", "--set", "layers=no.such"], 1, "the model has no tensor no.such"),
    "layers of counters": (["not", "--set", "layers=norm.num_batches_tracked"], 1, "norm.num_batches_tracked is torch.int64; only floating-point tensors can be negated"),
    "no history": (["drift"], 1, "drift needs more than the last round: give --history DIR"),
    "no data": (["fast", *HISTORY], 1, "give --data FILE with inputs and targets, and --task NAME"),
    "no task": (["kd", *HISTORY, "--data", "data.safetensors"], 1, "give --data FILE with inputs, and --task NAME"),
    "neither": (["kd"], 1, "give --history DIR and --data FILE with inputs, and --task NAME"),
    "no answers": (["retrain", *HISTORY], 1, "must train for this method; give --answers DIR"),
    "unknown task": (["kd", *HISTORY, "--data", "data.safetensors", "--task", "nosuch"], 1, "there is no task 'nosuch'"),
    "another model": (["kd", *HISTORY, "--data", "data.safetensors", "--task", "digits"], 1, "the model of task digits does not fit before.safetensors: models differ in their tensors"),
    "missing option": (["fedup", "--force"], 2, "Missing option"),
    # where it is to go
    "out is there": ([*FEDUP, "--out", "data.safetensors"], 1, "--out data.safetensors is there already; give --force"),
    "out is a folder": ([*FEDUP, "--out", "locals"], 1, "--out locals is a folder"),
    "no folder for out": ([*FEDUP, "--out", "no/such/m.safetensors"], 1, "no folder no/such; give a file in a folder that is there"),
    "out is an input": ([*FEDUP, "--force", "--out", "before.safetensors"], 1, "is an input, and inputs are never written to"),
    "out is no file": ([*FEDUP, "--force", "--out", "pipe"], 1, "--out pipe is no file; give a file in a folder", lambda: os.mkfifo("pipe")),
    "out is a client": ([*FEDUP, "--force", "--out", "locals/ann.safetensors"], 1, "lies among the clients' models"),
    "out is in the history": (["drift", *HISTORY, "--out", "history/round-0001/x.safetensors"], 1, "lies among the clients' models"),
    # what the files hold
    "no before": ([*FEDUP, "--before", "gone.safetensors"], 1, "gone.safetensors cannot be read as safetensors: No such file"),
    "before is a folder": ([*FEDUP, "--before", "locals"], 1, "locals cannot be read as safetensors: it is a folder"),
    "no weights": (["natural"], 1, "before.safetensors holds no weights, which are floating-point tensors", lambda: rewrite("before.safetensors", lambda m: {"first.weight": m["first.weight"].to(torch.int8)})),
    "before is a client": ([*FEDUP, "--before", "locals/ann.safetensors"], 1, "locals/ann.safetensors lies among the clients' models and would be"),
    "no locals": ([*FEDUP, "--locals", "gone"], 1, "there is no folder gone with clients' models"),
    "locals is a file": ([*FEDUP, "--locals", "data.safetensors"], 1, "there is no folder data.safetensors"),
    "locals is empty": ([*FEDUP], 1, "locals holds no model; it must hold CLIENT.safetensors of each client", lambda: empty("locals")),
    "cut": ([*FEDUP], 1, "locals/cem.safetensors cannot be read as safetensors", lambda: cut(USUAL_LOCAL)),
    "text": ([*FEDUP], 1, "before.safetensors cannot be read as safetensors", lambda: Path("before.safetensors").write_text("x" * 99)),
    "another shape": ([*FEDUP], 1, "locals/cem.safetensors does not fit before.safetensors: tensor last.bias is (3,)", lambda: rewrite(USUAL_LOCAL, lambda m: m | {"last.bias": torch.zeros(3, 1)})),
    "another type": ([*FEDUP], 1, "tensor last.bias is (3,) torch.float32 in one model and (3,) torch.float64", lambda: rewrite(USUAL_LOCAL, lambda m: m | {"last.bias": m["last.bias"].double()})),
    "another name": ([*FEDUP], 1, "cem.safetensors does not fit before.safetensors: models differ in their tensors: more", lambda: rewrite(USUAL_LOCAL, lambda m: m | {"more": torch.zeros(3)})),
    "NaN among the others": ([*FEDUP], 1, "locals/cem.safetensors: tensor first.weight holds values that are not finite", lambda: rewrite(USUAL_LOCAL, spoil("first.weight", math.nan))),
    "NaN in a bias": (["natural"], 1, "locals/cem.safetensors: tensor last.bias holds", lambda: rewrite(USUAL_LOCAL, spoil("last.bias", math.nan))),
    "Inf in the forgotten": ([*FEDUP], 1, "locals/eve.safetensors: tensor last.weight holds", lambda: rewrite("locals/eve.safetensors", spoil("last.weight", math.inf))),
    "NaN in before": (["natural"], 1, "before.safetensors: tensor last.bias holds", lambda: rewrite("before.safetensors", spoil("last.bias", math.nan))),
    "weight": ([*FEDUP], 1, "locals/cem.safetensors: num_examples is '-3'; it must be a number above 0", lambda: rewrite(USUAL_LOCAL, dict, num_examples="-3")),
    "two of one client": ([*FEDUP], 1, "are both of client 'cem'; keep one", lambda: Path("locals/%63em.safetensors").write_bytes(Path(USUAL_LOCAL).read_bytes())),
    "type of its own": ([*FEDUP], 1, "tensor x is of type F8_E4M3; known are BOOL", lambda: save_file({"x": torch.zeros(2).to(torch.float8_e4m3fn)}, USUAL_LOCAL)),
    "nothing prunable": ([*FEDUP], 1, "no tensor is named *.weight and has two or more dimensions; name the weights", flatten_all),
    "no linear layer": ([*FEDUP, "--set", "order=norm.weight"], 1, "the adaptive rate needs a linear layer; set a fixed rate"),
    # history
    "no such history": (["drift", "--history", "gone"], 1, "there is no folder gone with recorded rounds"),
    "empty history": (["drift", "--history", "locals"], 1, "locals holds no round; it must hold round-0001/global.safetensors"),
    "no start": (["drift", *HISTORY], 1, "round-0002/global.safetensors cannot be read as safetensors: No such file", lambda: Path("history/round-0002/global.safetensors").unlink()),
    "empty round": (["drift", *HISTORY], 1, "history/round-0002 holds no client's model", lambda: [p.unlink() for p in Path("history/round-0002").glob("[!g]*")]),
    "round of another name": (["drift", *HISTORY], 1, "history/round-1 is not the name of a round: they are round-0001", lambda: shutil.copytree("history/round-0001", "history/round-1")),
    "round 0": (["drift", *HISTORY], 1, "history/round-0000 is not the name of a round", lambda: Path("history/round-0001").rename("history/round-0000")),
    "total of a round": (["negative-gradients", *HISTORY], 1, "round-0001/global.safetensors: total_examples is 'all'; it must be a number above 0", lambda: rewrite("history/round-0001/global.safetensors", dict, total_examples="all")),
    "no total of a round": (["negative-gradients", *HISTORY], 1, "total_examples is '0'; it must be a number above 0", lambda: rewrite("history/round-0002/global.safetensors", dict, total_examples="0")),
    "locals of an earlier round": (["drift", *HISTORY, "--before", "history/round-0002/global.safetensors", "--locals", "history/round-0002"], 1, "round 2 started from history/round-0002/global.safetensors, and history goes on to round 3"),
    "history of another model": (["drift", *HISTORY], 1, "history/round-0001/ann.safetensors does not fit before.safetensors", lambda: rewrite("history/round-0001/ann.safetensors", lambda m: {"w": torch.zeros(1)})),
    "NaN in history": (["drift", *HISTORY], 1, "history/round-0001/ann.safetensors: tensor last.bias holds", lambda: rewrite("history/round-0001/ann.safetensors", spoil("last.bias", math.nan))),
    "NaN subtracted": (["negative-gradients", *HISTORY], 1, "history/round-0001/bob.safetensors: tensor last.bias holds", lambda: rewrite("history/round-0001/bob.safetensors", spoil("last.bias", math.nan))),
    "NaN tried": (["fast", *HISTORY, *DATA], 1, "history/round-0001/bob.safetensors: tensor last.bias holds", lambda: rewrite("history/round-0001/bob.safetensors", spoil("last.bias", math.nan))),
    "NaN replayed": (["fedrecover", *HISTORY, *ANSWERS], 1, "history/round-0002/ann.safetensors: tensor last.bias holds", lambda: rewrite("history/round-0002/ann.safetensors", spoil("last.bias", math.nan))),
    "NaN at the start": (["retrain", *HISTORY, *ANSWERS], 1, "history/round-0001/global.safetensors: tensor last.bias holds", lambda: rewrite("history/round-0001/global.safetensors", spoil("last.bias", math.nan))),
    "too much subtracted": (["negative-gradients", *HISTORY, "--set", "strength=99"], 1, "lower the strength"),
    # data
    "no data file": (["kd", *HISTORY, "--data", "gone.safetensors", *DATA[2:]], 1, "gone.safetensors cannot be read as safetensors"),
    "data without inputs": (["kd", *HISTORY, *DATA], 1, "data.safetensors holds no examples; they are its tensor 'inputs'", lambda: rewrite("data.safetensors", lambda d: {"x": d["inputs"]})),
    "data without examples": (["kd", *HISTORY, *DATA], 1, "data.safetensors holds no examples", lambda: rewrite("data.safetensors", lambda d: {"inputs": d["inputs"][:0].clone()})),
    "one input": (["kd", *HISTORY, *DATA], 1, "data.safetensors holds no examples", lambda: rewrite("data.safetensors", lambda d: {"inputs": torch.tensor(1.0)})),
    "one target": (["fast", *HISTORY, *DATA], 1, "data.safetensors holds 20 inputs and 0 targets", lambda: rewrite("data.safetensors", lambda d: d | {"targets": torch.tensor(1)})),
    "task without a model": (["kd", *HISTORY, *DATA], 1, "task tests_offline_task:make cannot build its model: NameError", lambda: retask("build_model = Net", "build_model = staticmethod(lambda: nothing)")),
    "task without metrics": (["fast", *HISTORY, *DATA], 1, "task tests_offline_task:make fails on the examples of data.safetensors: KeyError", lambda: retask("float((", "{}['no'] + float((")),
    "data without targets": (["fast", *HISTORY, *DATA], 1, "data.safetensors holds no labels; they are its tensor 'targets'", lambda: rewrite("data.safetensors", lambda d: {"inputs": d["inputs"]})),
    "fewer targets": (["fast", *HISTORY, *DATA], 1, "data.safetensors holds 20 inputs and 5 targets", lambda: rewrite("data.safetensors", lambda d: d | {"targets": d["targets"][:5].clone()})),
    "data of another shape": (["kd", *HISTORY, *DATA], 1, "task tests_offline_task:make fails on the examples of data.safetensors: RuntimeError", lambda: rewrite("data.safetensors", lambda d: {"inputs": torch.zeros(4, 5)})),
    "targets that are none": (["fast", *HISTORY, *DATA], 1, "fails on the examples of data.safetensors", lambda: rewrite("data.safetensors", lambda d: d | {"targets": d["targets"] + 7})),
    "NaN in data": (["kd", *HISTORY, *DATA], 1, "data.safetensors: tensor inputs holds values that are not finite", lambda: rewrite("data.safetensors", spoil("inputs", math.nan))),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(kind, here, capsys):
    arguments, expected, message, *changes = BAD[kind]
    for change in changes:
        change()
    if "--forget" not in arguments and kind != "missing option":
        arguments = [*arguments, "--forget", "bob,eve"]
    defaults = dict(zip(USUAL[::2], USUAL[1::2], strict=True))
    given = [
        part for key, value in defaults.items() if key not in arguments for part in (key, value)
    ]
    before = digest(here)
    code, out, err = call(capsys, *arguments, *given, "--json")
    assert message in err
    assert code == expected
    assert err.startswith("secateur: ")
    assert err.count("\n") == 1
    assert out == ""
    assert digest(here) == before


def test_a_disk_that_fills_up_leaves_the_file_that_was_there(here, capsys, monkeypatch):
    import strategies.archive

    def fill_up(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    (here / "out.safetensors").write_bytes(b"before")
    monkeypatch.setattr(strategies.archive, "save_file", fill_up)
    code, _, err = call(capsys, "natural", *USUAL, "--forget", "bob", "--force")
    assert (code, err) == (
        1,
        "secateur: out.safetensors cannot be written: No space left on device\n",
    )
    assert (here / "out.safetensors").read_bytes() == b"before"
    assert not [path for path in here.iterdir() if path.name.startswith(".")]


# ---------------------------------------------------------------- what a person should know
def test_a_client_that_conflicts_little_may_be_honest(here, capsys):
    report, _ = unlearn(capsys, "fedup", "--set", "rate=0.1", forget="ann")
    share = report["conflict_percentiles"]["ann"]
    assert share < 0.75
    told = (
        f"likely_false_positive: ann conflicts more than only {share:.0%} of the retained clients"
    )
    assert report["warnings"] == [told]


def test_files_without_a_weight_among_others_with_one(here, capsys):
    rewrite(USUAL_LOCAL, dict)
    path = here / USUAL_LOCAL
    save_file(load_file(path), path)
    report, model = unlearn(capsys, "natural")
    assert report["warnings"] == ["no num_examples in the files of cem: counted as 1 there"]
    weights = WEIGHTS | {"cem": 1.0}
    assert same(model, weighted_mean([LOCALS[c] for c in OTHERS], [weights[c] for c in OTHERS]))


def test_files_without_any_weight_count_the_same(here, capsys):
    for path in (here / "locals").iterdir():
        save_file(load_file(path), path)
    report, model = unlearn(capsys, "natural")
    assert report["warnings"] == []
    assert same(model, mean([LOCALS[client] for client in OTHERS]))


def test_answers_without_a_weight_among_others_with_one(here, capsys):
    call(capsys, "verifi", *USUAL, *ANSWERS, "--forget", "bob,eve", "--set", "rounds=2")
    place = here / "answers/ask-0001"
    start = load_file(place / "global.safetensors")
    for client in OTHERS:
        told = None if client == "dee" else {"num_examples": "5"}
        save_file(trained(client, 2, start), place / file_name(client), told)
    report, _ = unlearn(capsys, "verifi", *ANSWERS, "--set", "rounds=2")
    assert report["warnings"] == [
        "ask 1: no num_examples in the files of dee: counted as 1 there",
    ]


def test_one_client_that_stays(here, capsys):
    for client in ("ann", "cem", "dee", "fay g"):
        (here / "locals" / file_name(client)).unlink()
    report, model = unlearn(capsys, "natural", forget="bob")
    assert report["warnings"] == ["one retained client: the average of the others is eve's model"]
    assert same(model, LOCALS["eve"])
    code, _, err = call(capsys, "fedup", *USUAL, "--forget", "bob", "--force")
    assert (code, "at most 0 can be" in err) == (1, True)


def test_an_order_of_layers_that_is_a_guess(here, capsys):
    for path in [here / "before.safetensors", *(here / "locals").iterdir()]:
        save_file(load_file(path), path)
    doubt = "first.weight was taken for the first layer, by its name; see --set order=A,B"
    assert unlearn(capsys, "not")[0]["warnings"] == [doubt]
    doubt = "last.weight was taken for the last layer, by its name; see --set order=A,B"
    assert unlearn(capsys, "fedup", "--force")[0]["warnings"] == [doubt]
    order = ("--force", "--set", "order=first.weight,last.weight")
    assert unlearn(capsys, "not", *order)[0]["warnings"] == []
    for path in [here / "before.safetensors", *(here / "locals").iterdir()]:
        names = {"first": "fc1", "last": "fc10", "norm": "norm"}
        model = {
            f"{names[n.split('.')[0]]}.{n.split('.')[1]}": t for n, t in load_file(path).items()
        }
        save_file(model, path)
    report, _ = unlearn(capsys, "not", "--force")
    assert report["warnings"] == []
    assert report["settings"]["layers"] == ["fc1.weight", "fc1.bias"]


@pytest.mark.parametrize("order", ['[["first.weight"]]', '["last.weight"]', "first, last"])
def test_an_order_that_is_none_is_a_guess_like_any_other(order, here, capsys):
    rewrite("before.safetensors", dict, order=order)
    report, _ = unlearn(capsys, "not")
    doubt = "first.weight was taken for the first layer, by its name; see --set order=A,B"
    assert report["warnings"] == [doubt]


def test_a_result_tells_what_the_model_before_told_and_no_order_of_its_own(here, capsys):
    told = {"format": "pt", "num_examples": "7", "total_examples": "9"}
    save_file(BEFORE, here / "before.safetensors", told)
    unlearn(capsys, "natural")
    assert dict(SavedModel(here / "out.safetensors").metadata) == {"format": "pt"}
    before = ("--before", "out.safetensors", "--out", "next.safetensors")
    code, out, _ = call(
        capsys, "not", "--locals", "locals", *before, "--forget", "bob,eve", "--json"
    )
    assert code == 0
    assert "first.weight was taken for the first layer" in json.loads(out)["warnings"][0]


def test_names_are_printed_as_they_are(here, capsys):
    client = ":smile:[red]"
    (here / "locals/bob.safetensors").rename(here / "locals" / f"{client}.safetensors")
    _, out, _ = call(capsys, "natural", *USUAL, "--forget", client)
    assert f"natural forgot {client}; 5 of the last round stay" in out


def test_tensors_with_odd_names_are_put_in_an_order(here, capsys):
    for path in [here / "before.safetensors", *(here / "locals").iterdir()]:
        save_file(load_file(path) | {"\u00b2.1\u00b2": torch.ones(2)}, path)
    assert torch.equal(unlearn(capsys, "natural")[1]["\u00b2.1\u00b2"], torch.ones(2))


def test_clients_that_agree_have_nothing_zeroed(here, capsys):
    for client in CLIENTS:
        save_file(LOCALS["ann"], here / "locals" / file_name(client), ORDER)
    report, model = unlearn(capsys, "fedup", "--set", "rate=1")
    assert (
        "nothing was zeroed: the clients agree with the others on every weight"
        in report["warnings"]
    )
    assert same(model, mean([LOCALS["ann"]] * 4))


def test_rounds_that_are_not_recorded(here, capsys):
    for path in (here / "history/round-0001").iterdir():
        path.unlink()
    (here / "history/round-0001").rmdir()
    (here / "history/round-0003/eve.safetensors").unlink()
    (here / "history/round-0002/eve.safetensors").unlink()
    report, _ = unlearn(capsys, "drift", *HISTORY)
    assert report["warnings"] == [
        "round 1 not recorded: what was sent in it stays",
        "eve took part in no recorded round",
    ]


def test_only_the_last_round_recorded_leaves_nothing_to_subtract(here, capsys):
    for number in (1, 2):
        for path in (here / f"history/round-000{number}").iterdir():
            path.unlink()
        (here / f"history/round-000{number}").rmdir()
    report, model = unlearn(capsys, "negative-gradients", *HISTORY)
    assert "only the last round is recorded" in report["warnings"][-1]
    assert same(model, RETAINED)


def test_a_history_that_ends_before_the_last_round_is_subtracted_whole(here, capsys):
    for path in (here / "history/round-0003").iterdir():
        path.unlink()
    (here / "history/round-0003").rmdir()
    report, model = unlearn(capsys, "negative-gradients", *HISTORY)
    assert report["settings"]["rounds"] == 2
    assert same(model, negative_gradients.delta(RETAINED, EARLIER, frozenset(GONE)))
    (here / "out.safetensors").unlink()
    report, _, questions = by_files(capsys, here, "retrain", *HISTORY, *ANSWERS)
    assert [q["round"] for q in questions] == [1, 2, 3]  # the round of the locals is the third


def test_a_round_that_is_not_recorded_means_nothing_to_who_plays_it_again(here, capsys):
    shutil.rmtree(here / "history/round-0002")
    report, model, questions = by_files(capsys, here, "retrain", *HISTORY, *ANSWERS)
    assert report["warnings"] == []
    assert [q["round"] for q in questions] == [1, 2, 3]
    assert same(model, carry_out(ASKING["retrain"](), answer))
    shutil.rmtree(here / "answers")
    (here / "out.safetensors").unlink()
    report, _, _ = by_files(capsys, here, "fedrecover", *HISTORY, *ANSWERS)
    assert report["warnings"] == ["round 2 not recorded: it is not played again"]


@pytest.mark.parametrize("name", ["drift", "federaser", "fedrecover"])
def test_the_round_of_the_locals_counts_whether_or_not_it_is_recorded(name, here, capsys):
    arguments = (*HISTORY, *ANSWERS) if name in ASKING else HISTORY
    _, expected, _ = by_files(capsys, here, name, *arguments)
    (here / "out.safetensors").unlink()
    shutil.rmtree(here / "answers", ignore_errors=True)
    shutil.rmtree(here / "history/round-0003")
    report, model, _ = by_files(capsys, here, name, *arguments)
    assert same(model, expected)
    assert report["warnings"] == ["the round of the locals is not recorded: it counts as 3"]


# ---------------------------------------------------------------- names of clients
def test_a_client_is_named_as_its_file_is(here, capsys):
    (here / "locals/bob.safetensors").rename(here / "locals/bob, jr%2E.safetensors")
    report, model = unlearn(capsys, "natural", forget="bob%2C jr%2E,eve")
    assert report["forgotten"] == ["bob, jr.", "eve"]
    assert same(model, RETAINED)


def test_a_client_with_percents_in_its_name_is_found(here, capsys):
    (here / "locals/bob.safetensors").rename(here / "locals/100%2541.safetensors")
    assert unlearn(capsys, "natural", forget="100%41")[0]["forgotten"] == ["100%41"]
    assert unlearn(capsys, "natural", "--force", forget="100%2541")[0]["forgotten"] == ["100%41"]


def test_a_client_may_have_a_name_as_long_as_a_file_can(here, capsys):
    _, expected = unlearn(capsys, "drift", *HISTORY)
    for path in here.rglob("bob.safetensors"):
        path.rename(path.with_name("\u00e4" * 120 + ".safetensors"))  # 240 bytes of 255
    _, model = unlearn(capsys, "drift", *HISTORY, "--force", forget="\u00e4" * 120 + ",eve")
    # The same sum in another order.
    for name, tensor in expected.items():
        torch.testing.assert_close(model[name], tensor)


# ---------------------------------------------------------------- half precision
WITHOUT_DATA = [kind for kind, (arguments, _) in SERVER_ONLY.items() if "--data" not in arguments]


def recast(here, dtype):
    """Store every model of the folder in another precision, buffers of integers as they are."""
    for path in here.rglob("*.safetensors"):
        if path.name not in ("data.safetensors", "out.safetensors"):
            rewrite(
                path,
                lambda m: {n: t.to(dtype) if t.is_floating_point() else t for n, t in m.items()},
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", WITHOUT_DATA)
def test_half_precision_is_computed_in_single_and_rounded_once(kind, dtype, here, capsys):
    recast(here, dtype)
    report, half = unlearn(capsys, *SERVER_ONLY[kind][0])
    recast(here, torch.float32)  # holds the same numbers
    expected, single = unlearn(capsys, *SERVER_ONLY[kind][0], "--force")
    rounded = {n: t.to(dtype) if t.is_floating_point() else t for n, t in single.items()}
    assert same(half, rounded)
    assert report["zeroed"] == expected["zeroed"]


def test_a_hundred_ones_in_half_precision_average_to_one(here, capsys):
    shutil.rmtree(here / "locals")
    (here / "locals").mkdir()
    ones = {"a.weight": torch.ones(2, 2, dtype=torch.bfloat16)}
    save_file(ones, here / "before.safetensors")
    for number in range(101):
        save_file(ones, here / f"locals/{number}.safetensors")
    assert same(unlearn(capsys, "natural", forget="0")[1], ones)


def test_clients_are_asked_in_the_precision_of_their_models(here, capsys):
    recast(here, torch.bfloat16)
    arguments = ("federaser", *USUAL, *HISTORY, *ANSWERS, "--forget", "bob,eve")
    code, _, err = call(capsys, *arguments)
    assert (code, "waiting for" in err) == (1, True)
    place = here / "answers/ask-0001"
    start = load_file(place / "global.safetensors")
    assert start["first.weight"].dtype == torch.bfloat16
    for client in OTHERS:
        sent = {n: t.to(start[n].dtype) for n, t in trained(client, 3, start).items()}
        save_file(sent, place / file_name(client))
    assert call(capsys, *arguments)[0] == 0
    assert load_file("out.safetensors")["first.weight"].dtype == torch.bfloat16


# ---------------------------------------------------------------- at first hand
def test_models_of_any_framework_need_no_model_class_and_no_federation(here):
    """In a process of its own, as people run it, nothing that trains is loaded."""
    code = (
        "import sys\nfrom server.cli import main\ntry:\n"
        f"    main({['unlearn', 'fedup', *USUAL, '--forget', 'bob,eve', '--json']})\n"
        "except SystemExit as done: assert not done.code\n"
        "assert not {'ray', 'torchvision', 'sklearn', 'simulation'} & set(sys.modules)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True,
        cwd=here, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout)["method"] == "fedup"
    assert same(load_file(here / "out.safetensors"), masked(adaptive())[0])


def test_the_number_of_threads_is_as_before(here, capsys, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        unlearn(capsys, "natural")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------- the page about it
PAGE = (Path(__file__).resolve().parents[2] / "docs/offline.md").read_text(encoding="utf-8")


def test_the_page_names_every_method_and_every_setting():
    rows = {line.split("|")[1]: line for line in PAGE.splitlines() if line.startswith("| `")}
    for name, kind in METHODS_OF_FILES.items():
        (row,) = [line for first, line in rows.items() if f"`{name}`" in first]
        for field in kind.model_fields.values():
            assert f"`{field.alias}" in row, (name, field.alias)


def test_the_example_of_the_page_works_as_it_stands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = PAGE.split("```python\n")[1].partition("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    command = PAGE.split("```\npython federation.py\n")[1].partition("```")[0]
    arguments = command.replace("\\\n", " ").split()
    assert arguments[:2] == ["secateur", "unlearn"]
    code, out, err = call(capsys, *arguments[2:])
    assert (code, err) == (0, "")
    assert "fedup forgot evil; 4 of the last round stay" in out
    assert "likely_false_positive" not in out
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    model.load_state_dict(load_file("clean.safetensors"))
    place = ["--before", "run/round-0003/global.safetensors", "--locals", "run/round-0003"]
    code, _, err = call(
        capsys,
        "drift",
        *place,
        "--history",
        "run",
        "--forget",
        "evil",
        "--out",
        "drift.safetensors",
    )
    assert (code, err) == (0, "")


def test_a_subtraction_of_nothing_says_so(here, capsys):
    for number in (1, 2):
        for name in ("bob", "eve"):
            (here / f"history/round-{number:04d}/{name}.safetensors").unlink(missing_ok=True)
    report, model = unlearn(capsys, "negative-gradients", *HISTORY)
    assert (
        "nothing was subtracted: they took part in no round before the last" in report["warnings"]
    )
    call(capsys, "natural", *USUAL, "--forget", "bob,eve", "--force")
    assert same(model, load_file("out.safetensors"))


def test_a_whole_tensor_that_is_zeroed_is_told(here, capsys):
    report, model = unlearn(capsys, "fedup", "--set", "rate=1")
    zeroed = [name for name, count in report["zeroed"].items() if count == model[name].numel()]
    told = [w for w in report["warnings"] if w.startswith("all of ")]
    assert told == [f"all of {n} was zeroed: nothing of it is left to recover from" for n in zeroed]
    assert told


def test_numbers_that_no_round_has_are_refused(here, capsys):
    (here / "history/round-0003").rename(here / "history/round-99999999999999999999")
    for name in ("negative-gradients", "drift", "natural"):
        code, _, err = call(capsys, name, *USUAL, *HISTORY, "--forget", "bob")
        assert (code, "they go from 1 to 1000000" in err) == (1, True)
        assert not (here / "out.safetensors").exists()


def test_a_name_that_no_file_can_have_is_refused(here, capsys):
    arguments = ("--before", "before.safetensors", "--locals", "locals", "--forget", "bob")
    code, _, err = call(capsys, "natural", *arguments, "--out", "a" * 300 + ".safetensors")
    assert (code, err.count("\n"), "cannot be written: File name too long" in err) == (1, 1, True)


def test_all_that_is_missing_is_told_at_once(here, capsys):
    _, _, err = call(capsys, "federaser", *USUAL, "--forget", "bob")
    assert "give --history DIR and --answers DIR" in err
