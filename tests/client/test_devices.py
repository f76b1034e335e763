"""Every client action computed on a GPU, or what stands in for one, beside the CPU.

What a step sends may differ by ``CLOSE`` of what it changed: sums in another order, through some
dozens of steps. Where a number decides by its sign or its place, a difference in the last bit can
turn it over, and steps that do so may differ by more (``DECIDING``).
"""

import contextlib

import pytest
import torch

from client.task import device
from simulation.engines.inprocess import InProcessGrid
from tests.client import standin
from tests.client.every_action import CASES, CLIENTS, MARKING, Asked, assert_same, lacking, parts

ALL = {**CASES, **MARKING}
CLOSE = 1e-3
DECIDING = {
    "rcad": 5e-2,  # the direction of a row's gradient, however short it is
    "macforget": 5e-2,  # which entries are the largest
    "ffmu-n": 5e-2,  # the sign of a gradient's entry, however small it is
}


def replies(folder, device="cpu", around=None):
    """Return the model that everybody was sent, and what was answered in a context."""
    marking, logged = (
        Asked(folder / name, device, cases=cases)
        for name, cases in (("marking", MARKING), ("logged", CASES))
    )
    with around or contextlib.nullcontext():
        found = [made.all_replies(InProcessGrid(made.app, CLIENTS)) for made in (marking, logged)]
    return logged.model, found[0] | found[1]


@pytest.fixture(scope="module")
def on_the_cpu(tmp_path_factory):
    return replies(tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="module")
def on_the_gpu(tmp_path_factory):
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False  # it has no more than ten bits
    yield replies(tmp_path_factory.mktemp("gpu"), "cuda")
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def in_another_order(tmp_path_factory):
    """The CPU's other kernels: what rounding alone does, where there is no GPU as well."""
    plain = torch.backends.mkldnn.flags(enabled=False, allow_tf32=None)
    return replies(tmp_path_factory.mktemp("other"), around=plain)


def assert_close(case, one, other):
    """Check what all clients answered to one case."""
    start, answers = one
    for client in range(CLIENTS):
        (tensors, metrics), (found, told) = (
            parts(replies[case, client]) for replies in (answers, other[1])
        )
        assert told == pytest.approx(metrics, rel=CLOSE, abs=1e-6)
        assert tensors.keys() == found.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            changed = tensor - start[name] if name in start else tensor
            away = float((found[name] - tensor).double().norm())
            assert away <= DECIDING.get(case, CLOSE) * float(changed.double().norm()) + 1e-6, name


def test_no_action_is_left_out():
    assert not lacking()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("case", ALL)
def test_a_gpu_answers_as_the_cpu_does(case, on_the_cpu, on_the_gpu):
    assert_close(case, on_the_cpu, on_the_gpu)


@pytest.mark.parametrize("case", ALL)
def test_rounding_alone_stays_within_the_tolerance(case, on_the_cpu, in_another_order):
    assert_close(case, on_the_cpu, in_another_order)


@pytest.mark.parametrize("float64", [True, False])
def test_every_action_computes_on_its_device_and_answers_from_the_cpu(
    float64, on_the_cpu, tmp_path, monkeypatch
):
    if not float64:
        monkeypatch.setattr(device, "WITHOUT_FLOAT64", {standin.DEVICE})
    # The loss is computed there, forwards and backwards, for each of so many clients and cases.
    least = 10 * CLIENTS * len(ALL)
    there = standin.StandIn(float64=float64)
    _, found = replies(tmp_path, standin.DEVICE, around=there)
    assert there.operations > least
    arrays = [
        a
        for r in found.values()
        for kept in r.content.array_records.values()
        for a in kept.values()
    ]
    assert {array.stack.device.type for array in arrays} == {"cpu"}  # before they are encoded
    assert_same(found, on_the_cpu[1])
