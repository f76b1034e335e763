"""One round of a Flower strategy, apart from sending: choose clients, and aggregate.

Both the live federation and the plans that replay rounds (retraining, natural forgetting) pass
through here, so that they cannot drift apart.
"""

import contextlib
import copy
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import (
    Bulyan,
    FedAvg,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    Krum,
    MultiKrum,
    Strategy,
)

from strategies import averaging, messages
from strategies.directory import Directory, QuorumError, VisibleGrid
from strategies.exchange import match, matched
from strategies.screen import Screen
from unlearning.errors import RefusedRequestError, SecateurError
from unlearning.parameters import Parameters, byte_size, check_alike, check_finite
from unlearning.plan import Answer, Ask
from unlearning.randomness import derive_seed

log = logging.getLogger("flwr")


ROUND = "round"
"""Setting of an ask that plays a round of training, rather than asking for one step."""


class UnansweredError(RefusedRequestError):
    """A client whose answer a method cannot do without did not give it."""

    def __init__(self, ask: Ask, reasons: Mapping[str, str]) -> None:
        told = "; ".join(f"{client}: {reason}" for client, reason in sorted(reasons.items()))
        super().__init__(f"{ask.action} needs an answer of everybody asked: {told}")
        self.action, self.config = ask.action, ask.config
        """What they were asked for."""
        self.refused = sorted(c for c, why in reasons.items() if messages.REFUSED in why)
        """Clients that said that they will not, rather than could not."""


class AggregateError(SecateurError):
    """The wrapped strategy returned a model that cannot be published."""


FORGETFUL = (FedAvg, FedProx, FedMedian, FedTrimmedAvg, Krum, MultiKrum, Bulyan)
"""Strategies whose rounds depend on nothing but the model and the replies."""


def remembers(strategy: Strategy) -> bool:
    """Say whether a strategy may remember past rounds, as FedAdam does; unknown ones may."""
    return type(strategy) not in FORGETFUL


def too_few(usable: int, asked: int, needed: int) -> str:
    """Say why a round does not count."""
    return f"{usable} of {asked} clients sent a usable reply, {needed} are needed"


def fewest_clients(strategy: Strategy) -> int:
    """Return how many clients a round of a strategy waits for, as far as it says."""
    names = ("min_available_nodes", "min_train_nodes")
    return max(1, *(getattr(strategy, name, 1) for name in names))


def replies_needed(quorum: float, asked: int) -> int:
    """Return how many usable replies a round needs: a share of those asked, and one at least."""
    return max(1, math.ceil(quorum * asked - 1e-9))


@contextlib.contextmanager
def seeded_sampling(seed: int | None, number: int) -> Iterator[None]:
    """Make Flower's samplers, which draw from Python's global generator, depend on the seed.

    The generator is put back afterwards. Without a seed nothing is touched.
    """
    if seed is None:
        yield
        return
    state = random.getstate()
    random.seed(derive_seed(seed, "sampling", number))
    try:
        yield
    finally:
        random.setstate(state)


def aggregate(
    strategy: Strategy, number: int, schema: Parameters, replies: Sequence[Message]
) -> tuple[dict[str, torch.Tensor] | None, MetricRecord | None]:
    """Let ``strategy`` aggregate, and hold the result to the model's schema.

    Averages of integer buffers come back from Flower as float64; they are rounded to the dtype
    they had. ``None`` means that the strategy made no model.

    Raises
    ------
    AggregateError
        If the result differs from ``schema`` in names or shapes, or is not finite.
    """
    # Some of Flower's strategies empty the messages that they are given.
    arrays, metrics = strategy.aggregate_train(number, list(replies))
    if arrays is None:
        return None, metrics
    model = {
        name: _conform(tensor, schema[name]) if name in schema else tensor
        for name, tensor in messages.parameters_from(arrays).items()
    }
    try:
        check_alike(schema, model)
        check_finite(model)
    except SecateurError as error:
        raise AggregateError(
            f"{type(strategy).__name__} made an unusable model: {error}"
        ) from error
    return {name: model[name] for name in schema}, metrics


def _conform(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    if like.is_floating_point() or not tensor.is_floating_point():
        return tensor.to(like.dtype)
    return tensor.round().to(like.dtype)


class PlanRounds:
    """Carries a plan's asks over a Grid, with a strategy of its own.

    ``train`` goes through the strategy, so that whatever it tells clients (FedProx's ``mu``) or
    keeps between rounds (FedAdam's moments) takes part; every other action is sent as it is.

    Of rounds for which ``every`` says so, answers are handed over one by one also where their mean
    would do. Asks that are no round of training say that they belong to round ``number``, and what
    ``told`` has for their client.
    """

    def __init__(
        self,
        strategy: Strategy,
        grid: Grid,
        directory: Directory,
        *,
        screen: Screen,
        train_config: ConfigRecord,
        deadline_s: float,
        quorum: float,
        seed: int | None,
        every: Callable[[int], bool] = lambda number: False,
        number: int = 0,
        told: Callable[[str], Mapping[str, Any]] = lambda client: {},
    ) -> None:
        self.strategy = strategy
        """Plays the plan's rounds, and remembers them as the federation's own does."""
        self._grid = grid
        self._directory = directory
        self._screen = screen
        self._train_config = train_config
        self._deadline_s = deadline_s
        self._quorum = quorum
        self._seed = seed
        self._every = every
        self._number = number
        self._told = told
        self.answered: set[str] = set()
        """Clients whose training entered the plan."""
        self.trained: dict[str, int] = {}
        """Client -> the first round that it was asked to train in."""
        self.asks = 0
        """Asks carried so far."""
        self.bytes_sent = 0
        """Of models and statistics, to clients and back."""
        self.rejected: dict[str, str] = {}
        """Client -> why its answer to the last ask was not used."""
        self.unheard: list[str] = []
        """Whose answers, to asks that are no round, a plan did without; in words."""

    def ask(self, ask: Ask) -> list[Answer]:
        """Send one ask and return the usable answers, sorted by client.

        A round of training that too few answered does not count: nothing is returned then.
        """
        self.asks += 1
        training = ask.action.split(".")[0] == messages.TRAIN
        plays = training and ROUND in ask.config
        if plays:
            try:
                outgoing, expected = self._train(ask)
            except QuorumError as error:
                log.warning("%s: %s", ask.action, error)
                return []
        else:
            outgoing = self._other(ask)
            expected = len(outgoing)
        received = self._grid.send_and_receive(outgoing, timeout=self._deadline_s)
        schema = ask.expects if ask.expects is not None or not training else ask.arrays
        average = None
        one_by_one = isinstance(received, Iterator) and averaging.needs_mean_only(self.strategy)
        wanted = plays and self._every(int(ask.config[ROUND]))
        if ask.mean and one_by_one and schema is not None and not wanted:
            averaged = averaging.average(
                matched(outgoing, received, self._directory), schema, self._screen
            )
            screened, average = averaged.screened, averaged.mean
        else:
            screened = self._screen.check(
                match(outgoing, received, self._directory), schema, far=ask.expects is None
            )
        self.rejected = dict(screened.rejected)
        for client, reason in screened.rejected.items():
            log.warning("%s: answer of %s not used: %s", ask.action, client, reason)
        for model, count in ((ask.arrays, len(outgoing)), (schema, len(screened.answers))):
            self.bytes_sent += count * byte_size([model]) if model is not None else 0
        silent = [client for client in ask.to if client in self.rejected]
        if ask.everybody and silent:
            lacking = UnansweredError(ask, {client: self.rejected[client] for client in silent})
            if lacking.refused or not ask.away or not screened.answers:
                raise lacking
        if not plays:
            self.unheard += [
                f"unheard: {ask.action} is without {client}: {self.rejected[client]}"
                for client in silent
            ]
        if plays:
            needed, usable = replies_needed(self._quorum, expected), len(screened.answers)
            if usable < needed:
                log.warning("%s: %s", ask.action, too_few(usable, expected, needed))
                return []
            self.answered.update(answer.client for answer in screened.answers)
        return list(screened.answers) if average is None else [average]

    def aggregate(self, number: int, start: Parameters, answers: Sequence[Answer]) -> Parameters:
        """Aggregate as the strategy does; without an answer the model stays as it was."""
        if not answers:
            return start
        encoded = [
            messages.message_from(answer, self._directory.node(answer.client)) for answer in answers
        ]
        try:
            model, _ = aggregate(self.strategy, number, start, encoded)
        except AggregateError as error:
            log.warning("round %d of a plan made no model: %s", number, error)
            return start
        return start if model is None else model

    def _train(self, ask: Ask) -> tuple[list[Message], int]:
        """Return whom to ask, and how many it would be if all clients named were connected."""
        number = int(ask.config[ROUND])
        visible = VisibleGrid(
            self._grid, self._directory, _only(ask.to), patience_s=self._deadline_s
        )
        arrays = messages.record_from(ask.arrays or {})
        own = {key: value for key, value in ask.config.items() if key != ROUND}
        config = ConfigRecord({**self._train_config, **own})
        strategy = self.strategy if ask.mean else everybody(self.strategy)
        with seeded_sampling(self._seed, number):
            outgoing = list(strategy.configure_train(number, arrays, config, visible))
        for message in outgoing:
            self.trained.setdefault(self._directory.client(message.metadata.dst_node_id), number)
        if ask.action != messages.TRAIN:  # a strategy may have a kind of training of its own
            for message in outgoing:
                message.metadata.message_type = ask.action
        there = self._directory.refresh(self._grid).values()
        connected = len(set(ask.to) & set(there))
        return outgoing, len(outgoing) * len(ask.to) // max(1, connected)

    def _other(self, ask: Ask) -> list[Message]:
        self._directory.refresh(self._grid)
        arrays = None if ask.arrays is None else messages.record_from(ask.arrays)
        return [
            Message(
                content=self._content(ask, arrays, client),
                dst_node_id=self._directory.node(client),
                message_type=ask.action,
            )
            for client in ask.to
        ]

    def _content(self, ask: Ask, arrays: ArrayRecord | None, client: str) -> RecordDict:
        own = {messages.SERVER_ROUND: self._number, **self._told(client), **ask.config}
        content = RecordDict({messages.CONFIG: ConfigRecord({**self._train_config, **own})})
        if arrays is not None:
            content[messages.ARRAYS] = arrays
        return content


def everybody(strategy: Strategy) -> Strategy:
    """Return the strategy, asking whoever it sees: a plan that names clients means these."""
    asking = copy.copy(strategy)
    for name, value in (
        ("fraction_train", 1.0),
        ("min_train_nodes", 1),
        ("min_available_nodes", 1),
    ):
        if hasattr(asking, name):
            setattr(asking, name, value)
    return asking


def _only(clients: Sequence[str]) -> Callable[[str], bool]:
    chosen = frozenset(clients)
    return lambda client: client in chosen
