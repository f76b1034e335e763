"""Screening: check every reply against the model's schema before anything else sees it.

A client can send anything. Unscreened, one NaN poisons the model, one wrong key ends the run and
one absurd ``num-examples`` outvotes everybody (``docs/architecture.md``). A reply that fails is
dropped with a named reason, and the round goes on without it.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median, median_low

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from strategies import messages
from strategies.arrays import TensorArray
from strategies.exchange import Reply
from unlearning.parameters import Parameters, difference, norm
from unlearning.plan import Answer

ABSURD_UPDATE = 1000.0
"""Updates this many times longer than one plus the model's own norm are refused in any round."""
HEADER_BYTES = 1024
"""Room for the header of a serialised array."""


@dataclass(frozen=True)
class Rejected(Exception):
    """A reply that failed, and why."""

    reason: str


@dataclass(frozen=True)
class Screened:
    """Replies sorted into usable answers and named rejections."""

    answers: tuple[Answer, ...]
    """Sorted by client; weights capped."""
    rejected: Mapping[str, str]
    """Client -> reason, for replies that arrived and failed, were errors, or never came."""
    faults: frozenset[str]
    """Of the rejected, those whose content broke a rule: a strike against them."""
    capped: Mapping[str, float]
    """Client -> reported weight, where the cap lowered it."""


@dataclass(frozen=True, kw_only=True)
class Screen:
    """Rules a reply must meet.

    Attributes
    ----------
    weight_cap
        Largest weight of one client in an average, in units of the round's median
        ``num-examples``; larger ones are lowered to it.
    weight_limit
        Largest ``num-examples`` that is believed at all, in the same unit. Applies from three
        replies on: of two, nobody can say which one is absurd.
    norm_limit
        Largest distance of a returned model from the global one, in units of the round's median
        distance. Applies from three replies on.
    """

    weight_cap: float = 2.0
    weight_limit: float = 1000.0
    norm_limit: float = 20.0

    def check(
        self, replies: Sequence[Reply], previous: Parameters | None, *, far: bool = True
    ) -> Screened:
        """Screen the replies of one round.

        Parameters
        ----------
        replies
            One per client asked.
        previous
            Model that was sent out; its names, shapes and dtypes are the schema. ``None`` for
            replies that carry metrics only.
        far
            Whether to look how far from it replies are; sums over rows are no models near it.
        """
        answers: list[Answer] = []
        rejected: dict[str, str] = {}
        faults: set[str] = set()
        for reply in replies:
            if (reason := missing(reply)) is not None:
                rejected[reply.client] = reason
                continue
            try:
                answers.append(read_answer(reply.client, reply.message.content, previous))  # type: ignore[union-attr]
            except Rejected as failure:
                rejected[reply.client] = failure.reason
                faults.add(reply.client)
        norms = {
            answer.client: norm(difference(answer.arrays, previous))
            for answer in answers
            if far and answer.arrays is not None and previous is not None
        }
        failed = self.compare(answers, norms, previous)
        kept, capped = self.cap([answer for answer in answers if answer.client not in failed])
        kept.sort(key=lambda answer: answer.client)
        rejected = dict(sorted((rejected | failed).items()))
        return Screened(tuple(kept), rejected, frozenset(faults | failed.keys()), capped)

    def compare(
        self, answers: Sequence[Answer], norms: Mapping[str, float], previous: Parameters | None
    ) -> dict[str, str]:
        """Return whom to reject, and why, in comparison with the others of the round.

        Parameters
        ----------
        answers
            Of all clients; their arrays are not looked at.
        norms
            Client -> distance of its model from ``previous``; empty where there are no models.
        """
        rejected = _odd_metrics(answers)
        left = [answer for answer in answers if answer.client not in rejected]
        rejected |= self._heavy(left)
        norms = {client: value for client, value in norms.items() if client not in rejected}
        return rejected | (self._far(norms, previous) if previous is not None else {})

    def cap(self, answers: Sequence[Answer]) -> tuple[list[Answer], dict[str, float]]:
        """Return the answers with their weights capped, and what the capped ones had claimed."""
        if not answers:
            return [], {}
        # Of two middle values the lower: with two clients neither can buy itself a larger cap.
        cap = self.weight_cap * median_low(answer.num_examples for answer in answers)
        capped = {a.client: float(a.num_examples) for a in answers if a.num_examples > cap}
        return [
            replace(answer, num_examples=cap) if answer.client in capped else answer
            for answer in answers
        ], capped

    def _heavy(self, answers: Sequence[Answer]) -> dict[str, str]:
        if len(answers) < 3:
            return {}
        limit = self.weight_limit * median_low(answer.num_examples for answer in answers)
        return {
            answer.client: f"num-examples {answer.num_examples:g} exceeds {limit:g}, "
            f"{self.weight_limit:g} times the round's median"
            for answer in answers
            if answer.num_examples > limit
        }

    def _far(self, norms: Mapping[str, float], previous: Parameters) -> dict[str, str]:
        absurd = ABSURD_UPDATE * (1 + norm(previous))
        failed = {
            client: f"update norm {value:.3g} exceeds {absurd:.3g}, {ABSURD_UPDATE:g} times the "
            "model's own"
            for client, value in norms.items()
            if value > absurd
        }
        if len(norms) < 3:
            return failed
        limit = self.norm_limit * median(norms.values())
        return failed | {
            client: f"update norm {value:.3g} exceeds {limit:.3g}, {self.norm_limit:g} times the "
            "round's median"
            for client, value in norms.items()
            if value > limit > 0
        }


def missing(reply: Reply) -> str | None:
    """Say why there is nothing to read in a reply; ``None`` if there is."""
    if reply.message is None:
        return "no reply before the deadline"
    if reply.message.has_error():
        error = reply.message.error
        return f"error {error.code}: {one_line(error.reason)}"
    return None


def read_answer(client: str, content: RecordDict, previous: Parameters | None) -> Answer:
    """Decode one reply; raises ``Rejected``."""
    metrics, num_examples = read_form(content, with_model=previous is not None)
    model = None if previous is None else read_model(content[messages.ARRAYS], previous)  # type: ignore[arg-type]
    return Answer(client, model, metrics, num_examples)


def read_form(
    content: RecordDict, *, with_model: bool
) -> tuple[dict[str, int | float], int | float]:
    """Check which records there are; return the metrics and ``num-examples``."""
    arrays = [key for key, record in content.items() if isinstance(record, ArrayRecord)]
    wanted = [messages.ARRAYS] if with_model else []
    if arrays != wanted:
        raise Rejected(f"expected array records {wanted}, got {sorted(arrays)}")
    found = [key for key, record in content.items() if isinstance(record, MetricRecord)]
    if found != [messages.METRICS]:
        raise Rejected(f"expected metric records {[messages.METRICS]}, got {sorted(found)}")
    return read_metrics(content[messages.METRICS])  # type: ignore[arg-type]


def read_metrics(record: MetricRecord) -> tuple[dict[str, int | float], int | float]:
    """Return the metrics without ``num-examples``, and ``num-examples``."""
    if messages.NUM_EXAMPLES not in record:
        raise Rejected(f"metric '{messages.NUM_EXAMPLES}' is missing")
    metrics: dict[str, int | float] = {}
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Rejected(f"metric '{name}' is a {type(value).__name__}, not one number")
        if not math.isfinite(value):
            raise Rejected(f"metric '{name}' is {value}")
        if name == messages.ACCURACY and not 0 <= value <= 1:
            raise Rejected(f"metric '{name}' is {value:g}; it must lie in [0, 1]")
        metrics[name] = value
    weight = metrics.pop(messages.NUM_EXAMPLES)
    if weight <= 0:
        raise Rejected(f"num-examples is {weight:g}; it must be positive")
    return metrics, weight


def read_model(record: Mapping[str, Array], schema: Parameters) -> dict[str, torch.Tensor]:
    """Decode a model that must match ``schema`` exactly and be finite."""
    check_names(record.keys(), schema)
    return {name: read_tensor(name, record[name], tensor) for name, tensor in schema.items()}


def check_names(found: Collection[str], schema: Parameters) -> None:
    """Raise ``Rejected`` unless a model has the names of ``schema``."""
    missed = sorted(schema.keys() - found)
    extra = sorted(found - schema.keys())
    if missed or extra:
        raise Rejected(
            "; ".join(
                f"{kind} {', '.join(names)}"
                for kind, names in (("missing tensors", missed), ("unknown tensors", extra))
                if names
            )
        )


def read_tensor(name: str, array: Array, like: torch.Tensor) -> torch.Tensor:
    """Decode one tensor, trusting neither its header nor what it declares."""
    if isinstance(array, TensorArray) and (tensor := array.tensor) is not None:
        return _checked(name, tensor, like)
    size = like.element_size() * like.nelement() + HEADER_BYTES
    if len(array.data) > size:
        raise Rejected(f"tensor {name} takes {len(array.data)} bytes, at most {size} are expected")
    try:
        value = array.numpy()
    except Exception as error:
        raise Rejected(f"tensor {name} cannot be decoded: {one_line(error)}") from error
    if not isinstance(value, np.ndarray):
        raise Rejected(f"tensor {name} is a {type(value).__name__}, not an array")
    if value.dtype != _numpy_dtype(like):
        raise Rejected(f"tensor {name} has dtype {value.dtype}, expected {_numpy_dtype(like)}")
    # A copy: the reply's own memory is read-only.
    return _checked(name, torch.from_numpy(np.array(value)), like)


def _checked(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if value.shape != like.shape:
        raise Rejected(
            f"tensor {name} has shape {tuple(value.shape)}, expected {tuple(like.shape)}"
        )
    if value.dtype != like.dtype:
        found, expected = (str(t.dtype).removeprefix("torch.") for t in (value, like))
        raise Rejected(f"tensor {name} has dtype {found}, expected {expected}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise Rejected(f"tensor {name} holds NaN or Inf")
    return value


def check_form(name: str, shape: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> None:
    """Raise ``Rejected`` unless a tensor has the shape and type of ``like``."""
    if tuple(shape) != tuple(like.shape):
        raise Rejected(f"tensor {name} has shape {tuple(shape)}, expected {tuple(like.shape)}")
    if dtype != like.dtype:
        found, expected = (str(kind).removeprefix("torch.") for kind in (dtype, like.dtype))
        raise Rejected(f"tensor {name} has dtype {found}, expected {expected}")


def _odd_metrics(answers: Sequence[Answer]) -> dict[str, str]:
    """Reject replies whose metric names differ from most clients'.

    Flower ends the whole run when they differ, so one client could stop everybody. The most
    frequent set of names counts; of equally frequent ones, the smallest, then the first by name.
    """
    kinds = Counter(tuple(sorted(answer.metrics)) for answer in answers)
    if len(kinds) < 2:
        return {}
    common = min(kinds, key=lambda names: (-kinds[names], len(names), names))
    return {
        answer.client: f"metrics {sorted(answer.metrics)} differ from most clients' {list(common)}"
        for answer in answers
        if tuple(sorted(answer.metrics)) != common
    }


def one_line(text: object, limit: int = 200) -> str:
    """Return text from a client fit for a log: one printable line of bounded length."""
    line = "".join(c if c.isprintable() else " " for c in str(text))
    return line if len(line) <= limit else line[:limit] + " ..."


def _numpy_dtype(tensor: torch.Tensor) -> np.dtype[np.generic]:
    return torch.empty(0, dtype=tensor.dtype).numpy().dtype
