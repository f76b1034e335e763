"""PCMU in one place is FFMU with one client: the same model and the same check, bit for bit."""

import pytest

from client.app import build_app
from client.central.methods import METHODS
from client.central.quantised import Pcmu, trained
from client.central.run import Target, prepared
from client.central.settings import Training
from client.task.evaluation import state_of
from client.task.protocol import load_task
from server.federation import build_federation, initial_model
from server.settings import Settings
from simulation.engines.inprocess import InProcessGrid
from strategies.loop import run_rounds
from tests.client.forgetting.small import same
from unlearning.errors import NotCertifiedError, ParametersError

ROWS = (1, 4, 5)
ROUNDS = 5
WAYS = {
    "path": {},
    "path with a dead zone": {"lam-factor": 4.5},
    "full": {"local": "full"},
    "full and bounded": {"local": "full", "clip": 0.001},
}


def federation(told):
    """Return model and check of a federation with one client."""
    names = {"local": "local-gradient", "clip": "gradient-clip"}
    settings = Settings.model_validate(
        {
            "task": "digits", "model": "mlp-8", "examples": 200, "partition": "iid",
            "identity": "partition", "min-clients": 1, "rounds": ROUNDS, "local-epochs": 2,
            "batch-size": 30, "learning-rate": 0.1, "detector": "none", "method": "none",
            "ready-methods": "", "device": "cpu", "strategy": "ffmu", "seed": 3,
            **{names.get(key, key): value for key, value in told.items()},
        }
    )  # fmt: skip
    options = settings.task_options()
    model = initial_model(load_task(options), settings.seed)
    made = build_federation(settings, model)
    final = run_rounds(
        made,
        InProcessGrid(build_app(options.model_dump(by_alias=True)), 1),
        state_of(model),
        rounds=settings.rounds,
        train_config=settings.to_record(),
    )
    return options, final, made.strategy


@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_federation_of_one_client(way):
    told = WAYS[way]
    options, final, strategy = federation(told)
    training = Training.model_validate({"seed": 3, "batch-size": 30})
    case, _ = prepared(options, training, Target(None, ROWS))
    model, margins = trained(Pcmu.model_validate({"rounds": ROUNDS, **told}), case)
    assert same(model, final)
    assert not same(model, case.start)
    if told.get("local") == "full":
        assert margins == strategy.course.margins
        assert margins.rounds == ROUNDS
        # n_f / (n - n_f); both say the same of the same request
        (node,) = strategy.course.samples
        asked = len(ROWS) / (case.all_rows - len(ROWS))
        assert margins.check(asked) == strategy.check({node: len(ROWS)})


def test_a_request_that_takes_nothing_or_all_is_told_before_training():
    training = Training.model_validate({"seed": 3, "batch-size": 30})
    options, _, _ = federation({"rounds": 1})
    count = len(prepared(options, training, Target())[0].in_order[0])
    every = tuple(range(count))
    for rows, error in (((), ParametersError), (every, NotCertifiedError)):
        case, _ = prepared(options, training, Target(None, rows))
        with pytest.raises(error):
            METHODS["pcmu"].run(Pcmu(local="full", rounds=10**9), case)
