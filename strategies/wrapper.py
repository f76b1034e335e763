"""``Unlearning``: any Flower strategy, plus screening, detection, quarantine and forgetting."""

import copy
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from strategies import averaging, messages, rounds
from strategies.combination import check_combination, check_needs, takes_gradients
from strategies.data_requests import DataRequests, told
from strategies.detectors.interface import Detector, Finding, limited
from strategies.directory import Directory, Identify, QuorumError, VisibleGrid, by_node
from strategies.every_update import Holder, needs_every_update
from strategies.exchange import Reply, match, matched
from strategies.ffmu import FFMU
from strategies.forgetting import Forgetting, needs_of
from strategies.marking import Marking, ask_leaver
from strategies.memory import LastRound, Memory
from strategies.messages import ACCURACY
from strategies.methods.interface import (
    Method,
    Pending,
    ServerLab,
    Situation,
    Unlearned,
    together,
)
from strategies.methods.retraining import plays_as_ever
from strategies.rate_limit import RateLimit
from strategies.records import Phase, RoundRecord, UnlearningRecord
from strategies.recovery import VALIDATION, Recovery, RecoveryWatch
from strategies.rewriting import Rewriting
from strategies.roster import Hysteresis, Roster, Status
from strategies.screen import Screen, Screened
from strategies.shares import Shares
from strategies.store import MemoryStore, Store
from unlearning.catalogue import DATA, METHODS, Need, Target
from unlearning.errors import (
    ImpossibleRequestError,
    ParametersError,
    RefusedRequestError,
    SecateurError,
)
from unlearning.fedup import check_majority
from unlearning.parameters import Parameters, copied, difference
from unlearning.plan import Answer, Ask, carry_out
from unlearning.randomness import derive_seed
from unlearning.retraining import federated_average
from unlearning.routing import (
    CERTIFIED,
    NEED_MAJORITY,
    Cause,
    Promise,
    Request,
    Route,
    check_whole,
)

log = logging.getLogger("flwr")


class Unlearning(Strategy):
    """Wrap a strategy so that the federation can forget.

    A round, in order:

    1. Holders drop what is, or is to be, forgotten (``strategies.data_requests``).
    2. The wrapped strategy chooses among the clients that are not excluded. Whoever is to mark rows
       before it leaves does so in this round (``strategies.marking``).
    3. ``screen`` drops replies that break the model's schema.
    4. ``detector`` looks at what is left; who is flagged often enough is quarantined at once.
    5. The wrapped strategy aggregates the rest.
    6. If clients, or data that clients hold, wait to be forgotten and ``rate_limit`` allows it, one
       method forgets all who wait for it.
    7. Recovery rounds follow until ``recovery`` is satisfied.

    With ``screen``, ``detector`` and ``method`` all ``None`` it behaves as the wrapped strategy
    does. ``strategies.loop.run_rounds`` plays the rounds; ``start`` calls it, so the class can
    stand wherever a Flower strategy stands.

    Parameters
    ----------
    strategy
        Any Flower strategy whose clients send model parameters.
    screen
        Rules for replies. Needed by a detector or a method, which trust what they see.
    detector, hysteresis
        Who looks malicious, and how often that must be found. Without a detector, clients are
        forgotten on request only.
    method, rate_limit, recovery
        How to forget, how often at most, and when recovery is over.
    others
        Methods that requests may name, or be routed to, besides.
    memory
        What is remembered for the methods; what ``method`` and ``others`` need by default.
    lab
        What the server can compute on data of its own.
    store
        Keeps rounds and journals; in memory by default.
    identify
        Names the client behind a node.
    deadline_s
        Seconds that a round waits, first for enough clients to connect, then for their replies.
    quorum
        Share of the clients asked that must send a usable reply for the round to count.
    seed
        Seeds sampling and detection. ``None`` leaves Python's global generator to Flower.
    offers
        Needs that the task and the clients meet: classes, convolutions, a batch log. A log counts
        only where the strategy's model is the weighted mean, of which each client has a share.
    classes
        Number of classes, so that requests for others are refused; 0 where it is not known.
    """

    def __init__(
        self,
        strategy: Strategy,
        *,
        screen: Screen | None = None,
        detector: Detector | None = None,
        hysteresis: Hysteresis | None = None,
        method: Method | None = None,
        others: Sequence[Method] = (),
        memory: Memory | None = None,
        lab: ServerLab | None = None,
        rate_limit: RateLimit | None = None,
        recovery: Recovery | None = None,
        store: Store | None = None,
        identify: Identify = by_node,
        deadline_s: float = 3600.0,
        quorum: float = 0.5,
        seed: int | None = None,
        offers: Collection[Need] = (),
        classes: int = 0,
    ) -> None:
        needs = needs_of([m for m in (method, *others) if m is not None])
        check_combination(strategy, screen, detector, method, others)
        if not 0 <= quorum <= 1:
            raise ValueError(f"quorum must lie in [0, 1], got {quorum}")
        self.strategy = strategy
        self.screen = screen
        self.detector = detector
        self.warm_up = (hysteresis or Hysteresis()).warm_up
        if Need.BATCH_LOG in offers and not averaging.is_plain_mean(strategy):
            log.warning(
                "batch logs are of no use: %s makes no plain average, of which clients have shares",
                type(strategy).__name__,
            )
            offers = frozenset(offers) - {Need.BATCH_LOG}
        self.forgetting = Forgetting(
            method,
            others,
            memory=memory if memory is not None else Memory(needs),
            rate_limit=rate_limit or RateLimit(),
            lab=lab,
            offers=offers,
            classes=classes,
        )
        if detector is not None and method is not None:
            check_needs(method, self.forgetting)
        self.recovery = RecoveryWatch(recovery or Recovery())
        self.store: Store = store if store is not None else MemoryStore()
        self.deadline_s = deadline_s
        self.quorum = quorum
        self.seed = seed
        self.directory = Directory(identify)
        self.data = DataRequests(self.forgetting, self.directory)
        logged = Need.BATCH_LOG in self.forgetting.offers
        self.shares = Shares(self.memory, self.directory, on=logged)
        self.roster = Roster(hysteresis)
        self.marking = Marking(self.directory, self.roster)
        self.record = RoundRecord(0)
        self.fresh = copy.deepcopy(strategy)
        """The wrapped strategy as it was at first; not to be used, but copied."""
        self._outgoing: list[Message] = []
        self._refusals: list[str] = []
        """What was not forgotten in this round, and why."""
        self._previous: dict[str, torch.Tensor] = {}
        self._holder = Holder()
        self.clients_accuracy: float | None = None
        self.strategy_since = 0
        """Round after which the wrapped strategy was as at first."""
        self.forgettings = 0
        """Unlearnings so far; clients reset their state when it changes."""

    # ------------------------------------------------------------ Flower's interface
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Let the wrapped strategy choose among the clients that are not excluded."""
        self.record = RoundRecord(server_round, phase=self._phase())
        self._refusals = []
        self._previous = messages.parameters_from(arrays)
        self._tell_forgettings(config)
        self._settle(grid, config)
        for key, value in self.recovery.told(server_round, config).items():
            config[key] = value
        with rounds.seeded_sampling(self.seed, server_round):
            chosen = self.strategy.configure_train(
                server_round, arrays, config, self._visible(grid)
            )
            self._outgoing = self.shares.tell(list(chosen), server_round)
        self._outgoing = self.data.reminders.tell(self._outgoing)
        self._outgoing = self.marking.instead(self._outgoing, server_round)
        return self._outgoing

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Screen, detect, quarantine, and let the wrapped strategy aggregate what is left."""
        if isinstance(replies, Iterator):  # of a Grid that makes each reply when asked for it
            why = needs_every_update(self.strategy, self.detector, self.forgetting)
            if why is None:
                return self._aggregate_mean(server_round, replies)
            replies = self._holder.hold(replies, self._previous, why)
        received = match(self._outgoing, replies, self.directory)
        self.record.asked = tuple(reply.client for reply in received)
        if self.screen is None:
            return self._pass_through(server_round, received)
        screened = self.screen.check(received, self._previous)
        self._note_screening(screened)
        answers = screened.answers
        needed = rounds.replies_needed(self.quorum, len(received))
        if len(answers) < needed:
            return self._void(rounds.too_few(len(answers), len(received), needed))
        due = self._detect(server_round, answers)
        kept = [answer for answer in answers if answer.client not in due]
        model, metrics, failure = self._aggregate(server_round, kept)
        self._remember(server_round, answers, kept if model is not None else ())
        if due:  # at once, whether or not the strategy made a model of the others
            others = model if model is not None else federated_average(0, self._previous, kept)
            self._quarantine(due, server_round, "malicious", others, self.record.quarantined)
        if model is None:
            return self._void(failure)
        self.record.participants = tuple(answer.client for answer in kept)
        return messages.record_from(model), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Let the wrapped strategy choose among the clients that are not excluded."""
        self._tell_forgettings(config)
        with rounds.seeded_sampling(self.seed, -server_round):
            chosen = self.strategy.configure_evaluate(
                server_round, arrays, config, self._visible(grid)
            )
            self._outgoing = list(chosen)
        return self._outgoing

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Screen the metrics, and let the wrapped strategy average them."""
        received = match(self._outgoing, replies, self.directory)
        self.clients_accuracy = None
        if self.screen is None:
            return self.strategy.aggregate_evaluate(server_round, _messages(received))
        screened = self.screen.check(received, None)
        for client, reason in screened.rejected.items():
            log.warning("round %d: evaluation of %s not used: %s", server_round, client, reason)
        self.roster.strike(screened.faults)
        if not screened.answers:
            return None
        accuracies = [a.metrics[ACCURACY] for a in screened.answers if ACCURACY in a.metrics]
        # The median: a mean would let one client decide when recovery is over.
        self.clients_accuracy = median(accuracies) if accuracies else None
        return self.strategy.aggregate_evaluate(server_round, self._encoded(screened.answers))

    def summary(self) -> None:
        """Log what is switched on, then the wrapped strategy's settings."""
        log.info(
            "\t├──> Unlearning: screen %s, detector %s, method %s",
            "on" if self.screen else "off",
            self.detector.name if self.detector else "off",
            self.forgetting.method.name if self.forgetting.method else "off",
        )
        self.strategy.summary()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Play the rounds as Flower's strategies do, and as long as forgetting takes.

        ``evaluate_fn`` may return ``validation_accuracy``: recovery is judged by it.
        """
        from strategies.loop import run_rounds  # noqa: PLC0415  the loop knows this class

        self.deadline_s = self.deadline_s if timeout is None else timeout
        result = Result()

        def measure(number: int, model: Parameters) -> Mapping[str, float | None]:
            found = evaluate_fn(number, messages.record_from(model)) if evaluate_fn else None
            if found is None:
                return {}
            result.evaluate_metrics_serverapp[number] = found
            return {n: float(v) for n, v in found.items() if not isinstance(v, list)}

        model = run_rounds(
            self,
            grid,
            messages.parameters_from(initial_arrays),
            rounds=num_rounds,
            train_config=train_config,
            evaluate_config=evaluate_config,
            measure=measure,
            result=result,
        )
        result.arrays = messages.record_from(model)
        return result

    # ------------------------------------------------------------ forgetting
    @property
    def memory(self) -> Memory:
        """Return what is remembered of past rounds."""
        return self.forgetting.memory

    @property
    def forgotten_classes(self) -> set[int]:
        """Return the numbers of classes that were forgotten; recovery is judged without them."""
        return self.data.forgotten_classes

    @property
    def busy(self) -> bool:
        """Whether clients wait to be forgotten and could be, or recovery or a check goes on."""
        waiting = bool(self.forgetting.pending) and not self.forgetting.stuck
        checking = self.marking.busy(self.record.number)
        return waiting or checking or self.recovery.current is not None

    def route(self, request: Request, passed: Collection[str] = ()) -> Route:
        """Return how a request would be served; nothing is changed.

        ``passed`` are methods that turned out not to serve it.

        Raises
        ------
        RefusedRequestError
            If it would not be; one of its kinds.
        """
        trains = isinstance(self.strategy, FFMU)
        why = self._uncertifiable
        return self.forgetting.route(
            request,
            certifies=trains and why is None,
            uncertified=(trains and why) or "",
            gradients=takes_gradients(self.strategy),
            without=passed,
            number=self.record.number,
            active={*self._active(), *set(request.clients).intersection(self.directory.clients())},
            fewest=rounds.fewest_clients(self.strategy),
            remembers=rounds.remembers(self.strategy),
        )

    @property
    def _uncertifiable(self) -> str | None:
        """Say why no deletion is certified to change nothing; ``None`` if one may be."""
        if not isinstance(self.strategy, FFMU):
            return "the training is none that certifies"
        if self.detector is not None:
            return "a detector is on, which may flag others where samples are missing"
        return self.strategy.uncertifiable

    def request(self, request: Request) -> Route:
        """Take up a request, to be served as soon as the rate limit allows.

        Clients that are to be forgotten are excluded now, or, where they are to mark rows first,
        as soon as they did (``strategies.marking``). Holders of a class or samples stay; they are
        asked to drop them before the next round. To be called between rounds.

        Raises
        ------
        RefusedRequestError
            If it cannot be served as it asks for, or a client is unknown, or excluded already and
            not to be forgotten exactly now; nothing is changed.
        """
        self._check_names(request)
        found = self.route(request)
        if not request.marks:
            self._take_up(request, found)
            return found
        if isinstance(self.strategy, FFMU):
            raise ImpossibleRequestError(
                "FFMU's clients send quantised gradients, which carry no marks; leave marks out"
            )
        self.marking.wait(request, self.record.number)
        return found

    def settle_marks(self, model: Parameters, grid: Grid, config: ConfigRecord) -> None:
        """Go on with whoever marks or checks; called once the round's model is published."""
        told = ConfigRecord({**config, messages.SERVER_ROUND: self.record.number})
        self._tell_forgettings(told)
        self.marking.settle(
            self.record,
            lambda client, action: ask_leaver(
                client, action, model, told, grid, self.directory, self.deadline_s
            ),
            lambda request: self._take_up(request, self.route(request)),
            frozenset(c for entry in self.forgetting.pending for c in entry.clients),
        )

    def _take_up(self, request: Request, found: Route) -> None:
        if request.target in DATA:
            self.data.wait(
                request, found.method, self._active(), self.record.number, self._previous
            )
            return
        others = self._others_in_last_round(request.clients)
        self._quarantine(
            request.clients,
            self.record.number,
            request.cause,
            others,
            {},
            method=found.method,
            most_rounds=request.most_rounds,
        )

    def forget(self, clients: Sequence[str], cause: Cause) -> Route:
        """Request to forget clients by the federation's own method, whatever it guarantees."""
        if self.forgetting.method is None:
            raise SecateurError("no method is set, so nobody can be forgotten; set one")
        name = self.forgetting.method.name
        promise: Promise = "exact" if METHODS[name].guarantee == "exact" else "approximate"
        return self.request(
            Request(Target.CLIENT, tuple(clients), cause, guarantee=promise, method=name)
        )

    def _active(self) -> tuple[str, ...]:
        return tuple(filter(self._may_take_part, self.directory.clients()))

    def _members(self) -> tuple[str, ...]:
        """Return all but whom the roster excludes, also who has yet to drop what is forgotten."""
        return tuple(filter(self.roster.may_take_part, self.directory.clients()))

    def _may_take_part(self, client: str) -> bool:
        return self.roster.may_take_part(client) and client not in self.data.barred

    def _settle(self, grid: Grid, config: ConfigRecord) -> None:
        """See to it that whoever takes part has dropped what is, or is to be, forgotten."""
        if self.data.idle:
            return
        there = sorted(self.directory.refresh(grid).values())
        carrier = self.plan_rounds(grid, config, times=self.forgettings)
        for entry, error in self.data.drop(self._members(), there, carrier):
            self._note_refused(entry.method, (entry,), carrier, error)
        self.data.settle(self._members(), there, carrier)
        for client, why in self.data.barred.items():
            log.warning("round %d: %s takes no part: %s", self.record.number, client, why)

    def _others_in_last_round(self, clients: Sequence[str]) -> Parameters:
        """Return the aggregate of everybody else in the last round, as far as it is remembered."""
        last = self.memory.last
        if last is None:
            return self._previous
        answers = [
            Answer(client, last.locals_[client], {}, last.weights[client])
            for client in sorted(last.locals_.keys() - set(clients))
            if self.roster.may_take_part(client)
        ]
        return federated_average(last.number, last.previous, answers) if answers else self._previous

    def _check_names(self, request: Request) -> None:
        unknown = sorted(set(request.clients) - set(self.directory.clients()))
        if unknown:
            raise ImpossibleRequestError(f"no client is called {', '.join(unknown)}")
        for client in request.clients:
            if not self.roster.may_take_part(client):
                banned = self.roster.entry(client).status is Status.BANNED
                self.forgetting.check_excluded(client, request, banned=banned)

    def unlearn_if_due(
        self,
        model: Parameters,
        grid: Grid,
        config: ConfigRecord,
        on_ask: Callable[[Ask], None] = lambda ask: None,
    ) -> dict[str, torch.Tensor] | None:
        """Forget whoever waits, if the rate limit allows it; return the new model, if any.

        A refusal (too few honest clients in the round, a round not remembered, a result that is no
        model) is recorded with its reason; its clients stay in quarantine, and it is tried again in
        later rounds, not too often where clients are asked for it. Every other failure stops the
        run.
        """
        number = self.record.number
        # One at a time: recovery is measured against the model before the unlearning it follows.
        if self.recovery.current:
            return None
        for name, groups in self.forgetting.due(number):
            if not self.record.participants and Need.RETAINED in METHODS[name].needs:
                continue
            found = self._unlearn(name, groups, model, grid, config, on_ask)
            if found is not None:
                return found
        return None

    def _unlearn(
        self,
        name: str,
        groups: Sequence[tuple[Pending, ...]],
        model: Parameters,
        grid: Grid,
        config: ConfigRecord,
        on_ask: Callable[[Ask], None],
    ) -> dict[str, torch.Tensor] | None:
        """Forget those who wait for one method; return the new model, or ``None`` if refused.

        Of several groups, one plan begins with the model that the one before it made.
        """
        number = self.record.number
        rewriting = Rewriting(self.memory, number, logged=self.shares.on)
        carrier = self.plan_rounds(grid, config, every=rewriting.wants)

        def ask(question: Ask) -> Sequence[Answer]:
            on_ask(question)
            return carrier.ask(question)

        started = time.perf_counter()
        outcomes: list[Unlearned] = []
        served: list[Pending] = []
        told_of: list[Pending] = []
        for waiting in groups:
            due, late = self.forgetting.affordable(
                name, waiting, number, rounds.remembers(self.strategy)
            )
            for entry, error in late.items():
                self._note_refused(name, (entry,), carrier, error)
            if not due:
                continue
            asks = carrier.asks
            plan = f"unlearning-{number}" + (f"-{len(outcomes)}" if outcomes else "")
            try:
                situation = self._situation(
                    name, due, served, outcomes[-1].model if outcomes else model, carrier, rewriting
                )
                steps = self.forgetting.methods[name].plan(situation)
                outcomes.append(carry_out(steps, ask, self.store.journal(plan)))
            except (RefusedRequestError, ParametersError) as error:
                self.store.drop_journal(plan)
                self._note_refused(name, due, carrier, error, asks=carrier.asks - asks)
                continue
            self.store.drop_journal(plan)
            served += due
            told_of += situation.pending
        if not outcomes:
            return None
        outcome = together(outcomes)
        record = self._record_of(name, told_of, carrier, carrier.asks)
        record.seconds = time.perf_counter() - started
        return self._take_over(record, outcome, served, carrier, rewriting, config)

    def _situation(
        self,
        name: str,
        due: Sequence[Pending],
        served: Sequence[Pending],
        model: Parameters,
        carrier: rounds.PlanRounds,
        rewriting: Rewriting,
    ) -> Situation:
        """Return what a method is told of those who are due; raises where it must not be asked.

        A certificate is of these and those served just before together.
        """
        active = self._active()
        situation = Situation(
            self.record.number,
            model,
            self._previous,
            self.memory,
            tuple(self.data.served(entry, name, active) for entry in due),
            self.record.participants,
            active,
            carrier.aggregate,
            rewriting.note,
            rounds.remembers(self.strategy),
            type(self.strategy) in averaging.PLAIN_MEANS,
            self.forgetting.lab,
            self.seed or 0,
            partial(self.data.check, self.strategy)
            if isinstance(self.strategy, FFMU) and self._uncertifiable is None
            else None,
            self.data.dropped([*served, *due]),
        )
        if name in NEED_MAJORITY and situation.forgotten:
            gone = len(situation.forgotten)
            compared = Need.LAST in METHODS[name].needs
            honest = situation.retained if compared else situation.active
            check_majority(gone, len(honest) + gone)
        there = {*active, *situation.forgotten}
        check_whole(name, situation.forgotten, self.memory.purged_of(there))
        return situation

    def _record_of(
        self, name: str, entries: Sequence[Pending], carrier: rounds.PlanRounds, asks: int
    ) -> UnlearningRecord:
        """Return a record of who is forgotten, or was to be."""
        causes = ", ".join(sorted({entry.cause for entry in entries}))
        clients = {client for entry in entries for client in entry.clients}
        record = UnlearningRecord(self.record.number, name, causes, tuple(sorted(clients)))
        record.targets = tuple(told(entry) for entry in entries)
        record.guarantee = METHODS[name].guarantee
        record.memory_bytes = self.memory.bytes_held(METHODS[name].needs)
        dropping = sum(entry.dropped.asks for entry in entries if entry.dropped is not None)
        record.rounds_asked = asks + dropping
        record.bytes_sent = carrier.bytes_sent
        return record

    def _take_over(
        self,
        record: UnlearningRecord,
        outcome: Unlearned,
        served: Sequence[Pending],
        carrier: rounds.PlanRounds,
        rewriting: Rewriting,
        config: ConfigRecord,
    ) -> dict[str, torch.Tensor]:
        """Note what was forgotten, and return the model without it."""
        number = self.record.number
        self.forgetting.done(served, number, counts=not outcome.changes_nothing)
        self.forgettings += 1
        if record.method == CERTIFIED:
            self.data.certify(served)
        if outcome.exact and outcome.origin is not None:
            self.strategy = carrier.strategy  # it remembers what it would have without them
            self.data.start_anew()
        self.record.unlearning = record
        self.record.phase = Phase.UNLEARN
        leaving = sorted({c for e in served if e.selection is None for c in e.clients})
        if isinstance(self.strategy, FFMU):  # which has rates of its own
            outcome = replace(outcome, schedule=None)
        self._note_unlearned(record, outcome, leaving)
        if outcome.exact:
            self.forgetting.exactly.update(leaving)
        if outcome.schedule is not None:
            record.settings = {**record.settings, **outcome.schedule.settings(config)}
        record.warnings += carrier.unheard
        if late := sorted(self.data.late(served)):
            record.warnings.append(
                f"away: {', '.join(late)} may take part again only once the data are dropped "
                "there, too"
            )
        record.warnings += [f"not forgotten: {text}" for text in self._refusals]
        self.data.forgot(served, exactly=outcome.exact)
        self._note_rounds(self.forgetting.methods[record.method], outcome, carrier, rewriting)
        return copied(outcome.model)

    def _note_rounds(
        self,
        method: Method,
        outcome: Unlearned,
        carrier: rounds.PlanRounds,
        rewriting: Rewriting,
    ) -> None:
        """Take note of the rounds that a plan has played."""
        number, origin = self.record.number, outcome.origin
        if origin is None:  # who trained in the plan alone has a part in the model, too
            self.shares.mixed_up(carrier.trained)
            self.memory.joined(number, self._previous, sorted(carrier.answered))
            return
        if plays_as_ever(method):
            self.shares.replayed(origin, number, rewriting.shares)
        else:
            self.shares.mixed_up(dict.fromkeys(self.directory.clients(), origin + 1))
        rewriting.apply(origin)

    def _note_refused(
        self,
        name: str,
        due: tuple[Pending, ...],
        carrier: rounds.PlanRounds,
        error: SecateurError,
        *,
        asks: int = 0,
    ) -> None:
        """Take note that some are not forgotten now, and withdraw what never will be.

        Parameters
        ----------
        asks
            How often the method had asked clients for it.
        """
        number = self.record.number
        known = self.forgetting.refused.issuperset(due) and not asks
        record = self._record_of(name, due, carrier, asks)
        self.shares.mixed_up(carrier.trained)  # in rounds that do not count
        record.refused = str(error)
        self.forgetting.refuse(number, due, asked=asks > 0)
        self.data.find_others(due, error, self.route, self._active(), number, self._previous)
        self.forgettings += asks > 0  # they were told, and must be told anew
        if not known:  # said once where it costs nothing to try again in every round to come
            self._refusals.append(f"{', '.join(record.targets)}: {error}")
            if self.record.unlearning is None:
                self.record.unlearning = record
            else:
                self.record.unlearning.warnings.append(f"not forgotten: {self._refusals[-1]}")
            log.warning("round %d: unlearning refused: %s", number, error)

    def fork(self) -> "Unlearning":
        """Return a federation of its own that goes on from here, to be called between rounds.

        Whatever this one does later is unknown to it, and the other way round; models that nobody
        writes to are shared.
        """
        outgoing, self._outgoing = self._outgoing, []  # of the round that is over
        try:
            return copy.deepcopy(self)
        finally:
            self._outgoing = outgoing

    def after_measures(self) -> None:
        """Decide whether recovery is over; called once the round's model has been measured."""
        self.recovery.observe(self.record.number, self.record.measures.get(VALIDATION))

    def plan_rounds(
        self,
        grid: Grid,
        config: ConfigRecord,
        *,
        every: Callable[[int], bool] = lambda number: False,
        times: int | None = None,
    ) -> rounds.PlanRounds:
        """Return a carrier for plans, with a copy of the wrapped strategy as it was at first.

        Of rounds for which ``every`` says so it hands over each answer, also where a plan is
        content with their mean. ``times`` is how often clients are told that something was
        forgotten; one more than before unless given.
        """
        times = self.forgettings + 1 if times is None else times
        return rounds.PlanRounds(
            copy.deepcopy(self.fresh),
            self.data.reminders.on(grid),
            self.directory,
            screen=self.screen or Screen(),
            train_config=ConfigRecord(
                {**config, **({messages.FORGETTINGS: times} if times else {})}
            ),
            deadline_s=self.deadline_s,
            quorum=self.quorum,
            seed=self.seed,
            every=every,
            number=self.record.number,
            told=self.shares.told,
        )

    # ------------------------------------------------------------ steps of a round
    def _tell_forgettings(self, config: ConfigRecord) -> None:
        if self.forgettings:
            config[messages.FORGETTINGS] = self.forgettings

    def _phase(self) -> Phase:
        return Phase.RECOVER if self.recovery.current else Phase.TRAIN

    def _visible(self, grid: Grid) -> VisibleGrid:
        return VisibleGrid(grid, self.directory, self._may_take_part, patience_s=self.deadline_s)

    def _pass_through(
        self, number: int, replies: Sequence[Reply]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        usable = [r for r in replies if r.message is not None and not r.message.has_error()]
        self.record.participants = tuple(reply.client for reply in usable)
        found = averaging.plain_mean(self.strategy, _messages(usable))
        if found is not None:
            return messages.record_from(found[0]), found[1]
        return self.strategy.aggregate_train(number, _messages(replies))

    def _aggregate_mean(
        self, number: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average replies as they come, and let the wrapped strategy make its model of the mean."""
        arriving = matched(self._outgoing, replies, self.directory)
        averaged = averaging.average(arriving, self._previous, self.screen)
        screened = averaged.screened
        asked = len(self._outgoing)
        nodes = (message.metadata.dst_node_id for message in self._outgoing)
        self.record.asked = tuple(sorted(map(self.directory.client, nodes)))
        self._note_screening(screened)
        needed = rounds.replies_needed(self.quorum, asked) if self.screen is not None else 1
        if averaged.mean is None or len(screened.answers) < needed:
            return self._void(rounds.too_few(len(screened.answers), asked, needed))
        self.memory.joined(number, self._previous, averaged.mean.of)
        if type(self.strategy) in averaging.PLAIN_MEANS:
            self.record.participants = averaged.mean.of
            told = MetricRecord({**averaged.mean.metrics})
            return messages.record_from(averaged.mean.arrays or {}), told
        model, metrics, failure = self._aggregate(number, [averaged.mean])
        if model is None:
            return self._void(failure)
        self.record.participants = tuple(answer.client for answer in screened.answers)
        return messages.record_from(model), metrics

    def _void(self, why: str) -> tuple[None, None]:
        self.record.note = f"previous model kept: {why}"
        log.warning("round %d: %s", self.record.number, self.record.note)
        return None, None

    def void_round(self, number: int, error: QuorumError) -> None:
        """Record a round that could not even begin."""
        if self.record.number != number:
            self.record = RoundRecord(number, self._phase())
        self._void(str(error))

    def _note_screening(self, screened: Screened) -> None:
        self.record.rejected = dict(screened.rejected)
        self.record.capped = dict(screened.capped)
        self.roster.strike(screened.faults)
        self.data.doubt(self.data.reminders.doubted(screened.rejected))
        for client, reason in screened.rejected.items():
            log.warning("round %d: %s rejected: %s", self.record.number, client, reason)

    def _aggregate(
        self, number: int, kept: Sequence[Answer]
    ) -> tuple[dict[str, torch.Tensor] | None, MetricRecord | None, str]:
        """Return model and metrics, or why there is no model."""
        try:
            model, metrics = rounds.aggregate(
                self.strategy, number, self._previous, self._encoded(kept)
            )
        except rounds.AggregateError as error:
            return None, None, str(error)
        return model, metrics, "the strategy made no model"

    def _detect(self, number: int, answers: Sequence[Answer]) -> list[str]:
        """Return the clients that have now been flagged often enough."""
        if self.detector is None:
            return []
        updates = {
            answer.client: difference(answer.arrays, self._previous)
            for answer in answers
            if answer.arrays is not None
        }
        finding: Finding = self.detector.inspect(
            number,
            updates,
            self._previous,
            seed=derive_seed(self.seed or 0, "detector", number),
        )
        finding = limited(finding, len(updates))
        self.record.detector = self.detector.name
        self.record.finding = finding
        self.record.flags_count = number > self.warm_up and not self.recovery.settling(number)
        if not self.record.flags_count:
            return []
        return self.roster.record_flags(updates, finding.flagged)

    def _remember(self, number: int, answers: Sequence[Answer], kept: Sequence[Answer]) -> None:
        locals_ = {answer.client: answer.arrays for answer in answers if answer.arrays is not None}
        weights = {answer.client: float(answer.num_examples) for answer in answers}
        self.memory.remember(
            LastRound(number, self._previous, locals_, weights), [a.client for a in kept]
        )

    def _quarantine(
        self,
        clients: Sequence[str],
        number: int,
        cause: Cause,
        model: Parameters,
        noted: dict[str, str],
        *,
        method: str | None = None,
        most_rounds: int | None = None,
    ) -> None:
        default = self.forgetting.method
        name = method or (default.name if default is not None else None)
        refused = ""
        if name is not None:
            try:
                self.forgetting.wait(clients, cause, number, model, name, most_rounds)
            except RefusedRequestError as error:
                if method is not None:
                    raise  # a request; who was found to be malicious is excluded all the same
                refused = f"; not to be forgotten by {name}: {error}"
        for client in clients:
            entry = self.roster.entry(client)
            reason = (
                f"flagged in {sum(entry.recent)} of its last {len(entry.recent)} rounds"
                if cause == "malicious" and any(entry.recent)
                else f"to be forgotten ({cause})"
            ) + refused
            self.roster.quarantine([client], number, reason)
            noted[client] = reason
            log.warning("round %d: %s quarantined: %s", number, client, reason)

    def _note_unlearned(
        self,
        record: UnlearningRecord,
        outcome: Unlearned,
        leaving: Sequence[str],
    ) -> None:
        number = record.number
        record.settings = dict(outcome.settings)
        record.progress = dict(outcome.progress)
        record.zeroed = {name: int(mask.sum()) for name, mask in outcome.masks.items()}
        record.sizes = {name: mask.numel() for name, mask in outcome.masks.items()}
        record.warnings = list(outcome.warnings)
        record.percentiles = dict(outcome.percentiles)
        if outcome.changes_nothing:
            log.info("round %d: %s forgot %s", number, record.method, ", ".join(record.targets))
            return
        # What the wrapped strategy remembers (moments, momentum) holds their influence too.
        if not outcome.exact:
            self.strategy = copy.deepcopy(self.fresh)
            self.data.start_anew()
        self.strategy_since = number
        forgotten = frozenset(record.clients)
        self.memory.forget(forgotten)
        if self.detector is not None:
            self.detector.forget(forgotten)
        self.roster.ban(leaving, number, "forgotten")
        self.roster.clear_flags()
        if not outcome.exact:
            self.recovery.begin(record, outcome.rate, outcome.schedule)
        log.info("round %d: %s forgot %s", number, record.method, ", ".join(record.targets))

    def _encoded(self, answers: Sequence[Answer]) -> list[Message]:
        return [messages.message_from(a, self.directory.node(a.client)) for a in answers]

    def initial(self, model: Parameters, measures: Mapping[str, float | None]) -> None:
        """Take note of the model of round 0."""
        self.memory.start(model)
        self.record = RoundRecord(0, measures=dict(measures))
        self.recovery.observe(0, measures.get(VALIDATION))


def _messages(replies: Sequence[Reply]) -> list[Message]:
    return [reply.message for reply in replies if reply.message is not None]
