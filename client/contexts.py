"""What a message and a context say: whose data, which round, which settings."""

import functools
from typing import Any

import torch
from flwr.app import Context, Message

from client.keeping import Keeping, keeping_of
from client.task.protocol import Examples, TaskOptions, load_task
from strategies import messages
from unlearning.errors import RefusedRequestError
from unlearning.parameters import Parameters


def examples_of(options: TaskOptions, context: Context) -> Examples:
    """Return this client's own training data, with what it forgot."""
    return load_task(options).client_data(*partition_of(context)).train


def needed_keeping(own: TaskOptions, context: Context) -> Keeping:
    """Return what this client keeps; a client that keeps nothing cannot promise to forget."""
    keeping = keeping_of(own, context)
    if keeping is None:
        raise RefusedRequestError("this client keeps nothing on its disk; give it a client-dir")
    return keeping


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


def config_of(message: Message) -> dict[str, Any]:
    """Return the settings that came with a message."""
    return dict(message.content[messages.CONFIG].items())


def stream_of(context: Context) -> int:
    """Return what tells this client's random streams from others'."""
    return int(context.node_config.get(messages.PARTITION, context.node_id))
