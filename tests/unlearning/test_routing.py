"""Which method serves a request: the table of ``methods`` 10.3, and what must hold for any."""

import contextlib
import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import routing
from unlearning.catalogue import (
    DATA,
    HOLDERS,
    METHODS,
    RECORDED,
    SERVER,
    Entry,
    Need,
    Target,
    missing,
    with_implied,
)
from unlearning.errors import (
    BenignMajorityError,
    BudgetError,
    ImpossibleRequestError,
    MissingNeedError,
    NeedsRetainedClientsError,
    NoBatchLogError,
    NoExactMethodError,
    NoLastRoundError,
    NotCertifiedError,
    RefusedRequestError,
    TooFewClientsError,
    UnsafeMethodError,
)
from unlearning.routing import (
    CERTIFIED,
    COOPERATIVE,
    DROPPED,
    EXACT,
    LOGGED,
    NEED_MAJORITY,
    ORDER,
    POLICY,
    PROVEN,
    Available,
    Request,
    route,
)

EVERYTHING = frozenset(Need)
PLAIN = frozenset({Need.LAST, Need.RETAINED})
A, B, C = "client-0000", "client-0001", "client-0002"
FOR_CLIENTS = [name for name, entry in METHODS.items() if Target.CLIENT in entry.targets]
SEVERAL = [name for name in FOR_CLIENTS if METHODS[name].several]
FOR_DATA = [
    (name, target)
    for name, entry in METHODS.items()
    for target in sorted(entry.targets & DATA)
    if entry.federated
]


def having(needs, *, participants=10, default="fedup", without=(), **more):
    replay = {name: more.pop(name) for name in EXACT if name in more}
    ready = frozenset(METHODS) - frozenset(without)
    return Available(frozenset(needs), participants, replay, default, methods=ready, **more)


def asking(target="client", clients=(A,), cause="privacy", **terms):
    part = {"class": {"label": 3}, "samples": {"tokens": ("a1", "b2")}}.get(target, {})
    return Request(Target(target), clients, cause, **part | terms)


def named(name, clients=(A,), target=None, **terms):
    """A request by name, on terms on which the method serves it where everything is there."""
    entry = METHODS[name]
    target = target or ("client" if name in FOR_CLIENTS else min(entry.targets))
    guarantee = "exact" if entry.guarantee in PROVEN else "approximate"
    if target == "client" and entry.needs & {Need.TARGET, Need.DROP}:
        terms = {"target_cooperates": True, **terms}
    return asking(target, clients, **{"method": name, "guarantee": guarantee, **terms})


# ---------------------------------------------------------------- the table, row by row
MALICIOUS = [
    # needs there, method expected: FedUP -> FedRecover -> KD -> NoT -> Retrain
    (PLAIN, "fedup"),
    ({Need.HISTORY, Need.RETAINED}, "fedrecover"),
    ({Need.HISTORY, Need.UNLABELLED}, "kd"),
    ({Need.RETAINED}, "not"),
    (EVERYTHING, "fedup"),
]


@pytest.mark.parametrize(("needs", "expected"), MALICIOUS)
def test_malicious_clients(needs, expected):
    assert route(asking(cause="malicious"), having(needs)).method == expected


def test_malicious_clients_by_drift_where_the_federation_says_so():
    needs = {Need.LAST, Need.LEDGER, Need.RETAINED}
    found = route(asking(cause="malicious"), having(needs, default="drift"))
    assert found.method == "drift"
    # Without its ledger it is passed over, not replaced by what nobody chose.
    found = route(asking(cause="malicious"), having(PLAIN, default="drift"))
    assert found.method == "not"
    assert [name for name, _ in found.passed_over] == ["drift", "fedrecover", "kd"]


@pytest.mark.parametrize(
    ("needs", "cooperates", "expected"),
    [
        (PLAIN, False, "fedup"),
        ({Need.SAMPLED_HISTORY, Need.RETAINED}, False, "federaser"),
        ({Need.RETAINED}, False, "not"),
        (PLAIN, True, "fedup"),
        ({Need.HISTORY, Need.RETAINED}, True, "negative-gradients"),
        ({Need.SAMPLED_HISTORY, Need.RETAINED}, True, "federaser"),
    ],
)
def test_leavers_who_accept_an_approximation(needs, cooperates, expected):
    request = asking(guarantee="approximate", target_cooperates=cooperates)
    assert route(request, having(needs)).method == expected


def test_what_was_passed_over_is_told_with_what_it_lacked():
    found = route(asking(cause="malicious"), having({Need.RETAINED}))
    assert found.passed_over[0] == (
        "fedup",
        "fedup needs last round, which is not recorded",
    )
    assert [name for name, _ in found.passed_over] == ["fedup", "fedrecover", "kd"]


def test_leavers_are_forgotten_exactly_unless_they_say_otherwise():
    request = asking()
    assert request.promise == POLICY["privacy"] == "exact"
    assert route(request, having({Need.CHECKPOINTS, Need.RETAINED})).method == "rollback"
    assert route(request, having({Need.INITIAL, Need.RETAINED})).method == "retrain"


def test_exact_is_refused_rather_than_weakened():
    with pytest.raises(MissingNeedError, match="only approximate methods would work: fedup, not"):
        route(asking(), having(PLAIN))
    with pytest.raises(NoExactMethodError, match="fedup is not exact"):
        route(asking(method="fedup"), having(EVERYTHING))
    assert route(asking(method="fedup", guarantee="approximate"), having(PLAIN)).method == "fedup"


def test_exact_within_a_budget_of_rounds():
    needs = {Need.CHECKPOINTS, Need.INITIAL, Need.LAST, Need.RETAINED}
    there = having(needs, rollback=7, retrain=40)
    assert route(asking(most_rounds=7), there).method == "rollback"
    with pytest.raises(BudgetError, match=r"7 rounds again, and 6 are allowed; only approximate"):
        route(asking(most_rounds=6), there)
    with pytest.raises(BudgetError, match=r"retrain would play 40 .*; rollback would work"):
        route(asking(method="retrain", most_rounds=7), there)


def test_attackers_may_be_forgotten_exactly_too():
    request = asking(cause="malicious", guarantee="exact")
    assert route(request, having({Need.INITIAL, Need.RETAINED})).method == "retrain"


@pytest.mark.parametrize(("needs", "expected"), [(PLAIN, "fedup"),
    ({Need.HISTORY, Need.UNLABELLED}, "kd"), ({Need.RETAINED}, "not")])  # fmt: skip
def test_backdoor_whose_culprit_is_known(needs, expected):
    assert route(asking("backdoor", cause="malicious"), having(needs)).method == expected


def test_backdoor_whose_culprit_is_unknown():
    with pytest.raises(ImpossibleRequestError, match="who planted the backdoor is unknown"):
        route(asking("backdoor", (), "malicious"), having(EVERYTHING))
    with pytest.raises(ImpossibleRequestError, match="who planted the backdoor is unknown"):
        route(asking("backdoor", (), "malicious", method="fedup"), having(EVERYTHING))


def test_classes_and_samples_are_forgotten_by_their_holders():
    there = having(EVERYTHING - {Need.BATCH_LOG, Need.CERTIFICATE})
    for target in DATA:
        assert route(asking(target, guarantee="approximate"), there).method == "fisher-mask"
        assert route(asking(target), there).method == "rollback"


# ---------------------------------------------------------------- the table, cell by cell
L, S, H = Need.LAST, Need.SAMPLED_HISTORY, Need.HISTORY
U, R, P = Need.UNLABELLED, Need.RETAINED, Need.LEDGER
I, K = Need.INITIAL, Need.CHECKPOINTS  # noqa: E741
Y, V = Need.CLASSES, Need.CONVOLUTIONS
G, F = Need.BATCH_LOG, Need.CERTIFICATE
MALICIOUS_BACKDOOR = {"target": "backdoor", "cause": "malicious"}
PRIVATE_BACKDOOR = {"target": "backdoor", "guarantee": "approximate"}
LEAVER = {"guarantee": "approximate"}
HELPER = {"guarantee": "approximate", "target_cooperates": True}
CELLS = [
    # request, what is there, not made ready -> method, those passed over on the way to it
    ({"cause": "malicious"}, {L, H, U, R}, "", "fedup", ""),
    ({"cause": "malicious"}, {H, U, R}, "", "fedrecover", "fedup"),
    ({"cause": "malicious"}, {S, U, R}, "", "not", "fedup fedrecover kd"),
    ({"cause": "malicious"}, {H, U}, "", "kd", "fedup fedrecover"),
    ({"cause": "malicious"}, {R}, "", "not", "fedup fedrecover kd"),
    ({"cause": "malicious"}, {I, R}, "", "not", "fedup fedrecover kd"),
    ({"cause": "malicious"}, {I, R}, "not", "retrain", "fedup fedrecover kd"),
    ({"cause": "malicious"}, {I, R}, "fedup kd not", "retrain", "fedrecover"),
    (LEAVER, {L, H, U, R}, "", "fedup", ""),
    (LEAVER, {S, R}, "", "federaser", "fedup"),
    (LEAVER, {H, R}, "", "federaser", "fedup"),
    (LEAVER, {I, R}, "", "not", "fedup federaser"),
    (LEAVER, {I, R}, "not", "retrain", "fedup federaser"),
    (HELPER, {L, H, U, R}, "", "fedup", ""),
    (HELPER, {H, R}, "", "negative-gradients", "fedup"),
    (HELPER, {S, R}, "", "federaser", "fedup negative-gradients"),
    (HELPER, {I, R}, "", "not", "fedup negative-gradients federaser"),
    (HELPER, {I, R}, "not", "retrain", "fedup negative-gradients federaser"),
    # Attackers' offers of help change nothing.
    ({"cause": "malicious", "target_cooperates": True}, {H, R}, "", "fedrecover", "fedup"),
    *(
        cell
        for backdoor in (MALICIOUS_BACKDOOR, PRIVATE_BACKDOOR)
        for cell in (
            (backdoor, {L, H, U, R}, "", "fedup", ""),
            (backdoor, {H, U, R}, "", "kd", "fedup"),
            (backdoor, {H, R}, "", "not", "fedup kd"),
            (backdoor, {I, R}, "", "not", "fedup kd"),
            (backdoor, {I, R}, "not", "retrain", "fedup kd"),
        )
    ),
    # Exactly: by the last model from before they joined, or from the first.
    ({}, {I, K, L, R}, "", "rollback", ""),
    ({}, {I, L, R}, "", "retrain", "rollback"),
    ({}, {I, K, L, R}, "rollback", "retrain", ""),
    ({"target": "backdoor"}, {I, K, L, R}, "", "rollback", ""),
    ({"target": "backdoor"}, {I, L, R}, "", "retrain", "rollback"),
    ({"cause": "malicious", "guarantee": "exact"}, {I, K, L, R}, "", "rollback", ""),
    # What certifies deletions of samples says nothing of whole clients.
    ({"target_cooperates": True}, {I, L, R, F}, "", "retrain", "rollback"),
    (HELPER, {L, R, F}, "", "fedup", ""),
]
APPROXIMATELY = {"guarantee": "approximate"}
DROP_ONLY = {"target_cooperates": False, "target_drops": True}
CLASS = {"target": "class"} | APPROXIMATELY
SAMPLES = {"target": "samples"} | APPROXIMATELY
DATA_CELLS = [
    # A class, all clients answer: FisherMask -> TF-IDF (CNN) -> ascent -> Retrain
    (CLASS, {I, K, R, V, Y}, "", "fisher-mask", ""),
    (CLASS, {R, Y}, "", "fisher-mask", ""),
    (CLASS | {"clients": ()}, {I, R, V, Y}, "", "fisher-mask", ""),
    (CLASS | {"label": 0}, {I, R, V, Y}, "", "fisher-mask", ""),
    (CLASS, {I, R, V, Y}, "fisher-mask", "tfidf", ""),
    (CLASS, {I, R, Y}, "fisher-mask", "ascent", "tfidf"),
    (CLASS, {I, R, V, Y}, "fisher-mask tfidf", "ascent", ""),
    (CLASS, {I, R, V, Y}, "fisher-mask tfidf ascent", "retrain", ""),
    (CLASS, {I, R, Y}, "fisher-mask ascent", "retrain", "tfidf"),
    # Neither a batch log nor certified deletions change what is done about a class.
    (CLASS, {I, R, V, Y, G, F}, "", "fisher-mask", ""),
    ({"target": "class"}, {I, K, R, V, Y, G, F}, "", "rollback", ""),
    # A class, clients only drop it: NoT -> Retrain
    (CLASS | DROP_ONLY, {I, K, R, V, Y}, "", "not", ""),
    (CLASS | DROP_ONLY, {R, Y}, "", "not", ""),
    (CLASS | DROP_ONLY, {I, R, V, Y}, "not", "retrain", ""),
    # Samples, batches logged: amnesiac -> FisherMask -> Rapid Retraining -> Retrain
    (SAMPLES, {I, R, Y, G}, "", "amnesiac", ""),
    (SAMPLES, {R, G}, "", "amnesiac", ""),
    (SAMPLES, {I, R, Y, G}, "amnesiac", "fisher-mask", ""),
    (SAMPLES, {I, R, Y, G}, "amnesiac fisher-mask", "rapid-retraining", ""),
    (SAMPLES, {I, R, Y, G}, "amnesiac fisher-mask rapid-retraining", "retrain", ""),
    (SAMPLES | DROP_ONLY, {I, R, Y, G}, "", "rapid-retraining", "amnesiac fisher-mask"),
    (SAMPLES | DROP_ONLY, {I, R, Y, G}, "rapid-retraining", "retrain", "amnesiac fisher-mask"),
    # Samples, no log: FisherMask -> label flipping
    (SAMPLES, {I, R, Y}, "", "fisher-mask", ""),
    (SAMPLES, {R}, "", "fisher-mask", ""),
    (SAMPLES | {"clients": ()}, {R}, "", "fisher-mask", ""),
    (SAMPLES, {I, R, Y}, "fisher-mask", "label-flip", ""),
    (SAMPLES, {I, R}, "fisher-mask", "retrain", "label-flip"),
    (SAMPLES, {I, R, Y}, "fisher-mask label-flip", "retrain", ""),
    (SAMPLES | DROP_ONLY, {I, R, Y}, "", "retrain", "fisher-mask label-flip"),
    # Samples, trained by FFMU and certified: nothing is to be done, if their holder says so.
    *(
        ({"target": "samples", "guarantee": guarantee}, {F, *others}, "", "ffmu", "")
        for guarantee in (None, "exact", "approximate")
        for others in ((), (I, K, R, Y, G))
    ),
    ({"target": "samples", "retained_cooperate": False}, {I, K, R, F}, "", "ffmu", ""),
    (SAMPLES, {I, R, Y, G, F}, "ffmu", "amnesiac", ""),
    (SAMPLES, {I, R, Y, F}, "ffmu", "fisher-mask", ""),
    (SAMPLES | DROP_ONLY, {I, R, Y, F}, "", "retrain", "ffmu fisher-mask label-flip"),
    ({"target": "samples"}, {I, K, R, F}, "ffmu", "rollback", ""),
    ({"target": "samples"} | DROP_ONLY, {I, K, R, F}, "", "rollback", "ffmu"),
    # Exactly: as whole clients are, with holders who drop the data first.
    *(
        cell
        for target in ("class", "samples")
        for terms in ({"target": target}, {"target": target} | DROP_ONLY)
        for cell in (
            (terms, {I, K, L, R, Y, V, G}, "", "rollback", ""),
            (terms, {I, L, R, Y, V, G}, "", "retrain", "rollback"),
            (terms, {I, K, R, Y}, "rollback", "retrain", ""),
        )
    ),
]


@pytest.mark.parametrize(("terms", "needs", "without", "expected", "passed"), CELLS + DATA_CELLS)
def test_every_cell_of_the_table(terms, needs, without, expected, passed):
    found = route(asking(**terms), having(needs, without=without.split()))
    assert found.method == expected
    assert [name for name, _ in found.passed_over] == passed.split()


def test_methods_that_need_those_who_stay_say_so():
    for target in ("class", "samples", "client"):
        request = asking(target, guarantee="approximate", retained_cooperate=False)
        with pytest.raises(NeedsRetainedClientsError, match="retained clients answer, which is"):
            route(request, having({L, I, K, R, Y}))
    assert issubclass(NeedsRetainedClientsError, MissingNeedError)


def test_training_that_could_certify_and_does_not_is_passed_over_and_told():
    there = having({I, K, R, Y}, uncertified="a detector is on")
    found = route(asking("samples"), there)
    assert found.method == "rollback"
    why = "ffmu certifies nothing here: a detector is on; choose another method"
    assert found.passed_over == (("ffmu", why),)
    with pytest.raises(NotCertifiedError, match="a detector is on; choose another"):
        route(asking("samples", method="ffmu"), there)
    assert route(asking("class"), there).passed_over == ()


def test_drift_takes_the_place_of_fedup_for_attackers_alone():
    there = {L, H, P, U, R}
    for terms, expected in (
        ({"cause": "malicious"}, "drift"),
        (MALICIOUS_BACKDOOR, "drift"),
        (LEAVER, "fedup"),
        (PRIVATE_BACKDOOR, "fedup"),
    ):
        assert route(asking(**terms), having(there, default="drift")).method == expected
    found = route(asking(cause="malicious"), having({L, H, R}, default="drift"))
    assert [found.method, *found.passed_over[0]] == [
        "fedrecover",
        "drift",
        "drift needs ledger of each client's pull, which is not recorded",
    ]


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        # The end of each row: the error is about the default, whatever else lacked what.
        ({"cause": "malicious"}, "^fedup needs last round and retained clients answer, which"),
        (LEAVER, "^fedup needs last round and retained clients answer, which"),
        (HELPER, "^fedup needs last round and retained clients answer, which"),
        (MALICIOUS_BACKDOOR, "^fedup needs last round and retained clients answer, which"),
        (PRIVATE_BACKDOOR, "^fedup needs last round and retained clients answer, which"),
        ({}, "^rollback needs checkpoints and retained clients answer, which is not recorded"),
        ({"target": "class"}, "^rollback needs checkpoints and retained clients answer, which"),
        ({"target": "samples"}, "^rollback needs checkpoints and retained clients answer, which"),
    ],
)
def test_rows_of_the_table_end_in_a_refusal(terms, message):
    classes = {Y} if terms.get("target") == "class" else set()
    with pytest.raises(MissingNeedError, match=message):
        route(asking(**terms), having(classes))
    with pytest.raises(MissingNeedError, match=message.split(" and ")[0]):
        route(asking(**terms), having(RECORDED - {L, H, K} | classes))  # nobody answers
    if terms.get("target") not in DATA:
        with pytest.raises(MissingNeedError, match="fedup needs last round"):
            route(asking(**terms | APPROXIMATELY), having({R}, without=["not"]))


@pytest.mark.parametrize(
    ("terms", "needs", "message"),
    [
        (CLASS, {Y, V}, "fisher-mask needs retained clients answer, which is not available"),
        (CLASS | DROP_ONLY, {Y, V}, "not needs retained clients answer, which is not available"),
        (SAMPLES, {Y}, "fisher-mask needs retained clients answer, which is not available"),
        (SAMPLES, {Y, G}, "amnesiac needs retained clients answer, which is not available"),
        (
            SAMPLES | DROP_ONLY,
            {Y, R},
            "fisher-mask needs target answers, which is not available; not would work",
        ),
        (
            SAMPLES | DROP_ONLY,
            {Y, R, G},
            "amnesiac needs target answers, which is not available; not would work",
        ),
    ],
)
def test_rows_about_classes_and_samples_end_in_a_refusal(terms, needs, message):
    with pytest.raises(MissingNeedError) as caught:
        route(asking(**terms), having(needs))
    assert str(caught.value) == message
    if R not in needs:  # no other than where they are there, and do not answer
        with pytest.raises(MissingNeedError) as caught:
            route(asking(retained_cooperate=False, **terms), having(needs | {I, K, R}))
        assert str(caught.value) == message


def test_retraining_in_the_place_of_an_approximation_keeps_to_the_budget():
    request = asking(guarantee="approximate", most_rounds=6)
    there = {I, R}
    assert route(request, having(there, without=["not"], retrain=6)).method == "retrain"
    with pytest.raises(RefusedRequestError, match="fedup needs last round"):
        route(request, having(there, without=["not"], retrain=7))


@pytest.mark.parametrize("name", [n for n, e in METHODS.items() if e.guarantee == "none"])
def test_who_wants_deletion_proven_is_not_served_by_an_approximation(name):
    for guarantee in ("exact", None):
        with pytest.raises(NoExactMethodError, match=f"^{name} is not exact"):
            route(named(name, guarantee=guarantee), having(EVERYTHING))
    if name in FOR_CLIENTS:
        with pytest.raises(NoExactMethodError, match=f"^{name} is not exact"):
            route(named(name, cause="malicious", guarantee="exact"), having(EVERYTHING))


def test_a_backdoor_of_nobody_knows_whom_is_refused_whatever_is_there_and_on_whatever_terms():
    for terms in ({}, LEAVER, HELPER, {"cause": "malicious"}):
        with pytest.raises(ImpossibleRequestError, match="who planted the backdoor is unknown"):
            route(asking("backdoor", (), **terms), having(EVERYTHING))


def test_where_nothing_fit_was_made_ready_what_would_be_is_named():
    everything = frozenset(METHODS)
    with pytest.raises(ImpossibleRequestError) as caught:
        route(asking(), having(EVERYTHING, without=everything - {"fedup", "not", "natural"}))
    assert str(caught.value) == (
        "no method that forgets a client exactly (rollback or retrain) was made ready; add one to "
        "the methods; only approximate methods would work: fedup, not"
    )
    with pytest.raises(ImpossibleRequestError) as caught:
        route(asking(cause="malicious"), having(EVERYTHING, without=everything - {"rollback"}))
    assert str(caught.value) == (
        "no method that forgets a client was made ready; add one to the methods; rollback would "
        "work"
    )
    with pytest.raises(ImpossibleRequestError) as caught:
        route(asking("samples"), having(EVERYTHING, without=everything - {"amnesiac"}))
    assert str(caught.value) == (
        "no method that forgets samples exactly (rollback or retrain) was made ready; add one to "
        "the methods; only approximate methods would work: amnesiac"
    )


# ---------------------------------------------------------------- who stays, and who was there
@pytest.mark.parametrize("name", SEVERAL)
def test_those_who_stay_are_as_many_as_a_round_waits_for(name):
    # Two of five leave.
    request = named(name, (A, B))
    assert route(request, having(EVERYTHING, participants=5, fewest=3)).method == name
    four = having(EVERYTHING, participants=5, fewest=4)
    if name in ("fast", "kd"):  # whom no round follows that is needed
        assert route(request, four).method == name
        return
    with pytest.raises(TooFewClientsError, match=r"^3 of 5 clients would stay, .* waits for 4"):
        route(request, four)


@pytest.mark.parametrize("name", FOR_CLIENTS)
@pytest.mark.parametrize("fewest", [1, 2, 3])
def test_that_nobody_would_stay_is_said_as_such(name, fewest):
    message = "2 of 2 participants" if name in NEED_MAJORITY else "all 2 clients are to be"
    with pytest.raises(BenignMajorityError, match=message):
        route(named(name, (A, B)), having(EVERYTHING, participants=2, fewest=fewest))


def test_what_asks_nobody_serves_where_too_few_stay_for_a_round():
    there = having({L, H, U, R}, participants=4, fewest=4)
    found = route(asking(**PRIVATE_BACKDOOR), there)
    assert [found.method, *(name for name, _ in found.passed_over)] == ["kd", "fedup"]
    with pytest.raises(TooFewClientsError, match="3 of 4 clients would stay"):
        route(asking(**PRIVATE_BACKDOOR), dataclasses.replace(there, needs=frozenset({L, H, R})))
    # An attacker too: who may stay has nothing to do with who is honest.
    of_ten = having({L, H, U, R}, participants=10, fewest=10)
    malicious = dataclasses.replace(asking(**PRIVATE_BACKDOOR), cause="malicious", guarantee=None)
    assert route(malicious, of_ten).method == "kd"


@pytest.mark.parametrize("name", FOR_CLIENTS)
def test_those_who_wait_count_against_the_majority(name):
    # floor((N - 1) / 2) of N may go: one more besides w who wait already, of 7 + w in all.
    # w = 4: 5 of 11. w = 5: 6 of 12.
    request = named(name, (A,))
    assert route(request, having(EVERYTHING, participants=7, waiting=4)).method == name
    six = having(EVERYTHING, participants=7, waiting=5)
    if name not in NEED_MAJORITY:
        assert route(request, six).method == name
        return
    with pytest.raises(BenignMajorityError, match="6 of 12 participants"):
        route(request, six)


@pytest.mark.parametrize("name", SEVERAL)
def test_whoever_was_not_in_the_last_round_is_not_served_by_what_rests_on_it(name):
    request = named(name, (A, C))

    def among(present):
        return having(EVERYTHING, participants=9, present=present)

    five = frozenset({A, B, C, "d", "e"})
    for present in (None, five):
        assert route(request, among(present)).method == name
    # Of four in that round two are no minority, whoever else there is: floor((4 - 1) / 2) = 1.
    if name in ("fedup", "random"):
        with pytest.raises(BenignMajorityError, match="2 of 4 participants"):
            route(request, among(five - {"e"}))
    else:
        assert route(request, among(five - {"e"})).method == name
    for present, absent in (
        (frozenset({A, B}), C),
        (frozenset({B, C}), A),
        (frozenset(), f"{A} and {C}"),
    ):
        if name not in ("fedup", "random", "verifi"):
            assert route(request, among(present)).method == name
            continue
        with pytest.raises(NoLastRoundError, match=f"^{name} needs the last round of {absent}, "):
            route(request, among(present))


def test_attackers_who_were_not_in_the_last_round_are_handed_on():
    there = having(EVERYTHING, present=frozenset({B}))
    found = route(asking(cause="malicious"), there)
    assert [found.method, found.passed_over[0][0]] == ["fedrecover", "fedup"]
    with pytest.raises(NoLastRoundError, match=f"of {A}, .*; drift, .* would work"):
        route(asking(cause="malicious", method="fedup"), there)


@pytest.mark.parametrize(("name", "target"), FOR_DATA)
def test_of_those_who_hold_a_class_or_samples_nobody_leaves(name, target):
    for clients in ((A, B), (A,), ()):
        there = having(EVERYTHING, participants=2, fewest=2, waiting=3, present=frozenset({C}))
        assert route(named(name, clients, target), there).method == name


def test_a_method_for_one_client_at_a_time_is_not_given_two(monkeypatch):
    monkeypatch.setitem(METHODS, "not", dataclasses.replace(METHODS["not"], several=False))
    assert route(named("not", (A,)), having({R})).method == "not"
    assert route(named("not", (A, A)), having({R})).method == "not"
    with pytest.raises(ImpossibleRequestError, match="not forgets one client at a time"):
        route(named("not", (A, B)), having({R}))


# ---------------------------------------------------------------- refusals
def test_too_many_attackers_are_refused_and_not_handed_on():
    five = tuple(f"client-{n:04d}" for n in range(5))
    with pytest.raises(BenignMajorityError, match="5 of 10 participants"):
        route(asking(clients=five, cause="malicious"), having(EVERYTHING))
    assert route(asking(clients=five[:4], cause="malicious"), having(EVERYTHING)).method == "fedup"


@pytest.mark.parametrize("method", [None, *(n for n, e in SERVER.items() if e.safe)])
def test_nobody_is_left_after_everybody(method):
    request = asking(clients=(A, B), guarantee=None, method=method, cause="malicious")
    with pytest.raises(RefusedRequestError):
        route(request, having(EVERYTHING, participants=2))


def test_half_may_leave_on_their_own_account():
    five = tuple(f"client-{n:04d}" for n in range(5))
    assert route(asking(clients=five), having(EVERYTHING)).method == "rollback"


@pytest.mark.parametrize("name", [name for name in FOR_CLIENTS if not METHODS[name].safe])
def test_methods_that_trust_the_target_are_refused_for_attackers(name):
    for cooperates in (None, True, False):
        request = named(name, cause="malicious", target_cooperates=cooperates)
        with pytest.raises(UnsafeMethodError, match=rf"{name} trusts .*; fedup, .* would work"):
            route(request, having(EVERYTHING))


@pytest.mark.parametrize(("name", "target"), FOR_DATA + [(None, target) for target in sorted(DATA)])
def test_no_part_of_what_attackers_hold_is_forgotten_at_their_word(name, target):
    what = "a class" if target == "class" else "samples"
    for guarantee in ("exact", "approximate", None):
        for cooperates in (True, False, None):
            terms = {"target_cooperates": cooperates, "guarantee": guarantee, "method": name}
            with pytest.raises(
                UnsafeMethodError, match=f"^forgetting {what} trusts those who hold"
            ):
                route(asking(target, cause="malicious", **terms), having(EVERYTHING))


FIT = FOR_DATA + [
    (name, target) for name, entry in METHODS.items() for target in sorted(entry.targets - DATA)
]


@pytest.mark.parametrize(("name", "target"), FIT)
def test_a_named_method_is_honoured_only_if_its_needs_hold(name, target):
    entry = METHODS[name]
    request = named(name, target=target)
    # Whether clients help is the request's to say, not the federation's.
    needs = entry.needs | ({Y} if target == "class" else set())
    assert route(request, having(needs - {Need.TARGET, Need.DROP})).method == name
    for need in entry.needs - {Need.TARGET, Need.DROP} - ({Y} if target == "class" else set()):
        left = EVERYTHING - {need} - {n for n in EVERYTHING if need in with_implied({n})}
        with pytest.raises(RefusedRequestError) as caught:
            route(request, having(left))
        assert str(caught.value).startswith(f"{name} needs {need}, ")
        special = {G: NoBatchLogError, F: NotCertifiedError, R: NeedsRetainedClientsError}
        assert type(caught.value) is special.get(need, MissingNeedError)
        if need not in special:
            there = "recorded" if need in RECORDED else "available"
            assert f"{need}, which is not {there}" in str(caught.value)
    for need in entry.needs & {Need.TARGET, Need.DROP}:
        # Whoever drops what is to be forgotten does not answer for that alone.
        silent = {"target_cooperates": False, "target_drops": need is Need.TARGET}
        if need is Need.DROP and target in DATA:
            continue  # nothing serves that
        with pytest.raises(MissingNeedError, match=f"^{name} needs {need}, which is not available"):
            route(dataclasses.replace(request, **silent), having(EVERYTHING))
    if target in DATA and Need.TARGET not in entry.needs:
        request = dataclasses.replace(request, **DROP_ONLY)
        assert route(request, having(needs)).method == name


@pytest.mark.parametrize("target", ["client", "class", "samples"])
def test_holders_answer_for_their_data_and_leavers_do_not_unless_they_say_so(target):
    usual = target in DATA
    for said, cooperates in ((None, usual), (True, True), (False, False)):
        request = asking(target, target_cooperates=said)
        assert (request.target_cooperates, request.target_drops) == (cooperates, cooperates)
        for drops in (True, False):
            assert asking(target, target_cooperates=said, target_drops=drops).target_drops == drops
    request = asking(target, (B, A, B), tokens=("x", "y", "x"))
    assert (request.clients, request.tokens) == ((B, A), ("x", "y"))


@pytest.mark.parametrize("guarantee", ["exact", "approximate", None])
@pytest.mark.parametrize("cooperates", [True, False])
def test_data_that_nobody_drops_is_not_forgotten(guarantee, cooperates):
    terms = {"target_cooperates": cooperates, "target_drops": False, "guarantee": guarantee}
    for method in (None, "not", "retrain", "fisher-mask", "noisy-gd"):
        with pytest.raises(ImpossibleRequestError, match=r"class statistics .* forget the clients"):
            route(asking("class", method=method, **terms), having(EVERYTHING))
    for method in (None, "not", "retrain", "amnesiac", "ffmu"):
        with pytest.raises(ImpossibleRequestError) as caught:
            route(asking("samples", method=method, **terms), having(EVERYTHING))
        assert str(caught.value) == (
            "forgetting samples needs their holder, who must act or leave; the whole client can "
            "be forgotten instead"
        )
    # Which it can, by what was offered.
    whole = asking(target_cooperates=False, guarantee=guarantee)
    assert route(whole, having(EVERYTHING)).method in ("rollback", "fedup")


OWN_STEP = {"rapid-retraining", "noisy-gd", "rcad"}


@pytest.mark.parametrize(("name", "target"), [fit for fit in FIT if fit[0] in OWN_STEP])
def test_where_the_strategy_takes_gradients_no_other_step_plays_its_rounds(name, target):
    assert {n for n, entry in METHODS.items() if entry.own_step} == OWN_STEP
    request = named(name, target=target)
    there = having(EVERYTHING - {F}, gradients=True, retrain=3, rollback=3)
    assert route(request, dataclasses.replace(there, gradients=False)).method == name
    with pytest.raises(ImpossibleRequestError, match=f"^{name} plays rounds of models") as caught:
        route(request, there)
    assert str(caught.value).endswith(" would work")
    assert not OWN_STEP & set(re.split(r"[ ,;]+", str(caught.value).split(";")[1]))
    if name == "rapid-retraining":
        assert str(caught.value).endswith("; rollback or retrain would work")
    # Nor is it chosen.
    asked = asking("samples", guarantee="approximate")
    there = dataclasses.replace(there, methods=frozenset(METHODS) - {"amnesiac", "fisher-mask"})
    assert route(asked, dataclasses.replace(there, gradients=False)).method == "rapid-retraining"
    assert route(asked, there).method == "retrain"


@pytest.mark.parametrize("method", [None, "not", "fisher-mask", "retrain", "rapid-retraining"])
@pytest.mark.parametrize("guarantee", ["exact", "approximate"])
def test_a_class_that_the_task_does_not_have_is_refused(method, guarantee):
    def asked(label):
        return asking("class", label=label, method=method, guarantee=guarantee)

    with pytest.raises(MissingNeedError, match=r"class 3 needs a task with .* name samples"):
        route(asked(3), having(EVERYTHING - {Y}))
    for label, classes in ((10, 10), (99, 10), (1, 1)):
        with pytest.raises(
            ImpossibleRequestError, match=rf"no class {label}; .* 0 to {classes - 1}$"
        ):
            route(asked(label), having(EVERYTHING, classes=classes))
    may = guarantee == "approximate" or METHODS.get(method, METHODS["retrain"]).guarantee == "exact"
    for classes in (4, 0):  # the last one there is, or nobody knows how many there are
        if may:
            assert route(asked(3), having(EVERYTHING, classes=classes)).method
    samples = asking("samples", method=method, guarantee=guarantee)
    if may:
        assert route(samples, having(EVERYTHING - {Y, F}, classes=0)).method


@pytest.mark.parametrize("method", [None, "not", "fisher-mask", "retrain", "rapid-retraining"])
def test_what_is_not_said_is_not_forgotten(method):
    for guarantee in ("exact", "approximate"):
        for label in (None, -1):
            with pytest.raises(ImpossibleRequestError, match=rf"^no class is named \({label}\)"):
                route(
                    asking("class", label=label, method=method, guarantee=guarantee),
                    having(EVERYTHING),
                )
        with pytest.raises(ImpossibleRequestError, match=r"^no samples are named"):
            route(
                asking("samples", tokens=(), method=method, guarantee=guarantee),
                having(EVERYTHING),
            )


@pytest.mark.parametrize("target", ["client", "class", "samples"])
def test_amnesiac_by_name_wants_the_log_that_was_kept(target):
    request = named("amnesiac", target=target)
    assert route(request, having({R, G, Y})).method == "amnesiac"
    with pytest.raises(NoBatchLogError) as caught:
        route(request, having({R, Y}))
    would = {
        "client": "not or fisher-mask",
        "class": "not, fisher-mask, ascent or label-flip",
        "samples": "not, fisher-mask, ascent or label-flip",
    }[target]
    assert str(caught.value) == (
        "amnesiac needs batch log at the holders, which was not kept, or not of plain averages; "
        "set batch-log, and FedAvg or FedProx as the strategy, before training; "
        f"{would} would work"
    )


@pytest.mark.parametrize("guarantee", ["exact", "approximate", None])
def test_training_that_certifies_deletions_is_not_taken_for_granted(guarantee):
    request = asking("samples", method="ffmu", guarantee=guarantee)
    assert route(request, having({F})).method == "ffmu"
    with pytest.raises(NotCertifiedError) as caught:
        route(request, having({I, R}))
    would = "not, retrain, fisher-mask or rapid-retraining"
    if request.promise == "exact":
        would = "retrain or rapid-retraining"
    assert str(caught.value) == (
        "ffmu needs training that certifies deletions, and this one certifies no such deletion; "
        "choose another method, or train with strategy = ffmu and local = full from the start; "
        f"{would} would work"
    )


def test_a_certified_deletion_is_exact_enough_to_be_offered():
    with pytest.raises(MissingNeedError, match="checkpoints, which is not recorded; ffmu would"):
        route(asking("samples", method="rollback"), having({R, F}))


def test_a_leaver_who_helps_may_climb_its_own_loss_by_name_alone():
    there = having(PLAIN)
    request = named("pga")
    assert route(request, there).method == "pga"
    for method in (None, *(n for n in METHODS if n != "pga")):
        other = dataclasses.replace(request, method=method)
        with contextlib.suppress(RefusedRequestError):
            assert route(other, there).method != "pga"
    with pytest.raises(
        MissingNeedError, match=r"^pga needs target answers, .*; fedup or not would"
    ):
        route(named("pga", target_cooperates=False), there)
    with pytest.raises(UnsafeMethodError, match=r"^pga trusts what"):
        route(named("pga", cause="malicious"), there)
    with pytest.raises(ImpossibleRequestError, match=r"^pga forgets one client at a time"):
        route(named("pga", (A, B)), there)
    with pytest.raises(NoLastRoundError, match=f"^pga needs the last round of {A}"):
        route(request, dataclasses.replace(there, present=frozenset({B})))
    with pytest.raises(ImpossibleRequestError, match=r"^pga does not forget samples, only client"):
        route(asking("samples", method="pga"), there)


@pytest.mark.parametrize("target", Target)
def test_what_is_there_for_comparison_is_never_chosen(target):
    compared = {name for name, entry in METHODS.items() if not entry.routed}
    assert compared == {
        *("verifi", "natural", "random", "activation-mask", "grad-mask", "random-mask"),
        *("fisher-noise", "macforget", "pga", "noisy-gd", "rcad", "sisa", "ij"),
    }
    there = having(EVERYTHING, without=METHODS.keys() - compared)
    for guarantee in ("exact", "approximate"):
        for cooperates in (True, None):
            request = asking(target, guarantee=guarantee, target_cooperates=cooperates)
            # Nor offered, though some of them would work.
            with pytest.raises(
                ImpossibleRequestError, match=r"made ready; add one to the methods$"
            ):
                route(request, there)


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if not entry.federated])
@pytest.mark.parametrize("target", Target)
def test_what_is_no_federation_s_is_refused_by_name_with_the_reason(name, target):
    for ready in (having(EVERYTHING), having(EVERYTHING, without=[name])):
        with pytest.raises(ImpossibleRequestError) as caught:
            route(asking(target, method=name), ready)
        assert str(caught.value) == (
            f"{name} is for one machine that has all the data, not for a federation; leave the "
            "method out to have one chosen"
        )


@pytest.mark.parametrize("target", ["client", "class", "samples"])
def test_retraining_of_which_nobody_knows_how_long_it_takes_fits_no_budget(target):
    request = named("rapid-retraining", target=target)
    assert route(request, having({I, R, Y})).method == "rapid-retraining"
    bound = dataclasses.replace(request, most_rounds=9)
    there = having({I, R, Y}, retrain=10)
    with pytest.raises(BudgetError, match=r"^nobody knows how many rounds rapid-retraining would"):
        route(bound, there)
    nine, ten = (
        dataclasses.replace(there, replay={"retrain": 10, "rapid-retraining": rounds})
        for rounds in (9, 10)
    )
    assert route(bound, nine).method == "rapid-retraining"
    with pytest.raises(BudgetError, match=r"^rapid-retraining would play 10 rounds again, and 9"):
        route(bound, ten)
    # Exact as it is, it is offered and not chosen.
    with pytest.raises(MissingNeedError, match=r"^rollback needs .*; rapid-retraining would work"):
        route(dataclasses.replace(bound, method=None), nine)


def test_clients_that_do_not_answer_are_not_counted_on():
    with pytest.raises(MissingNeedError, match="retained clients answer"):
        route(asking(method="not", guarantee="approximate", retained_cooperate=False),
              having(EVERYTHING))  # fmt: skip
    request = asking(cause="malicious", retained_cooperate=False)
    assert route(request, having(EVERYTHING)).method == "kd"


def test_unknown_and_unfit_methods():
    with pytest.raises(ImpossibleRequestError, match="there is no method 'fedupp'; choose one of"):
        route(asking(method="fedupp"), having(EVERYTHING))
    with pytest.raises(ImpossibleRequestError, match="federaser does not forget a backdoor"):
        route(asking("backdoor", method="federaser"), having(EVERYTHING))
    with pytest.raises(
        ImpossibleRequestError, match=r"^tfidf does not forget samples, only class;"
    ):
        route(asking("samples", method="tfidf"), having(EVERYTHING))
    with pytest.raises(ImpossibleRequestError, match=r"^fedup was not made ready; add it to"):
        route(asking(method="fedup"), having(EVERYTHING, without=["fedup"]))
    with pytest.raises(ImpossibleRequestError, match="no client is named"):
        route(asking(clients=()), having(EVERYTHING))


# ---------------------------------------------------------------- whatever is asked
REQUESTS = st.builds(
    Request,
    target=st.sampled_from(Target),
    clients=st.lists(st.sampled_from("abcdefgh"), unique=True).map(tuple),
    cause=st.sampled_from(["malicious", "privacy"]),
    target_cooperates=st.sampled_from([None, True, False]),
    target_drops=st.sampled_from([None, True, False]),
    label=st.sampled_from([None, -1, 0, 3, 3]),
    tokens=st.sampled_from([(), ("a1",), ("a1", "b2")]),
    retained_cooperate=st.booleans(),
    guarantee=st.sampled_from([None, "exact", "approximate"]),
    method=st.sampled_from([None, *METHODS]),
    most_rounds=st.sampled_from([None, 3, 30]),
)
STATES = st.builds(
    Available,
    needs=st.frozensets(st.sampled_from(Need)) | st.just(EVERYTHING),
    participants=st.integers(1, 12),
    replay=st.fixed_dictionaries(
        {name: st.integers(1, 40) for name in EXACT},
        optional={"rapid-retraining": st.integers(1, 40)},
    ),
    default=st.sampled_from(["fedup", "drift"]),
    waiting=st.integers(0, 6),
    methods=st.frozensets(st.sampled_from(sorted(METHODS))) | st.just(frozenset(METHODS)),
    fewest=st.integers(1, 4),
    present=st.none() | st.frozensets(st.sampled_from("abcdefgh")),
    classes=st.sampled_from([0, 3, 4]),
    gradients=st.booleans(),
)


def possible(request, available):
    """Whether the request says all that it must, of those who can be asked for it."""
    if request.target in DATA:
        said = request.tokens
        if request.target is Target.CLASS:
            known = request.label is not None and request.label >= 0
            said = known and Y in available.needs
            said = said and (not available.classes or request.label < available.classes)
        return bool(said) and request.target_drops and request.cause == "privacy"
    return 0 < len(request.clients) < available.participants


@settings(deadline=None, max_examples=200)
@given(REQUESTS, STATES)
def test_no_request_is_served_by_what_must_not_serve_it(request, available):
    try:
        found = route(request, available)
    except RefusedRequestError:
        return
    entry = METHODS[found.method]
    if request.cause == "malicious":
        assert entry.safe
        assert not entry.needs & {Need.TARGET, Need.DROP}
        assert request.target not in DATA
    if request.promise == "exact":
        assert entry.guarantee != "none"
    if entry.guarantee == "conditional":
        assert Need.CERTIFICATE in available.needs
    there = set(available.needs) - {Need.TARGET, Need.DROP}
    there |= {Need.TARGET, Need.DROP} if request.target_cooperates else set()
    there |= {Need.DROP} if request.target_drops else set()
    there |= {Need.SAMPLED_HISTORY} if Need.HISTORY in there else set()
    there |= {Need.INITIAL} if Need.SAMPLED_HISTORY in there else set()
    if not request.retained_cooperate:
        there -= {Need.RETAINED}
    assert entry.needs <= there
    assert possible(request, available)
    assert not (entry.own_step and available.gradients)
    assert request.target in entry.targets
    assert request.method in (None, found.method)
    assert entry.routed or request.method == found.method
    assert entry.federated
    assert found.method in available.methods
    assert found.method not in [name for name, _ in found.passed_over]
    if request.most_rounds is not None and entry.guarantee == "exact":
        assert available.replay[found.method] <= request.most_rounds


@settings(deadline=None, max_examples=200)
@given(REQUESTS, STATES)
def test_a_refusal_offers_what_works_and_only_that(request, available):
    try:
        route(request, available)
    except RefusedRequestError as error:
        message = str(error)
    else:
        return
    weaker = "; only approximate methods would work: "
    offered = message.rpartition(weaker if weaker in message else "; ")[2]
    if weaker in message:
        assert request.promise == "exact"
        request = dataclasses.replace(request, guarantee="approximate")
    elif not offered.endswith(" would work"):
        return
    for name in re.split(", | or ", offered.removesuffix(" would work")):
        assert name != request.method
        assert METHODS[name].routed
        assert METHODS[name].guarantee == "none" or weaker not in message
        assert route(dataclasses.replace(request, method=name), available).method == name


@contextlib.contextmanager
def first_of_all(*, safe):
    """Put a method in the catalogue, and first in every order, in which the target computes."""
    entry = Entry(
        "The target does something",
        frozenset({Need.TARGET}),
        frozenset(Target),
        "none",
        safe,
        "1",
        "0",
        "made up",
        "2.12",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "made-up", entry)
        for name in ("COOPERATIVE", "DROPPED", "LOGGED"):
            patch.setattr(routing, name, ("made-up", *getattr(routing, name)))
        for key, names in ORDER.items():
            patch.setitem(ORDER, key, ("made-up", *names))
        yield


@settings(deadline=None, max_examples=200)
@given(REQUESTS, STATES, st.booleans(), st.booleans())
def test_attackers_never_reach_what_they_compute_in_and_leavers_who_help_do(
    request, available, safe, by_name
):
    if by_name:
        request = dataclasses.replace(request, method="made-up")
    with first_of_all(safe=safe):
        available = dataclasses.replace(available, methods=available.methods | {"made-up"})
        try:
            method = route(request, available).method
        except RefusedRequestError:
            method = None
    # It is first in every order and asks nobody else: leavers and holders who help reach it
    # wherever nothing is to be done for certain.
    nothing_to_do = (
        request.target is Target.SAMPLES
        and Need.CERTIFICATE in available.needs
        and CERTIFIED in available.methods
    )
    expected = (
        request.cause == "privacy"
        and request.target_cooperates
        and request.promise == "approximate"
        and (request.method == "made-up" or (request.method is None and not nothing_to_do))
        and possible(request, available)
    )
    assert (method == "made-up") == expected


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("target", ["client", "backdoor"])
def test_the_same_request_reaches_it_for_a_leaver_and_not_for_an_attacker(target, safe):
    with first_of_all(safe=safe):
        there = having(EVERYTHING)
        for method in (None, "made-up"):
            terms = {"guarantee": "approximate", "method": method}
            leaver = asking(target, target_cooperates=True, **terms)
            assert route(leaver, there).method == "made-up"
            attacker = dataclasses.replace(leaver, cause="malicious")
            if method is None:
                assert route(attacker, there).method == "fedup"
                assert route(attacker, there).passed_over[0][0] == "made-up"
                assert route(asking(target, **terms), there).method == "fedup"
                continue
            with pytest.raises(UnsafeMethodError, match="made-up trusts what"):
                route(attacker, there)
            with pytest.raises(MissingNeedError, match="made-up needs target answers"):
                route(asking(target, **terms), there)


@pytest.mark.parametrize(
    "state",
    [
        {"needs": EVERYTHING - {K, I, H, S}},
        {"needs": EVERYTHING - {R}},
        {"rollback": 6, "retrain": 9},
        {"without": EXACT},
        {"participants": 4, "fewest": 4},
    ],
    ids=["not recorded", "nobody answers", "too many rounds", "not made ready", "too few stay"],
)
@pytest.mark.parametrize("cause", POLICY)
def test_exact_forgetting_that_cannot_be_is_refused_though_something_weaker_could_serve(
    state, cause
):
    there = having(
        state.get("needs", EVERYTHING), **{k: v for k, v in state.items() if k != "needs"}
    )
    for target in ("client", "backdoor"):
        request = asking(target, cause=cause, guarantee="exact", most_rounds=5)
        with pytest.raises(RefusedRequestError):
            route(request, there)
        weaker = [
            name
            for name in METHODS.keys() & there.methods
            if target in METHODS[name].targets and served(name, request, there)
        ]
        assert weaker
        assert not {*weaker} & {*EXACT}


def served(name, request, there):
    """Whether a method serves a request whose guarantee is no more than approximate."""
    try:
        route(dataclasses.replace(request, method=name, guarantee="approximate"), there)
    except RefusedRequestError:
        return False
    return True


def test_the_order_names_methods_that_may_be_chosen():
    orders = [
        *ORDER.items(),
        ((Target.CLIENT, "privacy"), COOPERATIVE),
        ((Target.CLASS, "privacy"), DROPPED),
        ((Target.SAMPLES, "privacy"), (CERTIFIED, *LOGGED)),
        *(((target, cause), EXACT) for target in Target for cause in POLICY),
    ]
    assert {*ORDER} == {(target, cause) for target in Target for cause in POLICY} - {
        (target, "malicious") for target in DATA
    }
    for (target, cause), names in orders:
        for name in names:
            assert METHODS[name].routed
            assert METHODS[name].federated
            assert target in METHODS[name].targets
            assert METHODS[name].safe or cause == "privacy"


# ---------------------------------------------------------------- methods 10.1
CC, CD = "client class samples", "class samples"
TABLE = {
    # name: needs, targets, guarantee; whom it is not for
    "fisher-mask": ({Need.TARGET, R}, CC, "none", "attackers events"),
    "activation-mask": ({Need.TARGET, R, V}, CC, "none", "attackers events routes"),
    "grad-mask": ({Need.TARGET, R, V}, CC, "none", "attackers events routes"),
    "random-mask": ({R}, CC, "none", "attackers events routes"),
    "fisher-noise": ({Need.TARGET, R}, CD, "none", "attackers events routes"),
    "tfidf": ({Need.TARGET, R, V, Y}, "class", "none", "attackers events"),
    "ascent": ({Need.TARGET, R, Y}, CD, "none", "attackers events"),
    "label-flip": ({Need.TARGET, R, Y}, CD, "none", "attackers events"),
    "amnesiac": ({Need.TARGET, R, G}, CC, "none", "attackers events"),
    "macforget": ({Need.TARGET, R, Y}, CD, "none", "attackers events routes"),
    "pga": ({Need.TARGET, R, L}, "client", "none", "attackers several events routes"),
    "rapid-retraining": ({R, I}, CC, "exact", ""),
    "noisy-gd": ({R}, CC, "none", "routes"),
    "rcad": ({R}, CC, "none", "routes"),
    "ffmu": ({Need.TARGET, F}, "samples", "conditional", "attackers events"),
    "sisa": ({Need.DROP}, "samples", "exact", "attackers federations routes"),
    "ij": ({Need.TARGET, R}, "samples", "none", "attackers events routes"),
}


def test_what_is_there_wherever_something_else_is():
    assert with_implied({H}) == {H, S, I}
    assert with_implied({S}) == {S, I}
    assert with_implied({Need.TARGET}) == {Need.TARGET, Need.DROP}
    for need in EVERYTHING - {H, S, Need.TARGET}:
        assert with_implied({need}) == {need}
    assert missing("random-mask", {Need.TARGET}) == (R,)
    assert missing("kd", {S, Need.TARGET}) == (H, U)


def test_what_holders_compute_is_catalogued_as_specified():
    assert {*TABLE} == {*HOLDERS}
    assert {**SERVER, **HOLDERS} == METHODS
    assert not {*SERVER} & {*HOLDERS}
    for name, (needs, targets, guarantee, not_for) in TABLE.items():
        entry = HOLDERS[name]
        flags = {
            "attackers": entry.safe,
            "several": entry.several,
            "events": entry.events,
            "routes": entry.routed,
            "federations": entry.federated,
        }
        assert (name, entry.needs) == (name, needs)
        assert (name, entry.targets) == (name, {*targets.split()})
        assert (name, entry.guarantee) == (name, guarantee)
        assert (name, {f for f, given in flags.items() if not given}) == (name, {*not_for.split()})
        assert entry.replays == (name == "rapid-retraining")
    for name, entry in METHODS.items():  # whoever must answer could lie
        assert not (entry.safe and entry.needs & {Need.TARGET, Need.DROP}), name


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        ({Need.RETAINED}, "; not would work"),
        (PLAIN, "; fedup or not would work"),
        ({*PLAIN, Need.LEDGER}, "; fedup, drift or not would work"),
        (set(), ""),
    ],
)
def test_a_refusal_names_what_would_work_and_only_that(needs, expected):
    # Neither the method refused, nor those that are there for comparison alone.
    lacking = "history of every round and unlabelled server data, which is not recorded"
    with pytest.raises(MissingNeedError) as caught:
        route(asking(cause="malicious", method="kd"), having(needs))
    assert str(caught.value) == f"kd needs {lacking}{expected}"
    with pytest.raises(MissingNeedError) as caught:
        route(asking(cause="malicious", method="random"), having(needs - {Need.LAST}))
    assert "random would" not in str(caught.value)
