"""What clients answer to every action, over the in-process Grid on digits."""

import functools

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from torch.utils.data import Dataset

from client import answers
from client.app import build_app
from client.forgetting.steps import STEPS, do
from client.keeping import Keeping
from client.rows import subset
from client.task.digits import digits
from client.task.evaluation import gather, state_of
from client.task.protocol import Split, TaskOptions, load_task
from server.federation import initial_model
from simulation.engines.inprocess import InProcessGrid
from strategies import messages
from strategies.actions import (
    Ascend,
    Ascent,
    MacForget,
    Rcad,
    Selection,
    Statistics,
    joined,
    parted,
)
from strategies.exchange import Reply
from strategies.screen import Screen
from unlearning.fisher import fisher_statistics

CLIENTS = 3
REQUIRED = {"radius": 0.5, "kind": "fisher", "forget": "class"}
"""Settings that have no default."""
TRAINS = [kind for kind in STEPS if kind.action.startswith("train.")]
SELECTS = [kind for kind in TRAINS if issubclass(kind, Selection) and not kind.trains]
IDLE = (MacForget,)
"""Stops at once here: an untrained model is as unsure of these rows as of any others."""
QUERIES = [kind for kind in STEPS if kind.action.startswith("query.")]


def settings_of(action, **more):
    """Return an action with what it must be told, for class 3 where it forgets."""
    required = {name for name, field in action.model_fields.items() if field.is_required()}
    chosen = {name: REQUIRED[name] for name in required}
    if chosen.get("forget") == "class":
        chosen["forget_class"] = 3
    return action(**(chosen | more))


class Streamed(Dataset):
    """Rows of a user's own data set, read one by one."""

    def __init__(self, of):
        self.of = of

    def __len__(self):
        return len(self.of)

    def __getitem__(self, row):
        return self.of[row]


class OfStreams:
    """A task whose clients' data are in sets of no known kind."""

    def __init__(self, task):
        self.task = task
        self.client_data = functools.cache(self._split)

    def __getattr__(self, part):
        return getattr(self.task, part)

    def _split(self, partition, partitions):
        found = self.task.client_data(partition, partitions)
        return Split(Streamed(found.train), Streamed(found.test))


def streamed(options):
    return OfStreams(digits(options))


OWN = "tests.client.test_answers:streamed"
kinds_of_data = pytest.mark.parametrize("data", ["digits", OWN])


class Federation:
    """Three clients on digits, and the model that they are sent."""

    def __init__(self, folder=None, model="mlp", task="digits", **more):
        where = {} if folder is None else {"client-dir": str(folder)}
        values = {"task": task, "model": model, "examples": 120, **where, **more}
        self.options = TaskOptions.model_validate(values)
        self.task = load_task(self.options)
        self.app = build_app(self.options.model_dump(by_alias=True))
        self.grid = InProcessGrid(self.app, CLIENTS)
        self.model = state_of(initial_model(self.task, 0))
        *_, bias = self.model
        self.model[bias][3] += 2.0  # it takes everything for a 3: there is something to forget
        self.folder = folder

    def ask(self, settings, node=0, *, arrays=None, number=4, config=None):
        """Send one action and return the reply."""
        told = settings.config() if config is None else config
        if arrays is None:
            moved = {n: t + 0.01 if t.is_floating_point() else t for n, t in self.model.items()}
            both = joined(reference=self.model, leaver=moved)
            arrays = both if isinstance(settings, Ascend) else self.model
        content = RecordDict({
            messages.ARRAYS: messages.record_from(arrays),
            messages.CONFIG: ConfigRecord({"server-round": number, **told}),
        })  # fmt: skip
        nodes = list(self.grid.get_node_ids())
        (reply,) = self.grid.send_and_receive([Message(content, nodes[node], settings.action)])
        return reply

    def rows(self, node=0):
        """Return inputs and targets that a client holds."""
        return gather(self.task.client_data(node, CLIENTS).train)

    def keeping(self, node=0):
        return Keeping(self.folder / str(node))


def read(reply):
    """Return tensors, metrics and weight of a good reply."""
    assert not reply.has_error(), reply.error
    metrics = dict(reply.content[messages.METRICS])
    weight = metrics.pop(messages.NUM_EXAMPLES)
    return messages.parameters_from(reply.content[messages.ARRAYS]), metrics, weight


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@kinds_of_data
@pytest.mark.parametrize("kind", TRAINS)
def test_every_step_is_answered_with_a_model(kind, data, model, tmp_path):
    made = Federation(tmp_path, model, data)
    before = {name: tensor.clone() for name, tensor in made.model.items()}
    count = int((made.rows()[1] == 3).sum())
    assert count > 0
    reply = made.ask(settings_of(kind))
    found, metrics, weight = read(reply)
    assert same(found, made.model) == (kind in IDLE)
    assert all(found[n].shape == t.shape and found[n].dtype == t.dtype for n, t in before.items())
    assert same(made.model, before)  # the message's own arrays are not written to
    if kind in SELECTS:
        assert (metrics.pop("rows"), weight) == (count, count)
        assert metrics.keys() == set(kind.told)
    else:
        assert weight == len(made.rows()[1])
    checked = Screen().check([Reply("client-0000", 1, reply)], made.model)
    assert not checked.rejected
    assert same(read(made.ask(settings_of(kind)))[0], found)  # the same seed, the same bits


def test_a_round_of_rcad_is_on_the_rows_that_remain_also_around_those_to_forget(tmp_path):
    made, mine = Federation(tmp_path), {"forget": "class", "forget_class": 3}
    left = int((made.rows()[1] != 3).sum())
    around, without, plain = (
        read(made.ask(Rcad(**mine, **more)))
        for more in ({"source": "forget"}, {}, {"strength": 0.0})
    )
    assert around[1:] == without[1:] == plain[1:] == ({}, left)
    assert not same(around[0], without[0])
    assert not same(around[0], plain[0])
    nothing = {"forget": "samples", "forget_tokens": "0" * 32, "source": "forget"}
    every, metrics, weight = read(made.ask(Rcad(**nothing)))
    assert (metrics, weight) == ({}, len(made.rows()[1]))
    assert same(every, read(made.ask(Rcad(strength=0.0)))[0])


@kinds_of_data
@pytest.mark.parametrize("kind", SELECTS)
def test_who_holds_nothing_of_it_returns_the_model_and_all_answers_agree(
    kind, data, tmp_path, monkeypatch
):
    made = Federation(tmp_path, task=data)
    computed = []

    def spy(settings, start, holding):
        computed.append(len(holding.forget[1]))
        return do(settings, start, holding)

    monkeypatch.setattr(answers, "do", spy)
    threes = (made.rows()[1] == 3).nonzero().flatten().tolist()[:2]
    tokens = made.keeping(0).issue(threes, made.task.client_data(0, CLIENTS).train)
    asked = settings_of(kind, forget="samples", forget_class=-1, forget_tokens=",".join(tokens))
    replies = [made.ask(asked, node) for node in range(CLIENTS)]
    for node, reply in enumerate(replies):
        found, metrics, weight = read(reply)
        assert metrics.pop("rows") == (0 if node else 2)
        assert metrics.keys() == set(kind.told)
        assert node == 0 or not any(metrics.values())
        assert weight == (len(made.rows(node)[1]) if node else 2)
        assert same(found, made.model) == (bool(node) or kind in IDLE)
    assert computed == [2]  # a step need not know what to do with no rows
    # One holder among others is not turned away for being alone.
    received = [Reply(f"client-{n}", n, reply) for n, reply in enumerate(replies)]
    assert not Screen().check(received, made.model, far=False).rejected


@kinds_of_data
@pytest.mark.parametrize("kind", ["fisher", "activations", "gradients", "classes"])
@pytest.mark.parametrize("forget", ["none", "all"])
def test_what_nothing_is_selected_of_or_nothing_is_left_of_has_sums_of_nothing(
    kind, forget, data, tmp_path
):
    made = Federation(tmp_path, "cnn", data)
    found, metrics, _ = read(made.ask(Statistics(forget=forget, kind=kind)))
    # The same as of tensors in memory, of which no rows have a shape and a dtype, too.
    known = Federation(tmp_path / "known", "cnn")
    theirs, counted, _ = read(known.ask(Statistics(forget=forget, kind=kind)))
    assert same(found, theirs)
    assert metrics == counted
    empty = {"none": "forget", "all": "remain"}[forget]
    for name, tensor in parted(found).get(empty, {}).items():
        assert not tensor.any(), name


@kinds_of_data
@pytest.mark.parametrize("kind", ["fisher", "activations", "gradients", "classes"])
def test_statistics_are_of_the_selected_rows_and_of_the_others(kind, data, tmp_path):
    made = Federation(tmp_path, "cnn", data)
    targets = made.rows()[1]
    found, metrics, weight = read(made.ask(settings_of(Statistics, kind=kind)))
    chosen = int((targets == 3).sum())
    assert metrics.pop("rows") == chosen
    assert weight == len(targets)
    if kind == "classes":
        assert metrics == {f"{u}-count": int((targets == u).sum()) for u in range(10)}
        assert parted(found).keys() == {str(u) for u in range(10)}
    elif kind == "gradients":
        assert metrics == {"forget-count": chosen}
        assert parted(found).keys() == {"forget"}
    else:
        assert metrics == {"forget-count": chosen, "remain-count": len(targets) - chosen}
        assert parted(found).keys() == {"forget", "remain"}


def test_squares_are_those_of_the_rows_themselves(tmp_path):
    made = Federation(tmp_path)
    inputs, targets = made.rows()
    network = made.task.build_model().eval()

    def forward(parameters, batch):
        return torch.func.functional_call(network, dict(parameters), (batch,))

    groups = parted(read(made.ask(settings_of(Statistics)))[0])
    for group, chosen in (("forget", targets == 3), ("remain", targets != 3)):
        expected = fisher_statistics(
            made.model, forward, made.task.loss, inputs[chosen], targets[chosen]
        )
        for name, tensor in expected.sums.items():
            assert torch.allclose(groups[group][name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("where", ["kept", "nothing kept"])
@pytest.mark.parametrize("forget", ["none", "all"])
def test_all_or_none_of_a_clients_rows_may_be_meant(forget, where, tmp_path):
    made = Federation(tmp_path if where == "kept" else None)
    count = len(made.rows()[1])
    asked = Statistics(forget=forget, kind="fisher")
    _, metrics, weight = read(made.ask(asked))
    held = {"forget": count if forget == "all" else 0, "remain": 0 if forget == "all" else count}
    assert metrics == {"forget-count": held["forget"], "remain-count": held["remain"],
                       "rows": held["forget"]}  # fmt: skip
    assert weight == count


def test_rows_that_are_forgotten_already_do_not_remain(tmp_path):
    made = Federation(tmp_path)
    targets = made.rows()[1]
    examples = made.task.client_data(0, CLIENTS).train
    made.keeping().forget(Selection(forget="class", forget_class=7), examples, 1)
    _, metrics, _ = read(made.ask(settings_of(Statistics)))
    gone, chosen = int((targets == 7).sum()), int((targets == 3).sum())
    assert gone > 0
    assert metrics["remain-count"] == len(targets) - gone - chosen
    assert metrics["forget-count"] == chosen
    # What is dropped first is what is to be forgotten then: it counts all the same.
    made.keeping().forget(Selection(forget="class", forget_class=3), examples, 2)
    assert read(made.ask(settings_of(Statistics)))[1]["forget-count"] == chosen


def test_what_is_drawn_depends_on_the_round_and_the_client(tmp_path):
    made = Federation(tmp_path)
    asked = Ascent(forget="all", forgotten=0.0, batch_size=4)
    found = {n: read(made.ask(asked, number=n))[0] for n in (4, 5)}
    assert not same(found[4], found[5])
    assert not same(found[4], read(made.ask(asked, node=1))[0])


def test_how_a_step_went_is_told():
    made = Federation()
    went = read(made.ask(Ascend(forget="all", radius=0.5, epochs=2, floor=0.0)))[1]
    rows = len(made.rows()[1])
    assert went["rows"] == rows
    # Two passes over all rows, 32 at a time; a floor of 0 is none.
    assert went["steps"] == 2 * -(-rows // 32)
    assert 0 < went["distance"] <= 0.5 + 1e-5
    assert (went["stopped"], went["floor_measured"]) == (0, 0)
    asked = Ascend(forget="all", radius=0.5, epochs=2, floor=1.0)
    went = read(made.ask(asked))[1]  # no model is never wrong
    assert (went["stopped"], went["floor_measured"]) == (1, 1)


# ---------------------------------------------------------------- what is refused
@kinds_of_data
@pytest.mark.parametrize("kind", [kind for kind in TRAINS if kind not in SELECTS])
def test_who_has_no_rows_left_refuses_rounds_of_every_kind(kind, data, tmp_path):
    made = Federation(tmp_path, task=data)
    made.keeping().forget(Selection(forget="all"), made.task.client_data(0, CLIENTS).train, 1)
    reply = made.ask(kind())
    assert messages.is_refusal(reply)
    assert "no row of this client remains to train on" in reply.error.reason
    assert not made.ask(kind(), node=1).has_error()


@pytest.mark.parametrize("kind", [*SELECTS, *QUERIES])
@pytest.mark.parametrize("forget", ["class", "samples"])
def test_without_a_folder_nothing_was_dropped_for_good(kind, forget):
    made = Federation(None)
    chosen = {"forget_class": 3} if forget == "class" else {
        "forget_class": -1, "forget_tokens": "0" * 32}  # fmt: skip
    reply = made.ask(settings_of(kind, forget=forget, **chosen))
    assert messages.is_refusal(reply)
    assert "give it a client-dir" in reply.error.reason


INVALID = [
    {"forget": "class", "forget-class": -1},
    {"forget": "class"},
    {"forget": "everything"},
    {"forget": "samples", "forget-tokens": "xyz"},
    {"forget": "samples"},
    {},
]


@pytest.mark.parametrize("kind", [*SELECTS, *QUERIES])
@pytest.mark.parametrize("wrong", INVALID)
def test_settings_that_cannot_be_are_an_error_and_change_nothing(kind, wrong, tmp_path):
    made = Federation(tmp_path)
    before = {name: tensor.clone() for name, tensor in made.model.items()}
    rest = {k: v for k, v in settings_of(kind).config().items() if not k.startswith("forget")}
    reply = made.ask(settings_of(kind), config=rest | wrong)
    assert reply.has_error()
    assert not messages.is_refusal(reply)
    assert not reply.has_content()
    assert not list(tmp_path.iterdir())
    assert same(made.model, before)
    assert not made.ask(settings_of(kind)).has_error()  # the client goes on


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (Ascent, {"epochs": 0}),
        (Ascent, {"learning-rate": -1.0}),
        (Ascend, {"radius": -1.0}),
        (Ascend, {"radius": float("nan")}),
        (Statistics, {"kind": "other"}),
        (Statistics, {"most-samples": 0}),
    ],
)
def test_numbers_out_of_range_are_an_error(kind, wrong, tmp_path):
    made = Federation(tmp_path)
    reply = made.ask(settings_of(kind), config=settings_of(kind).config() | wrong)
    assert reply.has_error()
    assert next(iter(wrong)) in reply.error.reason


def test_channels_of_a_network_without_any_are_an_error(tmp_path):
    reply = Federation(tmp_path, "mlp").ask(settings_of(Statistics, kind="activations"))
    assert "needs a network with convolutions" in reply.error.reason


def test_a_part_of_the_rows_has_the_rows_own_place(tmp_path):
    made = Federation(tmp_path)
    examples = made.task.client_data(0, CLIENTS).train
    inputs, targets = gather(subset(examples, [2, 4]))
    assert torch.equal(inputs, made.rows()[0][[2, 4]])
    assert torch.equal(targets, made.rows()[1][[2, 4]])
