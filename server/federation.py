"""Assemble one federation from its settings."""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, FedProx, Strategy
from torch import nn

from client.task.device import choose_device
from client.task.evaluation import (
    accuracy_of,
    batches,
    forward_of,
    gather,
    load_state,
    predict,
    state_of,
)
from client.task.models import prunable_layers, trained_tensors
from client.task.protocol import Task, server_data, size_of
from client.task.structure import structure_of
from server.settings import Settings, SettingsError
from strategies.actions import Ffmu
from strategies.detectors.catalogue import DETECTORS
from strategies.detectors.interface import Detector
from strategies.directory import by_node, by_partition
from strategies.ffmu import FFMU
from strategies.forgetting import needs_of
from strategies.loop import Measure
from strategies.memory import Memory
from strategies.methods.catalogue import MAKE
from strategies.methods.drift import Drift
from strategies.methods.fedup import FedUP
from strategies.methods.holders import Ball, Holders
from strategies.methods.interface import UNKNOWN, Method, Network, ServerLab
from strategies.methods.masks import ClassDiscriminative, Mask, Noise
from strategies.methods.negation import Negation
from strategies.methods.replay import FedEraser
from strategies.methods.settings import configured
from strategies.methods.subtraction import FAST
from strategies.rate_limit import RateLimit
from strategies.recovery import VALIDATION, Recovery
from strategies.roster import Hysteresis
from strategies.screen import Screen
from strategies.store import Store
from strategies.wrapper import Unlearning
from unlearning.ascent import DRAWN
from unlearning.catalogue import Need
from unlearning.errors import ParametersError
from unlearning.parameters import Parameters
from unlearning.randomness import derive_seed

TEST = "test_accuracy"
REPAIR_EPOCHS = 5
"""Passes over the server's data after FAST (``methods`` 2.6)."""


def build_federation(
    settings: Settings,
    model: nn.Module,
    task: Task | None = None,
    *,
    store: Store | None = None,
) -> Unlearning:
    """Return the wrapped strategy that ``settings`` describe, for models like ``model``.

    Without the task nothing is known of classes and channels, and the server has no data.
    """
    lab = build_lab(task, model) if task is not None else None
    network = network_of(task, model) if task is not None else UNKNOWN
    network = replace(network, trained=trained_tensors(model))
    methods = build_methods(settings, model, network, fresh_models(task, settings.seed))
    ready = [methods[name] for name in settings.methods]
    return Unlearning(
        build_strategy(settings),
        screen=Screen(weight_cap=settings.weight_cap, norm_limit=settings.norm_limit),
        detector=build_detector(settings),
        hysteresis=Hysteresis(hits=settings.hits, window=settings.window, warm_up=settings.warm_up),
        method=methods.get(settings.method),
        others=list(methods.values()),
        memory=Memory(
            needs_of(ready),
            folder=Path(settings.memory_dir) if settings.memory_dir else None,
            limit=settings.memory_limit * 10**6 or None,
            interval=settings.history_interval,
            forgetting=settings.ledger_memory,
        ),
        lab=lab,
        rate_limit=RateLimit(rounds=settings.rate_limit),
        recovery=Recovery(tolerance=settings.recovery_tolerance, cap=settings.recovery_cap),
        store=store,
        identify=by_partition if settings.identity == "partition" else by_node,
        deadline_s=settings.round_deadline,
        quorum=settings.quorum,
        seed=settings.seed,
        offers=network.needs() | ({Need.BATCH_LOG} if settings.batch_log != "off" else set()),
        classes=network.classes if network.classes > 1 else 0,  # one output may tell two apart
    )


def build_strategy(settings: Settings) -> Strategy:
    """Return the Flower strategy to wrap."""
    kinds: dict[str, Callable[..., Strategy]] = {
        "fedavg": FedAvg,
        "fedprox": lambda **common: FedProx(proximal_mu=settings.proximal_mu, **common),
        "fedmedian": FedMedian,
        "fedadam": FedAdam,
        "ffmu": lambda **common: build_ffmu(settings, **common),
        "ffmu-n": lambda **common: build_ffmu(settings, **common),
    }
    return kinds[settings.strategy](
        fraction_train=settings.fraction_train,
        fraction_evaluate=settings.fraction_evaluate,
        min_train_nodes=settings.min_clients,
        min_evaluate_nodes=settings.min_clients,
        min_available_nodes=settings.min_clients,
    )


def build_ffmu(settings: Settings, **common: Any) -> FFMU:
    """Return FFMU, or FFMU-N."""
    try:
        return FFMU(
            rounds=settings.rounds,
            action=Ffmu(
                sigma=settings.sigma,
                lam_factor=settings.lam_factor,
                alpha_local=settings.alpha_local,
                mode=settings.quantiser,
                local=settings.local_gradient,
                clip=settings.gradient_clip,
                models=settings.strategy == "ffmu-n",
            ),
            learning_rate=settings.learning_rate,
            alpha=settings.alpha_server,
            weights=settings.gradient_weights,
            seed=settings.seed,
            **common,
        )
    except ParametersError as error:
        raise SettingsError(f"settings: strategy = {settings.strategy}: {error}") from error


def build_detector(settings: Settings) -> Detector | None:
    """Return the detector, or ``None`` where detection is switched off by name."""
    if settings.detector == "none":
        return None
    try:
        return DETECTORS[settings.detector].make(settings.detector_threshold or None)
    except ValueError as error:
        raise SettingsError(
            f"settings: detector-threshold = {settings.detector_threshold:g}: {error}"
        ) from error


def build_methods(
    settings: Settings,
    model: nn.Module,
    network: Network = UNKNOWN,
    drawn: Callable[[], Iterable[Parameters]] = tuple,
) -> dict[str, Method]:
    """Return every method by name; which of them can run depends on what is recorded.

    ``drawn`` makes freshly initialised models, if any can be made.
    """
    prunable = prunable_layers(model)
    rate = settings.pruning_rate
    ready = {
        name: _as_here(method, settings, drawn)
        for name, method in configured(network, settings.method_settings).items()
    }
    own: dict[str, Method] = {
        "fedup": FedUP(rate=rate, prunable=prunable, score=settings.pruning_score),
        "random": FedUP(rate=rate, prunable=prunable, score="random", name="random"),
        "drift": Drift(strength=settings.drift_strength),
        "not": Negation(prunable=prunable),
        "federaser": FedEraser(
            interval=settings.history_interval, local_epochs=settings.local_epochs
        ),
        "fast": FAST(
            learning_rate=settings.learning_rate / 10,
            epochs=REPAIR_EPOCHS,
            batch_size=settings.batch_size,
        ),
        **ready,
    }
    return {name: own.get(name) or make() for name, make in MAKE.items()}


def _as_here(
    method: Method, settings: Settings, drawn: Callable[[], Iterable[Parameters]]
) -> Method:
    """Return a method with what the federation decides, and no setting of the method's own."""
    match method:
        case Mask() | ClassDiscriminative() | Noise():
            return replace(method, schedule=settings.recovery_schedule)
        case Holders():
            return replace(method, weight_cap=settings.weight_cap)
        case Ball():
            return replace(method, drawn=drawn)
    return method


def network_of(task: Task, model: nn.Module) -> Network:
    """Return what is known of the model's class, by running it on a row of the server's data.

    Nothing is known where the server has none, and methods that need channels or classes are
    refused.
    """
    data = server_data(task)
    parts = (data.validation, data.test, data.root)
    held = next((part for part in parts if part is not None and size_of(part)), None)
    if held is None:
        return UNKNOWN
    inputs, targets = next(batches(held, 1, None))
    network = copy.deepcopy(model).cpu().eval()
    structure = structure_of(network, inputs)
    with torch.no_grad():
        outputs = network(inputs)
    classes = targets.dim() == 1 and not targets.is_floating_point() and outputs.dim() == 2
    own = trained_tensors(network)
    head = (f"{structure.head}.{part}" for part in ("weight", "bias") if structure.head is not None)
    return Network(
        structure.convolutions,
        tuple(name for name in head if name in own),
        outputs.shape[1] if classes else 0,
    )


def build_lab(task: Task, model: nn.Module) -> ServerLab | None:
    """Return what the server can compute on its own data; ``None`` where it has none."""
    data = server_data(task)
    root = gather(data.root) if data.root is not None and size_of(data.root) else None
    unlabelled = data.unlabelled if data.unlabelled is not None or root is None else root[0]
    return None if unlabelled is None else lab_for(task, model, root, unlabelled)


def lab_for(
    task: Task,
    model: nn.Module,
    root: tuple[torch.Tensor, torch.Tensor] | None,
    unlabelled: torch.Tensor | None,
) -> ServerLab:
    """Return what can be computed with a model of this class on such data."""
    forward = forward_of(copy.deepcopy(model).cpu(), torch.device("cpu"))

    @torch.no_grad()
    def accuracy(parameters: Parameters) -> float:
        assert root is not None  # noqa: S101  a method that asks for it has looked
        found = accuracy_of(task.metrics(forward(parameters, root[0]), root[1]))
        if found is None:
            raise SettingsError("the task has no accuracy, which choosing by server data needs")
        return found

    return ServerLab(forward, task.loss, accuracy, root, unlabelled)


def initial_model(task: Task, seed: int) -> nn.Module:
    """Return the model of round 0; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "initial model"))
        return task.build_model()


def fresh_models(task: Task | None, seed: int) -> Callable[[], Iterable[Parameters]]:
    """Return a function that makes freshly initialised models, none of them that of round 0."""

    def drawn() -> Iterator[Parameters]:
        if task is not None:
            for place in range(DRAWN):
                yield state_of(initial_model(task, derive_seed(seed, "fresh model", place)))

    return drawn


def central_measure(
    task: Task,
    model: nn.Module,
    settings: Settings,
    without: Callable[[], Collection[int]] = lambda: (),
) -> Measure:
    """Return a function that measures models on the server's validation and test data.

    ``model`` is used as a scratch pad. Validation, which recovery is judged by, leaves out the
    classes that ``without`` names: a forgotten class is not to be recovered.
    """
    data = server_data(task)
    device = choose_device(settings.device)
    parts = {VALIDATION: data.validation, TEST: data.test}

    def measure(number: int, parameters: Parameters) -> Mapping[str, float | None]:
        del number
        load_state(model, parameters)
        measures: dict[str, float | None] = {}
        for name, examples in parts.items():
            found: Mapping[str, float] = {}
            if examples is not None and size_of(examples):
                outputs, targets = predict(model, examples, device=device)
                if name == VALIDATION:
                    outputs, targets = staying(outputs, targets, without())
                found = task.metrics(outputs, targets) if len(targets) else {}
            measures[name] = accuracy_of(found)
        return measures

    return measure


def staying(
    outputs: torch.Tensor, targets: torch.Tensor, classes: Collection[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows whose targets are none of some classes."""
    if not classes:
        return outputs, targets
    kept = ~torch.isin(targets, torch.tensor(sorted(classes)))
    return outputs[kept], targets[kept]
