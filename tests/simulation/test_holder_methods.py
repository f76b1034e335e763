"""Every method in which holders compute, through a whole federation in this process."""

import pytest
import torch

from server.settings import parse_overrides
from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app, with_folder
from simulation.scenario import load_scenario
from unlearning.catalogue import HOLDERS, Target

APART = ("ffmu", "pga")
"""One serves what was trained by it alone, the other clients alone; they have tests of their own."""
METHODS = sorted(name for name, e in HOLDERS.items() if e.federated and name not in APART)
TARGET = {Target.CLASS: "label = 3", Target.SAMPLES: "clients = [1]\nrows = [0, 1, 2]"}
TEXT = """
summary = "what {method} makes of a request"
[clients]
total = 3
[baselines]
natural = false
retrain = false
[[requests]]
round = 2
target = "{target}"
{which}
method = "{method}"
guarantee = "{guarantee}"
[settings]
task = "digits"
model = "{model}"
rounds = 3
examples = 200
detector = "none"
method = "none"
ready-methods = "{method}"
rate-limit = 1
recovery-cap = 1
batch-log = "{log}"
"""


def forgotten(method, target, folder):
    entry = HOLDERS[method]
    which = TARGET.get(target, "clients = [1]")
    text = TEXT.format(
        method=method,
        target=target,
        which=which,
        guarantee="exact" if entry.guarantee == "exact" else "approximate",
        model="cnn" if "a model with convolutions" in entry.needs else "mlp-32",
        log="random" if method == "amnesiac" else "off",
    )
    path = folder / f"{method}.toml"
    path.write_text(text)
    models = {}
    overrides = parse_overrides([f"client-dir={folder / 'clients'}"])
    with with_folder(load_scenario(str(path), overrides)) as scenario:
        experiment = Experiment(scenario)
        note = experiment._note

        def noted(federation, record, model):
            models[record.number] = model
            note(federation, record, model)

        experiment._note = noted
        experiment.play(InProcessGrid(client_app(scenario), scenario.clients.total))
    done = [r.unlearning for r in experiment.outcome.rounds if r.unlearning is not None]
    return done, models


@pytest.mark.parametrize("method", METHODS)
def test_it_serves_each_of_its_targets(method, tmp_path):
    for target in sorted(HOLDERS[method].targets - {Target.CLIENT}):
        folder = tmp_path / target
        folder.mkdir()
        (done, *_), models = forgotten(method, target, folder)
        assert done.refused is None
        assert done.method == method
        assert done.targets == (("class 3",) if target is Target.CLASS else ("3 samples",))
        assert done.rounds_asked >= 1
        assert all(torch.isfinite(t).all() for t in models[done.number].values())
        if HOLDERS[method].guarantee != "exact":
            changed = any(
                not torch.equal(models[done.number][n], t)
                for n, t in models[done.number - 1].items()
            )
            assert changed
