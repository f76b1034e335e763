"""Average replies as they come, without ever holding more than a few of them.

Where all that a round needs is the weighted mean, no reply has to be kept: it is added to a sum
and forgotten. What the screen compares among clients (weights, norms, names of metrics) is told
after the last reply, so replies are summed by class: those that the screen may still treat
differently are in different sums. A class is as small as the screen's rules are fine, and there are
as many as clients have different numbers of examples, not as many as clients.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp.strategy import (
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedProx,
    FedYogi,
    Strategy,
)
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from strategies import messages
from strategies.arrays import TensorArray
from strategies.exchange import Reply
from strategies.screen import (
    Rejected,
    Screen,
    Screened,
    check_form,
    check_names,
    missing,
    read_form,
    read_model,
)
from unlearning.errors import ParametersError, SecateurError
from unlearning.parameters import Parameters, weighted_mean
from unlearning.plan import Answer

MEANS = (FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad, FedYogi)
"""Strategies whose model depends on the replies through their weighted mean alone."""
PLAIN_MEANS = (FedAvg, FedProx)
"""Of these, those whose model is the mean itself."""
LONG_ROW = 2**13
"""Entries of a tensor from which a stack of them is added up row by row: a sum over the stack in
another type than its own goes through memory several times."""


def is_plain_mean(strategy: Strategy) -> bool:
    """Say whether a strategy's model is the mean of the replies, weighted by their examples."""
    return type(strategy) in PLAIN_MEANS and needs_mean_only(strategy)


def needs_mean_only(strategy: Strategy) -> bool:
    """Say whether one reply with the mean and all the weight gives ``strategy`` the same model.

    Subclasses are not trusted to: they may look at every reply.
    """
    return (
        isinstance(strategy, FedAvg)
        and type(strategy) in MEANS
        and strategy.weighted_by_key == messages.NUM_EXAMPLES
        and strategy.arrayrecord_key == messages.ARRAYS
        and strategy.train_metrics_aggr_fn is aggregate_metricrecords
    )


@dataclass(frozen=True)
class Averaged:
    """A round's replies, screened and averaged.

    Attributes
    ----------
    screened
        As the screen has it; the answers carry no arrays.
    mean
        The average as one answer with all the weight; ``None`` without a usable reply.
    """

    screened: Screened
    mean: Answer | None


def average(replies: Iterable[Reply], previous: Parameters, screen: Screen | None) -> Averaged:
    """Screen and average replies in one pass.

    The mean is FedAvg's up to rounding: it is summed in float64, in the order of arrival. Where the
    screen rejects a reply for its norm, those with a norm of the same power of two go with it:
    they can no longer be told apart.

    Parameters
    ----------
    replies
        One per client asked.
    previous
        The model that was sent out.
    screen
        ``None`` to use every reply that is no error.

    Raises
    ------
    SecateurError
        If nothing is screened and a reply's model has not the form of ``previous``.
    """
    sums: defaultdict[tuple[object, ...], _Sum] = defaultdict(_Sum)
    answers: list[Answer] = []
    norms: dict[str, float] = {}
    rejected: dict[str, str] = {}
    faults: set[str] = set()
    for block in _blocks(replies, previous, screen, rejected, faults):
        answers += block.answers
        members: defaultdict[tuple[object, ...], list[int]] = defaultdict(list)
        for row, answer in enumerate(block.answers):
            kind: tuple[object, ...] = (answer.num_examples,)
            if screen is not None:
                length = norms[answer.client] = block.norms[row]
                octave = math.frexp(length)[1] if 0 < length < math.inf else str(length)
                kind = (*kind, octave, *sorted(answer.metrics))
            members[kind].append(row)
        for kind, rows in members.items():
            sums[kind].add([block.answers[row].client for row in rows], block.models, rows)
    failed: dict[str, str] = {}
    capped: dict[str, float] = {}
    if screen is not None:
        failed = screen.compare(answers, norms, previous)
        faults.update(failed)
        for total in sums.values():
            failed |= _inseparable(total.clients, failed)
        answers, capped = screen.cap([a for a in answers if a.client not in failed])
    answers.sort(key=lambda answer: answer.client)
    told = dict(sorted((rejected | failed).items()))
    screened = Screened(tuple(answers), told, frozenset(faults), capped)
    return Averaged(screened, _mean(answers, sums.values(), previous))


def plain_mean(
    strategy: Strategy, replies: Sequence[Message]
) -> tuple[dict[str, Tensor], MetricRecord] | None:
    """Return what FedAvg makes of replies, bit for bit, in a fraction of its time.

    ``None`` where that is not certain: for another strategy, for replies that are not all of the
    same form, and for integer tensors, whose means FedAvg leaves as float64.
    """
    if not (is_plain_mean(strategy) and replies):
        return None
    contents = [reply.content for reply in replies]
    try:
        forms = [read_form(content, with_model=True) for content in contents]
    except Rejected:
        return None
    models = [
        messages.shared_parameters(cast(ArrayRecord, content[messages.ARRAYS]))
        for content in contents
    ]
    weights = [weight for _, weight in forms]
    names = forms[0][0].keys()
    if any(metrics.keys() != names for metrics, _ in forms) or not all(
        tensor.is_floating_point() for tensor in models[0].values()
    ):
        return None
    try:
        mean = weighted_mean(models, weights)
    except ParametersError:
        return None
    total = sum(weights)
    shares = [weight / total for weight in weights]
    told = {
        name: sum((m[name] * share for (m, _), share in zip(forms, shares, strict=True)), 0.0)
        for name in names
    }
    return mean, MetricRecord(cast(Any, told))


# ---------------------------------------------------------------- sums
@dataclass
class _Sum:
    """The sum of some clients' models, in float64 on the CPU."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    clients: list[str] = field(default_factory=list)

    def add(self, clients: Sequence[str], models: Parameters, rows: Sequence[int]) -> None:
        """Add the ``rows`` of models with shape (models, ...)."""
        self.clients += clients
        for name, stack in models.items():
            if name not in self.tensors:
                self.tensors[name] = torch.zeros(stack.shape[1:], dtype=torch.float64)
            total = self.tensors[name]
            if stack.device.type == "cpu" and total.numel() >= LONG_ROW:
                for row in rows:
                    total.add_(stack[row])
            else:
                chosen = stack if len(rows) == len(stack) else stack[list(rows)]
                total.add_(torch.sum(chosen, 0, dtype=torch.float64).cpu())


def _mean(answers: Sequence[Answer], sums: Iterable[_Sum], like: Parameters) -> Answer | None:
    weights = {answer.client: float(answer.num_examples) for answer in answers}
    total = sum(weights.values())
    if not total:
        return None
    used = [entry for entry in sums if entry.clients[0] in weights]
    model = {}
    for name, tensor in like.items():
        mean = sum(weights[entry.clients[0]] / total * entry.tensors[name] for entry in used)
        assert isinstance(mean, Tensor)  # noqa: S101  the sum is not empty
        model[name] = (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
    common = set.intersection(*(set(answer.metrics) for answer in answers))
    metrics = {
        name: sum(weights[a.client] / total * a.metrics[name] for a in answers)
        for name in answers[0].metrics
        if name in common
    }
    return Answer(answers[0].client, model, metrics, total, tuple(weights))


def _inseparable(clients: Sequence[str], failed: Mapping[str, str]) -> dict[str, str]:
    """Return who must be left out because of others in the same sum."""
    bad = [client for client in clients if client in failed]
    if not bad:
        return {}
    reason = f"update norm is like that of {bad[0]}, which was rejected, and in the same sum"
    return {client: reason for client in clients if client not in failed}


# ---------------------------------------------------------------- reading
@dataclass(frozen=True)
class _Block:
    """Usable replies of some clients.

    Attributes
    ----------
    answers
        Without arrays.
    models
        Their models, shape (clients, ...).
    norms
        Distances from the model that was sent; empty where nothing is screened.
    """

    answers: Sequence[Answer]
    models: Parameters
    norms: Sequence[float]


def _blocks(
    replies: Iterable[Reply],
    previous: Parameters,
    screen: Screen | None,
    rejected: dict[str, str],
    faults: set[str],
) -> Iterator[_Block]:
    """Yield the usable replies; note the others."""
    for stack, group in itertools.groupby(replies, key=_stack_of):
        there = []
        for reply in group:
            if (reason := missing(reply)) is not None:
                rejected[reply.client] = reason
            else:
                there.append(reply)
        for together in [there] if stack else [[reply] for reply in there]:
            block, refused = _block(together, previous, screen)
            rejected.update(refused)
            faults.update(refused)
            if block.answers:
                yield block


def _block(
    replies: Sequence[Reply], previous: Parameters, screen: Screen | None
) -> tuple[_Block, dict[str, str]]:
    """Read replies whose models are in one stack, or one reply; return also whom to refuse."""
    refused: dict[str, str] = {}
    answers: list[Answer] = []
    formed: list[Reply] = []
    for reply in replies:
        try:
            metrics, weight = _metrics(reply, screen)
        except Rejected as failure:
            refused[reply.client] = failure.reason
        else:
            answers.append(Answer(reply.client, None, metrics, weight))
            formed.append(reply)
    if not formed:
        return _Block((), {}, ()), refused
    try:
        models = _models(formed, previous, screen)
    except Rejected as failure:
        if screen is None:
            raise SecateurError(
                f"the reply of {formed[0].client} cannot be averaged: {failure.reason}; screen "
                "replies, and those that do not fit are left out"
            ) from failure
        return _Block((), {}, ()), refused | {r.client: failure.reason for r in formed}
    if screen is None:
        return _Block(answers, models, ()), refused
    spoilt = _not_finite(models)
    if spoilt:
        refused |= {
            answers[row].client: f"tensor {name} holds NaN or Inf" for row, name in spoilt.items()
        }
        rows = [row for row in range(len(answers)) if row not in spoilt]
        answers = [answers[row] for row in rows]
        models = {name: tensor[rows] for name, tensor in models.items()}
    norms = _distances(models, previous) if answers else []
    return _Block(answers, models, norms), refused


def _stack_of(reply: Reply) -> int:
    """Return which stack of models a reply is a row of; 0 for a model of its own."""
    if missing(reply) is not None:
        return 0
    record = reply.message.content.get(messages.ARRAYS)  # type: ignore[union-attr]
    if not isinstance(record, ArrayRecord) or not record:
        return 0
    first = next(iter(record.values()))
    return id(first.stack) if isinstance(first, TensorArray) and first.row is not None else 0


def _models(
    replies: Sequence[Reply], previous: Parameters, screen: Screen | None
) -> dict[str, Tensor]:
    """Return the models of one stack, or of one reply, shape (models, ...)."""
    contents = [reply.message.content for reply in replies]  # type: ignore[union-attr]
    records = [cast(ArrayRecord, content[messages.ARRAYS]) for content in contents]
    arrays = {name: array for name, array in records[0].items() if isinstance(array, TensorArray)}
    if len(arrays) < len(records[0]) or any(array.row is None for array in arrays.values()):
        if screen is not None:
            model = read_model(records[0], previous)
        else:
            model = messages.shared_parameters(records[0])
            _check_forms(model, previous)
        return {name: tensor.unsqueeze(0) for name, tensor in model.items()}
    stacks = {name: cast(Tensor, array.stack) for name, array in arrays.items()}
    _check_forms({name: stack[0] for name, stack in stacks.items()}, previous)
    rows = [cast(TensorArray, next(iter(record.values()))).row for record in records]
    if rows == list(range(len(next(iter(stacks.values()))))):
        return stacks
    return {name: stack[rows] for name, stack in stacks.items()}


def _check_forms(model: Parameters, previous: Parameters) -> None:
    check_names(model.keys(), previous)
    for name, tensor in previous.items():
        check_form(name, model[name].shape, model[name].dtype, tensor)


def _metrics(reply: Reply, screen: Screen | None) -> tuple[dict[str, int | float], int | float]:
    content = reply.message.content  # type: ignore[union-attr]
    if screen is not None:
        return read_form(content, with_model=True)
    metrics = dict(cast(MetricRecord, content[messages.METRICS]))
    weight = metrics.pop(messages.NUM_EXAMPLES)
    return cast(dict[str, int | float], metrics), cast(float, weight)


def _not_finite(models: Parameters) -> dict[int, str]:
    """Return the first tensor of each model that holds NaN or Inf; row -> name."""
    found: dict[int, str] = {}
    for name, stack in models.items():
        if stack.is_floating_point() and not bool((good := torch.isfinite(stack)).all()):
            rows = torch.nonzero(~good.reshape(len(good), -1).all(dim=1)).reshape(-1).tolist()
            found = dict.fromkeys(rows, name) | found
    return found


def _distances(models: Parameters, previous: Parameters) -> list[float]:
    """Return each model's distance from ``previous``, as ``norm(difference(...))`` has it."""
    squares = [
        (stack - previous[name].to(stack.device))
        .double()
        .square()
        .reshape(len(stack), -1)
        .sum(dim=1)
        for name, stack in models.items()
        if stack.is_floating_point()
    ]
    return torch.stack(squares).sum(dim=0).sqrt().tolist()
