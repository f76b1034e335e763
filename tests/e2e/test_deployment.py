"""The same app under Flower's own runtimes: ``flwr run`` on Ray, and processes over gRPC."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SETTINGS = "rounds=2 fraction-evaluate=1.0 batch-size=64"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def environment(tmp_path):
    """A Flower home of its own; nothing is sent to anybody, nothing is installed."""
    return os.environ | {
        "FLWR_HOME": str(tmp_path / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    }


@pytest.fixture
def processes(environment, tmp_path):
    """Starts processes, and ends those and only those, with their children."""
    started = []

    def start(*command):
        log = (tmp_path / f"{command[0]}-{len(started)}.log").open("w")
        process = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]],
            env=environment,
            cwd=tmp_path,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in reversed(started):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
    for process in started:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(port, process, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the process ended before it listened"
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise AssertionError(f"nothing listens on port {port} after {seconds} s")


def superlink(processes, environment, tmp_path, *more):
    """Start a SuperLink and make it flwr's default connection."""
    port = free_port()
    process = processes(
        "flower-superlink", "--insecure", "--isolation", "subprocess",
        "--host", "127.0.0.1", "--port", str(port),
        "--database", str(tmp_path / "state.db"), *more,
    )  # fmt: skip
    wait_for(port, process)
    home = Path(environment["FLWR_HOME"])
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "test"\n\n[superlink.test]\naddress = "127.0.0.1:{port}"\n'
        "insecure = true\n",
        encoding="utf-8",
    )


def flwr(environment, *arguments, timeout=200):
    done = subprocess.run(
        [str(BIN / "flwr"), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def check_run(environment, log, clients):
    runs = json.loads(flwr(environment, "list", "--format", "json"))["runs"]
    assert [run["status"] for run in runs] == ["finished:completed"], log
    assert f"round 1 train  {clients} of {clients} clients" in log
    assert f"round 2 train  {clients} of {clients} clients" in log
    assert "validation_accuracy" in log


@pytest.mark.ray
@pytest.mark.deployment
def test_flwr_run_simulates_the_bundle(processes, environment, tmp_path):
    superlink(
        processes, environment, tmp_path, "--simulation",
        "--control-api-address", f"127.0.0.1:{free_port()}",
    )  # fmt: skip
    log = flwr(
        environment, "run", ".", "--stream", "--run-config", f'{SETTINGS} identity="partition"',
        "--federation-config", "num-supernodes=3 client-resources-num-cpus=1",
    )  # fmt: skip
    check_run(environment, log, 3)


@pytest.mark.deployment
def test_the_same_app_runs_as_processes_over_grpc(processes, environment, tmp_path):
    fleet = free_port()
    superlink(
        processes, environment, tmp_path, "--fleet-api-address", f"127.0.0.1:{fleet}",
        "--fleet-api-type", "grpc-rere",
    )  # fmt: skip
    for partition in range(2):
        processes(
            "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{fleet}",
            "--host", "127.0.0.1", "--port", str(free_port()),
            "--node-config", f"partition-id={partition} num-partitions=2",
        )  # fmt: skip
    log = flwr(environment, "run", ".", "--stream", "--run-config", SETTINGS)
    check_run(environment, log, 2)
