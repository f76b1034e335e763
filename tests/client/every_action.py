"""One federation that is asked everything: whoever compares engines or devices asks the same.

The list is held against the actions that there are, so that a new one without a case is noticed.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch.utils.data import TensorDataset

from client.app import build_app
from client.task.evaluation import state_of
from client.task.protocol import TaskOptions, load_task
from client.train import Job, do
from server.federation import initial_model
from strategies import messages
from strategies.actions import (
    Action,
    Amnesiac,
    Ascend,
    Ascent,
    Batches,
    Curvature,
    Ffmu,
    Forget,
    LabelFlip,
    MacForget,
    Mark,
    Marks,
    Noisy,
    Rapid,
    Rcad,
    Statistics,
    joined,
)
from strategies.messages import LocalTraining

CLIENTS, SEED = 2, 5
CLASS = {"forget": "class", "forget_class": 3}
LEARNT = LocalTraining(local_epochs=6, optimizer="adam", learning_rate=0.01)
"""How the model came about: it is surer of the clients' rows than of others."""
TRAINING = LocalTraining(seed=SEED, local_epochs=2, batch_size=16, learning_rate=0.05)

CASES: dict[str, Action] = {
    # First, because training of another kind ends the log.
    "batches": Batches(**CLASS),
    "amnesiac": Amnesiac(**CLASS, request="one"),
    "ascend": Ascend(**CLASS, radius=0.5, batch_size=8, epochs=2),
    "ascent": Ascent(**CLASS, epochs=2),
    "ascent, all rows, naive": Ascent(forget="all", partial=False, epochs=1),
    "label flip": LabelFlip(**CLASS, epochs=2),
    "label flip, at random": LabelFlip(**CLASS, epochs=2, pattern="random"),
    "macforget": MacForget(**CLASS, steps=3),
    "fisher": Statistics(**CLASS, kind="fisher"),
    "activations": Statistics(**CLASS, kind="activations", most_samples=20),
    "gradients": Statistics(**CLASS, kind="gradients"),
    "classes": Statistics(**CLASS, kind="classes"),
    "curvature": Curvature(**CLASS),
    "rapid": Rapid(),
    "rapid, row by row": Rapid(fisher="per_sample"),
    "noisy": Noisy(steps=2),
    "rcad": Rcad(radius=0.1),
    "ffmu": Ffmu(),
    "ffmu, soft": Ffmu(mode="soft"),
    "ffmu, all rows": Ffmu(local="full"),
    "ffmu, all rows clipped": Ffmu(local="full", clip=0.01),
    "ffmu-n": Ffmu(models=True),
    # Last, because what comes after it would have other rows.
    "forget": Forget(**CLASS),
}
MARKING: dict[str, Action] = {
    "mark, watched": Mark(kind="forgettable", rounds=2),
    "mark": Mark(kind="forgettable", rounds=2, noted=1),
    "marks": Marks(first=True),
}
"""Of clients that keep no batch log, in which marks would be missing."""
LOGGED = 2
"""Rounds of plain training with a batch log before anything else is asked."""


def kinds(base: type[Action] = Action) -> set[type[Action]]:
    """Return every action that there is."""
    below = [kind for child in base.__subclasses__() for kind in kinds(child)]
    return {*below, *([base] if "action" in vars(base) else [])}


def lacking() -> list[str]:
    """Return the actions without a case."""
    cases = {**CASES, **MARKING}.values()
    return sorted(kind.action for kind in kinds() - {type(case) for case in cases})


@dataclass
class Asked:
    """Digits on a small CNN that has learnt the clients' rows, and a folder for each client."""

    folder: Path
    """What clients keep; one for each federation that is asked."""
    device: str = "cpu"
    clients: int = CLIENTS
    changes: dict = field(default_factory=dict)
    cases: dict[str, Action] = field(default_factory=lambda: CASES)

    def __post_init__(self):
        values = {"task": "digits", "model": "cnn", "examples": 120, "seed": SEED,
                  "device": self.device, "client-dir": str(self.folder),
                  "batch-log": "off" if self.cases is MARKING else "full",
                  "batch-log-precision": "float32"}  # fmt: skip
        self.options = TaskOptions.model_validate(values | self.changes)
        self.app = build_app(self.options.model_dump(by_alias=True))
        task = load_task(self.options)
        held = [task.client_data(k, self.clients).train for k in range(self.clients)]
        everything = TensorDataset(
            *(torch.cat(parts) for parts in zip(*(d.tensors for d in held), strict=True))
        )
        job = Job(task, everything, LEARNT, (0, 0), torch.device("cpu"))
        self.model, _ = do(job, state_of(initial_model(task, SEED)))

    def messages(self, case, nodes):
        """Return the messages that ask all clients for one case, each case in its own round."""
        settings, number = self.cases[case], LOGGED + 2 + list(self.cases).index(case)
        arrays = self.model
        if isinstance(settings, Ascend):
            moved = {name: tensor + 0.01 for name, tensor in self.model.items()}
            arrays = joined(reference=self.model, leaver=moved)
        return self._to(nodes, settings.action, arrays, number, settings.config())

    def all_replies(self, grid: Grid):
        """Return (case, partition) -> reply, of two rounds of training and of every case."""
        nodes = list(grid.get_node_ids())
        identities = grid.send_and_receive(self._to(nodes, messages.QUERY_IDENTITY, {}, 0, {}))
        partition = {
            reply.metadata.src_node_id: reply.content[messages.METRICS][messages.PARTITION]
            for reply in identities
        }
        found = {}
        for case, sent in self._everything(nodes):
            for reply in grid.send_and_receive(sent):
                found[case, partition[reply.metadata.src_node_id]] = reply
        return found

    def is_moved(self, tensors):
        """Say whether tensors are others than the model that was sent."""
        return any(
            name not in self.model or not torch.equal(tensor, self.model[name])
            for name, tensor in tensors.items()
        )

    def rounds(self, nodes):
        """Yield the names of rounds of plain training, and the messages that ask for them."""
        for number in range(1, LOGGED + 1):
            yield f"round {number}", self._to(nodes, messages.TRAIN, self.model, number, {})

    def _everything(self, nodes):
        yield from self.rounds(nodes)
        for case in self.cases:
            yield case, self.messages(case, nodes)

    @staticmethod
    def _to(nodes, action, arrays, number, config):
        told = {
            **TRAINING.to_record(),
            messages.SERVER_ROUND: number,
            messages.SHARE: LOGGED * [0.5],
            messages.SHARE_ROUND: list(range(1, LOGGED + 1)),
            **config,
        }
        content = RecordDict({
            messages.ARRAYS: messages.record_from(arrays), messages.CONFIG: ConfigRecord(told),
        })  # fmt: skip
        return [Message(content, node, action) for node in nodes]


def parts(reply):
    """Return tensors and metrics of a good reply."""
    assert not reply.has_error(), reply.error
    arrays = reply.content.array_records.get(messages.ARRAYS)
    tensors = {} if arrays is None else messages.parameters_from(arrays)
    return tensors, dict(reply.content[messages.METRICS])


def assert_same(one, other):
    """Check that two sets of replies are alike bit for bit."""
    assert one.keys() == other.keys()
    for key, reply in one.items():
        (tensors, metrics), (others, told) = parts(reply), parts(other[key])
        assert metrics == told, key
        assert tensors.keys() == others.keys(), key
        for name, tensor in tensors.items():
            assert tensor.dtype == others[name].dtype, (key, name)
            assert torch.equal(tensor, others[name]), (key, name)
