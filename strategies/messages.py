"""The wire contract: every record key and every conversion between parameters and records.

A train message carries ``arrays`` (the global model) and ``config``; its reply ``arrays`` (the
client's model) and ``metrics`` with ``num-examples``. An evaluate message carries the same, its
reply only ``metrics``. Nothing else in Secateur names a record key.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from pydantic import BaseModel, ConfigDict, Field, field_validator

from strategies.arrays import TensorArray, tensor_of
from strategies.flower import error_reply, filled, refusal_reply
from unlearning.errors import RefusedRequestError
from unlearning.parameters import Parameters
from unlearning.plan import Answer

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NUM_EXAMPLES = "num-examples"
ACCURACY = "accuracy"
SERVER_ROUND = "server-round"
TRAIN, EVALUATE = "train", "evaluate"
QUERY_IDENTITY = "query.identity"
PARTITION = "partition-id"
FORGETTINGS = "forgettings"
"""How often the federation has forgotten somebody; not sent before the first time."""

REFUSED = "refused: "
"""Begins the reason of an error by which a client says that it will not; others say that it could
not."""
SHARE, SHARE_ROUND = "past-shares", "past-rounds"
"""The weights of the client's updates in the averages of their rounds, in [0, 1], 0 where one was
not used; and the numbers of these rounds. They come with the client's next messages. Clients that
keep a batch log need them."""
TAKEN_BACK = "taken-back"
"""Requests to subtract batches that were served, whoever was asked; comes with every message, so
that no client misses it, or subtracts what was subtracted before."""
ENTRIES = "entries"
"""How many entries a client's list of what is forgotten has, in its answer to ``query.forget``, or
had when it last answered, in messages that begin training; entries are never removed."""
SHORTER = "the list of what is forgotten is shorter than it was"
"""In the reason of a client that does not train because of that."""
REQUEST = "request"
"""Which request to forget a message belongs to; for the client's own records."""


class LocalTraining(BaseModel):
    """What a client is told about local training; carried in ``config`` of a train message."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the run; a client derives its own streams from it."""
    local_epochs: int = Field(1, ge=1)
    """Passes over a client's data in one round."""
    batch_size: int = Field(32, ge=1)
    """Examples per step."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Fresh in every round."""
    learning_rate: float = Field(0.05, gt=0)
    """Step size."""
    learning_rate_milestones: str = ""
    """Rounds, such as ``100,150``, after each of which the step size shrinks; empty for none."""
    learning_rate_factor: float = Field(0.1, gt=0)
    """What the step size is multiplied by at each milestone."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Of SGD; Adam ignores it."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty of the optimizer."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """``bfloat16`` computes losses in mixed precision; weights stay float32."""
    proximal_mu: float = Field(0.0, ge=0)
    """FedProx's pull towards the global model; that strategy itself sends it."""

    @field_validator("learning_rate_milestones", mode="before")
    @classmethod
    def _check_milestones(cls, value: object) -> str:
        text = str(value) if isinstance(value, int | str) and not isinstance(value, bool) else "?"
        rounds = text.replace(" ", "").split(",") if text else []
        if not all(number.isascii() and number.isdecimal() for number in rounds):
            raise ValueError(f"{value!r} names no rounds; give numbers, such as 100,150")
        return ",".join(rounds)

    @property
    def milestones(self) -> tuple[int, ...]:
        """Return the rounds after which the step size is smaller."""
        return tuple(int(text) for text in self.learning_rate_milestones.split(",") if text)

    def to_record(self) -> ConfigRecord:
        """Return these settings as a record, without what the strategy itself sends."""
        fields = set(LocalTraining.model_fields) - {"proximal_mu"}
        return ConfigRecord(self.model_dump(by_alias=True, include=fields))


TRAINING_KEYS = frozenset(field.alias or "" for field in LocalTraining.model_fields.values())
"""Keys of ``config`` that say how to train."""


def record_from(model: Parameters, row: int | None = None) -> ArrayRecord:
    """Encode parameters; names, shapes and dtypes are kept, tensors are shared.

    ``row`` encodes one model of several, whose tensors have shape (models, ...).
    """
    arrays = {
        name: TensorArray(tensor.detach() if tensor.requires_grad else tensor, row)
        for name, tensor in model.items()
    }
    return filled(ArrayRecord, arrays)


def parameters_from(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Decode a record that is trusted, such as the strategy's own; copies the data."""
    return {name: tensor.clone() for name, tensor in shared_parameters(record).items()}


def shared_parameters(record: ArrayRecord) -> dict[str, torch.Tensor]:
    """Decode a record that is trusted; not to be written to, for the tensors may be shared."""
    return {name: tensor_of(array) for name, array in record.items()}


def train_reply(
    model: Parameters,
    metrics: Mapping[str, int | float],
    num_examples: int | float,
    row: int | None = None,
) -> RecordDict:
    """Build the content of a reply to ``train``; ``row`` as for ``record_from``."""
    arrays = record_from(model, row)
    numbers = filled(MetricRecord, {**metrics, NUM_EXAMPLES: num_examples})
    return filled(RecordDict, {ARRAYS: arrays, METRICS: numbers})


def evaluate_reply(metrics: Mapping[str, int | float], num_examples: int) -> RecordDict:
    """Build the content of a reply to ``evaluate``."""
    return RecordDict({METRICS: MetricRecord({**metrics, NUM_EXAMPLES: num_examples})})


def tell(message: Message, settings: Mapping[str, Any]) -> None:
    """Add settings to what a message says in ``config``.

    Records are not written to: other messages may share them.
    """
    config = ConfigRecord({**cast(ConfigRecord, message.content[CONFIG]), **settings})
    message.content = RecordDict({**message.content, CONFIG: config})


def refusal(message: Message, why: object) -> Message:
    """Return the reply of a client that will not do what it was asked."""
    return refusal_reply(message, f"{REFUSED}{why}")


def failure(message: Message, raised: Exception) -> Message:
    """Return the reply that tells of an exception."""
    if isinstance(raised, RefusedRequestError):
        return refusal(message, raised)
    return error_reply(message, raised)


def is_refusal(reply: Message) -> bool:
    """Say whether a client refused what it was asked."""
    return reply.has_error() and (reply.error.reason or "").startswith(REFUSED)


def message_from(answer: Answer, node_id: int) -> Message:
    """Encode a screened answer again, for a strategy that aggregates messages."""
    arrays = answer.arrays if answer.arrays is not None else {}
    content = train_reply(arrays, answer.metrics, answer.num_examples)
    if answer.arrays is None:
        del content[ARRAYS]
    return Message(content=content, dst_node_id=node_id, message_type=TRAIN)
