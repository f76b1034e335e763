"""Which method serves a request: the table of ``methods`` 10.3, and what must hold for any."""

import contextlib
import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearning import routing
from unlearning.catalogue import (
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
    NoExactMethodError,
    NoLastRoundError,
    RefusedRequestError,
    TooFewClientsError,
    UnsafeMethodError,
)
from unlearning.routing import EXACT, NEED_MAJORITY, ORDER, POLICY, Available, Request, route

EVERYTHING = frozenset(Need)
PLAIN = frozenset({Need.LAST, Need.RETAINED})
A, B, C = "client-0000", "client-0001", "client-0002"


def having(needs, *, participants=10, default="fedup", without=(), **more):
    replay = {name: more.pop(name) for name in EXACT if name in more}
    ready = frozenset(METHODS) - frozenset(without)
    return Available(frozenset(needs), participants, replay, default, methods=ready, **more)


def asking(target="client", clients=(A,), cause="privacy", **terms):
    return Request(Target(target), clients, cause, **terms)


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


def test_classes_and_samples_need_their_holders():
    with pytest.raises(ImpossibleRequestError, match="class statistics"):
        route(asking("class"), having(EVERYTHING))
    with pytest.raises(ImpossibleRequestError, match="the whole client can be forgotten instead"):
        route(asking("samples"), having(EVERYTHING))
    with pytest.raises(ImpossibleRequestError, match="class statistics"):
        route(asking("class", method="fedup"), having(EVERYTHING))


# ---------------------------------------------------------------- the table, cell by cell
L, S, H = Need.LAST, Need.SAMPLED_HISTORY, Need.HISTORY
U, R, P = Need.UNLABELLED, Need.RETAINED, Need.LEDGER
I, K = Need.INITIAL, Need.CHECKPOINTS  # noqa: E741
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
]


@pytest.mark.parametrize(("terms", "needs", "without", "expected", "passed"), CELLS)
def test_every_cell_of_the_table(terms, needs, without, expected, passed):
    found = route(asking(**terms), having(needs, without=without.split()))
    assert found.method == expected
    assert [name for name, _ in found.passed_over] == passed.split()


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
    ],
)
def test_rows_of_the_table_end_in_a_refusal(terms, message):
    with pytest.raises(MissingNeedError, match=message):
        route(asking(**terms), having(()))
    with pytest.raises(MissingNeedError, match=message.split(" and ")[0]):
        route(asking(**terms), having(RECORDED - {L, H, K}))  # nobody answers
    with pytest.raises(MissingNeedError, match="fedup needs last round"):
        route(asking(**terms | {"guarantee": "approximate"}), having({R}, without=["not"]))


def test_retraining_in_the_place_of_an_approximation_keeps_to_the_budget():
    request = asking(guarantee="approximate", most_rounds=6)
    there = {I, R}
    assert route(request, having(there, without=["not"], retrain=6)).method == "retrain"
    with pytest.raises(RefusedRequestError, match="fedup needs last round"):
        route(request, having(there, without=["not"], retrain=7))


@pytest.mark.parametrize("name", [n for n, e in SERVER.items() if e.guarantee != "exact"])
def test_who_wants_deletion_proven_is_not_served_by_an_approximation(name):
    for cause in POLICY:
        with pytest.raises(NoExactMethodError, match=f"^{name} is not exact"):
            route(asking(cause=cause, method=name, guarantee="exact"), having(EVERYTHING))


def test_what_nothing_here_serves_is_refused_whatever_is_there_and_on_whatever_terms():
    for terms in ({}, LEAVER, HELPER, {"cause": "malicious"}):
        for target, message in (("class", "class statistics"), ("samples", "whole client")):
            with pytest.raises(ImpossibleRequestError, match=message):
                route(asking(target, **terms), having(EVERYTHING))
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


# ---------------------------------------------------------------- who stays, and who was there
def named(name, clients, **terms):
    exact = METHODS[name].guarantee == "exact"
    return asking(
        clients=clients, method=name, guarantee="exact" if exact else "approximate", **terms
    )


@pytest.mark.parametrize("name", SERVER)
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


@pytest.mark.parametrize("name", METHODS)
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


@pytest.mark.parametrize("name", SERVER)
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


@pytest.mark.parametrize("name", SERVER)
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


@pytest.mark.parametrize("name", [n for n, e in SERVER.items() if not e.safe])
def test_methods_that_trust_the_target_are_refused_for_attackers(name):
    request = asking(cause="malicious", method=name, guarantee="approximate")
    with pytest.raises(UnsafeMethodError, match=rf"{name} trusts .*; fedup, .* would work"):
        route(request, having(EVERYTHING))


@pytest.mark.parametrize("name", SERVER)
def test_a_named_method_is_honoured_only_if_its_needs_hold(name):
    entry = METHODS[name]
    request = asking(method=name, guarantee=None if entry.guarantee == "exact" else "approximate")
    assert route(request, having(entry.needs)).method == name
    for need in entry.needs:
        left = EVERYTHING - {need} - {n for n in EVERYTHING if need in with_implied({n})}
        with pytest.raises(MissingNeedError) as caught:
            route(request, having(left))
        assert str(caught.value).startswith(f"{name} needs {need}, which is not ")
        assert ("recorded" in str(caught.value)) == (need in RECORDED)


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
    with pytest.raises(ImpossibleRequestError, match="no client is named"):
        route(asking(clients=()), having(EVERYTHING))


# ---------------------------------------------------------------- whatever is asked
REQUESTS = st.builds(
    Request,
    target=st.sampled_from(Target),
    clients=st.lists(st.sampled_from("abcdefgh"), unique=True).map(tuple),
    cause=st.sampled_from(["malicious", "privacy"]),
    target_cooperates=st.booleans(),
    retained_cooperate=st.booleans(),
    guarantee=st.sampled_from([None, "exact", "approximate"]),
    method=st.sampled_from([None, *METHODS]),
    most_rounds=st.sampled_from([None, 3, 30]),
)
STATES = st.builds(
    Available,
    needs=st.frozensets(st.sampled_from(Need)),
    participants=st.integers(1, 12),
    replay=st.fixed_dictionaries({name: st.integers(1, 40) for name in EXACT}),
    default=st.sampled_from(["fedup", "drift"]),
    waiting=st.integers(0, 6),
    methods=st.frozensets(st.sampled_from(sorted(METHODS))) | st.just(frozenset(METHODS)),
    fewest=st.integers(1, 4),
    present=st.none() | st.frozensets(st.sampled_from("abcdefgh")),
)


@settings(deadline=None)
@given(REQUESTS, STATES)
def test_no_request_is_served_by_what_must_not_serve_it(request, available):
    try:
        found = route(request, available)
    except RefusedRequestError:
        return
    entry = METHODS[found.method]
    if request.cause == "malicious":
        assert entry.safe
        assert Need.TARGET not in entry.needs
    if request.promise == "exact":
        assert entry.guarantee == "exact"
    assert not missing(found.method, available.needs)
    assert request.clients
    assert len(request.clients) < available.participants
    assert request.target in entry.targets
    assert request.method in (None, found.method)
    assert entry.routed or request.method == found.method
    assert found.method in available.methods
    if request.most_rounds is not None and found.method in EXACT:
        assert available.replay[found.method] <= request.most_rounds


@contextlib.contextmanager
def ascent(*, safe):
    """Put a method in the catalogue, and first in every order, in which the target computes."""
    entry = Entry(
        "The target climbs its own loss",
        frozenset({Need.TARGET}),
        frozenset({Target.CLIENT, Target.BACKDOOR}),
        "none",
        safe,
        "1",
        "0",
        "made up",
        "2.12",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "ascent", entry)
        patch.setattr(routing, "COOPERATIVE", ("ascent", *routing.COOPERATIVE))
        for key, names in ORDER.items():
            patch.setitem(ORDER, key, ("ascent", *names))
        yield


@settings(deadline=None)
@given(REQUESTS, STATES, st.booleans(), st.booleans())
def test_attackers_never_reach_what_they_compute_in_and_leavers_who_help_do(
    request, available, safe, by_name
):
    if by_name:
        request = dataclasses.replace(request, method="ascent")
    with ascent(safe=safe):
        available = dataclasses.replace(available, methods=available.methods | {"ascent"})
        try:
            method = route(request, available).method
        except RefusedRequestError:
            method = None
    # It is first in every order and asks nobody else: leavers reach it whenever they help.
    expected = (
        request.cause == "privacy"
        and request.target_cooperates
        and Need.TARGET in available.needs
        and request.promise == "approximate"
        and request.target in (Target.CLIENT, Target.BACKDOOR)
        and request.method in (None, "ascent")
        and 0 < len(request.clients) < available.participants
    )
    assert (method == "ascent") == expected


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("target", ["client", "backdoor"])
def test_the_same_request_reaches_it_for_a_leaver_and_not_for_an_attacker(target, safe):
    with ascent(safe=safe):
        there = having(EVERYTHING)
        for method in (None, "ascent"):
            terms = {"guarantee": "approximate", "method": method}
            leaver = asking(target, target_cooperates=True, **terms)
            assert route(leaver, there).method == "ascent"
            attacker = dataclasses.replace(leaver, cause="malicious")
            if method is None:
                assert route(attacker, there).method == "fedup"
                assert route(attacker, there).passed_over[0][0] == "ascent"
                assert route(asking(target, **terms), there).method == "fedup"
                continue
            with pytest.raises(UnsafeMethodError, match="ascent trusts what"):
                route(attacker, there)
            with pytest.raises(MissingNeedError, match="ascent needs target answers"):
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
    for (target, cause), names in ORDER.items():
        for name in names:
            assert METHODS[name].routed
            assert target in METHODS[name].targets
            assert METHODS[name].safe or cause == "privacy"


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
