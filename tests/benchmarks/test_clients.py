"""The benchmark of methods on one machine, on a small scale."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks import clients
from benchmarks.membership import attack_auc
from client.central.methods import METHODS


def test_the_attack_sorts_by_loss():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    assert attack_auc(low, high) == 1
    assert attack_auc(high, low) == 0
    assert attack_auc(low, low) == 0.5
    # Of four pairs of a member and another, the member has the smaller loss in three.
    assert attack_auc(torch.tensor([0.1, 0.35]), high) == 0.75


@pytest.fixture
def small(monkeypatch):
    few = ("finetune", "amnesiac", "sisa", "tfidf", "pcmu", "retrain")
    monkeypatch.setattr(clients, "DATA", {"Digits": "digits"})
    monkeypatch.setattr(clients, "LENET", "cnn")
    monkeypatch.setattr(clients, "CHANNELS", ("tfidf",))
    monkeypatch.setattr(clients, "METHODS", {name: METHODS[name] for name in few})
    monkeypatch.setattr(clients, "SETTINGS", {"pcmu": {"uncertified": True, "rounds": 1}})


def run(folder, *more):
    app = typer.Typer()
    app.command()(clients.main)
    where = ["--output", str(folder / "out"), "--work", str(folder / "work")]
    told = ["--seeds", "1", "--examples", "300", *where, *more]
    result = CliRunner().invoke(app, told, catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads((folder / "out/clients.json").read_text(encoding="utf-8"))["runs"]


def test_every_method_is_beside_retraining_on_its_own_network(small, tmp_path, monkeypatch):
    runs = run(tmp_path)
    assert list(runs) == ["Digits, class 3", "Digits, 5 % of the rows"]
    ((of_class,), (of_rows,)) = runs.values()
    base = of_class["methods"]["retrain"]
    assert (base["forget_train"], base["forget_test"], base["speed"]) == (0, 0, 1)
    assert of_class["methods"]["retrain, LeNet"]["forget_train"] == 0
    pace = of_class["methods"]["retrain, LeNet"]["seconds"]
    pruned = of_class["methods"]["tfidf"]
    assert pruned["speed"] == pytest.approx(pace / pruned["seconds"])
    assert of_rows["forgotten"] == round(0.05 * of_rows["rows"])
    assert of_rows["methods"]["tfidf"]["refused"].startswith("tfidf forgets a class")
    for found in of_class["methods"].values():
        assert 0 <= found["attack_auc"] <= 1
    page = (tmp_path / "out/clients.md").read_text(encoding="utf-8")
    assert page.count("](clients.svg)") == 1
    assert "`tfidf` is refused: tfidf forgets a class" in page
    # What is finished is not done again.
    monkeypatch.setattr(clients, "one", None)
    assert run(tmp_path) == runs
    before = (tmp_path / "out/clients.svg").read_bytes()
    run(tmp_path, "--redraw")
    assert (tmp_path / "out/clients.svg").read_bytes() == before
