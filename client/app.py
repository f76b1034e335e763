"""The Flower ClientApp: carries messages to and from local training."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.forgetting import ffmu
from client.scratch import scratch_for
from client.task import evaluation
from client.task.device import choose_device
from client.task.protocol import TaskOptions, load_task, size_of
from client.train import Job, do
from strategies import messages
from unlearning.parameters import Parameters

MakeJob = Callable[[Message, Context, TaskOptions], Job]
"""Says what one client does with a ``train`` message."""


def build_app(
    config: Mapping[str, Any] | None = None,
    *,
    job: MakeJob | None = None,
    mods: Sequence[Mod] = (),
) -> ClientApp:
    """Return a ClientApp.

    Parameters
    ----------
    config
        Run configuration, where the engine has none of its own; otherwise Flower's is used.
    job
        Says what to train on; ``honest_job`` by default.
    mods
        Flower mods around every message.
    """
    app = ClientApp(mods=[forget_state, *mods])
    make_job = job or honest_job
    fixed = TaskOptions.model_validate(config) if config is not None else None

    def options(context: Context) -> TaskOptions:
        return fixed if fixed is not None else TaskOptions.model_validate(context.run_config)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        use_one_thread()
        chosen = make_job(message, context, options(context))
        model, metrics = do(chosen, start_of(message))
        content = messages.train_reply(model, metrics, chosen.num_examples)
        return Message(content, reply_to=message)

    @app.train("ffmu")
    def train_ffmu(message: Message, context: Context) -> Message:
        use_one_thread()
        chosen = make_job(message, context, options(context))
        asked = ffmu.settings_of(message.content[messages.CONFIG])
        model, metrics = ffmu.do(chosen, start_of(message), asked)
        content = messages.train_reply(model, metrics, chosen.num_examples)
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return evaluate_reply(message, context, options(context))

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        partition, _ = partition_of(context)
        content = RecordDict({messages.METRICS: MetricRecord({messages.PARTITION: partition})})
        return Message(content, reply_to=message)

    return app


def forget_state(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clear this client's state when the federation has forgotten somebody; a Flower mod.

    What a client keeps between rounds (momentum, a model of its own) comes from global models that
    held the forgotten client's influence. The app made here has it built in; give it to your own.
    """
    config = message.content.get(messages.CONFIG) if message.has_content() else None
    times = config.get(messages.FORGETTINGS, 0) if isinstance(config, ConfigRecord) else 0
    known = context.state.get(messages.FORGETTINGS)
    if times and not (isinstance(known, ConfigRecord) and known.get("times") == times):
        for key in list(context.state):
            del context.state[key]
        context.state[messages.FORGETTINGS] = ConfigRecord({"times": times})
    return call_next(message, context)


def honest_job(message: Message, context: Context, options: TaskOptions) -> Job:
    """Train on this client's own data, as the server's message says."""
    task = load_task(options)
    return Job(
        task,
        task.client_data(*partition_of(context)).train,
        training_settings(message),
        (round_of(message), _stream(context)),
        choose_device(options.device),
    )


def evaluate_reply(message: Message, context: Context, options: TaskOptions) -> Message:
    """Evaluate the model on this client's test data and reply with the metrics."""
    use_one_thread()
    device = choose_device(options.device)
    task = load_task(options)
    examples = task.client_data(*partition_of(context)).test
    scratch = scratch_for(task, device)
    scratch.load(start_of(message))
    metrics = evaluation.evaluate(task, scratch.model, examples, device=device)
    return Message(messages.evaluate_reply(metrics, size_of(examples)), reply_to=message)


def training_settings(message: Message) -> messages.LocalTraining:
    """Read and validate what the server said about local training."""
    items = message.content[messages.CONFIG].items()
    return _settings(tuple(item for item in items if item[0] in messages.TRAINING_KEYS))


@functools.lru_cache(maxsize=8)
def _settings(items: tuple[tuple[str, Any], ...]) -> messages.LocalTraining:
    return messages.LocalTraining.model_validate(dict(items))


def partition_of(context: Context) -> tuple[int, int]:
    """Return this client's partition and their number; (0, 1) for a client with its own data."""
    config = context.node_config
    return int(config.get(messages.PARTITION, 0)), int(config.get("num-partitions", 1))


def use_one_thread() -> None:
    """Compute on one thread: more would add up sums in another order, and clients share cores."""
    torch.set_num_threads(1)


def start_of(message: Message) -> Parameters:
    """Return the model that came with a message; not to be written to."""
    return messages.shared_parameters(message.content[messages.ARRAYS])  # type: ignore[arg-type]


def round_of(message: Message) -> int:
    """Return the number of the round that a message belongs to."""
    return int(message.content[messages.CONFIG][messages.SERVER_ROUND])  # type: ignore[arg-type]


def _stream(context: Context) -> int:
    """Return what tells this client's random streams from others'."""
    return int(context.node_config.get(messages.PARTITION, context.node_id))


app = build_app()
