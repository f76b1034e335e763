"""Nothing of a forgotten client is left: not in what the server holds, and not on its disk."""

import gc
import tempfile
import types

import numpy as np
import pytest
import torch
from flwr.app import Array
from flwr.serverapp.strategy import FedAdam, FedAvgM
from safetensors.torch import load_file

from strategies import messages
from strategies.detectors.fldetector import FLDetector
from strategies.erasure import SCOPE
from strategies.forgetting import needs_of
from strategies.loop import run_rounds
from strategies.memory import Memory
from strategies.methods.interface import Pending
from strategies.store import MemoryJournal, MemoryStore
from tests.strategies.small import (
    GONE,
    client,
    everything,
    federation,
    late,
    play,
)
from unlearning.catalogue import SERVER, Target
from unlearning.routing import Request

WEIGHTS = ("first.weight", "last.weight")
"""Tensors that no two models share; biases and counters may be equal by chance."""
JOINS = {3: 2, 5: 3}
KINDS = {
    "FedAvgM": (FedAvgM, {"server_momentum": 0.5}, ("momentum_vector",)),
    "FedAdam": (FedAdam, {"beta_1": 0.5, "beta_2": 0.5}, ("m_t", "v_t")),
}
"""Strategy, what makes it remember, and where it does."""


class JournalledStore(MemoryStore):
    """Keeps the journals of plans, as a store does that outlives its process."""

    def __init__(self):
        super().__init__()
        self.journals, self.seen = {}, []

    def journal(self, plan):
        self.seen.append(self.journals.setdefault(plan, MemoryJournal()))
        return self.journals[plan]

    def drop_journal(self, plan):
        self.journals.pop(plan, None)

    def open_journals(self):
        return tuple(self.journals)


REPLAYING = ("federaser", "fedrecover", "rollback", "retrain")
"""Methods that play all rounds again; rollback too, where the strategy remembers past rounds."""
ASKING = (*REPLAYING, "verifi")
"""Methods whose plans ask clients."""


def strategy(kind):
    make, more, _ = KINDS[kind]
    return make(fraction_evaluate=0.0, **more)


def moments(kind, wrapped):
    """What the wrapped strategy remembers of past rounds, as lists of arrays."""
    kept = {name: getattr(wrapped.strategy, name) for name in KINDS[kind][2]}
    return {
        name: None
        if value is None
        else [np.array(v) for v in (value.values() if isinstance(value, dict) else value)]
        for name, value in kept.items()
    }


def alike(one, other):
    return one.keys() == other.keys() and all(
        (one[name] is None) == (other[name] is None)
        and (one[name] is None or all(map(np.array_equal, one[name], other[name])))
        for name in one
    )


def reachable(root):
    """Yield every object that can be reached from one, without code."""
    skipped = (type, types.ModuleType, types.FunctionType, types.CodeType, types.FrameType)
    seen, waiting = set(), [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, skipped):
            continue
        seen.add(id(one))
        yield one
        if not isinstance(one, torch.Tensor | np.ndarray | str | bytes):
            waiting += gc.get_referents(one)


def fingerprints(model):
    """Return the weights of a model as bytes, to be looked up in a set."""
    return {model[name].contiguous().numpy().tobytes() for name in WEIGHTS if name in model}


def held(wrapped):
    """Return the bytes of every tensor and array that the federation holds in memory."""
    found = set()
    for one in reachable(wrapped):
        if isinstance(one, torch.Tensor):
            found.add(one.detach().contiguous().numpy().tobytes())
        elif isinstance(one, np.ndarray | Array):
            found.add((one if isinstance(one, np.ndarray) else one.numpy()).tobytes())
    return found


def written(folder):
    """Return the bytes of the weights of every model in a folder, hidden files included."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return set().union(*(fingerprints(load_file(path)) for path in files))


def checkpointed(wrapped):
    """Return the bytes of the weights of every checkpoint."""
    return set().union(*map(fingerprints, wrapped.memory.checkpoints.values()))


def named(folder):
    """Return the files of forgotten clients in a folder."""
    return [path for path in folder.rglob("*") if any(name in path.name for name in GONE)]


@pytest.mark.parametrize(("where", "kind"), [("disk", "FedAvgM"), ("memory", "FedAdam")])
@pytest.mark.parametrize("name", SERVER)
def test_nothing_of_a_forgotten_client_is_left_anywhere(
    name, where, kind, scripted_grid, tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # all that is written is in sight
    folder = tmp_path / "memory" if where == "disk" else None
    theirs, others = set(), set()

    def reply(partition, number, model):
        sent = late(JOINS)(partition, number, model)
        model = {n: torch.from_numpy(a.numpy()) for n, a in sent.array_records["arrays"].items()}
        (theirs if client(partition) in GONE else others).update(fingerprints(model))
        return sent

    grid = scripted_grid(reply, 7)
    wrapped = federation(
        "fedup",
        strategy=strategy(kind),
        others=everything(),
        detector=FLDetector(),
        memory=Memory(needs_of(everything()), folder=folder),
        store=JournalledStore(),
    )
    _, models = play(wrapped, grid, 4)
    looked = {place.name: place.holds for place in SCOPE if place.holds is not None}
    for gone in GONE:
        before = {place for place, holds in looked.items() if holds(wrapped, gone)}
        # Nobody waits yet and no plan runs; all other places hold something that must go.
        assert before == looked.keys() - {"waiting list", "journal"}
    # Client 4 took part from round 1 on, so in every model that was published.
    tainted = set().union(*map(fingerprints, models[1:]))
    assert tainted & checkpointed(wrapped)
    rows = set().union(*(fingerprints(wrapped.memory.ledger[gone]) for gone in GONE))
    assert theirs & (held(wrapped) | written(tmp_path))
    assert theirs & written(tmp_path)
    assert rows & (held(wrapped) | written(tmp_path))
    assert named(tmp_path)
    assert all(value is not None for value in moments(kind, wrapped).values())

    exact = SERVER[name].guarantee == "exact"
    request = Request(
        Target.CLIENT, GONE, "privacy", guarantee="exact" if exact else "approximate", method=name
    )
    assert wrapped.request(request).method == name
    assert looked["waiting list"](wrapped, GONE[0])
    assert any(isinstance(one, Pending) for one in reachable(wrapped))
    states, after = [], []

    def on_round(record, model):
        assert (record.unlearning is not None) == (record.number == 5)
        for gone in GONE:
            assert [place for place, holds in looked.items() if holds(wrapped, gone)] == []
        disk = written(tmp_path)
        assert not (theirs | rows) & (held(wrapped) | disk)
        assert others & disk  # the look finds what is there
        assert named(tmp_path) == []
        assert not tainted & checkpointed(wrapped)
        # Models that recorded rounds started from stay, until these are played again.
        assert bool(tainted & (held(wrapped.memory) | disk)) == (name not in REPLAYING)
        assert not any(isinstance(one, Pending) for one in reachable(wrapped))
        states.append(moments(kind, wrapped))
        after.append(model)

    run_rounds(wrapped, grid, models[-1], rounds=4, played=4, on_round=on_round)
    assert len(states) == (1 if exact else 3)  # a recovery of two rounds
    assert [bool(journal.kept) for journal in wrapped.store.seen] == [name in ASKING]
    assert looked["last round"](wrapped, client(1))
    assert looked["history"](wrapped, client(1))

    # What the strategy remembers is what one does that never heard of them: since the unlearning,
    # or, where all rounds were played again, since the first.
    def never(partition, number, model):
        return late(JOINS | dict.fromkeys((3, 4), 99))(partition, number, model)

    again = federation("natural", strategy=strategy(kind))
    if exact:
        play(again, scripted_grid(never, 7), 5)
    else:
        assert alike(states[0], moments(kind, again))  # nothing yet
        play(again, scripted_grid(never, 7), 7, played=5, model=after[0])
    assert all(value is not None for value in states[-1].values())
    assert alike(states[-1], moments(kind, again))


def test_the_look_into_memory_finds_what_is_hidden_in_it(scripted_grid):
    wrapped = federation("natural", strategy=strategy("FedAvgM"))
    play(wrapped, scripted_grid(late(JOINS), 7), 1)
    secret = {"first.weight": torch.full((4, 3), 42.0)}
    assert not fingerprints(secret) & held(wrapped)
    for place in (
        {"deep": [({"er": (secret["first.weight"],)},)]},
        secret["first.weight"].numpy(),
        messages.record_from(secret),
        lambda: secret,
    ):
        wrapped.hidden = place
        assert bool(fingerprints(secret) & held(wrapped)) == (not callable(place))
    del wrapped.hidden


def test_every_fate_is_explained():
    assert len({place.name for place in SCOPE}) == len(SCOPE)
    for place in SCOPE:
        assert place.how.endswith(".")
        if place.fate in ("reset", "purged"):
            assert place.holds is not None or place.name == "clients' state"
