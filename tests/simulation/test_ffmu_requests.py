"""What FFMU answers to a deletion: nothing where that is certified, another method where not."""

import pytest
import torch

from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app, with_folder
from simulation.scenario import load_scenario
from strategies.ffmu import FFMU
from unlearning.certificates import ExactCheck

TEXT = """
summary = "deletions of samples, of a federation that trains by FFMU"
extends = "ffmu"
[[requests]]
round = 2
target = "samples"
clients = [1]
rows = [0, 1]
[[requests]]
round = 4
target = "samples"
clients = [1]
rows = [2]
[settings]
rounds = 6
examples = 300
local-gradient = "full"
rate-limit = 1
"""


@pytest.fixture
def play(tmp_path):
    path = tmp_path / "deletions.toml"
    path.write_text(TEXT)

    def run():
        models, memory = {}, []
        with with_folder(load_scenario(str(path), {})) as scenario:
            experiment = Experiment(scenario)
            note = experiment._note

            def noted(federation, record, model):
                models[record.number] = model
                memory.append((federation.forgetting.last, dict(federation.memory.purged)))
                note(federation, record, model)

            experiment._note = noted
            experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
        return experiment.outcome, models, memory

    return run


def test_a_certified_deletion_changes_nothing_and_deletions_add_up(play, monkeypatch):
    asked = []

    def check(self, removed):
        asked.append(sorted(removed.values()))
        return ExactCheck(certified=5, pairs=5, rounds=self.course.number)

    monkeypatch.setattr(FFMU, "check", check)
    outcome, _, memory = play()
    done = [r.unlearning for r in outcome.rounds if r.unlearning is not None]
    assert [(u.method, u.refused, u.guarantee) for u in done] == [("ffmu", None, "conditional")] * 2
    assert any("all: the model is the one" in warning for warning in done[0].warnings)
    # Two rows, then one more: together they must be certified, three of the same client.
    assert [2] in asked
    assert [3] in asked
    assert all(u.recovery_rounds is None for u in done)
    # What changes nothing is no unlearning that the rate limit counts, and deletes nothing.
    assert set(map(str, memory)) == {str((None, {}))}


def test_a_deletion_that_is_not_certified_is_routed_to_another_method(play):
    outcome, models, memory = play()
    done = [r.unlearning for r in outcome.rounds if r.unlearning is not None]
    assert next(u.method for u in done if u.refused is None) == "rollback"
    assert all("not all: nothing is shown" in u.refused for u in done if u.method == "ffmu")
    assert memory[-1][0] is not None
    assert all(torch.isfinite(t).all() for t in models[max(models)].values())


def test_with_a_detector_nothing_is_certified(tmp_path, monkeypatch):
    everything = ExactCheck(certified=1, pairs=1, rounds=4)  # were it asked
    monkeypatch.setattr(FFMU, "check", lambda self, removed: everything)
    path = tmp_path / "watched.toml"
    path.write_text(TEXT.replace("rounds = 6", 'rounds = 4\ndetector = "cohort"'))
    with with_folder(load_scenario(str(path), {})) as scenario:
        experiment = Experiment(scenario)
        experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
    done = [r.unlearning for r in experiment.outcome.rounds if r.unlearning is not None]
    assert {(u.method, u.refused) for u in done} == {("rollback", None)}


def test_the_same_rows_count_once_and_requests_of_one_round_together(tmp_path, monkeypatch):
    asked = []

    def check(self, removed):
        asked.append(sum(removed.values()))
        return ExactCheck(certified=5, pairs=5, rounds=self.course.number)

    monkeypatch.setattr(FFMU, "check", check)
    again = '[[requests]]\nround = {}\ntarget = "samples"\nclients = [1]\nrows = {}\n'
    more = 'guarantee = "approximate"\n'
    text = TEXT.replace("rows = [2]", "rows = [0, 1]\n" + more)
    text = text.replace("[settings]", again.format(4, [0, 2]) + again.format(4, [3]) + "[settings]")
    path = tmp_path / "again.toml"
    path.write_text(text)
    with with_folder(load_scenario(str(path), {})) as scenario:
        experiment = Experiment(scenario)
        experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
    # Rows 0 and 1; the same again, which add nothing; with 0 and 2, of which one is new but both
    # count, since the server cannot tell the rows apart from their tokens; and with 3.
    of_requests = asked[-5:-1] if asked[-1] == 1 else asked[-4:]
    assert of_requests == [2, 2, 4, 5]
