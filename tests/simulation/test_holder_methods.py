"""Every method in which holders compute, through a whole federation in this process."""

import pytest
import torch

from server.settings import parse_overrides
from simulation.engines.inprocess import InProcessGrid
from simulation.experiment import Experiment, client_app, with_folder
from simulation.scenario import load_scenario
from unlearning.catalogue import HOLDERS, Target
from unlearning.errors import RefusedRequestError

APART = ("ffmu",)
"""It serves what was trained by it alone, and has tests of its own."""
METHODS = sorted(name for name, e in HOLDERS.items() if e.federated and name not in APART)
CASES = [(name, target) for name in METHODS for target in sorted(HOLDERS[name].targets)]
WHICH = {
    Target.CLASS: "label = 3",
    Target.SAMPLES: "clients = [1]\nrows = [0, 1, 2]",
    Target.CLIENT: "clients = [1]\ncooperates = true",
}
TOLD = {Target.CLASS: "class 3", Target.SAMPLES: "3 samples", Target.CLIENT: "client-0001"}
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


def forgotten(method, target, folder, which=None):
    """Return the unlearnings, the round's models and everybody's standing."""
    entry = HOLDERS[method]
    text = TEXT.format(
        method=method,
        target=target,
        which=which or WHICH[target],
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
    return done, models, experiment.outcome


@pytest.mark.parametrize(("method", "target"), CASES)
def test_it_serves_each_of_its_targets(method, target, tmp_path):
    (done, *_), models, outcome = forgotten(method, target, tmp_path)
    assert done.refused is None
    assert done.method == method
    assert done.targets == (TOLD[target],)
    # A mask drawn by chance needs nothing of anybody where nobody stays to drop anything.
    asks_nobody = (method, target) == ("random-mask", Target.CLIENT)
    assert (done.rounds_asked == 0) == asks_nobody
    assert all(torch.isfinite(t).all() for t in models[done.number].values())
    if HOLDERS[method].guarantee != "exact":
        changed = any(
            not torch.equal(models[done.number][n], t) for n, t in models[done.number - 1].items()
        )
        assert changed
    left = (TOLD[target],) if target is Target.CLIENT else ()
    assert outcome.forgotten == left
    for record in outcome.rounds[done.number :]:
        assert set(record.participants) == {f"client-{n:04d}" for n in range(3)} - set(left)


@pytest.mark.parametrize("method", ["pga", "fisher-mask", "amnesiac"])
def test_a_client_that_does_not_help_is_not_forgotten_by_what_needs_its_help(method, tmp_path):
    with pytest.raises(RefusedRequestError, match=f"{method} needs target answers"):
        forgotten(method, Target.CLIENT, tmp_path, which="clients = [1]")
