"""Run the contenders on the same work, in turn, and write down how long they took.

``python -m benchmarks.engines --help``. Every contender runs in a process of its own; the order
rotates from repetition to repetition, so that a slow minute of the machine does not fall on one of
them alone. Each finished process is added to ``docs/results/performance.json`` at once.
"""

import datetime
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape

from benchmarks import page
from benchmarks.workloads import WORKLOADS, export
from unlearning.errors import SecateurError

ROOT = Path(__file__).resolve().parent.parent
PFL_FOLDER = ROOT / "benchmarks" / "pfl_research"
PFL_VENV = ROOT / "benchmarks" / ".venv-pfl"
PFL_PYTHONS = ((3, 10), (3, 12))
"""The oldest and the newest Python that pfl-research 0.6.0 accepts."""
FEWEST_ROUNDS = 5
"""Measured rounds without which a contender's warm-up is cut short."""

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # everything is compared on the CPU
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}

console = Console(stderr=True)


@dataclass(frozen=True)
class Contender:
    """One way to run a workload: a module that prints what ``benchmarks.plain.report`` does.

    ``warm_up`` is the number of rounds at the start of each process that do not count.
    """

    title: str
    command: tuple[str, ...]
    warm_up: int = 3
    threads: int = 1


SECATEUR = "benchmarks.contenders"
CONTENDERS = {
    "bare": Contender("plain PyTorch", ("benchmarks.plain",)),
    "bare-2": Contender("plain PyTorch, 2 threads", ("benchmarks.plain",), threads=2),
    "sequential": Contender("Secateur, sequential", (SECATEUR, "sequential")),
    "batched": Contender("Secateur, batched", (SECATEUR, "batched"), warm_up=40),
    "batched-screened": Contender(
        "Secateur, batched, screened", (SECATEUR, "batched-screened"), warm_up=40
    ),
    "ray": Contender("Flower on Ray", (SECATEUR, "ray")),
    "pfl": Contender("pfl-research", ("benchmarks.pfl_research.run",)),
}


# ---------------------------------------------------------------- one process
def run_contender(contender: Contender, python: str, path: Path, rounds: int) -> dict[str, Any]:
    """Run one contender once and return its report.

    Raises
    ------
    SecateurError
        If it fails, with the last line that it wrote to stderr.
    """
    threads = str(contender.threads)
    environment = {
        **os.environ,
        **ENVIRONMENT,
        **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
    }
    command = [python, "-m", *contender.command, str(path), str(rounds), str(time.monotonic())]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(  # noqa: S603  our own modules
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=log, text=True,
            start_new_session=True,
        ) as process,
    ):  # fmt: skip
        try:
            output, _ = process.communicate()
        finally:
            _end(process)
        if process.returncode:
            log.seek(0)
            lines = log.read().strip().splitlines()
            raise SecateurError(lines[-1] if lines else f"it ended with {process.returncode}")
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that is still running, and whatever it started and left behind."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # Ray takes its cluster down
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


# ---------------------------------------------------------------- pfl-research's environment
def pfl_python() -> str:
    """Return the Python of pfl-research's environment, made first if need be."""
    wanted = hashlib.sha256((PFL_FOLDER / "requirements.txt").read_bytes()).hexdigest()
    stamp, python = PFL_VENV / ".installed", PFL_VENV / "bin" / "python"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return str(python)
    oldest, newest = PFL_PYTHONS
    base = next((p for p in _pythons() if p and oldest <= _version(p) <= newest), None)
    if base is None:
        raise SecateurError("it needs Python 3.10, 3.11 or 3.12, and there is none here")
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    commands = [
        [base, "-m", "venv", "--clear", str(PFL_VENV)],
        [*pip, "--requirement", str(PFL_FOLDER / "requirements.txt")],
    ]
    with console.status("making pfl-research's environment"):
        for command in commands:
            done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
            if done.returncode:
                why = (done.stderr or done.stdout).strip().splitlines() or ["it failed"]
                raise SecateurError(f"its environment cannot be made: {why[-1]}")
    stamp.write_text(wanted, encoding="utf-8")
    return str(python)


def _pythons() -> Iterator[str | None]:
    yield sys.executable
    yield from map(shutil.which, ("python3.12", "python3.11", "python3.10"))


def _version(python: str) -> tuple[int, int]:
    ask = "import sys; print(*sys.version_info[:2])"
    done = subprocess.run([python, "-c", ask], capture_output=True, text=True, check=False)  # noqa: S603
    numbers = done.stdout.split() or ["0", "0"]  # a launcher may know no such version
    return int(numbers[0]), int(numbers[1])


# ---------------------------------------------------------------- results
def summarise(runs: list[Mapping[str, Any]], contender: Contender) -> dict[str, Any]:
    """Return medians and spread over the rounds of all repetitions."""
    rounds = len(runs[0]["rounds"])
    dropped = contender.warm_up
    if rounds - dropped < FEWEST_ROUNDS:
        dropped = min(3, rounds // 2)
    measured = [run["rounds"][dropped:] for run in runs]
    low, middle, high = np.quantile(np.concatenate(measured), [0.25, 0.5, 0.75])
    return {
        "title": contender.title,
        "seconds_per_round": float(middle),
        "quartiles": [float(low), float(high)],
        "medians": [float(np.median(rounds)) for rounds in measured],
        "first_round_s": float(np.median([run["first_round"] for run in runs])),
        "peak_mb": float(np.median([run["peak_mb"] for run in runs])),
        "accuracy": runs[0]["accuracy"],
        "rounds": rounds,
        "dropped": dropped,
        "repetitions": len(runs),
        "versions": runs[0]["versions"],
    }


def machine() -> dict[str, Any]:
    """Return what is known of this machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def measure(
    name: str, path: Path, names: list[str], pythons: Mapping[str, str], rounds: int, times: int
) -> Iterator[dict[str, Any]]:
    """Run the contenders in turn and yield the workload's results after each process."""
    runs: dict[str, list[Mapping[str, Any]]] = {}
    out: set[str] = set()
    for repetition in range(times):
        first = repetition % max(1, len(names))
        for contender in names[first:] + names[:first]:
            if contender in out:
                continue
            kind = CONTENDERS[contender]
            label = f"{name}, {kind.title}, {repetition + 1}/{times}"
            try:
                with console.status(escape(label)):
                    found = run_contender(kind, pythons[contender], path, rounds)
            except SecateurError as error:
                console.print(f"{escape(label)}: left out: {escape(str(error))}", soft_wrap=True)
                out.add(contender)
                continue
            runs.setdefault(contender, []).append(found)
            done = {key: summarise(runs[key], CONTENDERS[key]) for key in CONTENDERS if key in runs}
            seconds = float(np.median(found["rounds"][done[contender]["dropped"] :]))
            console.print(f"{escape(label)}: {seconds:.4g} s per round", highlight=False)
            workload = WORKLOADS[name]
            yield {
                "summary": workload.summary,
                "clients": workload.clients,
                "family": workload.family,
                "at": workload.at,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
                "machine": machine(),
                "contenders": done,
            }


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End with one line on stderr instead of a traceback, where the user can act on it."""
    try:
        yield
    except SecateurError as error:
        console.print(f"error: {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        console.print("interrupted; what had finished is kept")
        raise typer.Exit(130) from error


def choose(only: Sequence[str], contenders: Sequence[str]) -> dict[str, list[str]]:
    """Return the contenders of every chosen workload; no choice means all."""
    chosen = {
        name: [key for key in CONTENDERS if key in (contenders or workload.contenders)]
        for name, workload in WORKLOADS.items()
        if not only or name in only or workload.family in only
    }
    known = {*CONTENDERS, *WORKLOADS, *(workload.family for workload in WORKLOADS.values())}
    if unknown := sorted({*only, *contenders} - known):
        raise SecateurError(
            f"there is no {', '.join(unknown)}; workloads are {', '.join(WORKLOADS)}; contenders "
            f"are {', '.join(CONTENDERS)}"
        )
    return chosen


def main(
    *,
    only: Annotated[list[str] | None, typer.Option(help="A workload, or a family.")] = None,
    contender: Annotated[list[str] | None, typer.Option(help="Instead of the usual ones.")] = None,
    data_dir: Annotated[
        str, typer.Option(help="Folder of Fashion-MNIST and CIFAR-10; downloaded by default.")
    ] = "",
    repetitions: Annotated[int, typer.Option(min=1, help="Processes per contender.")] = 3,
    quick: Annotated[
        bool, typer.Option(help="Few rounds, once, and results in runs/performance.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the results; docs/results by default.")
    ] = None,
) -> None:
    """Compare Secateur's engines with other ways to run the same federations."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that no contender is left behind
    output = output or ROOT / ("runs/performance" if quick else "docs/results")
    with one_line_errors(), tempfile.TemporaryDirectory() as folder:
        chosen = choose(only or (), contender or ())
        pythons = dict.fromkeys(CONTENDERS, sys.executable)
        if any("pfl" in names for names in chosen.values()):
            try:
                pythons["pfl"] = pfl_python()
            except SecateurError as error:
                console.print(f"pfl-research is left out: {escape(str(error))}", soft_wrap=True)
                del pythons["pfl"]
        path, times = Path(folder) / "work.npz", 1 if quick else repetitions
        try:
            for name, names in chosen.items():
                workload = WORKLOADS[name]
                try:
                    export(workload, path, data_dir=data_dir)
                except SecateurError as error:
                    console.print(f"{name}: left out: {escape(str(error))}", soft_wrap=True)
                    continue
                rounds = workload.quick_rounds if quick else workload.rounds
                here = [key for key in names if key in pythons]
                for found in measure(name, path, here, pythons, rounds, times):
                    page.save(output, name, found)
        finally:
            page.write(output)


if __name__ == "__main__":
    typer.run(main)
