"""One model for client after client: as good as new each time."""

import pytest
import torch
from torch import nn

from client.scratch import Scratch, scratch_for
from client.task.evaluation import state_of

CPU = torch.device("cpu")


class Odd(nn.Module):
    """Counts in a buffer that is no part of its state, and replaces another buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, inputs):
        self.calls += 1
        self.kept = self.kept + 1
        return self.layer(inputs) + self.calls + self.kept


class Task:
    def __init__(self, kind=Odd):
        self.kind = kind

    def build_model(self):
        return self.kind()


def fresh(kind=Odd):
    torch.manual_seed(3)
    return state_of(kind())


def test_a_used_model_becomes_as_good_as_new():
    start = fresh()
    scratch = Scratch(Task(), CPU)
    for _ in range(2):
        scratch.load(start)
        out = scratch.model(torch.zeros(1, 2))
        assert torch.equal(out, start["layer.bias"].expand(1, 2) + 1 + 1)
        assert scratch.state()["kept"].tolist() == [1, 1]  # the buffer that took its place
        assert float(scratch.model.calls) == 1
    assert start["kept"].tolist() == [0, 0]


def test_its_state_is_a_copy_and_what_it_is_given_stays_as_it_was():
    start = fresh()
    before = {name: tensor.clone() for name, tensor in start.items()}
    scratch = Scratch(Task(), CPU)
    scratch.load(start)
    state = scratch.state()
    assert state.keys() == scratch.model.state_dict().keys() == start.keys()
    with torch.no_grad():
        scratch.model.layer.weight += 1
    assert torch.equal(state["layer.weight"], start["layer.weight"])
    assert all(torch.equal(start[name], before[name]) for name in start)


@pytest.mark.parametrize("spoil", [lambda s: s.pop("kept"), lambda s: s.update(more=torch.ones(1)),
                                   lambda s: s.update(kept=torch.zeros(1))])  # fmt: skip
def test_a_model_that_does_not_match_is_refused_with_torchs_own_words(spoil):
    start = fresh()
    spoil(start)
    with pytest.raises(RuntimeError, match="state_dict"):
        Scratch(Task(), CPU).load(start)


class Extra(nn.Linear):
    """Has something in its state that is no tensor of its own."""

    def __init__(self):
        super().__init__(2, 2)
        self.register_state_dict_post_hook(
            lambda module, state, prefix, meta: state.update({f"{prefix}more": module.bias * 2})
        )
        self.register_load_state_dict_pre_hook(
            lambda module, state, prefix, *rest: state.pop(f"{prefix}more")
        )


def test_a_state_that_torch_makes_in_its_own_way_is_left_to_it():
    scratch = Scratch(Task(Extra), CPU)
    start = fresh(Extra)
    scratch.load(start)
    assert torch.equal(scratch.state()["more"], start["bias"] * 2)


def test_every_task_and_thread_has_its_own():
    from concurrent.futures import ThreadPoolExecutor

    one, other = Task(), Task()
    assert scratch_for(one, CPU) is scratch_for(one, CPU)
    assert scratch_for(one, CPU) is not scratch_for(other, CPU)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(scratch_for, one, CPU).result() is not scratch_for(one, CPU)
