"""An existing Ray cluster: its address, and what a run takes of it. No cluster is started here."""

import math

import pytest

from simulation.engines.ray import cluster


def node(cpu, gpu=0, alive=True):
    return {"Alive": alive, "Resources": {"CPU": float(cpu), "GPU": float(gpu)} if alive else {}}


def workers(nodes, resources):
    """Return how many workers Flower starts."""
    from flwr.simulation.ray_transport import ray_actor

    found = pytest.MonkeyPatch()
    with found.context() as patch:
        patch.setattr(ray_actor.ray, "nodes", lambda: nodes)
        return ray_actor.pool_size_from_resources(resources)


@pytest.mark.parametrize(
    ("cpus", "clients", "each", "expected"),
    [
        ([1, 1], 10, 1, 2),  # fewer CPUs than clients: one each
        ([4, 4], 10, 1, 8),
        ([32, 32], 10, 6, 10),  # more: as many workers as clients
        ([64, 4], 10, 6, 10),
        ([8], 1, 8, 1),
        ([3, 3], 4, 1, 6),  # with two CPUs each there would be fewer than four
    ],
)
def test_there_are_as_many_workers_as_clients_where_cpus_allow(cpus, clients, each, expected):
    nodes = [node(cpu) for cpu in cpus]
    resources = cluster.client_resources(nodes, clients, gpu=False)
    assert resources == {"num_cpus": each, "num_gpus": 0.0}
    assert workers(nodes, resources) == expected


@pytest.mark.parametrize(
    ("sizes", "clients", "per_gpu"),
    [([(8, 1), (8, 1)], 100, 8), ([(8, 2)], 100, 4), ([(5, 2)], 100, 3), ([(4, 1), (8, 8)], 100, 4),
     ([(8, 8)], 2, 1)],
)  # fmt: skip
def test_the_workers_of_a_gpu_share_it(sizes, clients, per_gpu):
    nodes = [node(*size) for size in sizes]
    resources = cluster.client_resources(nodes, clients, gpu=True)
    assert resources["num_gpus"] == 1 / per_gpu
    for cpu, gpu in sizes:  # whatever fits by CPUs has its place on a GPU, too
        assert cpu // resources["num_cpus"] <= gpu * math.floor(1 / resources["num_gpus"] + 1e-9)


def test_only_nodes_that_can_compute_are_used():
    nodes = [node(2), node(0, 1), node(2, 1), node(8, alive=False)]
    assert cluster.usable(nodes, "a:1", gpu=False) == [nodes[0], nodes[2]]
    assert cluster.usable(nodes, "a:1", gpu=True) == [nodes[2]]
    with pytest.raises(cluster.ClusterError, match="at a:1 has no node with a CPU; add one"):
        cluster.usable([node(0), node(1, alive=False)], "a:1", gpu=False)


@pytest.mark.parametrize(
    "address", ["", "a", ":1", "a:", "a:x", "a:0", "a:65536", "http://a:1", "ray://a", "local"]
)
def test_what_is_no_address_is_refused(address, monkeypatch):
    with pytest.raises(cluster.AddressError, match=r"--ray-address '.*' is no address; give"):
        cluster.resolve(address)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(cluster.AddressError, match=r"RAY_ADDRESS '.*' is no address; give"):
            cluster.resolve("auto")


def test_auto_is_the_environments_address_or_the_last_that_was_started_here(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster.services, "find_bootstrap_address", lambda folder: None)
    with pytest.raises(cluster.ClusterError, match="auto finds no Ray cluster on this machine"):
        cluster.resolve("auto")
    monkeypatch.setattr(cluster.services, "find_bootstrap_address", lambda folder: "10.0.0.1:6379")
    assert cluster.resolve("auto") == "10.0.0.1:6379"
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.2:6379")
    assert cluster.resolve("auto") == "10.0.0.2:6379"
    assert cluster.resolve("10.0.0.3:6379") == "10.0.0.3:6379"
    assert cluster.resolve("ray://head:10001") == "ray://head:10001"


@pytest.mark.parametrize(
    ("address", "remedy"),
    [("10.0.0.1:6379", "on a machine of the cluster"), ("ray://a:10001", "ray-client-server-port")],
)
def test_another_version_of_ray_is_told_in_its_own_words(address, remedy, monkeypatch):
    def init(**options):
        assert "num_cpus" not in options
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.54.0")

    monkeypatch.setattr(cluster, "_check_answers", lambda address: None)
    monkeypatch.setattr(cluster.ray, "init", init)
    with (
        pytest.raises(cluster.ClusterError, match=rf"(?s)joined: Version mismatch.*{remedy}"),
        cluster.joined(address, gpu=False),
    ):
        pass


def test_workers_get_added_folders_but_none_of_this_interpreter(monkeypatch, tmp_path):
    seen = {}

    def init(**options):
        seen.update(options["runtime_env"]["env_vars"])
        raise RuntimeError("enough")

    monkeypatch.setattr(cluster, "_check_answers", lambda address: None)
    monkeypatch.setattr(cluster.ray, "init", init)
    monkeypatch.syspath_prepend(tmp_path)
    for gpu in (True, False):
        seen.clear()
        with pytest.raises(cluster.ClusterError), cluster.joined("10.0.0.1:6379", gpu=gpu):
            pass
        assert str(tmp_path) in seen["PYTHONPATH"].split(":")
        assert "site-packages" not in seen["PYTHONPATH"]
        assert seen["FLWR_TELEMETRY_ENABLED"] == "0"
        assert ("CUDA_VISIBLE_DEVICES" in seen) is not gpu
