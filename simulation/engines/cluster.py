"""An existing Ray cluster: joining it, what a run takes of it, and whether its machines are fit.

Ray is pinned to one version, so the private pieces of it that are used here stay what they are.
"""

import contextlib
import logging
import math
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private import services
from ray._private.grpc_utils import init_grpc_channel
from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from unlearning.errors import SecateurError

AUTO, CLIENT = "auto", "ray://"
ANSWER_S = 10.0
"""Seconds in which a cluster must answer; Ray itself would ask for many minutes."""
FIT_S = 600.0
"""Seconds in which a machine must have loaded what a run needs; it may download a data set."""
COMPARED = ("secateur", "flwr", "torch")
"""Packages whose versions must be the same everywhere: other versions, other results."""

Node = Mapping[str, Any]
"""What ``ray.nodes()`` says of a node."""


class ClusterError(SecateurError):
    """A Ray cluster that cannot be reached, joined or used."""


class AddressError(ClusterError):
    """An address that names no cluster."""

    exit_code = 2


@contextlib.contextmanager
def joined(address: str, *, gpu: bool) -> Iterator[list[Node]]:
    """Connect this process to the cluster at ``address``, and disconnect it in the end.

    The cluster stays as it was; only this process's own work on it ends. Yields the nodes that can
    run clients.

    Raises
    ------
    ClusterError
        If there is no cluster, it cannot be joined, or none of its nodes can run clients.
    """
    found = resolve(address)
    if not found.startswith(CLIENT):  # Ray's client gives up by itself in time
        _check_answers(found)
    try:
        ray.init(
            address=found,
            runtime_env={"env_vars": _environment(gpu=gpu)},
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception as error:  # Ray raises bare exceptions, such as for another version of itself
        raise ClusterError(f"{found} cannot be joined: {error}; {_remedy(found)}") from error
    try:
        yield usable(ray.nodes(), found, gpu=gpu)  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def resolve(address: str) -> str:
    """Return an address as ``HOST:PORT`` or ``ray://HOST:PORT``.

    ``auto`` is the one in ``RAY_ADDRESS``, or else of the cluster that ``ray start`` last put this
    machine into. Ray's own ``auto`` would also take a Ray that another run has started for itself.

    Raises
    ------
    ClusterError
        If the address is of another form, or ``auto`` finds none.
    """
    source, text = "--ray-address", address
    if address == AUTO:
        source, text = "RAY_ADDRESS", os.environ.get("RAY_ADDRESS", "")
        text = text or services.find_bootstrap_address(None) or ""
        if not text:
            raise ClusterError(
                "--ray-address auto finds no Ray cluster on this machine; start one with ray "
                "start, or give its address"
            )
    host, _, port = text.removeprefix(CLIENT).rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise AddressError(
            f"{source} {text!r} is no address; give HOST:PORT, {CLIENT}HOST:PORT or {AUTO}"
        )
    # Ray knows this machine by the address that others reach it by, not by the loopback's.
    return text if text.startswith(CLIENT) else str(services.canonicalize_bootstrap_address(text))


def client_resources(nodes: Sequence[Node], clients: int, *, gpu: bool) -> dict[str, float]:
    """Return what each worker takes of a node, so that Flower starts as many as can be used.

    Flower fills the whole cluster with workers. As many as clients are enough, so where there are
    more CPUs, each worker takes several; on a GPU all workers of its node have equal shares.

    Parameters
    ----------
    nodes
        Those with CPUs, and with a GPU where workers are to use one.
    """
    cpus = [int(node["Resources"]["CPU"]) for node in nodes]
    wanted = min(clients, sum(cpus))
    each = max(
        size for size in range(1, max(cpus) + 1) if sum(cpu // size for cpu in cpus) >= wanted
    )
    if not gpu:
        return {"num_cpus": each, "num_gpus": 0.0}
    # One worker's share must fit on one GPU, so count workers per GPU, not per node.
    most = max(
        math.ceil(cpu // each / int(node["Resources"]["GPU"]))
        for cpu, node in zip(cpus, nodes, strict=True)
    )
    return {"num_cpus": each, "num_gpus": 1 / max(most, 1)}


def usable(nodes: Sequence[Node], address: str, *, gpu: bool) -> list[Node]:
    """Return the nodes on which workers can run.

    Raises
    ------
    ClusterError
        If there is none.
    """
    needed = ("CPU", "GPU") if gpu else ("CPU",)
    found = [
        node
        for node in nodes
        if node["Alive"] and all(node["Resources"].get(kind, 0) >= 1 for kind in needed)
    ]
    if not found:
        raise ClusterError(
            f"the Ray cluster at {address} has no node with a "
            + ("CPU and a GPU, and this machine computes on one; " if gpu else "CPU; ")
            + ("use --device cpu, or add one" if gpu else "add one with ray start --address")
        )
    return found


def check_fit(nodes: Sequence[Node], app: object, prepare: Callable[[], None]) -> None:
    """Let every node load what a run needs, all at the same time.

    A worker that cannot would make every reply an error, round after round.

    Parameters
    ----------
    app
        What Flower sends to every worker.
    prepare
        Finds the task and its data; runs on every node.

    Raises
    ------
    ClusterError
        If a node cannot, or has other versions of what results depend on.
    """
    here = versions()
    asked = [
        (
            node,
            _fault.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(here, app, prepare),
        )
        for node in nodes
    ]
    for node, answer in asked:
        try:
            fault = ray.get(answer, timeout=FIT_S)
        except GetTimeoutError:
            fault = f"it was not ready within {FIT_S:g} s; see its Ray logs"
        except RayError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            fault = f"{reason}; install there what is installed here, your own task among it"
        if fault:
            raise ClusterError(
                f"the cluster's node {node['NodeManagerAddress']} cannot run clients: {fault}"
            )


@ray.remote(num_cpus=0, max_retries=0)
def _fault(wanted: dict[str, str], app: object, prepare: Callable[[], None]) -> str | None:
    """Return why this node cannot run clients."""
    del app  # decoding it has imported what clients are made of
    found = versions()
    other = [name for name in wanted if found[name] != wanted[name]]
    if other:
        return (
            ", ".join(f"{name} is {found[name]} there and {wanted[name]} here" for name in other)
            + "; install the same versions"
        )
    try:
        prepare()
    except SecateurError as error:
        return str(error)
    return None


def versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    return {name: metadata.version(name) for name in COMPARED}


def _remedy(address: str) -> str:
    same = "with the cluster's versions of Python and Ray"
    if address.startswith(CLIENT):
        return f"give the head's ray-client-server-port (10001 by default), {same}"
    return f"start this command on a machine of the cluster, {same}, or give {CLIENT}HOST:PORT"


def _check_answers(address: str) -> None:
    """Ask whether this is a cluster's head, as Ray would only say so after many minutes."""
    # Ray's own connections ignore proxies, too.
    with init_grpc_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        head = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            request = gcs_service_pb2.GetClusterIdRequest()  # type: ignore[attr-defined]
            head.GetClusterId(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            raise ClusterError(
                f"no Ray cluster answers at {address} ({error.details()}); correct the address, or "
                "start one there with ray start --head; RAY_USE_TLS and RAY_AUTH_MODE must be the "
                "same here and there"
            ) from error


def _environment(*, gpu: bool) -> dict[str, str]:
    """Return the environment of workers, which inherit nothing from this process.

    Folders of this machine's interpreter are left out of the path: each machine has its own.
    """
    own = [Path(folder) for folder in sysconfig.get_paths().values()]
    added = [
        str(path)
        for path in (Path(entry).absolute() for entry in sys.path)
        if path.is_dir() and not any(path.is_relative_to(folder) for folder in own)
    ]
    told = ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK")
    variables = {name: os.environ[name] for name in told if name in os.environ}
    if added:
        variables["PYTHONPATH"] = os.pathsep.join(added)
    if not gpu:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # or workers would compute elsewhere than the server
    return variables
