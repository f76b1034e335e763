"""Every unlearning method: what it needs, whom it serves, what it promises (``methods`` 10.1)."""

from collections.abc import Collection

from unlearning.entry import DATA, IMPLIED, RECORDED, Entry, Guarantee, Need, Target
from unlearning.holders import HOLDERS

__all__ = [
    "DATA",
    "HOLDERS",
    "METHODS",
    "RECORDED",
    "SERVER",
    "Entry",
    "Guarantee",
    "Need",
    "Target",
    "missing",
    "titled",
    "with_implied",
]

_CLIENTS = frozenset({Target.CLIENT, Target.BACKDOOR})

SERVER: dict[str, Entry] = {
    "fedup": Entry(
        "Zero the large weights on which the forgotten and the others disagree most, then recover",
        frozenset({Need.LAST, Need.RETAINED}),
        _CLIENTS,
        "none",
        True,
        "a few of recovery",
        "K + 1",
        "arXiv:2508.13853",
        "1.1",
    ),
    "drift": Entry(
        "Take back part of how they pulled the model away from the others in all rounds, "
        "then recover",
        frozenset({Need.LEDGER, Need.RETAINED}),
        _CLIENTS,
        "none",
        True,
        "a few of recovery",
        "K + 1",
        "this project",
        "1.9",
    ),
    "not": Entry(
        "Negate the first layer, which knocks the model out of its basin, then recover",
        frozenset({Need.RETAINED}),
        _CLIENTS | DATA,
        "none",
        True,
        "5 to 20 of recovery",
        "0",
        "arXiv:2503.05657",
        "2.3",
    ),
    "negative-gradients": Entry(
        "Subtract every update that they sent, then recover",
        frozenset({Need.HISTORY, Need.RETAINED}),
        _CLIENTS,
        "none",
        True,
        "some of recovery",
        "R (K + 1)",
        "negative gradients, methods 4",
        "4",
    ),
    "federaser": Entry(
        "Replay the recorded rounds without them, directions corrected by short training",
        frozenset({Need.SAMPLED_HISTORY, Need.RETAINED}),
        frozenset({Target.CLIENT}),
        "none",
        False,
        "R / 2 of half the work",
        "(R / 2) (K + 1)",
        "FedEraser, IWQoS 2021",
        "2.4",
        replays=True,
    ),
    "fedrecover": Entry(
        "Replay all rounds without them, the others' updates estimated from the recorded ones",
        frozenset({Need.HISTORY, Need.RETAINED}),
        _CLIENTS,
        "none",
        True,
        "some of R, at most R",
        "R (K + 1)",
        "arXiv:2210.10936",
        "2.5",
        replays=True,
    ),
    "fast": Entry(
        "Subtract their recorded updates, latest round first, while accuracy on server data holds, "
        "then fine-tune on it",
        frozenset({Need.HISTORY, Need.ROOT}),
        _CLIENTS,
        "none",
        True,
        "0",
        "R (K + 1)",
        "FAST, methods 2.6",
        "2.6",
    ),
    "kd": Entry(
        "Subtract every update that they sent, then distil the old model into what is left",
        frozenset({Need.HISTORY, Need.UNLABELLED}),
        _CLIENTS,
        "none",
        True,
        "0",
        "R (K + 1)",
        "arXiv:2201.09441",
        "2.7",
    ),
    "verifi": Entry(
        "Scale their last contribution down and the others' up for three rounds",
        frozenset({Need.LAST, Need.RETAINED}),
        frozenset({Target.CLIENT}),
        "none",
        False,
        "3",
        "K + 1",
        "arXiv:2205.12709",
        "2.10",
        events=False,
        routed=False,
    ),
    "rollback": Entry(
        "Go back to the last model from before they first took part and train again without them",
        frozenset({Need.CHECKPOINTS, Need.RETAINED}),
        _CLIENTS | DATA,
        "exact",
        True,
        "R less those before they joined",
        "one per joining",
        "the gold baseline",
        "10.3",
        replays=True,
    ),
    "retrain": Entry(
        "Train again from round 0 without them",
        frozenset({Need.INITIAL, Need.RETAINED}),
        _CLIENTS | DATA,
        "exact",
        True,
        "R",
        "1",
        "the gold baseline",
        "2.1",
        replays=True,
    ),
    "natural": Entry(
        "Go on without them and change nothing else",
        frozenset({Need.RETAINED}),
        _CLIENTS | DATA,
        "none",
        True,
        "any number",
        "0",
        "the null hypothesis",
        "2.2",
        routed=False,
    ),
    "random": Entry(
        "Zero as many weights as FedUP would, chosen at random, then recover",
        frozenset({Need.LAST, Need.RETAINED}),
        _CLIENTS,
        "none",
        True,
        "a few of recovery",
        "K + 1",
        "arXiv:2508.13853, Fig. 5",
        "1.7",
        routed=False,
    ),
}
"""Methods that the server carries out, with no more help of clients than ordinary training."""

METHODS = SERVER | HOLDERS
"""Name -> what there is to know. Who has the inputs runs it; nothing here does."""


def with_implied(needs: Collection[Need]) -> frozenset[Need]:
    """Return needs and whatever is there wherever they are."""
    found = frozenset(needs)
    return found.union(*(IMPLIED.get(need, frozenset()) for need in found))


def missing(name: str, available: Collection[Need]) -> tuple[Need, ...]:
    """Return what a method needs and is not there, sorted."""
    return tuple(sorted(METHODS[name].needs - with_implied(available)))


def titled(name: str) -> str:
    """Return how reports name a method."""
    entry = METHODS.get(name)
    return entry.title if entry is not None and entry.title else name
