"""What tests share: tiny models, and scripted clients on an in-process Grid."""

import logging
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from simulation.engines.inprocess import InProcessGrid
from strategies import flower, messages

Model = dict[str, torch.Tensor]
Reply = Callable[[int, int, Model], RecordDict]
"""Partition, round, global model -> content of the reply; may raise."""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Threads cost more than they give on tensors this small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _loud_log() -> Iterator[None]:
    """Commands quieten Flower's log; what a test expects there is not for them to take away."""
    logger = logging.getLogger("flwr")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _run_identity() -> None:
    """Let messages be built outside an engine: Flower's constructor asks who is running."""
    flower.begin_run(1)


@pytest.fixture
def tiny_model() -> Model:
    """A linear layer with bias and a counter, as batch normalisation has."""
    return {
        "layer.weight": torch.zeros(4, 3),
        "layer.bias": torch.zeros(4),
        "norm.num_batches_tracked": torch.tensor(0, dtype=torch.int64),
    }


def shifted(model: Model, value: float) -> Model:
    """Return the model with ``value`` added to every weight."""
    return {k: v + value if v.is_floating_point() else v.clone() for k, v in model.items()}


def content(model: Model, num_examples: object = 10, **metrics: float) -> RecordDict:
    """Build an honest reply, unless told otherwise."""
    return RecordDict(
        {
            messages.ARRAYS: messages.record_from(model),
            messages.METRICS: MetricRecord({"loss": 0.5, **metrics, "num-examples": num_examples}),
        }
    )


def scripted_app(reply: Reply, evaluate: Mapping[int, float] | None = None) -> ClientApp:
    """Return a ClientApp whose training is a function of partition, round and model."""
    app = ClientApp()

    @app.train("ffmu")
    @app.train()
    def train(message: Message, context: Context) -> Message:
        record = message.content.config_records[messages.CONFIG]
        model = messages.parameters_from(message.content.array_records[messages.ARRAYS])
        partition = int(context.node_config["partition-id"])
        number = int(record[messages.SERVER_ROUND])
        return Message(reply(partition, number, model), reply_to=message)

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        accuracy = (evaluate or {}).get(int(context.node_config["partition-id"]), 0.5)
        return Message(messages.evaluate_reply({"accuracy": accuracy}, 10), reply_to=message)

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        record = MetricRecord({messages.PARTITION: partition})
        return Message(RecordDict({messages.METRICS: record}), reply_to=message)

    return app


@pytest.fixture
def scripted_grid() -> Callable[..., InProcessGrid]:
    """Return a function (reply, clients) -> Grid of scripted clients."""

    def build(
        reply: Reply, clients: int = 5, evaluate: Mapping[int, float] | None = None
    ) -> InProcessGrid:
        return InProcessGrid(scripted_app(reply, evaluate), clients)

    return build


@pytest.fixture
def make_content() -> Callable[..., RecordDict]:
    return content


@pytest.fixture
def shift() -> Callable[[Model, float], Model]:
    return shifted
