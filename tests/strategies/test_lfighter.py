"""LFighter against its publication (Neural Networks 170, 2024) and the guard that we add."""

import math

import pytest
import torch

from strategies.detectors.geometry import cosines_of
from strategies.detectors.lfighter import (
    LFighterDetector,
    busiest_classes,
    dissimilarity,
    output_layer,
)
from unlearning.errors import ParametersError

CLASSES, WIDTH = 4, 30


def names(count):
    return [f"client-{index:02d}" for index in range(count)]


def model(classes=CLASSES, *, bias=True):
    tensors = {
        "conv.weight": torch.zeros(2, 3, 3, 3),
        "hidden.weight": torch.zeros(WIDTH, 5),
        "fc.weight": torch.zeros(classes, WIDTH),
        "fc.bias": torch.zeros(classes),
        "bn.weight": torch.zeros(2),
    }
    return tensors if bias else {n: t for n, t in tensors.items() if n != "fc.bias"}


def honest(count, *, seed=0, start=None):
    """Random updates everywhere, the same small scale in every class."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: {
            tensor: torch.randn(t.shape, generator=random)
            for tensor, t in (start or model()).items()
        }
        for name in names(count)
    }


def flip(updates, flippers, *, classes=(1, 3), strength=4.0, seed=99):
    """Make clients push two output rows in one common direction, up and down."""
    random = torch.Generator().manual_seed(seed)
    push = strength * torch.randn(WIDTH, generator=random)
    for client in flippers:
        updates[client]["fc.weight"][classes[0]] += push
        updates[client]["fc.weight"][classes[1]] -= push
    return updates


def inspect(updates, detector=None, *, seed=0, start=None):
    detector = detector or LFighterDetector()
    return detector.inspect(1, updates, start or model(), seed=seed)


# ---------------------------------------------------------------- the parts, by hand


def test_the_output_layer_is_the_last_matrix_called_weight():
    assert output_layer(model()) == "fc.weight"
    assert output_layer({"weight": torch.zeros(2, 2), "conv.weight": torch.zeros(1, 1, 3, 3)}) == (
        "weight"
    )
    assert output_layer({"a.bias": torch.zeros(2), "b.kernel": torch.zeros(2, 2)}) is None


def test_the_busiest_classes_have_the_largest_row_norms_summed_over_clients():
    # Row norms of the first client: 5, 0, 1; of the second: 0, 4, 2. Sums: 5, 4, 3.
    weights = torch.tensor([[[3.0, 4], [0, 0], [1, 0]], [[0, 0], [0, -4], [-2, 0]]])

    assert busiest_classes(weights, None) == (0, 1)


def test_rows_that_cancel_between_clients_still_count():
    weights = torch.tensor([[[9.0], [1], [2]], [[-9.0], [1], [2]]])

    assert busiest_classes(weights, None) == (0, 2)  # 18, 2, 4


def test_biases_count_for_the_choice_of_classes_by_their_size():
    weights = torch.tensor([[[5.0], [4], [3]]])
    biases = torch.tensor([[0.0, -0.5, -2]])  # 5, 4.5, 5

    assert busiest_classes(weights, biases) == (0, 2)


def test_of_equally_busy_classes_the_first_are_chosen():
    assert busiest_classes(torch.ones(2, 4, 3), None) == (0, 1)


def test_dissimilarity_by_hand():
    # Members e1, e1, (e1 + e2) / sqrt 2 of five rows. Their least cosines to another member are
    # r, r, r with r = 1 / sqrt 2, so d = 3/5 (1 - r). Of e2 and -e2 both are -1: d = 2/5 * 2.
    r = math.sqrt(0.5)
    cosines = cosines_of(torch.tensor([[1.0, 0], [2, 0], [r, r], [0, 3], [0, -1]]))
    members = torch.tensor([True, True, True, False, False])

    assert dissimilarity(cosines, members) == pytest.approx(0.6 * (1 - r))
    assert dissimilarity(cosines, ~members) == pytest.approx(0.8)


def test_dissimilarity_takes_the_least_cosine_of_each_member():
    # e1, e2 and between them: least cosines 0, 0, r; the mean of minima is r / 3.
    r = math.sqrt(0.5)
    cosines = cosines_of(torch.tensor([[1.0, 0], [r, r], [0, 1]]))

    found = dissimilarity(cosines, torch.tensor([True, True, True]))

    assert found == pytest.approx(1 - r / 3)


def test_a_lone_member_has_its_share_as_dissimilarity():
    assert dissimilarity(torch.eye(4), torch.tensor([False, True, False, False])) == 0.25


# ---------------------------------------------------------------- who is flagged


@pytest.mark.parametrize("flippers", [2, 3, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_flippers_are_flagged_exactly(flippers, bias):
    start = model(bias=bias)
    for seed in range(3):
        bad = names(10)[2 : 2 + flippers]
        finding = inspect(flip(honest(10, seed=seed, start=start), bad), seed=seed, start=start)

        assert finding.flagged == set(bad)
        assert (finding.evidence["first_class"], finding.evidence["second_class"]) == (1, 3)
        assert finding.evidence["dissimilarity_suspects"] < finding.evidence["dissimilarity_rest"]
        assert finding.evidence["cohesion_gap"] >= 0.3
        assert finding.decided_by == "cohesion_gap"
        assert min(finding.scores[c] for c in bad) > max(
            score for client, score in finding.scores.items() if client not in bad
        )


@pytest.mark.parametrize("seed", range(10))
def test_an_attack_free_round_loses_nobody(seed):
    # The published rule drops one of the two clusters in every one of these rounds.
    finding = inspect(honest(10, seed=seed), seed=seed)

    assert not finding.flagged
    assert finding.note


def test_a_dense_majority_is_not_flagged():
    # Seven alike against three scattered: the seven are the denser cluster.
    updates = flip(honest(10), names(10)[:7], strength=30.0)

    finding = inspect(updates)

    assert not finding.flagged
    assert finding.note == "the suspected group has 7 of 10 clients; a cohort has 2 to 4"


def test_a_cluster_that_only_two_rows_show_does_not_pass_the_cohesion_test():
    # The two rows agree, but the rest of the update is a hundred times longer and random.
    updates = flip(honest(10), names(10)[:3], strength=10.0)
    for update in updates.values():
        update["hidden.weight"] *= 100

    finding = inspect(updates)

    assert not finding.flagged
    assert "cohesion gap" in finding.note
    assert finding.evidence["dissimilarity_suspects"] < finding.evidence["dissimilarity_rest"]


def test_biases_choose_classes_but_are_no_features():
    updates = flip(honest(10), names(10)[:3])
    plain = inspect(updates)
    for index, update in enumerate(updates.values()):
        update["fc.bias"][1] = 50.0 * (-1) ** index
        update["fc.bias"][3] = 50.0 * (-1) ** index

    biased = inspect(updates)

    for number in ("first_class", "second_class", "dissimilarity_suspects", "dissimilarity_rest"):
        assert biased.evidence[number] == plain.evidence[number]
    assert biased.scores == plain.scores


def test_the_layer_can_be_named():
    updates = flip(honest(10), names(10)[:3])
    for update in updates.values():
        update["hidden.weight"][[20, 25]] *= 50

    for layer, classes in (("hidden.weight", (20, 25)), ("fc.weight", (1, 3))):
        evidence = inspect(updates, LFighterDetector(layer)).evidence
        assert (evidence["first_class"], evidence["second_class"]) == classes
    assert inspect(updates, LFighterDetector("fc.weight")) == inspect(updates)


@pytest.mark.parametrize("layer", ["fc", "fc.bias", "conv.weight"])
def test_a_layer_that_is_no_matrix_of_the_model_is_an_error(layer):
    with pytest.raises(ParametersError, match=f"got {layer}; its matrices are: hidden.weight, fc"):
        inspect(honest(5), LFighterDetector(layer))


def test_one_output_cannot_be_judged():
    start = model(classes=1)

    finding = inspect(honest(6, start=start), start=start)

    assert finding.note == "two classes are compared, and fc.weight has 1 output"
    assert not finding.flagged


def test_two_outputs_are_the_two_classes():
    start = model(classes=2)
    updates = flip(honest(10, start=start), names(10)[:3], classes=(0, 1))

    assert inspect(updates, start=start).flagged == set(names(10)[:3])


def test_a_model_without_matrices_cannot_be_judged():
    start = {"conv.weight": torch.zeros(2, 3, 3, 3)}

    finding = inspect(honest(6, start=start), start=start)

    assert finding.note == "the model has no output layer: no matrix is named weight"


def test_equal_output_rows_lose_nobody():
    updates = honest(8)
    for update in updates.values():
        update["fc.weight"] = torch.ones(CLASSES, WIDTH)
        update["fc.bias"] = torch.zeros(CLASSES)

    finding = inspect(updates)

    assert finding.note == "nobody stands out: the rows of classes 0 and 1 are alike"
    assert set(finding.scores.values()) == {0.0}


def test_too_few_clients_cannot_be_judged():
    assert inspect(honest(4)).note.endswith("among 5 or more updates, got 4")


@pytest.mark.parametrize("cohesion", [0, -1, 2.5, math.nan])
def test_the_cohesion_threshold_must_be_reachable_and_positive(cohesion):
    with pytest.raises(ValueError, match="over 0 and at most 2"):
        LFighterDetector(cohesion=cohesion)
