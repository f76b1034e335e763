"""The wrapper: transparent when its hooks are off, and the rules it adds when they are on."""

import dataclasses
import itertools
import math

import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp.strategy import (
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
    FedXgbBagging,
    Krum,
)

from strategies import messages
from strategies.detectors.interface import Finding
from strategies.directory import QuorumError, by_partition, wait_for_nodes
from strategies.loop import run_rounds
from strategies.methods.fedup import FedUP
from strategies.methods.retraining import NaturalForgetting, Retrain
from strategies.rate_limit import RateLimit
from strategies.records import Phase
from strategies.recovery import Recovery
from strategies.roster import Hysteresis, Roster
from strategies.screen import Screen
from strategies.store import MemoryStore
from strategies.wrapper import Unlearning
from unlearning.catalogue import METHODS, Need
from unlearning.errors import NoLastRoundError, SecateurError
from unlearning.fedup import disagreement, fedup
from unlearning.parameters import mean, prunable_names, weighted_mean

MODEL = {"layer.weight": torch.zeros(4, 3), "layer.bias": torch.zeros(4)}


def client(number):
    return f"client-{number:04d}"


class Oracle:
    """Flags whom a test says, round by round; stands where a detector stands."""

    name = "oracle"

    def __init__(self, flags):
        self.flags = flags
        self.forgotten = []
        self.seen = []

    def inspect(self, number, updates, previous, *, seed):
        self.seen.append(sorted(updates))
        flagged = frozenset(c for c in self.flags(number) if c in updates)
        scores = {c: float(c in flagged) for c in updates}
        return Finding(scores, flagged, 0.5, "score", {"score": 1.0})

    def forget(self, clients):
        self.forgotten.append(clients)


def noisy(seed=0, attackers=()):
    """Return a reply: the model moves by noise of the client and round, attackers by more."""

    def reply(partition, number, model):
        draw = torch.Generator().manual_seed(1000 * number + partition + seed)
        factor = 3.0 if partition in attackers else 1.0
        moved = {k: v + factor * torch.randn(v.shape, generator=draw) for k, v in model.items()}
        return messages.train_reply(moved, {"loss": 1.0}, 10 + partition)

    return reply


def fedavg(**more):
    return FedAvg(fraction_evaluate=0.0, **more)


def wrapped(strategy=None, **more):
    more = {"screen": Screen(), "identify": by_partition, "seed": 3, "deadline_s": 5.0} | more
    return Unlearning(strategy or fedavg(), **more)


def play(federation, grid, rounds, model=MODEL, measure=lambda number, model: {}):
    records, models = [], []

    def on_round(record, parameters):
        records.append(record)
        models.append(parameters)

    run_rounds(federation, grid, model, rounds=rounds, measure=measure, on_round=on_round)
    return records, models


# ---------------------------------------------------------------- transparency
STRATEGIES = {
    "FedAvg": fedavg,
    "FedProx": lambda: FedProx(proximal_mu=0.3, fraction_evaluate=0.0),
    "Krum": lambda: Krum(num_malicious_nodes=1, fraction_evaluate=0.0),
    "FedMedian": lambda: FedMedian(fraction_evaluate=0.0),
    "FedAdam": lambda: FedAdam(fraction_evaluate=0.0),
    "FedAvgM": lambda: FedAvgM(server_momentum=0.5, fraction_evaluate=0.0),
}


@pytest.mark.parametrize("screen", [None, Screen(weight_cap=100.0)], ids=["off", "screened"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_with_hooks_off_it_is_the_wrapped_strategy(name, screen, scripted_grid):
    configs = {"wrapped": [], "alone": []}

    def spying(kind):
        grid = scripted_grid(noisy())
        send = grid.send_and_receive

        def spy(messages, *, timeout=None):
            outgoing = list(messages)
            configs[kind] += [
                (m.metadata.dst_node_id, dict(m.content.config_records["config"]))
                for m in outgoing
                if m.metadata.message_type == "train"
            ]
            # Flower aggregates in order of arrival; here that is the order of the clients.
            return sorted(send(outgoing, timeout=timeout), key=lambda m: m.metadata.src_node_id)

        grid.send_and_receive = spy
        return grid

    alone = STRATEGIES[name]().start(spying("alone"), messages.record_from(MODEL), num_rounds=3)
    federation = Unlearning(STRATEGIES[name](), screen=screen, identify=by_partition)
    result = federation.start(spying("wrapped"), messages.record_from(MODEL), num_rounds=3)

    one, other = (messages.parameters_from(r.arrays) for r in (alone, result))
    if screen is not None and name == "FedAdam":
        # FedAdam turns the model into float64; the screen keeps the schema, so it is rounded.
        one = {key: tensor.float() for key, tensor in one.items()}
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    else:
        assert all(torch.equal(one[key], other[key]) for key in MODEL)
    assert sorted(map(str, configs["wrapped"])) == sorted(map(str, configs["alone"]))
    assert result.train_metrics_clientapp == alone.train_metrics_clientapp


def test_our_weighted_mean_is_fedavgs_bit_for_bit(scripted_grid):
    records, models = play(wrapped(), scripted_grid(noisy()), 1)
    del records
    locals_ = [
        messages.parameters_from(noisy()(n, 1, MODEL).array_records["arrays"]) for n in range(5)
    ]
    expected = weighted_mean(locals_, [10 + n for n in range(5)])
    assert all(torch.equal(models[-1][key], expected[key]) for key in MODEL)


def test_integer_buffers_keep_their_dtype(scripted_grid, tiny_model):
    def reply(partition, number, model):
        model["norm.num_batches_tracked"] += 4
        return messages.train_reply(model, {}, 10)

    _, models = play(wrapped(), scripted_grid(reply), 2, tiny_model)
    assert models[-1]["norm.num_batches_tracked"].dtype == torch.int64
    assert int(models[-1]["norm.num_batches_tracked"]) == 8


def test_replies_in_any_order_give_the_same_model(scripted_grid):
    results = []
    for reverse in (False, True):
        grid = scripted_grid(noisy())
        pull = grid.pull_messages
        grid.pull_messages = lambda ids, pull=pull, r=reverse: sorted(
            pull(ids), key=lambda m: m.metadata.src_node_id, reverse=r
        )
        results.append(play(wrapped(), grid, 3)[1][-1])
    assert all(torch.equal(results[0][key], results[1][key]) for key in MODEL)


def test_sampling_follows_the_seed_and_leaves_the_global_generator_alone(scripted_grid):
    import random

    def asked(seed):
        federation = wrapped(fedavg(fraction_train=0.4), seed=seed)
        records, _ = play(federation, scripted_grid(noisy(), 10), 5)
        return [record.asked for record in records[1:]]

    random.seed(5)
    state = random.getstate()
    first = asked(1)
    assert random.getstate() == state
    random.seed(6)
    assert asked(1) == first
    assert asked(2) != first


# ---------------------------------------------------------------- bad clients
def test_a_round_goes_on_without_a_client_that_raises(scripted_grid):
    def reply(partition, number, model):
        if partition == 2:
            raise RuntimeError("disk on fire")
        return noisy()(partition, number, model)

    records, _ = play(wrapped(), scripted_grid(reply), 1)
    assert records[1].participants == tuple(client(n) for n in (0, 1, 3, 4))
    assert "disk on fire" in records[1].rejected[client(2)]


def test_if_everybody_is_bad_the_previous_model_is_kept_and_the_round_says_so(scripted_grid):
    def reply(partition, number, model):
        value = math.nan if number == 2 else 1.0
        return messages.train_reply({k: v + value for k, v in model.items()}, {}, 10)

    federation = wrapped()
    records, models = play(federation, scripted_grid(reply), 3)
    assert torch.equal(models[2]["layer.bias"], models[1]["layer.bias"])
    assert "previous model kept: 0 of 5 clients" in records[2].note
    assert models[3]["layer.bias"].tolist() == [2.0] * 4
    assert federation.roster.entry(client(0)).strikes == 1


def test_below_the_quorum_the_round_does_not_count(scripted_grid):
    def reply(partition, number, model):
        if partition < 3:
            raise RuntimeError
        return messages.train_reply({k: v + 1 for k, v in model.items()}, {}, 10)

    records, models = play(wrapped(quorum=0.5), scripted_grid(reply), 1)
    assert "2 of 5 clients sent a usable reply, 3 are needed" in records[1].note
    assert torch.equal(models[1]["layer.bias"], MODEL["layer.bias"])
    _, models = play(wrapped(quorum=0.4), scripted_grid(reply), 1)
    assert models[1]["layer.bias"].tolist() == [1.0] * 4


def test_too_few_clients_end_the_wait_at_the_deadline(scripted_grid):
    federation = wrapped(fedavg(min_available_nodes=9), deadline_s=0.5)
    records, _ = play(federation, scripted_grid(noisy()), 1)
    assert "still waits for clients after 0.5 s and 5 may take part" in records[1].note


def test_a_strategy_that_makes_nan_does_not_publish_it(scripted_grid):
    class Diverging(FedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            return messages.record_from(
                {k: v * math.inf for k, v in messages.parameters_from(arrays).items()}
            ), metrics

    records, models = play(wrapped(Diverging(fraction_evaluate=0.0)), scripted_grid(noisy()), 1)
    assert "Diverging made an unusable model" in records[1].note
    assert torch.equal(models[1]["layer.bias"], MODEL["layer.bias"])


def test_error_replies_made_by_the_superlink_are_attributed_to_the_client_asked(scripted_grid):
    def reply(partition, number, model):
        if partition == 4:
            raise RuntimeError("gone")
        return noisy()(partition, number, model)

    grid = scripted_grid(reply)
    pull = grid.pull_messages

    def pull_with_wrong_source(ids):
        replies = pull(ids)
        for message in replies:
            if message.has_error():
                message.metadata.__dict__["_src_node_id"] = 1
        return replies

    grid.pull_messages = pull_with_wrong_source
    records, _ = play(wrapped(), grid, 1)
    assert list(records[1].rejected) == [client(4)]
    assert "gone" in records[1].rejected[client(4)]


# ---------------------------------------------------------------- detection and quarantine
def test_a_client_is_quarantined_at_once_and_seen_no_more(scripted_grid):
    oracle = Oracle(lambda number: [client(4)] if number in (2, 3) else [])
    federation = wrapped(detector=oracle, hysteresis=Hysteresis(hits=2, window=3))
    records, models = play(federation, scripted_grid(noisy()), 5)
    assert client(4) in records[2].participants  # one flag is noise
    assert client(4) not in records[3].participants
    assert records[3].quarantined == {client(4): "flagged in 2 of its last 3 rounds"}
    assert all(client(4) not in record.asked for record in records[4:])
    # Round 3 is the average of the others alone.
    locals_ = [
        messages.parameters_from(noisy()(n, 3, models[2]).array_records["arrays"]) for n in range(4)
    ]
    expected = weighted_mean(locals_, [10, 11, 12, 13])
    assert all(torch.equal(models[3][key], expected[key]) for key in MODEL)


def test_flags_in_the_warm_up_do_not_count(scripted_grid):
    oracle = Oracle(lambda number: [client(4)])
    federation = wrapped(detector=oracle, hysteresis=Hysteresis(hits=2, window=3, warm_up=3))
    records, _ = play(federation, scripted_grid(noisy()), 5)
    assert [record.number for record in records if record.quarantined] == [5]


def test_flags_while_the_model_recovers_do_not_count(scripted_grid):
    flags = {1: [client(4)], 2: [client(3)], 3: [client(3)], 4: [client(3)]}
    federation = forgetting(lambda number: flags.get(number, []), limit=1)
    records, _ = play(federation, scripted_grid(noisy()), 4)
    # Recovery takes rounds 2 and 3, its cap; round 4 counts again.
    assert [r.number for r in records if r.quarantined] == [1, 4]
    assert [r.flags_count for r in records] == [False, True, False, False, True, False, False]


def test_a_detector_that_fails_stops_the_run(scripted_grid):
    def broken(number):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        play(wrapped(detector=Oracle(broken)), scripted_grid(noisy()), 1)


def test_trust_without_screening_is_refused():
    with pytest.raises(SecateurError, match="replies must be screened"):
        Unlearning(fedavg(), detector=Oracle(lambda number: []))
    with pytest.raises(SecateurError, match="exchanges trees"):
        Unlearning(FedXgbBagging())


# ---------------------------------------------------------------- unlearning
def forgetting(flags, *, limit=10, strategy=None, method=None, **more):
    oracle = Oracle(flags)
    return wrapped(
        strategy,
        detector=oracle,
        hysteresis=Hysteresis(hits=1, window=1),
        method=method or FedUP(rate=0.5),
        rate_limit=RateLimit(rounds=limit),
        recovery=Recovery(cap=2),
        **more,
    )


def test_one_detection_is_fedup_of_its_round(scripted_grid):
    attackers = [client(3), client(4)]
    federation = forgetting(lambda number: attackers if number == 2 else [])
    records, models = play(federation, scripted_grid(noisy()), 2)

    locals_ = {
        client(n): messages.parameters_from(noisy()(n, 2, models[1]).array_records["arrays"])
        for n in range(5)
    }
    retained = weighted_mean([locals_[client(n)] for n in range(3)], [10, 11, 12])
    average = mean([locals_[name] for name in attackers])
    dis = disagreement(average, retained, prunable_names(MODEL))
    expected, masks = fedup(dis, models[1], retained, 0.5)
    assert all(torch.equal(models[2][key], expected[key]) for key in MODEL)
    done = records[2].unlearning
    assert done.clients == tuple(attackers)
    assert done.zeroed == {"layer.weight": int(masks["layer.weight"].sum())} == {"layer.weight": 6}
    assert records[2].phase is Phase.UNLEARN
    assert done.memory_bytes == (4 * 3 + 4) * 4 * 6  # five models and the one they started from


def test_detections_that_must_wait_are_served_together(scripted_grid):
    flags = {1: [client(9)], 4: [client(8)], 5: [client(7)]}
    federation = forgetting(lambda number: flags.get(number, []), limit=6)
    records, _ = play(federation, scripted_grid(noisy(), 10), 5)
    served = [(r.number, r.unlearning.clients) for r in records if r.unlearning]
    assert served == [(1, (client(9),)), (7, (client(7), client(8)))]
    assert [r.quarantined for r in records if r.quarantined] == [
        {c: "flagged in 1 of its last 1 rounds"} for c in (client(9), client(8), client(7))
    ]
    # The loop went on past round 5 until everybody had been served and the model recovered.
    assert [str(r.phase) for r in records[6:]] == ["train", "unlearn", "recover", "recover"]


@pytest.mark.parametrize("limit", [1, 10])
def test_rate_limit_over_a_hundred_rounds(limit, scripted_grid):
    # 30 of 80 clients show themselves, one more every three rounds.
    shown = {3 * n + 1: client(n) for n in range(30)}
    federation = forgetting(
        lambda number: [name for n, name in shown.items() if n <= number], limit=limit
    )
    records, _ = play(federation, scripted_grid(noisy(), 80), 100)
    unlearnings = [r.unlearning for r in records if r.unlearning]
    assert len(unlearnings) <= math.ceil(100 / limit)
    assert limit > 1 or len(unlearnings) > 20
    served = [c for unlearning in unlearnings for c in unlearning.clients]
    assert sorted(served) == sorted(shown.values())
    gone = set()
    for record in records:
        gone |= set(record.quarantined)
        assert not gone & set(record.participants)
    assert gone == set(shown.values())
    gaps = [b.number - a.number for a, b in itertools.pairwise(unlearnings)]
    assert all(gap >= limit for gap in gaps)


def test_a_refusal_is_tried_again_once_a_round_has_enough_honest_clients(scripted_grid):
    # Rounds 1 to 3 catch three clients while only five take part; from round 5 on, all twenty do.
    flags = {1: [client(0)], 2: [client(1)], 3: [client(2)]}

    def reply(partition, number, model):
        if number < 5 and partition > 4:
            raise RuntimeError("not yet here")
        return noisy()(partition, number, model)

    federation = forgetting(lambda number: flags.get(number, []), quorum=0.1)
    federation.forgetting.last = 0
    federation.forgetting.rate_limit = RateLimit(rounds=3)
    records, _ = play(federation, scripted_grid(reply, 20), 6)
    noted = [(r.number, r.unlearning.refused is not None) for r in records if r.unlearning]
    assert noted == [(3, True), (5, False)]  # round 4 was refused for the same reason: said once
    assert records[5].unlearning.clients == tuple(client(n) for n in range(3))


def test_a_refusal_does_not_keep_the_run_going_for_ever(scripted_grid):
    flags = {1: [client(0)], 2: [client(1)], 3: [client(2)]}
    federation = forgetting(lambda number: flags.get(number, []))
    federation.forgetting.last = 0
    federation.forgetting.rate_limit = RateLimit(rounds=3)
    records, _ = play(federation, scripted_grid(noisy()), 4)
    assert [r.number for r in records] == [0, 1, 2, 3, 4]
    assert [p.clients for p in federation.forgetting.pending] == [(client(n),) for n in range(3)]


def test_an_error_of_the_plan_is_no_refusal(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 1 else [])

    class Failing(FedUP):
        def plan(self, situation):
            raise QuorumError("nobody answers")

    failing = Failing(rate=0.1)
    federation.forgetting.method = federation.forgetting.methods["fedup"] = failing
    with pytest.raises(QuorumError, match="nobody answers"):
        play(federation, scripted_grid(noisy()), 1)


def test_quarantine_does_not_wait_for_an_aggregate(scripted_grid):
    class Silent(FedAvg):
        def aggregate_train(self, server_round, replies):
            if server_round == 2:
                return None, None
            return super().aggregate_train(server_round, replies)

    federation = forgetting(
        lambda number: [client(4)] if number == 2 else [], strategy=Silent(fraction_evaluate=0.0)
    )
    records, _ = play(federation, scripted_grid(noisy()), 3)
    assert "the strategy made no model" in records[2].note
    assert list(records[2].quarantined) == [client(4)]
    assert client(4) not in records[3].asked
    assert records[3].unlearning.clients == (client(4),)


def test_a_detector_that_flags_too_many_flags_the_most_suspicious_minority(scripted_grid):
    oracle = Oracle(lambda number: [client(n) for n in range(4)])
    federation = wrapped(detector=oracle, hysteresis=Hysteresis(hits=1, window=1))
    records, _ = play(federation, scripted_grid(noisy()), 1)
    assert list(records[1].quarantined) == [client(0), client(1)]
    assert "of 4 flagged only the 2 highest count" in records[1].finding.note


def test_flags_from_before_an_unlearning_are_not_held_against_anybody_after_it(scripted_grid):
    flags = {1: [client(3), client(4)], 2: [client(4)], 5: [client(3)]}
    federation = forgetting(lambda number: flags.get(number, []), limit=1)
    federation.roster = Roster(Hysteresis(hits=2, window=3))
    records, _ = play(federation, scripted_grid(noisy()), 6)
    # client 4 is out in round 2; client 3 was flagged in rounds 1 and 5, with recovery between.
    assert {r.number: list(r.quarantined) for r in records if r.quarantined} == {2: [client(4)]}


def test_the_model_settles_for_a_few_rounds_and_no_longer(scripted_grid):
    flags = {1: [client(4)], **{number: [client(3)] for number in range(2, 12)}}
    federation = forgetting(lambda number: flags.get(number, []), limit=1)
    federation.recovery.rule = Recovery(cap=12)
    records, _ = play(federation, scripted_grid(noisy()), 10)
    assert {r.number: list(r.quarantined) for r in records if r.quarantined} == {
        1: [client(4)],
        7: [client(3)],
    }
    # Its turn to be forgotten comes when the recovery that goes on is over.
    assert [r.number for r in records if r.unlearning] == [1, 14]


def test_requests_and_detections_served_together_tell_both_causes(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 1 else [])
    federation.forgetting.last = 0
    federation.forgetting.rate_limit = RateLimit(rounds=3)
    grid = scripted_grid(noisy(), 9)
    asked = []

    def measure(number, model):
        if number == 1 and not asked:
            asked.append(number)
            federation.forget([client(1)], "privacy")
        return {}

    records, _ = play(federation, grid, 3, measure=measure)
    assert records[3].unlearning.cause == "malicious, privacy"


@pytest.mark.parametrize("rounds", [(2, 4), (4,)])
def test_evidence_frozen_in_earlier_rounds_is_what_is_served(rounds, scripted_grid):
    # dis is frozen in the round of the detection; b and w_prev are those of the round that serves.
    flags = {number: [client(9 - n)] for n, number in enumerate(rounds)}
    federation = forgetting(lambda number: flags.get(number, []))
    federation.forgetting.last = 0
    federation.forgetting.rate_limit = RateLimit(rounds=6)
    _, models = play(federation, scripted_grid(noisy(), 10), 6)

    def locals_of(number):
        replies = {n: noisy()(n, number, models[number - 1]) for n in range(10)}
        return {n: messages.parameters_from(r.array_records["arrays"]) for n, r in replies.items()}

    def average(number, gone):
        stay = [n for n in range(10) if n not in gone]
        return weighted_mean([locals_of(number)[n] for n in stay], [10 + n for n in stay])

    gone, events = set(), []
    for n, number in enumerate(rounds):
        gone.add(9 - n)
        flagged = locals_of(number)[9 - n]
        events.append(disagreement(flagged, average(number, gone), prunable_names(MODEL)))
    merged = {
        name: torch.stack([event[name] for event in events]).amax(dim=0)
        for name in prunable_names(MODEL)
    }
    expected, _ = fedup(merged, models[5], average(6, gone), 0.5)
    assert all(torch.equal(models[6][key], expected[key]) for key in MODEL)


def test_the_adaptive_rate_looks_at_the_last_layer_of_the_retained_clients(scripted_grid):
    model = {
        "first.weight": torch.zeros(3, 3),
        "last.weight": torch.zeros(2, 3),
        "last.bias": torch.zeros(2),
    }
    draw = torch.Generator().manual_seed(0)
    heads = [torch.rand(8, generator=draw) for _ in range(4)] + [-torch.ones(8)]

    def reply(partition, number, model):
        del number
        moved = dict(model)
        moved["first.weight"] = torch.randn(3, 3, generator=draw)
        moved["last.weight"] = heads[partition][:6].reshape(2, 3)
        moved["last.bias"] = heads[partition][6:]
        return messages.train_reply(moved, {}, 10)

    federation = forgetting(
        lambda number: [client(4)] if number == 1 else [], method=FedUP(rate="adaptive")
    )
    records, _ = play(federation, scripted_grid(reply), 1, model)
    cosines = [
        float(torch.nn.functional.cosine_similarity(heads[i], heads[j], dim=0))
        for i in range(4)
        for j in range(i)
    ]
    sim = sum(cosines) / 6
    settings = records[1].unlearning.settings
    assert settings["similarity"] == pytest.approx(sim, abs=1e-5)
    assert settings["rate"] == pytest.approx(0.14 * ((sim - 0.5) / 0.5) ** 5 + 0.01, abs=1e-5)


def test_without_an_honest_majority_nothing_is_pruned_and_quarantine_stays(scripted_grid):
    flags = {1: [client(0)], 2: [client(1)], 3: [client(2)]}
    federation = forgetting(lambda number: flags.get(number, []), limit=1)
    federation.forgetting.last = 0
    federation.forgetting.rate_limit = RateLimit(rounds=3)
    records, models = play(federation, scripted_grid(noisy()), 3)
    refused = records[3].unlearning.refused
    assert "3 of 5 participants are to be forgotten, but at most 2" in refused
    assert federation.roster.statuses()[client(0)] == "quarantined"
    assert bool((models[3]["layer.weight"] != 0).all())


def test_a_request_without_its_last_round_is_refused_before_anything_changes(scripted_grid):
    def reply(partition, number, model):
        if partition == 1:
            raise RuntimeError("offline")
        return noisy()(partition, number, model)

    federation = forgetting(lambda number: [])
    play(federation, scripted_grid(reply), 1)
    with pytest.raises(NoLastRoundError, match="last round of client-0001"):
        federation.forget([client(1)], "privacy")
    with pytest.raises(SecateurError, match="no client is called typo"):
        federation.forget(["typo"], "privacy")
    assert not federation.busy
    assert federation.roster.may_take_part(client(1))


def test_a_request_is_served_like_a_detection(scripted_grid):
    federation = forgetting(lambda number: [])
    grid = scripted_grid(noisy())
    play(federation, grid, 1)
    federation.forget([client(1)], "privacy")
    records, _ = play(federation, grid, 1)
    assert records[1].unlearning.clients == (client(1),)
    assert records[1].unlearning.cause == "privacy"
    assert client(1) not in records[1].asked


def test_nobody_is_forgotten_twice_or_without_a_method(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 1 else [])
    play(federation, scripted_grid(noisy()), 1)
    with pytest.raises(SecateurError, match="client-0004 takes no part any more: it waits"):
        federation.forget([client(4)], "privacy")
    bare = wrapped()
    play(bare, scripted_grid(noisy()), 1)
    with pytest.raises(SecateurError, match="no method is set"):
        bare.forget([client(1)], "privacy")


def test_forgetting_that_can_never_finish_is_given_up(scripted_grid):
    def reply(partition, number, model):
        if number > 2:
            raise RuntimeError("everybody left")
        return noisy()(partition, number, model)

    federation = forgetting(lambda number: [client(4)] if number == 1 else [])
    federation.recovery.rule = Recovery(cap=50)
    with pytest.raises(QuorumError, match="the last 20 rounds made no model"):
        play(federation, scripted_grid(reply), 2)


def test_strategy_detector_and_memory_forget_too(scripted_grid):
    federation = forgetting(
        lambda number: [client(4)] if number == 3 else [],
        strategy=FedAvgM(server_momentum=0.9, fraction_evaluate=0.0),
    )
    held = {}

    def on_round(record, model):
        last = federation.memory.last
        held[record.number] = (
            federation.strategy.momentum_vector is not None,
            last is not None and client(4) in last.locals_,
        )

    run_rounds(federation, scripted_grid(noisy()), MODEL, rounds=3, on_round=on_round)
    assert held[2] == (True, True)
    assert held[3] == (False, False)  # momentum holds the forgotten client's influence, too
    assert federation.detector.forgotten == [frozenset({client(4)})]
    assert federation.roster.statuses()[client(4)] == "banned"


def test_memory_holds_only_what_the_method_needs(scripted_grid):
    for method, held in ((NaturalForgetting(), 0), (Retrain(), 64), (FedUP(rate=0.1), 6 * 64)):
        federation = forgetting(lambda number: [], method=method)
        play(federation, scripted_grid(noisy()), 2)
        assert federation.memory.bytes_held() == held  # (4 * 3 + 4) floats a model
        assert (federation.memory.last is not None) == (Need.LAST in METHODS[method.name].needs)


def test_a_likely_false_positive_is_warned_of(scripted_grid):
    def crowd(partition, number, model):
        value = [1.0, 2.0, 3.0, 4.0, 2.5][partition]
        return messages.train_reply({k: v + value for k, v in model.items()}, {}, 10)

    model = {k: v + 1 for k, v in MODEL.items()}
    federation = forgetting(lambda number: [client(4)] if number == 1 else [])
    records, _ = play(federation, scripted_grid(crowd), 1, model)
    assert any("likely_false_positive: client-0004" in w for w in records[1].unlearning.warnings)


# ---------------------------------------------------------------- recovery
def accuracies(curve):
    return lambda number, model: {"validation_accuracy": curve.get(number)}


def test_recovery_ends_when_validation_accuracy_is_back(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 4 else [])
    federation.recovery.rule = Recovery(tolerance=0.02, cap=9)
    curve = {1: 0.5, 2: 0.88, 3: 0.9, 4: 0.3, 5: 0.8, 6: 0.87999, 7: 0.88, 8: 0.9}
    records, _ = play(federation, scripted_grid(noisy()), 4, measure=accuracies(curve))
    done = records[4].unlearning
    assert (done.recovery_rounds, done.recovery_ended_by) == (3, "recovered")
    # R* = 2 (first round at .88 or better), rate .5: the bound is 1, and 3 is over it.
    assert done.recovery_bound == 1
    assert any("more than FedUP's bound of 1" in warning for warning in done.warnings)


def test_recovery_ends_at_its_cap(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 2 else [])
    curve = {1: 0.9, **dict.fromkeys(range(2, 9), 0.1)}
    records, _ = play(federation, scripted_grid(noisy()), 2, measure=accuracies(curve))
    assert records[2].unlearning.recovery_ended_by == "cap"
    assert records[2].unlearning.recovery_rounds == 2
    assert len(records) == 5


def test_without_server_data_the_clients_own_accuracy_counts(scripted_grid):
    federation = forgetting(
        lambda number: [client(4)] if number == 2 else [],
        strategy=FedAvg(fraction_evaluate=1.0),
    )
    grid = scripted_grid(noisy(), 5, dict.fromkeys(range(5), 0.75))
    records, _ = play(federation, grid, 2)
    assert records[1].measures == {"validation_accuracy": pytest.approx(0.75)}
    assert records[2].unlearning.recovery_ended_by == "recovered"
    assert records[2].unlearning.recovery_rounds == 1


# ---------------------------------------------------------------- plans that ask clients
@pytest.mark.parametrize("name", STRATEGIES)
def test_retraining_without_anybody_missing_is_the_original_run_bit_for_bit(name, scripted_grid):
    from unlearning.plan import carry_out
    from unlearning.retraining import retrain

    federation = wrapped(STRATEGIES[name]())
    grid = scripted_grid(noisy())
    _, models = play(federation, grid, 4)
    rounds = federation.plan_rounds(grid, ConfigRecord())
    clients = tuple(client(n) for n in range(5))
    again = carry_out(retrain(MODEL, clients, 4, aggregate=rounds.aggregate), rounds.ask)
    assert all(torch.equal(again[key], models[-1][key]) for key in MODEL)


def test_retrain_as_a_method_forgets_exactly(scripted_grid):
    federation = forgetting(lambda number: [client(4)] if number == 3 else [], method=Retrain())
    _, models = play(federation, scripted_grid(noisy()), 3)

    def without(partition, number, model):
        if partition == 4:
            raise RuntimeError("never took part")
        return noisy()(partition, number, model)

    _, expected = play(wrapped(), scripted_grid(without), 3)
    assert all(torch.equal(models[-1][key], expected[-1][key]) for key in MODEL)


def test_retraining_under_sampling_asks_all_who_stay_and_not_only_the_last_round(scripted_grid):
    asked = set()

    def reply(partition, number, model):
        asked.add((number, partition))
        return noisy()(partition, number, model)

    federation = forgetting(
        lambda number: [client(9)] if number == 3 else [],
        method=Retrain(),
        strategy=fedavg(fraction_train=0.5),
    )
    federation.seed = 1
    federation.detector = Oracle(lambda number: [])
    grid = scripted_grid(reply, 10)
    play(federation, grid, 3)
    last = set(federation.record.participants)
    asked.clear()
    federation.forget(sorted(last)[:1], "privacy")
    play(federation, grid, 1)
    again = {client(partition) for _, partition in asked}
    assert again - last  # clients that sat the last round out take part in the retraining


def test_retraining_leaves_out_no_honest_client_for_one_bad_reply(scripted_grid):
    seen = []

    def reply(partition, number, model):
        seen.append((partition, number))
        if partition == 0 and number == 3 and (0, 3) not in seen[:-1]:
            return messages.train_reply({k: v * math.nan for k, v in model.items()}, {}, 10)
        return noisy()(partition, number, model)

    federation = forgetting(lambda number: [client(4)] if number == 3 else [], method=Retrain())
    records, _ = play(federation, scripted_grid(reply), 3)
    assert client(0) in records[3].rejected
    assert seen.count((0, 1)) == 2  # once in training, once in the retraining
    assert seen.count((4, 1)) == 1


def test_a_baseline_round_below_the_quorum_keeps_its_model_and_names_the_reason(scripted_grid):
    from unlearning.plan import carry_out
    from unlearning.retraining import retrain

    def reply(partition, number, model):
        if partition < 3:
            raise RuntimeError("gone")
        return noisy()(partition, number, model)

    federation = wrapped(quorum=0.5)
    grid = scripted_grid(reply)
    rounds = federation.plan_rounds(grid, ConfigRecord())
    clients = tuple(client(n) for n in range(5))
    federation.directory.refresh(grid)
    model = carry_out(retrain(MODEL, clients, 1, aggregate=rounds.aggregate), rounds.ask)
    assert torch.equal(model["layer.bias"], MODEL["layer.bias"])
    assert list(rounds.rejected) == list(clients[:3])


def test_one_client_cannot_decide_when_recovery_is_over(scripted_grid):
    federation = forgetting(
        lambda number: [client(4)] if number == 2 else [],
        strategy=FedAvg(fraction_evaluate=1.0),
    )
    grid = scripted_grid(noisy(), 5, {0: 0.7, 1: 0.7, 2: 0.7, 3: 1e6, 4: 0.7})
    records, _ = play(federation, grid, 2)
    assert records[1].measures["validation_accuracy"] == 0.7
    assert federation.roster.entry(client(3)).strikes == len(records) - 1
    grid = scripted_grid(noisy(), 5, {0: 0.7, 1: 0.7, 2: 0.7, 3: 1.0, 4: 0.0})
    records, _ = play(
        forgetting(lambda number: [], strategy=FedAvg(fraction_evaluate=1.0)), grid, 1
    )
    assert records[1].measures["validation_accuracy"] == 0.7  # the median


def test_start_keeps_the_deadline_and_bears_lists_of_metrics(scripted_grid):
    from flwr.app import MetricRecord

    federation = wrapped(deadline_s=7.0)
    result = federation.start(
        scripted_grid(noisy()),
        messages.record_from(MODEL),
        num_rounds=1,
        evaluate_fn=lambda number, arrays: MetricRecord({"per_class": [0.1, 0.2], "accuracy": 0.5}),
    )
    assert federation.deadline_s == 7.0
    assert federation.record.measures == {"accuracy": 0.5}
    assert set(result.evaluate_metrics_serverapp) == {0, 1}


def test_other_actions_reach_the_clients_named(scripted_grid):
    from unlearning.plan import Ask

    federation = wrapped()
    grid = scripted_grid(noisy(), 5, {1: 0.25, 3: 0.75})
    rounds = federation.plan_rounds(grid, ConfigRecord())
    ask = Ask("evaluate", to=(client(1), client(3)), arrays=MODEL, config={"round": 1})
    answers = rounds.ask(ask)
    assert {a.client: a.metrics["accuracy"] for a in answers} == {client(1): 0.25, client(3): 0.75}


# ---------------------------------------------------------------- store
def test_every_round_is_committed_before_the_next_begins(scripted_grid):
    events = []

    @dataclasses.dataclass
    class Recording(MemoryStore):
        def commit(self, record, model, roster):
            events.append(("commit", record.number))
            super().commit(record, model, roster)

    def reply(partition, number, model):
        if partition == 0:
            events.append(("train", number))
        return noisy()(partition, number, model)

    store = Recording()
    play(wrapped(store=store), scripted_grid(reply), 3)
    assert events == [(kind, n) for n in (1, 2, 3) for kind in ("train", "commit")]
    assert [record.number for record in store.rounds] == [1, 2, 3]


def test_replies_are_not_written_to(scripted_grid):
    sent = {}

    def reply(partition, number, model):
        content = noisy()(partition, number, model)
        sent[partition] = content
        return content

    grid = scripted_grid(reply)
    play(wrapped(screen=Screen(weight_cap=1.0)), grid, 1)
    for partition, content in sent.items():
        assert isinstance(content, RecordDict)
        assert content.metric_records["metrics"]["num-examples"] == 10 + partition
        assert set(content.array_records["arrays"]) == set(MODEL)


def test_a_run_waits_for_all_its_clients_and_not_for_ever(scripted_grid):
    grid = scripted_grid(noisy(), 3)
    now = iter(range(100))
    wait_for_nodes(grid, 3, patience_s=5)
    with pytest.raises(QuorumError, match="only 3 of 4 clients connected within 5 s"):
        wait_for_nodes(grid, 4, patience_s=5, clock=lambda: next(now), pause=lambda _: None)
