"""FedUP against its definition: arXiv:2508.13853, Algorithm 1 and eq. 3-6."""

import itertools
import weakref
from collections.abc import Mapping
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import fedup
from unlearning.errors import BenignMajorityError, ParametersError
from unlearning.parameters import mean, top_count, weighted_mean

# dis = (m - b)^2 = (0, 1, .01, 4, .04); score = dis |w_prev| = (0, 1.5, .04, .4, .2)
M = torch.tensor([[1, -2, 0.5, 3, 0]])
B = torch.tensor([[1, -1, 0.4, 1, 0.2]])
PREVIOUS = torch.tensor([[2, -1.5, -4, 0.1, 5]])
NAMES = ("w.weight",)


def named(tensor):
    return {"w.weight": tensor}


def random_round(seed, participants=5, shape=(4, 3)):
    """Return locals, previous model and retained average of a round; clients 0 and 1 flagged."""
    draw = torch.Generator().manual_seed(seed)

    def model():
        return {
            "conv.weight": torch.randn(2, 1, *shape, generator=draw),
            "conv.bias": torch.randn(2, generator=draw),
            "head.weight": torch.randn(*shape, generator=draw),
            "norm.running_mean": torch.randn(3, generator=draw),
        }

    locals_ = {f"c{n}": model() for n in range(participants)}
    others = range(2, participants)
    retained = weighted_mean([locals_[f"c{n}"] for n in others], [n - 1 for n in others])
    return locals_, model(), retained


NAMES_OF_ROUND = ("conv.weight", "head.weight")


def forget(locals_, previous, flagged, rate, *, retained, names=NAMES_OF_ROUND):
    """Forget the flagged clients of one round, as the definition composes it."""
    if not flagged:
        return fedup.fedup({}, previous, retained, rate)
    average = mean([locals_[client] for client in sorted(flagged)])
    return fedup.fedup(fedup.disagreement(average, retained, names), previous, retained, rate)


@pytest.mark.parametrize(
    ("rate", "zeroed"), [(0.0, []), (0.2, [1]), (0.4, [1, 3]), (0.5, [1, 3, 4]), (1, [1, 2, 3, 4])]
)
def test_scores_and_ranks_by_hand(rate, zeroed):
    dis = fedup.disagreement(named(M), named(B), NAMES)
    torch.testing.assert_close(dis["w.weight"], torch.tensor([[0, 1, 0.01, 4, 0.04]]))
    mask = fedup.conflict_mask(dis, named(PREVIOUS), rate)["w.weight"]
    # At rate 1 entry 0 stays: the groups agree on it, which is no evidence of conflict.
    assert torch.nonzero(mask.reshape(-1)).reshape(-1).tolist() == zeroed


@settings(deadline=None)
@given(seed=st.integers(0, 50), rate=st.floats(0, 1))
def test_each_tensor_loses_exactly_its_share(seed, rate):
    locals_, previous, retained = random_round(seed)
    pruned, masks = forget(
        locals_, previous, {"c0", "c1"}, rate, retained=retained, names=NAMES_OF_ROUND
    )
    dis = fedup.disagreement(mean([locals_["c0"], locals_["c1"]]), retained, NAMES_OF_ROUND)
    for name in NAMES_OF_ROUND:
        nonzero = int((dis[name] * previous[name].abs() > 0).sum())
        assert int(masks[name].sum()) == min(top_count(previous[name].numel(), rate), nonzero)
        assert bool((pruned[name][masks[name]] == 0).all())
        assert torch.equal(pruned[name][~masks[name]], retained[name][~masks[name]])


def test_biases_and_buffers_are_the_retained_average():
    locals_, previous, retained = random_round(1)
    pruned, _ = forget(locals_, previous, {"c0"}, 1.0, retained=retained, names=NAMES_OF_ROUND)
    assert torch.equal(pruned["conv.bias"], retained["conv.bias"])
    assert torch.equal(pruned["norm.running_mean"], retained["norm.running_mean"])


def test_rate_zero_is_the_retained_average_bit_for_bit():
    locals_, previous, retained = random_round(2)
    pruned, masks = forget(locals_, previous, {"c0"}, 0.0, retained=retained, names=NAMES_OF_ROUND)
    assert all(torch.equal(pruned[name], retained[name]) for name in retained)
    assert not any(bool(mask.any()) for mask in masks.values())


def test_groups_that_agree_lose_nothing():
    dis = fedup.disagreement(named(B), named(B), NAMES)
    mask = fedup.conflict_mask(dis, named(PREVIOUS), 1.0)["w.weight"]
    assert not bool(mask.any())


def test_nobody_flagged_gives_the_average_and_an_empty_mask():
    locals_, previous, retained = random_round(3)
    pruned, masks = forget(locals_, previous, set(), 0.5, retained=retained, names=NAMES_OF_ROUND)
    assert all(torch.equal(pruned[name], retained[name]) for name in retained)
    assert not any(bool(mask.any()) for mask in masks.values())


@settings(deadline=None)
@given(seed=st.integers(0, 30))
def test_swapping_the_groups_leaves_the_mask(seed):
    locals_, previous, _ = random_round(seed)
    a, b = locals_["c0"], locals_["c1"]
    one = fedup.conflict_mask(fedup.disagreement(a, b, NAMES_OF_ROUND), previous, 0.3)
    other = fedup.conflict_mask(fedup.disagreement(b, a, NAMES_OF_ROUND), previous, 0.3)
    assert all(torch.equal(one[name], other[name]) for name in NAMES_OF_ROUND)


@pytest.mark.parametrize("factor", [0.25, 8.0, -1.0])
def test_scaling_or_negating_every_model_leaves_the_mask(factor):
    # The score scales by |c|^3; a power of two scales floats exactly. A signed score would choose
    # other weights when every model is negated.
    locals_, previous, retained = random_round(4)

    def scaled(model):
        return {name: tensor * factor for name, tensor in model.items()}

    flagged = mean([locals_["c0"], locals_["c1"]])
    one = fedup.conflict_mask(fedup.disagreement(flagged, retained, NAMES_OF_ROUND), previous, 0.3)
    other = fedup.conflict_mask(
        fedup.disagreement(scaled(flagged), scaled(retained), NAMES_OF_ROUND), scaled(previous), 0.3
    )
    assert all(torch.equal(one[name], other[name]) for name in NAMES_OF_ROUND)


def test_order_of_clients_and_flags_does_not_matter():
    locals_, previous, retained = random_round(5)
    results = [
        forget(
            {client: locals_[client] for client in order},
            previous,
            flags,
            0.2,
            retained=retained,
            names=NAMES_OF_ROUND,
        )[0]
        for order in (sorted(locals_), sorted(locals_, reverse=True))
        for flags in (["c0", "c1"], ["c1", "c0"])
    ]
    for one, other in itertools.pairwise(results):
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("participants", "most"), [(5, 2), (10, 4), (20, 9)])
def test_an_honest_majority_must_remain(participants, most):
    fedup.check_majority(most, participants)
    with pytest.raises(BenignMajorityError, match=f"at most {most}"):
        fedup.check_majority(most + 1, participants)


@pytest.mark.parametrize("which", ["previous", "retained"])
def test_models_that_are_not_finite_are_refused_and_not_published(which):
    _, previous, retained = random_round(6)
    models = {"previous": previous, "retained": retained}
    models[which] = models[which] | {"conv.bias": torch.tensor([float("nan"), 0.0])}
    with pytest.raises(ParametersError, match=r"conv\.bias holds values that are not finite"):
        fedup.fedup({}, models["previous"], models["retained"], 0.1)


def test_inputs_are_left_untouched():
    locals_, previous, retained = random_round(7)
    copies = [
        {name: tensor.clone() for name, tensor in model.items()}
        for model in (*locals_.values(), previous, retained)
    ]
    forget(locals_, previous, {"c0"}, 0.5, retained=retained, names=NAMES_OF_ROUND)
    for model, copy in zip((*locals_.values(), previous, retained), copies, strict=True):
        assert all(torch.equal(model[name], copy[name]) for name in model)


def test_events_of_several_rounds_count_by_their_largest_disagreement():
    one, two = named(torch.tensor([[1.0, 0.0]])), named(torch.tensor([[0.5, 2.0]]))
    assert fedup.largest_disagreement([one, two])["w.weight"].tolist() == [[1.0, 2.0]]
    assert torch.equal(fedup.largest_disagreement([one])["w.weight"], one["w.weight"])


# ---------------------------------------------------------------- ablations
ALL_SCORES = get_args(fedup.Score)


def variant(score, dis, previous, rate, flagged, seed=0):
    return fedup.conflict_mask(
        dis,
        previous,
        rate,
        score=score,
        flagged=flagged,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize(
    ("score", "rate", "zeroed"),
    [
        # dis w_prev = (0, -1.5, -.04, .4, .2): 3, 4, 0, 2, 1
        ("signed", 0.2, [3]),
        ("signed", 0.4, [3, 4]),
        ("signed", 0.5, [0, 3, 4]),
        # dis = (0, 1, .01, 4, .04): 3, 1, 4, 2, 0
        ("diff", 0.2, [3]),
        ("diff", 0.4, [1, 3]),
        ("diff", 0.5, [1, 3, 4]),
        # |m| = (1, 2, .5, 3, 0): 3, 1, 0, 2, 4
        ("malmag", 0.2, [3]),
        ("malmag", 0.4, [1, 3]),
        ("malmag", 0.5, [0, 1, 3]),
        ("natural", 0.5, []),
        # Only four scores of the default differ from 0, so four it is for all.
        ("signed", 1.0, [0, 2, 3, 4]),
        ("diff", 1.0, [1, 2, 3, 4]),
        ("malmag", 1.0, [0, 1, 2, 3]),
        ("natural", 1.0, []),
    ],
)
def test_each_ablation_ranks_by_its_own_score(score, rate, zeroed):
    dis = fedup.disagreement(named(M), named(B), NAMES)
    mask = variant(score, dis, named(PREVIOUS), rate, named(M))["w.weight"]
    assert torch.nonzero(mask.reshape(-1)).reshape(-1).tolist() == zeroed


@settings(deadline=None)
@given(seed=st.integers(0, 50), rate=st.floats(0, 1), agreeing=st.integers(0, 12))
def test_ablations_zero_as_many_weights_as_the_default_and_natural_none(seed, rate, agreeing):
    locals_, previous, retained = random_round(seed)
    flagged = dict(locals_["c0"])
    flagged["head.weight"] = flagged["head.weight"].clone()
    flagged["head.weight"].view(-1)[:agreeing] = retained["head.weight"].view(-1)[:agreeing]
    dis = fedup.disagreement(flagged, retained, NAMES_OF_ROUND)
    wanted = fedup.conflict_mask(dis, previous, rate)
    assert int(wanted["head.weight"].sum()) == min(top_count(12, rate), 12 - agreeing)
    for score in ALL_SCORES:
        masks = variant(score, dis, previous, rate, flagged, seed)
        for name, mask in masks.items():
            assert mask.shape == previous[name].shape
            count = 0 if score == "natural" else int(wanted[name].sum())
            assert int(mask.sum()) == count


@pytest.mark.parametrize("score", ALL_SCORES)
def test_where_the_groups_agree_no_ablation_zeroes_anything(score):
    dis = fedup.disagreement(named(B), named(B), NAMES)
    assert not bool(variant(score, dis, named(PREVIOUS), 1.0, named(B))["w.weight"].any())


def test_a_signed_score_depends_on_the_sign_of_the_whole_model():
    # Which is why it is no default: a network and its negation hold the same conflict.
    dis = fedup.disagreement(named(M), named(B), NAMES)
    one = variant("signed", dis, named(PREVIOUS), 0.4, None)["w.weight"]
    other = variant("signed", dis, named(-PREVIOUS), 0.4, None)["w.weight"]
    assert one.tolist() == [[False, False, False, True, True]]
    assert other.tolist() == [[False, True, True, False, False]]


def test_random_masks_follow_the_generator_and_favour_no_weight():
    dis = {"w.weight": torch.ones(10)}
    previous = {"w.weight": torch.arange(1.0, 11.0)}
    masks = [variant("random", dis, previous, 0.3, None, seed)["w.weight"] for seed in range(400)]
    again = variant("random", dis, previous, 0.3, None, 7)["w.weight"]
    assert torch.equal(again, masks[7])
    # 400 draws of 3 in 10: each weight 120 times, with a standard deviation of sqrt(84) = 9.2
    assert all(abs(int(count) - 120) < 40 for count in torch.stack(masks).sum(dim=0))


@pytest.mark.parametrize(
    ("score", "lacking"), [("malmag", "the flagged clients' mean model"), ("random", "a generator")]
)
def test_an_ablation_says_what_it_lacks(score, lacking):
    dis = fedup.disagreement(named(M), named(B), NAMES)
    with pytest.raises(ParametersError, match=f"{score} needs {lacking}"):
        fedup.conflict_mask(dis, named(PREVIOUS), 0.2, score=score)


@pytest.mark.parametrize("score", ALL_SCORES)
def test_ablations_refuse_what_is_not_finite_and_leave_inputs_untouched(score):
    dis = fedup.disagreement(named(M), named(B), NAMES)
    before = dis["w.weight"].clone(), PREVIOUS.clone(), M.clone()
    variant(score, dis, named(PREVIOUS), 0.5, named(M))
    assert all(
        torch.equal(*pair) for pair in zip((dis["w.weight"], PREVIOUS, M), before, strict=True)
    )
    with pytest.raises(ParametersError, match="not finite"):
        variant(score, named(torch.full((1, 5), torch.inf)), named(PREVIOUS), 0.5, named(M))


def test_a_bias_is_pruned_by_whoever_names_it():
    # dis = (0, 4), |w_prev| = (3, 1): the second entry is the only conflict
    retained = {"w.weight": torch.ones(1, 2), "w.bias": torch.tensor([1.0, 2.0])}
    flagged = {"w.weight": torch.ones(1, 2), "w.bias": torch.tensor([1.0, 4.0])}
    previous = {"w.weight": torch.ones(1, 2), "w.bias": torch.tensor([3.0, 1.0])}
    dis = fedup.disagreement(flagged, retained, ("w.weight", "w.bias"))
    pruned, _ = fedup.fedup(dis, previous, retained, 0.5)
    assert pruned["w.bias"].tolist() == [1.0, 0.0]
    assert fedup.disagreement(flagged, retained, NAMES).keys() == {"w.weight"}


# ---------------------------------------------------------------- adaptive rate
@pytest.mark.parametrize(
    ("sim", "rate"),
    # z = (SIM - .5) / .5; P = .14 z^5 + .01: .78^5 = .288717 -> .050420; .98^5 = .903921 -> .136549
    [(0.89, 0.050420), (0.99, 0.136549), (0.5, 0.01), (1.0, 0.15), (0.2, 0.01), (-1.0, 0.01)],
)
def test_adaptive_rate_by_hand(sim, rate):
    assert fedup.adaptive_rate(sim) == pytest.approx(rate, abs=1e-6)


@settings(deadline=None)
@given(a=st.floats(-1, 1), b=st.floats(-1, 1))
def test_adaptive_rate_grows_with_similarity(a, b):
    low, high = sorted((a, b))
    assert fedup.adaptive_rate(low) <= fedup.adaptive_rate(high)


def test_similarity_is_the_mean_cosine_over_pairs():
    # cos(x, y) = 0, cos(x, x + y) = cos(y, x + y) = 1 / sqrt(2); mean = sqrt(2) / 3
    vectors = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0]), torch.tensor([2.0, 2.0])]
    assert fedup.similarity(vectors) == pytest.approx(2**0.5 / 3)


def test_similarity_with_a_zero_vector_is_zero_and_of_one_client_undefined():
    assert fedup.similarity([torch.zeros(2), torch.ones(2)]) == 0.0
    assert fedup.similarity([torch.ones(2)]) is None


# ---------------------------------------------------------------- false positives
def test_conflict_percentile_tells_an_outlier_from_one_of_the_crowd():
    # Scores with |w_prev| = 1: the crowd sits at -.1, 0, .1 around its mean 0. Left out, each is
    # compared to the mean of the other two (.05, 0, -.05): distances .15, 0, .15.
    # The outlier at 5 lies above all; one at .01 above the middle one only.
    previous = named(torch.ones(1, 1))
    crowd = {c: named(torch.tensor([[v]])) for c, v in {"a": -0.1, "b": 0.0, "c": 0.1}.items()}
    flagged = {"far": named(torch.tensor([[5.0]])), "near": named(torch.tensor([[0.01]]))}
    found = fedup.conflict_percentiles({**crowd, **flagged}, previous, ["far", "near"], NAMES)
    assert found["far"] == 1.0
    assert found["near"] == pytest.approx(1 / 3)


@settings(deadline=None)
@given(seed=st.integers(0, 40), retained=st.integers(2, 6))
def test_conflict_percentiles_are_those_of_leaving_each_client_out(seed, retained):
    locals_, previous, _ = random_round(seed, participants=retained + 2)
    flagged, others = ["c0", "c1"], sorted(locals_.keys() - {"c0", "c1"})

    def score(model, reference):
        return sum(
            float(((model[n] - reference[n]) ** 2 * previous[n].abs()).double().sum())
            for n in NAMES_OF_ROUND
        )

    crowd = [
        score(locals_[one], mean([locals_[other] for other in others if other != one]))
        for one in others
    ]
    average = mean([locals_[client] for client in others])
    found = fedup.conflict_percentiles(locals_, previous, flagged, NAMES_OF_ROUND)
    for client in flagged:
        own = score(locals_[client], average)
        assert found[client] == sum(other < own for other in crowd) / retained


def test_conflict_percentiles_need_two_retained_clients():
    locals_, previous, _ = random_round(8, participants=3)
    found = fedup.conflict_percentiles(locals_, previous, ["c0", "c1"], NAMES_OF_ROUND)
    assert found == {}


class StoredModel(Mapping):
    """A model that is read anew at every access, and knows what of it is held."""

    def __init__(self, tensors, held):
        self.tensors, self.held, self.reads = tensors, held, []

    def __getitem__(self, name):
        return self.read(name, self.tensors[name])

    def form(self, name):
        return torch.empty_like(self.tensors[name], device="meta")

    def stretch(self, name, start, stop, scratch):
        del scratch
        return self.read(name, self.tensors[name].reshape(-1)[start:stop])

    def read(self, name, entries):
        self.reads.append(name)
        tensor = entries.clone()
        self.held.add(tensor)
        assert len(self.held) <= 2, "models are being collected"
        return tensor

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_stored_models_are_read_tensor_by_tensor_and_never_held():
    locals_, previous, retained = random_round(9, participants=8)
    held, names = weakref.WeakSet(), list(NAMES_OF_ROUND)
    stored = {client: StoredModel(model, held) for client, model in locals_.items()}
    found = fedup.conflict_percentiles(stored, StoredModel(previous, held), {"c0"}, names)
    assert found == fedup.conflict_percentiles(locals_, previous, {"c0"}, names)
    assert all(model.reads == names for model in stored.values())
    flagged, kept, before = (StoredModel(m, held) for m in (locals_["c0"], retained, previous))
    fedup.conflict_mask(fedup.disagreement(flagged, kept, names), before, 0.3)
    assert flagged.reads == kept.reads == before.reads == names
