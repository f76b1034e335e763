"""One scenario from beginning to end: train under attack, forget, recover, and the baselines."""

import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client.app import MakeJob, build_app, honest_job
from client.files import prepare_folder
from client.task.evaluation import state_of
from client.task.protocol import Task, load_task
from server.federation import TEST, build_federation, initial_model
from simulation.attacks.client import AttackedJobs, load_poisoned
from simulation.certify import ffmu_statements, speed
from simulation.probes import RETAINED, Probes, build_probes
from simulation.requests import request_of, rows_of
from simulation.scenario import Scenario
from strategies.data_requests import told
from strategies.directory import QuorumError, client_name, wait_for_nodes
from strategies.ffmu import FFMU
from strategies.loop import Measure, run_rounds
from strategies.methods.interface import Pending
from strategies.records import Phase, RoundRecord, UnlearningRecord
from strategies.rounds import PlanRounds
from strategies.wrapper import Unlearning
from unlearning.catalogue import DATA, Target
from unlearning.errors import RefusedRequestError
from unlearning.parameters import Parameters
from unlearning.plan import Answer, Ask, carry_out, senders
from unlearning.randomness import generator
from unlearning.recovery import rounds_to_reach
from unlearning.retraining import retrain
from unlearning.routing import Request

OnRound = Callable[[str, RoundRecord], None]
"""Stage (``federation``, ``natural`` or ``retrain``) and a finished round."""


@dataclass(frozen=True)
class Point:
    """A model at a named moment."""

    number: int
    model: Parameters
    measures: dict[str, float | None]


@dataclass
class Outcome:
    """Everything that a report is made of."""

    scenario: Scenario
    malicious: tuple[str, ...] = ()
    rounds: list[RoundRecord] = field(default_factory=list)
    """The federation's, from round 0, the untrained model."""
    natural_rounds: list[RoundRecord] = field(default_factory=list)
    retrain_rounds: list[RoundRecord] = field(default_factory=list)
    unlearnings: list[tuple[UnlearningRecord, tuple[str, ...]]] = field(default_factory=list)
    """Each with those of its clients that leave; the others hold what is forgotten, and stay."""
    points: dict[str, Point] = field(default_factory=dict)
    """``before``, ``unlearned``, ``after``, ``natural``, ``retrained``, ``final``."""
    hits: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    """Per point, which examples each measure hit; for ``after`` and ``retrained``."""
    roster: dict[str, str] = field(default_factory=dict)
    ffmu: dict[str, Any] | None = None
    """What can be said of a model trained by FFMU; ``None`` for other strategies."""
    retrain_rounds_needed: int | None = None
    """Rounds that retraining took to come within 2 points of the accuracy before."""

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Return every client that was forgotten, sorted; not those who forgot and stayed."""
        served = (left for record, left in self.unlearnings if record.refused is None)
        return tuple(sorted(client for left in served for client in left))


def attackers(scenario: Scenario) -> tuple[int, ...]:
    """Return the partitions of the malicious clients, drawn from the seed, sorted."""
    draw = generator(scenario.settings.seed, "malicious clients")
    order = torch.randperm(scenario.clients.total, generator=draw)
    return tuple(sorted(order[: scenario.clients.malicious].tolist()))


def client_jobs(scenario: Scenario) -> MakeJob:
    """Return what the scenario's clients do: their own training, or the attack."""
    if scenario.attack is None or not scenario.clients.malicious:
        return honest_job
    return AttackedJobs(scenario.attack, attackers(scenario))


def client_app(scenario: Scenario) -> ClientApp:
    """Return the ordinary ClientApp, doing the scenario's jobs."""
    config = scenario.settings.task_options().model_dump(by_alias=True)
    return build_app(config, job=client_jobs(scenario))


@contextlib.contextmanager
def with_folder(scenario: Scenario) -> Iterator[Scenario]:
    """Yield the scenario with a folder for what its clients keep, if they must keep anything.

    Where it names none, one is made, and removed at the end. To be entered before anything is made
    of the scenario: equal settings find the same task.

    Raises
    ------
    SecateurError
        If the folder named cannot be written to.
    """
    if scenario.settings.client_dir:  # engines' processes may work elsewhere
        own = Path(scenario.settings.client_dir).resolve()
        prepare_folder(own, (), "client-dir")
        yield _in_folder(scenario, own)
    elif scenario.keeps:
        with tempfile.TemporaryDirectory(prefix="secateur-clients-") as folder:
            yield _in_folder(scenario, Path(folder))
    else:
        yield scenario


def _in_folder(scenario: Scenario, folder: Path) -> Scenario:
    settings = scenario.settings.model_copy(update={"client_dir": str(folder)})
    return scenario.model_copy(update={"settings": settings})


def check_trained(records: Sequence[RoundRecord]) -> None:
    """Raise ``QuorumError`` if no round after round 0 made a model."""
    last = records[-1]
    if all(record.note for record in records[1:]):
        why = next(iter(last.rejected.values()), last.note)
        raise QuorumError(f"no round made a model: {last.note}; the last reason was: {why}")


class Experiment:
    """Plays a scenario on any Grid; one whose clients keep something has a folder for it."""

    def __init__(
        self,
        scenario: Scenario,
        on_round: OnRound = lambda stage, record: None,
        on_ask: Callable[[Ask], None] = lambda ask: None,
    ) -> None:
        self.scenario = scenario
        self.outcome = Outcome(scenario)
        self._on_round = on_round
        self._on_ask = on_ask
        self._last: Point | None = None
        self._rows: list[tuple[int, ...]] = []
        """Of each request, the samples that it names."""
        self._waiting: list[tuple[str, Request | Pending]] = []
        """What is to be forgotten that was asked for, and is not served; as long as its client has
        yet to mark rows, a request, otherwise an entry of the waiting list."""
        self._refusal = "no round was left for it"
        """Why the last one that was refused was."""

    def play(self, grid: Grid) -> None:
        """Run everything; the result is in ``outcome``."""
        torch.set_num_threads(1)
        scenario, settings = self.scenario, self.scenario.settings
        wait_for_nodes(grid, scenario.clients.total, patience_s=settings.round_deadline)
        options = settings.task_options()
        task = load_task(options)
        partitions = attackers(scenario)
        self.outcome.malicious = tuple(client_name(partition) for partition in partitions)
        poisoned = (
            load_poisoned(options, scenario.attack, partitions)
            if scenario.attack is not None and partitions
            else None
        )
        model = initial_model(task, settings.seed)
        start = state_of(model)
        self._rows = [
            rows_of(asked, place, task, scenario.clients.total, settings.seed)
            if asked.target is Target.SAMPLES
            else ()
            for place, asked in enumerate(scenario.requests)
        ]
        probes = build_probes(
            task,
            poisoned,
            scenario.clients.total,
            model,
            settings.device,
            **self._forget_set(partitions),
        )
        federation = build_federation(settings, model, task)

        def on_round(record: RoundRecord, parameters: Parameters) -> None:
            self._note(federation, record, parameters)
            self._ask(federation, task, record.number)

        final = run_rounds(
            federation,
            grid,
            start,
            rounds=settings.rounds,
            train_config=settings.to_record(),
            measure=_measure(probes, federation),
            on_round=on_round,
            on_ask=self._on_ask,
        )
        last = self.outcome.rounds[-1]
        check_trained(self.outcome.rounds)
        if self._waiting and not scenario.may_be_refused:
            raise RefusedRequestError(self._refusal)
        self.outcome.points["final"] = Point(last.number, final, dict(last.measures))
        self.outcome.roster = federation.roster.statuses()
        if isinstance(federation.strategy, FFMU):
            self.outcome.ffmu = ffmu_statements(federation.strategy, task, model, final, settings)
        if "after" in self.outcome.points:
            self._compare(federation, grid, probes, start)
        if self.outcome.ffmu is not None:
            trained, again = self.outcome.rounds, self.outcome.retrain_rounds
            self.outcome.ffmu |= speed(trained, again, settings.rounds)

    def _forget_set(self, partitions: Sequence[int]) -> dict[str, Any]:
        """Return what ``build_probes`` is to know of what is, or should be, forgotten."""
        requests = self.scenario.requests
        leaving = {p for asked in requests if asked.target not in DATA for p in asked.clients}
        samples: dict[int, tuple[int, ...]] = {}
        for asked, rows in zip(requests, self._rows, strict=True):
            if rows:
                samples[asked.holder] = (*samples.get(asked.holder, ()), *rows)
        return {
            "forgotten": sorted({*partitions, *leaving}),
            "classes": {asked.label for asked in requests if asked.label is not None},
            "samples": {p: sorted(set(rows)) for p, rows in sorted(samples.items())},
        }

    def _ask(self, federation: Unlearning, task: Task, number: int) -> None:
        """Ask what the scenario asks after a round."""
        scenario = self.scenario
        options, clients = scenario.settings.task_options(), scenario.clients.total
        for asked, rows in zip(scenario.requests, self._rows, strict=True):
            if asked.round != number:
                continue
            request = request_of(asked, rows, task, options, clients)
            try:
                federation.request(request)
            except RefusedRequestError as error:
                if not scenario.may_be_refused:
                    raise
                self.outcome.unlearnings.append(_refused(request, number, str(error)))
            else:
                if request.marks:
                    self._waiting.append((", ".join(request.clients), request))
                else:
                    entry = federation.forgetting.pending[-1]
                    self._waiting.append((told(entry), entry))

    def _note(self, federation: Unlearning, record: RoundRecord, model: Parameters) -> None:
        points = self.outcome.points
        here = Point(record.number, model, dict(record.measures))
        unlearning = record.unlearning
        if unlearning is not None:
            self._note_unlearning(federation, unlearning)
        if unlearning is not None and unlearning.refused is None:
            if "before" not in points and self._last is not None:
                points["before"] = self._last
            points["unlearned"] = here
            points.pop("after", None)
        if "unlearned" in points and "after" not in points and federation.recovery.current is None:
            points["after"] = here
        self._last = here
        self.outcome.rounds.append(record)
        self._on_round("federation", record)

    def _note_unlearning(self, federation: Unlearning, record: UnlearningRecord) -> None:
        status = "banned" if record.refused is None else "quarantined"
        statuses = federation.roster.statuses()
        left = tuple(client for client in record.clients if statuses.get(client) == status)
        withdrawn = {found.client for found in record.marks}
        if record.refused is not None and withdrawn.issuperset(record.clients):
            left = record.clients  # they stay, and would have left
        self.outcome.unlearnings.append((record, left))
        if record.refused is not None:
            self._refusal = record.refused
            return
        self._waiting = [
            (what, entry)
            for what, entry in self._waiting
            if entry in federation.forgetting.pending or what not in record.targets
        ]

    def _compare(
        self, federation: Unlearning, grid: Grid, probes: Probes, start: Parameters
    ) -> None:
        """Run the baselines without whoever was forgotten or should have been.

        Who holds a class or samples that were forgotten takes part, and has dropped them by now.
        """
        outcome, points = self.outcome, self.outcome.points
        left_out = {*outcome.forgotten, *outcome.malicious}
        clients = [c for c in federation.directory.clients() if c not in left_out]
        before, after = points["before"], points["after"]
        outcome.hits["after"] = probes.hits(after.model)
        if self.scenario.baselines.natural:
            # From the model before, the unlearning's own round and all that followed, replayed
            # with the same random streams: only the pruning is missing.
            outcome.natural_rounds, points["natural"] = self._without(
                "natural",
                federation,
                grid,
                probes,
                before.model,
                clients,
                first=before.number + 1,
                rounds=after.number - before.number,
            )
        if self.scenario.baselines.retrain:
            outcome.retrain_rounds, points["retrained"] = self._without(
                "retrain",
                federation,
                grid,
                probes,
                start,
                clients,
                first=1,
                rounds=self.scenario.settings.rounds,
            )
            outcome.hits["retrained"] = probes.hits(points["retrained"].model)
            # Without a class, no training comes back to the accuracy on all of them.
            measure = TEST if before.measures[RETAINED] is None else RETAINED
            target = before.measures[measure]
            if target is not None:
                curve = [r.measures[measure] or 0.0 for r in outcome.retrain_rounds]
                tolerance = self.scenario.settings.recovery_tolerance
                outcome.retrain_rounds_needed = rounds_to_reach(curve, target - tolerance)

    def _without(
        self,
        stage: str,
        federation: Unlearning,
        grid: Grid,
        probes: Probes,
        start: Parameters,
        clients: Sequence[str],
        *,
        first: int,
        rounds: int,
    ) -> tuple[list[RoundRecord], Point]:
        carrier = federation.plan_rounds(grid, self.scenario.settings.to_record())
        records: list[RoundRecord] = []

        def note(record: RoundRecord) -> None:
            records.append(record)
            self._on_round(stage, record)

        measure = _measure(probes, federation)
        model = train_without(
            carrier, measure, start, clients, first=first, rounds=rounds, on_round=note
        )
        return records, Point(records[-1].number, model, dict(records[-1].measures))


def _measure(probes: Probes, federation: Unlearning) -> Measure:
    def measure(number: int, model: Parameters) -> Mapping[str, float | None]:
        return probes.measure(number, model, without=federation.forgotten_classes)

    return measure


def _refused(request: Request, number: int, why: str) -> tuple[UnlearningRecord, tuple[str, ...]]:
    """Return the record of a request that was not even taken up."""
    if request.target is Target.CLASS:
        what = f"class {request.label}"
    elif request.target is Target.SAMPLES:
        what = f"{len(request.tokens)} samples"
    else:
        what = ", ".join(request.clients)
    record = UnlearningRecord(
        number,
        request.method or "",
        request.cause,
        request.clients,
        targets=(what,),
        refused=why,
    )
    return record, () if request.target in DATA else request.clients


def train_without(
    carrier: PlanRounds,
    measure: Measure,
    start: Parameters,
    clients: Sequence[str],
    *,
    first: int,
    rounds: int,
    on_round: Callable[[RoundRecord], None],
) -> Parameters:
    """Carry out the retraining plan among some clients, and measure every round of it.

    Seconds of a round include its measuring, and nothing that ``on_round`` does.
    """
    clock = time.perf_counter()

    def aggregate(number: int, model: Parameters, answers: Sequence[Answer]) -> Parameters:
        nonlocal clock
        merged = carrier.aggregate(number, model, answers)
        record = RoundRecord(
            number,
            Phase.RETRAIN,
            asked=tuple(clients),
            participants=senders(answers),
            rejected=dict(carrier.rejected),
            measures=dict(measure(number, merged)),
            seconds=time.perf_counter() - clock,
        )
        on_round(record)
        clock = time.perf_counter()
        return merged

    plan = retrain(start, clients, rounds, first_round=first, aggregate=aggregate)
    return carry_out(plan, carrier.ask)
