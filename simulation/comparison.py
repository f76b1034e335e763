"""Methods side by side: each forgets the same in the same federation, from the same model.

The federation is trained once per seed, attackers and all, and nobody looks for them. Then it is
told whom, or which data, to forget; every method in turn starts from a copy of everything the
server has, and of what clients keep, and the same rounds follow with the same random streams.
Retraining, natural forgetting and a random choice of weights to zero always take part: the gold
baseline and two null hypotheses.

Costs are those of forgetting alone. Measuring takes no part in the seconds; the ordinary round at
whose end the clients are forgotten takes place in any case and is in no sum.
"""

import contextlib
import copy
import hashlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch
from flwr.serverapp import Grid
from safetensors.torch import save

from client.keeping import keeping_at
from client.task.evaluation import state_of
from client.task.protocol import Task, load_task
from server.federation import TEST, build_federation, initial_model
from simulation.attacks.client import load_poisoned
from simulation.experiment import attackers, check_trained, train_without, with_folder
from simulation.probes import BACKDOOR, FLIP, FORGET, RETAINED, Probes, build_probes
from simulation.requests import Asked, request_of, rows_of
from simulation.scenario import Scenario, ScenarioError
from strategies.data_requests import selection_of
from strategies.directory import client_name, wait_for_nodes
from strategies.loop import Measure, run_rounds
from strategies.methods.dropping import asked_to_drop
from strategies.records import Phase, RoundRecord, UnlearningRecord
from strategies.wrapper import Unlearning
from unlearning.catalogue import DATA, METHODS, Need, Target
from unlearning.errors import RefusedRequestError
from unlearning.parameters import Parameters, byte_size
from unlearning.plan import Ask
from unlearning.recovery import rounds_to_reach
from unlearning.routing import Cause, Promise, Request

NATURAL, RANDOM, RETRAINED = "natural", "random", "retrain"
RANDOM_MASK = "random-mask"
"""In the place of ``random`` where clients stay: there are no leavers whose weights to compare."""
TRAINING = "training"
"""What is going on before anybody is forgotten."""
OWN_EXAMPLES = 100
"""Examples that the server sets aside where the scenario gives it none. It does so whether or not a
method needs them, so that the same federation is trained whichever methods are compared."""
WATCHED = (TEST, RETAINED, FORGET, BACKDOOR, FLIP)
MOMENTS = ("before", "unlearned", "after", "end")
COSTS = (
    "recovery_rounds",
    "rounds_asked",
    "seconds",
    "memory_bytes",
    "bytes_sent",
    "speedup_rounds",
    "speedup_seconds",
)

Measures = Mapping[str, float | None]


@dataclass
class Trial:
    """One method with one seed.

    Attributes
    ----------
    asked_as
        Cause that the request gave: ``malicious``, or ``privacy`` where the clients did not attack
        or the method would refuse to trust attackers.
    started_from
        SHA-256 of the model that it started from, as safetensors: the same for all methods, and
        the untrained one for retraining.
    before, unlearned, after, end
        Measures of the models before the request, right after the method, at the end of its
        recovery, and after the last round that all methods are followed for. Retraining has one
        model, from its last round.
    curve
        Measures after every round from the request on; of retraining, from its first round.
    recovery_rounds, recovery_ended_by
        Ordinary rounds until validation accuracy was back; ``recovered`` or ``cap``, ``None`` for
        exact methods, which need none.
    rounds_asked
        Rounds that the method itself took.
    rounds_needed
        R*, of retraining alone: rounds until its test accuracy was within the tolerance of before;
        ``None`` if it never was.
    seconds
        Of the method and its recovery.
    memory_bytes
        What the server had stored for it when the request came.
    bytes_sent
        Of models, to clients and back, by the method and its recovery.
    speedup_rounds, speedup_seconds
        R* rounds of retraining, over what this took; ``None`` where either never came back to the
        accuracy before.
    refused
        Why the method would not, if so; nothing else was measured then.
    """

    method: str
    seed: int
    guarantee: str = "none"
    asked_as: str = "privacy"
    started_from: str = ""
    before: Measures = field(default_factory=dict)
    unlearned: Measures = field(default_factory=dict)
    after: Measures = field(default_factory=dict)
    end: Measures = field(default_factory=dict)
    curve: list[Measures] = field(default_factory=list)
    recovery_rounds: int | None = None
    recovery_ended_by: str | None = None
    rounds_asked: int | None = None
    rounds_needed: int | None = None
    seconds: float | None = None
    memory_bytes: int | None = None
    bytes_sent: int | None = None
    speedup_rounds: float | None = None
    speedup_seconds: float | None = None
    settings: Mapping[str, str | float | int] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    refused: str | None = None


class Watcher:
    """Is told what a comparison does; this one does nothing with it."""

    def begin(self, seed: int, what: str, rounds: int) -> None:
        """Take note that training, or a method, begins, and how many rounds are planned."""

    def round(self, record: RoundRecord) -> None:
        """Take note of a finished round."""

    def ask(self, ask: Ask) -> None:
        """Take note that a method is about to ask clients."""

    def end(self, trial: Trial) -> None:
        """Take note of a method's result."""


def compared(methods: Sequence[str], *, data: bool = False) -> tuple[str, ...]:
    """Return methods in the order of the table: as asked for, then what always takes part.

    Parameters
    ----------
    data
        Whether a class or samples are to be forgotten, and no clients.

    Raises
    ------
    ScenarioError
        If one does not exist, or there is none.
    """
    if not methods:
        raise ScenarioError(f"no method is named; choose among {', '.join(METHODS)}")
    for name in methods:
        if name not in METHODS:
            raise ScenarioError(f"there is no method {name!r}; choose among {', '.join(METHODS)}")
    chance = RANDOM_MASK if data else RANDOM
    chosen = dict.fromkeys(name for name in (*methods, NATURAL, chance) if name != RETRAINED)
    return (*chosen, RETRAINED)


def prepared(scenario: Scenario, methods: Sequence[str], seed: int) -> Scenario:
    """Return a scenario set up for a comparison: nobody detects, all that is needed is recorded."""
    own = scenario.settings
    logged = any(Need.BATCH_LOG in METHODS[name].needs for name in methods)
    settings = own.model_copy(
        update={
            "batch_log": "random" if logged and own.batch_log == "off" else own.batch_log,
            "seed": seed,
            "identity": "partition",
            "detector": "none",
            "method": "none",
            "ready_methods": ",".join(methods),
            "rate_limit": 1,
            "server_examples": own.server_examples or OWN_EXAMPLES,
            "memory_dir": "",  # copies of the federation would write to the same folder
        }
    )
    return scenario.model_copy(update={"settings": settings})


class Comparison:
    """Runs methods on one scenario and seed.

    Parameters
    ----------
    scenario
        Its detector and methods are switched off, see ``prepared``.
    methods
        Names; what always takes part comes on top.
    seed
        The scenario's by default.
    clients
        Partitions to forget; by default what the scenario asks to be forgotten, and where it asks
        for nothing its attackers.
    rounds
        Rounds that every method is followed for from the request on, at least 1.

    Raises
    ------
    ScenarioError
        If a method does not exist, there is nobody to forget, somebody does not exist, or too few
        would be left.
    """

    def __init__(
        self,
        scenario: Scenario,
        methods: Sequence[str],
        *,
        seed: int | None = None,
        clients: Sequence[int] = (),
        rounds: int = 10,
    ) -> None:
        asked = None if clients else _asked(scenario)
        self.asked = asked if asked is not None and asked.target in DATA else None
        """Class or samples to forget; ``None`` where clients are."""
        self.methods = compared(methods, data=self.asked is not None)
        self.seed = scenario.settings.seed if seed is None else seed
        self.scenario = prepared(scenario, self.methods, self.seed)
        named = asked.clients if asked is not None and self.asked is None else clients
        self.partitions = tuple(sorted(set(named)))
        self.named = bool(self.partitions) or self.asked is not None
        """Whether it was said what to forget, and it is not the attackers of every seed."""
        if not self.named:
            self.partitions = attackers(self.scenario)
        self.rounds = rounds
        self._rows: tuple[int, ...] = ()
        self._disks = _Disks(None)
        self._check()

    @property
    def clients(self) -> tuple[str, ...]:
        """Return the clients to be forgotten, sorted; none where data are."""
        return tuple(client_name(partition) for partition in self.partitions)

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Return what is to be forgotten, in words: the clients, sorted, or which data."""
        if self.asked is None:
            return self.clients
        if self.asked.target is Target.CLASS:
            return (f"class {self.asked.label}",)
        count = self.asked.samples or len(set(self.asked.rows))
        return (f"{count} samples of {client_name(self.asked.holder)}",)

    @contextlib.contextmanager
    def in_folder(self) -> Iterator[Self]:
        """Yield the comparison with a folder for what its clients keep, where they keep anything.

        To be entered before its Grid is made.
        """
        with with_folder(self.scenario) as scenario:
            ready = copy.copy(self)
            ready.scenario = scenario
            folder = scenario.settings.client_dir
            with _Disks(Path(folder) if folder else None) as ready._disks:
                yield ready

    def play(self, grid: Grid, watcher: Watcher | None = None) -> list[Trial]:
        """Train, let every method forget, and return their trials in the order of the table."""
        torch.set_num_threads(1)
        scenario, settings = self.scenario, self.scenario.settings
        wait_for_nodes(grid, scenario.clients.total, patience_s=settings.round_deadline)
        options = settings.task_options()
        task = load_task(options)
        culprits = attackers(scenario)
        poisoned = (
            load_poisoned(options, scenario.attack, culprits)
            if scenario.attack is not None and culprits
            else None
        )
        model = initial_model(task, settings.seed)
        start = state_of(model)
        probes = build_probes(
            task,
            poisoned,
            scenario.clients.total,
            model,
            settings.device,
            **self._forget_set(task),
        )
        federation = build_federation(settings, model, task)
        trained = self._train(federation, grid, probes, start, watcher or Watcher(), task)
        baseline, seconds = self._retrain(trained, start)
        trials = []
        for name in self.methods[:-1]:
            trial = self._forget(name, trained)
            _compare(trial, baseline.rounds_needed, seconds)
            trials.append(trial)
            trained.watcher.end(trial)
        return [*trials, baseline]

    def _forget_set(self, task: Task) -> dict[str, Any]:
        """Return what ``build_probes`` is to know of what is to be forgotten."""
        if self.asked is None:
            return {"forgotten": self.partitions}
        if self.asked.target is Target.CLASS:
            return {"forgotten": (), "classes": {self.asked.label}}
        total, seed = self.scenario.clients.total, self.scenario.settings.seed
        self._rows = rows_of(self.asked, 0, task, total, seed)
        return {"forgotten": (), "samples": {self.asked.holder: self._rows}}

    def _check(self) -> None:
        scenario, count = self.scenario, len(self.partitions)
        total, fewest = scenario.clients.total, scenario.settings.min_clients
        if self.rounds < 1:
            raise ScenarioError(f"--rounds {self.rounds}: follow methods for 1 round at least")
        if self.asked is not None:
            return
        if not count:
            raise ScenarioError(
                f"scenario {scenario.name} has no attackers, so nobody is to be forgotten; name "
                "partitions with --forget"
            )
        named = ",".join(map(str, self.partitions))
        if not all(0 <= partition < total for partition in self.partitions):
            raise ScenarioError(f"--forget {named}: partitions are 0 to {total - 1}")
        if total - count < fewest:
            raise ScenarioError(
                f"--forget {named}: {total - count} of {total} clients would be left, and a round "
                f"needs {fewest} (min-clients); forget fewer"
            )

    def _train(
        self,
        federation: Unlearning,
        grid: Grid,
        probes: Probes,
        start: Parameters,
        watcher: Watcher,
        task: Task,
    ) -> "_Trained":
        settings, measure = self.scenario.settings, _Stopwatch(probes.measure)
        records: list[RoundRecord] = []

        def note(record: RoundRecord, parameters: Parameters) -> None:
            del parameters
            records.append(record)
            watcher.round(record)

        watcher.begin(self.seed, TRAINING, settings.rounds)
        model = run_rounds(
            federation,
            grid,
            start,
            rounds=settings.rounds,
            train_config=settings.to_record(),
            measure=measure,
            on_round=note,
        )
        check_trained(records)
        request = None
        if self.asked is not None:
            options, total = settings.task_options(), self.scenario.clients.total
            request = request_of(self.asked, self._rows, task, options, total)
        self._disks.keep()
        return _Trained(
            federation, grid, probes, measure, model, _watched(records[-1]), watcher, request
        )

    def _forget(self, name: str, trained: "_Trained") -> Trial:
        settings, played = self.scenario.settings, self.scenario.settings.rounds
        request = self._request(name, trained.request)
        trial = Trial(
            name,
            self.seed,
            METHODS[name].guarantee,
            request.cause,
            fingerprint(trained.model),
            trained.measures,
        )
        trained.watcher.begin(self.seed, name, self.rounds)
        self._disks.restore()
        fork = trained.federation.fork()
        # Of the copy, since what it has forgotten recovery is not judged by.
        measure = _Stopwatch(
            lambda number, model: trained.probes.measure(
                number, model, without=fork.forgotten_classes
            )
        )
        held = fork.memory.bytes_held(METHODS[name].needs)
        try:
            fork.request(request)
        except RefusedRequestError as error:
            trial.refused = str(error)
            return trial
        records: list[RoundRecord] = []
        seconds: list[float] = []

        def note(record: RoundRecord, parameters: Parameters) -> None:
            del parameters
            records.append(record)
            seconds.append(record.seconds - measure.seconds)
            trained.watcher.round(record)

        run_rounds(
            fork,
            trained.grid,
            trained.model,
            rounds=played + self.rounds,
            played=played,
            train_config=settings.to_record(),
            measure=measure,
            on_round=note,
            on_ask=trained.watcher.ask,
        )
        done = records[0].unlearning
        if done is None or done.refused is not None:
            trial.refused = done.refused if done is not None else records[0].note
            return trial
        recovery = [n for n, record in enumerate(records) if record.phase is Phase.RECOVER]
        _fill(trial, done, [_watched(record) for record in records], len(recovery), self.rounds)
        trial.seconds = done.seconds + sum(seconds[n] for n in recovery)
        trial.memory_bytes = held
        models = sum(len(records[n].asked) + len(records[n].participants) for n in recovery)
        trial.bytes_sent = done.bytes_sent + models * byte_size([trained.model])
        return trial

    def _request(self, name: str, data: Request | None) -> Request:
        if data is not None:
            promise: Promise = "exact" if METHODS[name].guarantee == "exact" else "approximate"
            return replace(data, method=name, guarantee=promise, most_rounds=None)
        # A method that trusts those it forgets is asked as if they only left: the point is to see.
        attacked = set(self.partitions) <= set(attackers(self.scenario))
        cause: Cause = "malicious" if attacked and METHODS[name].safe else "privacy"
        exact = METHODS[name].guarantee == "exact"
        return Request(
            Target.CLIENT,
            self.clients,
            cause,
            guarantee="exact" if exact else "approximate",
            method=name,
        )

    def _retrain(self, trained: "_Trained", start: Parameters) -> tuple[Trial, float]:
        """Retrain as the baseline, measured in every round; return also the seconds of R* rounds.

        Of all rounds, where the accuracy before was never reached.
        """
        settings, federation = self.scenario.settings, trained.federation
        clients = [c for c in federation.directory.clients() if c not in self.clients]
        self._disks.restore()
        carrier = federation.fork().plan_rounds(trained.grid, settings.to_record())
        if trained.request is not None:
            holders = trained.request.clients or tuple(clients)
            carrier.ask(asked_to_drop(selection_of(trained.request), holders))
        records: list[RoundRecord] = []
        seconds: list[float] = []

        def note(record: RoundRecord) -> None:
            records.append(record)
            seconds.append(record.seconds - trained.measure.seconds)
            trained.watcher.round(record)

        trained.watcher.begin(self.seed, RETRAINED, settings.rounds)
        train_without(
            carrier, trained.measure, start, clients, first=1, rounds=settings.rounds, on_round=note
        )
        curve: list[Measures] = [_watched(record) for record in records]
        needed = _needed(curve, trained.measures, settings.recovery_tolerance)
        trial = Trial(
            RETRAINED,
            self.seed,
            METHODS[RETRAINED].guarantee,
            self._request(RETRAINED, trained.request).cause,
            fingerprint(start),
            trained.measures,
            unlearned=curve[-1],
            after=curve[-1],
            end=curve[-1],
            curve=curve,
            recovery_rounds=0,
            rounds_asked=len(records),
            rounds_needed=needed,
            seconds=sum(seconds),
            memory_bytes=federation.memory.bytes_held(METHODS[RETRAINED].needs),
            bytes_sent=carrier.bytes_sent,
        )
        trained.watcher.end(trial)
        return trial, sum(seconds[:needed])


@dataclass(frozen=True)
class _Trained:
    """A federation that has trained and forgotten nobody."""

    federation: Unlearning
    grid: Grid
    probes: Probes
    measure: "_Stopwatch"
    model: Parameters
    measures: Measures
    watcher: Watcher
    request: Request | None
    """For a class or samples; ``None`` where clients are to be forgotten."""


class _Disks(contextlib.AbstractContextManager["_Disks"]):
    """What clients keep on their disks, put back before every method: none finds another's traces.

    Parameters
    ----------
    folder
        Theirs; ``None`` where they keep nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: tempfile.TemporaryDirectory[str] | None = None

    def keep(self) -> None:
        """Take note of what is there now."""
        if self._folder is not None and self._folder.exists():
            self._kept = tempfile.TemporaryDirectory(prefix="secateur-kept-")
            shutil.copytree(self._folder, self._kept.name, dirs_exist_ok=True)

    def restore(self) -> None:
        """Put it back."""
        if self._folder is None or self._kept is None:
            return
        for part in self._folder.iterdir():
            shutil.rmtree(part)
        shutil.copytree(self._kept.name, self._folder, dirs_exist_ok=True)
        keeping_at.cache_clear()  # what a client knows of its folder is of another course

    def __exit__(self, *raised: object) -> None:
        """Leave what was there after training."""
        self.restore()
        if self._kept is not None:
            self._kept.cleanup()


class _Stopwatch:
    """Measures models, and knows how long the last time took: that is no cost of a method."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure
        self.seconds = 0.0

    def __call__(self, number: int, parameters: Parameters) -> Measures:
        """Return the measures of a model."""
        started = time.perf_counter()
        measures = self._measure(number, parameters)
        self.seconds = time.perf_counter() - started
        return measures


def table(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return one row per method: means and sample standard deviations over the seeds it served.

    A deviation is ``None`` for fewer than two values, a mean where nothing was measured.
    """
    rows = []
    for name in dict.fromkeys(trial.method for trial in trials):
        mine = [trial for trial in trials if trial.method == name]
        served = [trial for trial in mine if trial.refused is None]
        row: dict[str, Any] = {
            "method": name,
            "guarantee": mine[0].guarantee,
            "asked_as": mine[0].asked_as,
            "seeds": len(mine),
            "served": len(served),
            "refused": next((trial.refused for trial in mine if trial.refused is not None), None),
        }
        for moment in MOMENTS:
            for measure in WATCHED:
                row |= _spread(
                    f"{moment}_{measure}", [getattr(t, moment).get(measure) for t in served]
                )
        for key in (*COSTS, "rounds_needed"):
            row |= _spread(key, [getattr(trial, key) for trial in served])
        row["capped"] = sum(trial.recovery_ended_by == "cap" for trial in served)
        rows.append(row)
    return rows


def as_json(trial: Trial) -> dict[str, Any]:
    """Return a trial as plain values; ``Trial(**values)`` is the way back."""
    return {**asdict(trial), "warnings": list(trial.warnings)}


def fingerprint(model: Parameters) -> str:
    """Return the SHA-256 of a model as safetensors."""
    return hashlib.sha256(save({k: v.contiguous() for k, v in model.items()})).hexdigest()


def _spread(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    known = [float(value) for value in values if value is not None]
    return {
        name: statistics.fmean(known) if known else None,
        f"{name}_sd": statistics.stdev(known) if len(known) > 1 else None,
    }


def _fill(
    trial: Trial, done: UnlearningRecord, curve: list[Measures], recovery: int, rounds: int
) -> None:
    """Note what a method made of the model, and how; ``curve[0]`` is right after it."""
    trial.curve = curve
    trial.unlearned, trial.after, trial.end = curve[0], curve[recovery], curve[rounds - 1]
    trial.recovery_rounds = recovery
    trial.recovery_ended_by = done.recovery_ended_by
    trial.rounds_asked = done.rounds_asked
    trial.settings, trial.warnings = dict(done.settings), tuple(done.warnings)


def _needed(curve: Sequence[Measures], before: Measures, tolerance: float) -> int | None:
    """Return R*: the first round, from 1, whose test accuracy is within the tolerance of before.

    Of the classes that stay, where one goes: no training without it comes back to all of them.
    """
    measure = TEST if before[RETAINED] is None else RETAINED
    wanted = before[measure]
    if wanted is None:
        return None
    return rounds_to_reach([measures[measure] or 0.0 for measures in curve], wanted - tolerance)


def _asked(scenario: Scenario) -> Asked | None:
    """Return the one request of a scenario, if there is any."""
    if len(scenario.requests) > 1:
        raise ScenarioError(
            f"scenario {scenario.name} asks for {len(scenario.requests)} things to be forgotten, "
            "and a comparison is of one: leave one [[requests]] table, or name partitions with "
            "--forget"
        )
    return scenario.requests[0] if scenario.requests else None


def _compare(trial: Trial, needed: int | None, seconds: float) -> None:
    """Note how much faster than retraining to the accuracy before, if both ever came there."""
    if needed is None or trial.rounds_asked is None or trial.recovery_rounds is None:
        return
    if trial.recovery_ended_by == "cap":
        return
    spent = trial.rounds_asked + trial.recovery_rounds
    trial.speedup_rounds = needed / spent if spent else None
    trial.speedup_seconds = seconds / trial.seconds if trial.seconds else None


def _watched(record: RoundRecord) -> dict[str, float | None]:
    return {name: record.measures.get(name) for name in WATCHED}
