"""FedUP pruning (arXiv:2508.13853), and pruning at random for comparison."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned, done
from unlearning import fedup
from unlearning.errors import ImpossibleRequestError, NoLastRoundError, SecateurError
from unlearning.parameters import Parameters, flat, mean, prunable_names
from unlearning.plan import Plan
from unlearning.randomness import generator

ALIKE, BENIGN_RATE = 0.95, 0.30
"""Leavers among clients this similar are cut at this rate, not the adaptive one (``methods`` 1.3):
their conflicts are small, and more must go to leave the basin."""


@dataclass(frozen=True)
class FedUPEvidence:
    """One detection event: the disagreement in its own round (``methods`` 1.5, 1.6)."""

    disagreement: Mapping[str, torch.Tensor]
    flagged: Mapping[str, torch.Tensor]
    """Size of the weights of the event's clients' mean model m; for ``malmag`` alone."""
    percentiles: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class FedUP:
    """FedUP pruning, arXiv:2508.13853; asks nobody.

    Attributes
    ----------
    rate
        Share of each prunable tensor to zero, in [0, 1], or ``"adaptive"`` (eq. 3-6).
    prunable
        Names of the weights of linear and convolutional layers, in forward order; judged by name
        and shape where not given.
    score
        What weights are ranked by (``methods`` 1.7).
    """

    rate: float | Literal["adaptive"] = "adaptive"
    prunable: Sequence[str] | None = None
    score: fedup.Score = "abs"
    name: str = "fedup"

    def __post_init__(self) -> None:
        if self.rate != "adaptive" and not 0 <= self.rate <= 1:
            raise SecateurError(f"the pruning rate must lie in [0, 1], got {self.rate}")

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> FedUPEvidence:
        """Keep the disagreement between these clients and the retained ones."""
        last = memory.last
        if last is None or not set(clients) <= last.locals_.keys():
            raise NoLastRoundError(
                f"FedUP needs the last round of {', '.join(sorted(clients))}, and it was not "
                "remembered; let them take part once more, or retrain without them"
            )
        names = self._names(model)
        if self.rate == "adaptive":
            last_layer(model, names)  # refused now if there is none
        flagged = mean([last.locals_[client] for client in sorted(clients)])
        return FedUPEvidence(
            fedup.disagreement(flagged, model, names),
            {name: flagged[name].abs() for name in names} if self.score == "malmag" else {},
            fedup.conflict_percentiles(last.locals_, last.previous, clients, names),
        )

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Prune; yields nothing."""
        names = self._names(situation.model)
        rate, settings, warnings = self._rate(situation, names)
        events: list[FedUPEvidence] = situation.evidence
        dis = fedup.largest_disagreement([event.disagreement for event in events])
        masks = fedup.conflict_mask(
            dis,
            situation.previous,
            rate,
            score=self.score,
            flagged=fedup.largest_disagreement([event.flagged for event in events]),
            generator=generator(situation.seed, "random pruning", situation.number),
        )
        pruned = fedup.prune(situation.model, masks)
        percentiles = {c: share for event in events for c, share in event.percentiles.items()}
        warnings += false_positives(percentiles)
        return done(
            Unlearned(pruned, masks, settings, rate, percentiles=percentiles, warnings=warnings)
        )

    def _names(self, model: Parameters) -> tuple[str, ...]:
        return tuple(self.prunable) if self.prunable is not None else prunable_names(model)

    def _rate(
        self, situation: Situation, names: Sequence[str]
    ) -> tuple[float, dict[str, str | float | int], tuple[str, ...]]:
        if self.rate != "adaptive":
            return self.rate, {"rate": self.rate, "rate_chosen": "fixed"}, ()
        last = situation.memory.last
        if last is None:
            raise NoLastRoundError("the adaptive rate needs the last round; set a fixed rate")
        rate, sim, warnings = adaptive([last.locals_[c] for c in situation.retained], names)
        if sim is None:
            return rate, {"rate": rate, "rate_chosen": "adaptive"}, warnings
        if sim >= ALIKE and all(entry.cause == "privacy" for entry in situation.pending):
            rate = BENIGN_RATE
        return rate, {"rate": rate, "rate_chosen": "adaptive", "similarity": sim}, warnings


def adaptive(
    models: Sequence[Parameters], names: Sequence[str]
) -> tuple[float, float | None, tuple[str, ...]]:
    """Return the adaptive rate, the similarity that it follows from, and what to be warned of.

    Parameters
    ----------
    models
        Of the retained clients.
    names
        Prunable tensors, in forward order.
    """
    sim = fedup.similarity([last_layer(model, names) for model in models])
    if sim is None:
        warning = "one retained client: similarity is undefined, the smallest rate was used"
        return fedup.ADAPTIVE_MIN, None, (warning,)
    return fedup.adaptive_rate(sim), sim, ()


def false_positives(percentiles: Mapping[str, float]) -> tuple[str, ...]:
    """Return a warning for each client that conflicts little with those who stay."""
    return tuple(
        f"likely_false_positive: {client} conflicts more than only {share:.0%} of the retained "
        "clients"
        for client, share in percentiles.items()
        if share < fedup.FALSE_POSITIVE_PERCENTILE
    )


def last_layer(model: Parameters, names: Sequence[str]) -> torch.Tensor:
    """Return the last linear layer's weight followed by its bias, flattened."""
    linear = [name for name in names if model[name].dim() == 2]
    if not linear:
        raise ImpossibleRequestError("the adaptive rate needs a linear layer; set a fixed rate")
    weight = linear[-1]
    bias = weight.removesuffix("weight") + "bias"
    return flat({name: model[name] for name in (weight, bias) if name in model})
