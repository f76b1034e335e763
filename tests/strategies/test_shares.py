"""Which shares a client is told, round after round."""

from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.memory import LastRound, Memory
from strategies.shares import Shares

A, B = "client-0000", "client-0001"


class Names:
    """A directory of two clients."""

    def clients(self):
        return (A, B)


def remembered(memory, number, weights):
    memory.remember(LastRound(number, {}, {c: {} for c in weights}, weights), list(weights))


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
@settings(max_examples=200, deadline=None)
def test_whatever_is_lost_a_client_that_hears_a_message_knows_all_its_shares(course):
    """Each round: whether the message of client A arrives, and whether its reply does."""
    memory = Memory([])
    shares = Shares(memory, Names(), on=True)
    logged, true = {}, {}
    for number, (heard, answered) in enumerate(course, start=1):
        told = dict(shares.of(A))
        shares.asked(A, number)
        if heard:
            logged = {n: told.get(n, share) for n, share in logged.items()} | {number: None}
        weights = {B: 3.0} | ({A: 1.0} if heard and answered else {})
        remembered(memory, number, weights)
        if heard:
            true[number] = 0.25 if answered else 0.0
    assert {n: shares.of(A).get(n, share) for n, share in logged.items()} == true


def test_after_a_replay_everybody_is_told_of_every_round_of_it_until_it_is_heard_of_again():
    memory = Memory([])
    shares = Shares(memory, Names(), on=True)
    for number in (1, 2, 3):
        for client in (A, B):
            shares.asked(client, number)
        remembered(memory, number, {A: 1.0, B: 3.0} if number < 3 else {A: 1.0})
    assert (shares.of(A), shares.of(B)) == ({3: 1.0}, {2: 0.75, 3: 0.0})
    shares.mixed_up({A: 3, B: 1})
    # Rounds 2 and 3 are played again; B enters neither.
    shares.replayed(1, 3, {2: {A: 1.0}, 3: {A: 1.0}})
    memory.rewind(1)
    memory.shares = {A: (3, 1.0)}
    assert (shares.of(A), shares.of(B)) == ({2: 1.0, 3: 1.0}, {2: 0.0, 3: 0.0})
    assert memory.unlogged == {B: 1}  # what was wrong before is wrong still
    for client in (A, B):
        shares.asked(client, 4)
    remembered(memory, 4, {A: 1.0})
    assert (shares.of(A), shares.of(B)) == ({4: 1.0}, {2: 0.0, 3: 0.0, 4: 0.0})


def test_what_is_mixed_up_is_so_from_the_earliest_round_on():
    memory = Memory([])
    shares = Shares(memory, Names(), on=True)
    for first in (4, 2, 3):
        shares.mixed_up({A: first})
    assert memory.unlogged == {A: 2}
