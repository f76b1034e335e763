"""FFMU beside FFMU-N and retraining: whether one model serves every removal.

``python -m benchmarks.ffmu --help``. Seeds that are finished are kept, so that a run that was
interrupted goes on where it was. What is expected, and of which scale, is ``methods`` 3.6.
"""

import logging
import math
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from flwr.app import Context, Message
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from benchmarks import figures
from benchmarks import seeds as kept
from benchmarks.engines import ROOT, one_line_errors
from benchmarks.ffmu_page import PRINTED, TASKS, Row, means, page, speedups, verdicts
from benchmarks.membership import attack_auc
from client.app import build_app, honest_job
from client.contexts import partition_of
from client.task.evaluation import gather, load_state, predict, state_of
from client.task.protocol import Task, TaskOptions, load_task, server_data
from client.train import Job
from server.federation import build_federation, initial_model
from server.settings import Settings, SettingsError
from simulation.engines.inprocess import InProcessGrid
from strategies.directory import client_name
from strategies.ffmu import FFMU
from strategies.loop import run_rounds
from unlearning.errors import NotCertifiedError
from unlearning.parameters import Parameters
from unlearning.randomness import generator

CLIENTS, ROUNDS, EXAMPLES = 20, 60, 8000
RATIOS = (0.05, 0.10, 0.20)
"""Shares of every client's training samples that are removed; smaller ones are parts of larger."""
COMMON = {
    "task": "fashion-mnist", "model": "mlp-64", "partition": "iid", "identity": "partition",
    "rounds": ROUNDS, "local-epochs": 2, "batch-size": 50, "learning-rate": 0.1,
    "learning-rate-milestones": f"{ROUNDS // 2},{ROUNDS * 3 // 4}",
    "detector": "none", "method": "none", "ready-methods": "", "device": "cpu",
}  # fmt: skip
CERTIFIABLE = "FFMU, local-gradient full"
CHECKED_ROUNDS = 10
"""Of the training that can be certified: a pair that is not certified is so in longer ones too."""
TRAININGS: dict[str, dict[str, Any]] = {
    "FedAvg": {"strategy": "fedavg"},
    "FFMU": {"strategy": "ffmu"},
    "FFMU-N": {"strategy": "ffmu-n"},
    CERTIFIABLE: {
        "strategy": "ffmu",
        "local-gradient": "full",
        "gradient-clip": 0.001,
        "rounds": CHECKED_ROUNDS,
    },
}
"""What is trained once, on everything; milestones are FedAvg's, FFMU has the same of its own."""
NAME = "ffmu"
console = Console(stderr=True)


# ---------------------------------------------------------------- one seed
@dataclass(frozen=True)
class Parts:
    """A federation's training samples, client by client, in the order in which they are removed."""

    task: Task
    seed: int
    splits: dict[int, TensorDataset]
    kept: dict[tuple[int, float], TensorDataset]

    @classmethod
    def of(cls, task: Task, seed: int) -> "Parts":
        """Return the samples of every client of a task."""
        splits, kept = {}, {}
        for number in range(CLIENTS):
            inputs, targets = gather(task.client_data(number, CLIENTS).train)
            draw = generator(seed, "removal", number)
            order = torch.randperm(len(targets), generator=draw)
            splits[number] = TensorDataset(inputs[order], targets[order])
            for ratio in (0.0, *RATIOS):
                cut = removed_of(len(targets), ratio)
                kept[number, ratio] = TensorDataset(inputs[order[cut:]], targets[order[cut:]])
        return cls(task, seed, splits, kept)

    def removed(self, ratio: float) -> TensorDataset:
        """Return all samples that are removed."""
        return self._joined(ratio, forgotten=True)

    def retained(self, ratio: float) -> TensorDataset:
        """Return all others."""
        return self._joined(ratio, forgotten=False)

    def _joined(self, ratio: float, *, forgotten: bool) -> TensorDataset:
        parts = []
        for split in self.splits.values():
            cut = removed_of(len(split), ratio)
            parts.append([t[:cut] if forgotten else t[cut:] for t in split.tensors])
        return TensorDataset(*(torch.cat(column) for column in zip(*parts, strict=True)))


def removed_of(samples: int, ratio: float) -> int:
    """Return how many of a client's samples are removed."""
    return math.ceil(ratio * samples - 1e-9)


def train(
    parts: Parts, options: TaskOptions, settings: Settings, ratio: float
) -> tuple[Parameters, float, Any]:
    """Train a federation without a share of the samples; return model, CPU seconds, federation."""
    model = initial_model(parts.task, settings.seed)
    federation = build_federation(settings, model)

    def job(message: Message, context: Context, told: TaskOptions) -> Job:
        partition, _ = partition_of(context)
        return replace(honest_job(message, context, told), examples=parts.kept[partition, ratio])

    app = build_app(options.model_dump(by_alias=True), job=job)
    started = time.process_time()
    final = run_rounds(
        federation,
        InProcessGrid(app, CLIENTS),
        state_of(model),
        rounds=settings.rounds,
        train_config=settings.to_record(),
    )
    return final, time.process_time() - started, federation


def losses(network: nn.Module, examples: Any) -> tuple[Tensor, float]:
    """Return the loss of every example, and the error in per cent."""
    outputs, targets = predict(network, examples, device=torch.device("cpu"))
    error = 100 * float((outputs.argmax(dim=1) != targets).double().mean())
    return functional.cross_entropy(outputs, targets, reduction="none"), error


def measured(parts: Parts, network: nn.Module, model: Parameters, ratio: float) -> Row:
    """Return accuracy and errors in per cent, and the AUC of the attack, 0.5 being a guess.

    The attack takes samples with a small loss for members: those removed, against the test data.
    """
    load_state(network, model)
    unseen, error_t = losses(network, server_data(parts.task).test)
    gone, error_f = losses(network, parts.removed(ratio))
    _, error_r = losses(network, parts.retained(ratio))
    return {
        "accuracy": 100 - error_t,
        "error_f": error_f,
        "error_r": error_r,
        "attack_auc": attack_auc(gone, unseen),
    }


def certificates(federation: Any, ratios: Mapping[str, Mapping[int, int]]) -> dict[str, Any]:
    """Return what the exact check says of each removal, or why it says nothing."""
    strategy: FFMU = federation.strategy
    told: dict[str, Any] = {}
    for name, removed in ratios.items():
        nodes = {federation.directory.node(client_name(k)): n for k, n in removed.items()}
        try:
            check = strategy.check(nodes)
        except NotCertifiedError as error:
            told[name] = {"certified": False, "share": None, "statement": str(error)}
        else:
            told[name] = {
                "certified": check.complete,
                "share": check.share,
                "statement": check.statement,
            }
    if strategy.course.closeness is not None:
        told["closeness"] = strategy.course.closeness.statement
    return told


def one_seed(seed: int, task_name: str, data_dir: str, examples: int) -> dict[str, Any]:
    """Train everything that one seed needs, and measure it."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    own = {"task": task_name, "seed": seed, "data-dir": data_dir, "examples": examples}
    common = {**COMMON, **own}
    every = {name: Settings.model_validate({**common, **its}) for name, its in TRAININGS.items()}
    options = every["FedAvg"].task_options()
    task = load_task(options)
    parts, network = Parts.of(task, seed), task.build_model()
    asked = {"one sample": {0: 1}} | {
        f"{ratio:.0%}": {k: removed_of(len(split), ratio) for k, split in parts.splits.items()}
        for ratio in RATIOS
    }
    rows: dict[str, dict[str, Row]] = {}
    seconds: dict[str, float] = {}
    checks: dict[str, Any] = {}
    for name, settings in every.items():
        model, seconds[name], federation = train(parts, options, settings, 0.0)
        console.print(f"seed {seed}: {name} {seconds[name]:.0f} s", highlight=False)
        rows[name] = {f"{r:.0%}": measured(parts, network, model, r) for r in RATIOS}
        if isinstance(federation.strategy, FFMU):
            checks[name] = certificates(federation, asked)
    rows["Retrain"] = {}
    for ratio in RATIOS:
        model, spent, _ = train(parts, options, every["FedAvg"], ratio)
        name = f"{ratio:.0%}"
        seconds[f"Retrain {name}"] = spent
        console.print(f"seed {seed}: Retrain {name} {spent:.0f} s", highlight=False)
        rows["Retrain"][name] = measured(parts, network, model, ratio)
    return {"seed": seed, "rows": rows, "seconds": seconds, "checks": checks}


# ---------------------------------------------------------------- over seeds
def result(seeds: list[dict[str, Any]], task: str, examples: int) -> dict[str, Any]:
    """Return everything that is told."""
    found = means(seeds)
    return {
        "scale": {
            "clients": CLIENTS,
            "rounds": ROUNDS,
            "examples": examples,
            "seeds": len(seeds),
            "checked_rounds": CHECKED_ROUNDS,
        },
        "certifiable": CERTIFIABLE,
        "settings": {**COMMON, "task": task},
        "environment": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "flwr")},
        },
        "means": found,
        "verdicts": verdicts(found, PRINTED.get(task)),
        "speedup_vs_retrain": speedups(seeds),
        "seeds": seeds,
    }


def drawn(told: Mapping[str, Any]) -> str:
    """Return the figure."""
    return figures.ffmu(told, CERTIFIABLE)


def main(
    *,
    task: Annotated[str, typer.Option(help=f"{' or '.join(TASKS)}.")] = "fashion-mnist",
    data_dir: Annotated[str, typer.Option(help="Folder of the data set.")] = "",
    repetitions: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    examples: Annotated[int, typer.Option(min=CLIENTS * 10)] = EXAMPLES,
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = ROOT / "docs/results",
    work: Annotated[
        Path, typer.Option(help="Folder of finished seeds; they are not run again.")
    ] = ROOT / "runs" / NAME,
    redraw: Annotated[bool, typer.Option("--redraw", help=kept.REDRAW)] = False,
) -> None:
    """Train with FFMU, FFMU-N and without the removed samples, and write a table."""
    with one_line_errors():
        if task not in TASKS:
            raise SettingsError(f"--task {task}: choose {' or '.join(TASKS)}")
        name = NAME if task == "fashion-mnist" else f"{NAME}-{task}"
        if redraw:
            return kept.redraw(output, name, drawn)
        found: list[dict[str, Any]] = []
        for seed in range(repetitions):
            path = work / f"{task}-examples-{examples}-seed-{seed}.json"

            def make(seed: int = seed) -> dict[str, Any]:
                return one_seed(seed, task, data_dir, examples)

            found.append(kept.finished(path, make))
            told = result(found, task, examples)
            kept.write(output, name, told, page(told, f"{name}.svg"), drawn(told))


if __name__ == "__main__":
    typer.run(main)
