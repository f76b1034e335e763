"""The detectors a federation can choose from, by name."""

from collections.abc import Callable
from dataclasses import dataclass

from strategies.detectors.cohort import CohortDetector
from strategies.detectors.fldetector import FLDetector
from strategies.detectors.interface import Detector
from strategies.detectors.lfighter import LFighterDetector


@dataclass(frozen=True)
class DetectorEntry:
    """One choice, with what to expect of it."""

    make: Callable[[float | None], Detector]
    """Makes a fresh one with a threshold, or with the detector's default for ``None``."""
    summary: str
    """What it looks for, on one line."""
    catches: str
    """Attacks it was built for."""
    limits: str
    """What it misses or mistakes, and what it needs."""
    source: str
    """Where the rule comes from."""


def _cohort(threshold: float | None) -> Detector:
    return CohortDetector() if threshold is None else CohortDetector(threshold)


def _lfighter(threshold: float | None) -> Detector:
    return LFighterDetector() if threshold is None else LFighterDetector(cohesion=threshold)


def _fldetector(threshold: float | None) -> Detector:
    return FLDetector() if threshold is None else FLDetector(ratio=threshold)


DETECTORS: dict[str, DetectorEntry] = {
    "cohort": DetectorEntry(
        make=_cohort,
        summary="A minority whose updates agree with one another far more than the rest do.",
        catches="Colluders: the same backdoor or label flip at two or more clients; sybils.",
        limits=(
            "A lone attacker has no cohort; strong heterogeneity hides one; attackers who "
            "decorrelate on purpose are not caught. Needs 5 updates a round. The threshold, a "
            "difference of mean cosines, is best tuned on attack-free rounds."
        ),
        source="Secateur; no publication.",
    ),
    "lfighter": DetectorEntry(
        make=_lfighter,
        summary="The small or dense cluster of gradients of the two busiest output classes.",
        catches="Label flipping between two classes by two or more clients.",
        limits=(
            "Needs an output layer with a row a class, 5 updates a round and mildly heterogeneous "
            "data. Misses lone attackers and whatever does not show in two output rows. Flags "
            "only a cluster that also passes the cohort test, unlike the published rule, which "
            "drops one in every round; the threshold is that test's."
        ),
        source=(
            "Jebreel, Domingo-Ferrer, Sanchez, Blanco-Justicia. LFighter: Defending against the "
            "label-flipping attack in federated learning. Neural Networks 170, 2024."
        ),
    ),
    "fldetector": DetectorEntry(
        make=_fldetector,
        summary="Updates that do not follow from the client's own earlier ones.",
        catches="Boosted updates and model replacement, also by a single client.",
        limits=(
            "Silent for the first 10 rounds; remembers the last 11. Also flags honest "
            "updates that are much larger or noisier than the others', and tells less where "
            "clients are sampled. Needs 5 clients with history. The threshold is the quotient of "
            "the suspects' and the others' mean scores."
        ),
        source=(
            "Zhang, Cao, Jia, Gong. FLDetector: Defending federated learning against model "
            "poisoning attacks via detecting malicious clients. KDD 2022, arXiv:2207.09209."
        ),
    ),
}
