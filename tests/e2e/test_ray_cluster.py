"""On a Ray cluster that is there before the run and after it: two nodes, on this machine."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simulation.report import without_times

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).parent / "ray"
SMALL = ["rounds=3", "warm-up=1", "clients.total=6", "model=mlp", "detector=none", "examples=300"]
TASK = """
from dataclasses import fields
from pathlib import Path

import ray

from client.task.classification import Classification
from client.task.digits import digits


class Tracked(Classification):
    def client_data(self, partition, partitions):
        if ray.is_initialized():
            node = ray.get_runtime_context().get_node_id()
            (Path({folder!r}) / node).touch()
        return super().client_data(partition, partitions)


def tracked(options):
    task = digits(options)
    return Tracked(**{{f.name: getattr(task, f.name) for f in fields(task) if f.init}})
"""

pytestmark = pytest.mark.ray


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def address():
    """Two nodes with a CPU each, in the foreground, so that they end with their processes."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    port, client_port, first, second = free_ports(4)
    address = f"127.0.0.1:{port}"
    common = ["--block", "--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    nodes = [
        ["--head", f"--port={port}", f"--ray-client-server-port={client_port}",
         "--include-dashboard=false", f"--temp-dir={folder}",
         f"--dashboard-agent-listen-port={first}"],
        [f"--address={address}", f"--dashboard-agent-listen-port={second}"],
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "PYTHONPATH")}
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for number, options in enumerate(nodes, 1):
            process = subprocess.Popen(
                [RAY, "start", *options, *common],
                cwd=folder,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            stack.callback(end, process)
            wait_until(lambda expected=number: nodes_of(address) == expected)
        yield address


def end(process):
    """Let a node stop its own processes; end its group if it does not."""
    process.terminate()
    try:
        process.wait(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until(condition, seconds=40):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.3)


def nodes_of(address):
    """Return how many nodes the cluster has, without joining it; 0 while there is none."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    with init_grpc_channel(address) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            found = head.GetAllNodeInfo(gcs_service_pb2.GetAllNodeInfoRequest(), timeout=5)
        except grpc.RpcError:
            return 0
    return sum(node.state == 0 for node in found.node_info_list)


def start(folder, address, *settings, path=""):
    pairs = [part for pair in [*SMALL, *settings] for part in ("--set", pair)]
    engine = (
        ["--engine", "inprocess", "--no-batch"]
        if address is None
        else ["--engine", "ray", "--ray-address", address]
    )
    return subprocess.Popen(
        [sys.executable, "-m", "server", "run", "clean", *engine, "--out", folder, *pairs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_both_nodes_run_clients_and_the_model_is_that_of_one_process(address, tmp_path):
    plugin, seen = tmp_path / "plugin", tmp_path / "seen"
    plugin.mkdir()
    seen.mkdir()
    (plugin / "tracked.py").write_text(TASK.format(folder=str(seen)), encoding="utf-8")
    for name, where in (("cluster", address), ("alone", None)):
        run = start(tmp_path / name, where, "task=tracked:tracked", path=plugin)
        _, err = run.communicate(timeout=120)
        assert run.returncode == 0, err
    assert len(list(seen.iterdir())) == 2
    reports = [
        json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))
        for name in ("cluster", "alone")
    ]
    assert without_times(reports[0]) == without_times(reports[1])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("cluster", "alone"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert nodes_of(address) == 2


def test_an_interrupt_ends_the_run_and_leaves_the_cluster(address, tmp_path):
    import ray

    from simulation.engines.ray import cluster

    run = start(tmp_path / "new/folder", address, "rounds=1000")
    for line in run.stderr:
        if line.startswith("round   1"):  # clients are at work
            break
    run.send_signal(signal.SIGINT)
    _, rest = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "secateur: interrupted" in rest
    assert not (tmp_path / "new").exists()
    with cluster.joined(address, gpu=False) as nodes:
        assert len(nodes) == 2
        wait_until(lambda: ray.available_resources().get("CPU") == 2)


def test_a_node_that_cannot_run_clients_is_told(address, monkeypatch):
    from simulation.engines.ray import cluster
    from unlearning.errors import SecateurError

    def nothing():
        return None

    def no_data():
        raise SecateurError("FashionMNIST is not in /data")

    def not_there():
        import nosuchmodule  # noqa: F401

    with cluster.joined(address, gpu=False) as nodes:
        cluster.check_fit(nodes, None, nothing)
        with pytest.raises(cluster.ClusterError, match="cannot run clients: FashionMNIST is not"):
            cluster.check_fit(nodes, None, no_data)
        with pytest.raises(cluster.ClusterError, match="No module named 'nosuchmodule'; install"):
            cluster.check_fit(nodes, None, not_there)
        here = {**cluster.versions(), "torch": "1.0"}
        monkeypatch.setattr(cluster, "versions", lambda: here)
        with pytest.raises(cluster.ClusterError, match=r"torch is 2\S+ there and 1\.0 here"):
            cluster.check_fit(nodes, None, nothing)
    with (
        pytest.raises(cluster.ClusterError, match="no node with a CPU and a GPU, and this machine"),
        cluster.joined(address, gpu=True),
    ):
        pass
