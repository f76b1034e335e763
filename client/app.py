"""The Flower ClientApp: carries messages to and from local training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from client import train as local
from client.task import evaluation
from client.task.device import choose_device
from client.task.protocol import Task, TaskOptions, load_task, size_of
from strategies import messages

LoadTask = Callable[[TaskOptions], Task]


def build_app(
    config: Mapping[str, Any] | None = None,
    *,
    load: LoadTask = load_task,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    config
        Run configuration, where the engine has none of its own; otherwise Flower's is used.
    load
        Finds the task.
    mods
        Flower mods around every message.
    """
    app = ClientApp(mods=list(mods))

    def options(context: Context) -> TaskOptions:
        return TaskOptions.model_validate(config if config is not None else context.run_config)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return train_reply(message, context, options(context), load)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return evaluate_reply(message, context, options(context), load)

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        partition, _ = partition_of(context)
        content = RecordDict({messages.METRICS: MetricRecord({messages.PARTITION: partition})})
        return Message(content, reply_to=message)

    return app


def train_reply(
    message: Message, context: Context, options: TaskOptions, load: LoadTask
) -> Message:
    """Train on this client's data and reply with the model."""
    settings = training_settings(message)
    device = _prepare(options)
    task = load(options)
    examples = task.client_data(*partition_of(context)).train
    model = _model(task, message)
    purpose = (_round(message), _stream(context))
    metrics = local.train(task, model, examples, settings, device=device, purpose=purpose)
    content = messages.train_reply(evaluation.state_of(model), metrics, size_of(examples))
    return Message(content, reply_to=message)


def evaluate_reply(
    message: Message, context: Context, options: TaskOptions, load: LoadTask
) -> Message:
    """Evaluate the model on this client's test data and reply with the metrics."""
    device = _prepare(options)
    task = load(options)
    examples = task.client_data(*partition_of(context)).test
    metrics = evaluation.evaluate(task, _model(task, message), examples, device=device)
    return Message(messages.evaluate_reply(metrics, size_of(examples)), reply_to=message)


def training_settings(message: Message) -> messages.LocalTraining:
    """Read and validate what the server said about local training."""
    record = message.content.config_records[messages.CONFIG]
    return messages.LocalTraining.model_validate(dict(record))


def partition_of(context: Context) -> tuple[int, int]:
    """Return this client's partition and their number; (0, 1) for a client with its own data."""
    config = context.node_config
    return int(config.get(messages.PARTITION, 0)), int(config.get("num-partitions", 1))


def _prepare(options: TaskOptions) -> torch.device:
    # More threads would add up sums in another order, and clients share the machine's cores.
    torch.set_num_threads(1)
    return choose_device(options.device)


def _model(task: Task, message: Message) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        model = task.build_model()
    record = message.content.array_records[messages.ARRAYS]
    evaluation.load_state(model, messages.parameters_from(record))
    return model


def _round(message: Message) -> int:
    return int(message.content.config_records[messages.CONFIG][messages.SERVER_ROUND])  # type: ignore[arg-type]


def _stream(context: Context) -> int:
    """Return what tells this client's random streams from others'."""
    return int(context.node_config.get(messages.PARTITION, context.node_id))


app = build_app()
