"""FedUP's pruning, and pruning at random, on models in files."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import model_validator
from torch import Tensor

from server.offline import Case
from server.offline_settings import Ordered, Seed
from strategies.methods.fedup import FedUP as RunningFedUP
from strategies.methods.fedup import adaptive, false_positives
from strategies.methods.interface import Unlearned, done
from unlearning import fedup
from unlearning.parameters import Parameters, mean_tensor
from unlearning.plan import Plan
from unlearning.randomness import generator


class Pruning(Ordered):
    """Zero weights at random, as many as FedUP would (``methods`` 1.7)."""

    rate: float | Literal["adaptive"] = RunningFedUP.rate
    """Share of each prunable tensor, in [0, 1]; ``adaptive`` by how alike the others are."""
    prune_bias: bool = False
    """Whether the biases of these layers are pruned as well."""
    seed: Seed = 0
    """What is drawn at random depends on it."""

    @property
    def ranking(self) -> fedup.Score:
        """Return what weights are ranked by."""
        return "random"

    @model_validator(mode="after")
    def _check_rate(self) -> Self:
        if self.rate != "adaptive" and not 0 <= self.rate <= 1:
            raise ValueError(f"rate = {self.rate} is outside [0, 1]; give a share, or adaptive")
        return self

    def plan(self, case: Case) -> Plan[Unlearned]:
        """Prune the average of the others; yields nothing."""
        score = self.ranking
        names = self.prunable(case)
        rate, found, warnings = self._rate(case, names)
        if self.prune_bias:
            biases = (name.removesuffix("weight") + "bias" for name in names)
            names += tuple(name for name in biases if name in case.before)
        retained = case.average(case.others)
        case.tell("comparing clients")
        percentiles = fedup.conflict_percentiles(case.locals_, case.before, case.forgotten, names)
        warnings += false_positives(percentiles)
        masks = self._masks(case, retained, names, rate, score)
        if rate > 0 and score != "natural" and not any(bool(mask.any()) for mask in masks.values()):
            warnings.append("nothing was zeroed: the clients agree with the others on every weight")
        for name, mask in masks.items():
            if bool(mask.all()) and mask.numel():
                warnings.append(f"all of {name} was zeroed: nothing of it is left to recover from")
        return done(
            Unlearned(
                fedup.prune(retained, masks),
                masks,
                self.told(**found),
                percentiles=percentiles,
                warnings=tuple(warnings),
            )
        )

    def _masks(
        self,
        case: Case,
        retained: Parameters,
        names: Sequence[str],
        rate: float,
        score: fedup.Score,
    ) -> dict[str, Tensor]:
        case.tell("choosing weights")
        draw = generator(self.seed, "random pruning")
        masks: dict[str, Tensor] = {}
        for name in names:  # so that no map but the mask is there for the whole model
            flagged = {name: mean_tensor(name, case.sent)}
            masks |= fedup.conflict_mask(
                fedup.disagreement(flagged, retained, (name,)),
                case.before,
                rate,
                score=score,
                flagged=flagged,
                generator=draw,
            )
        return masks

    def _rate(self, case: Case, names: Sequence[str]) -> tuple[float, dict[str, Any], list[str]]:
        if self.rate != "adaptive":
            return self.rate, {"rate_chosen": "fixed"}, []
        schema = case.before.schema
        linear = [name for name in names if schema[name].dim() == 2]
        models = [case.locals_[client] for client in case.others]
        rate, sim, warnings = adaptive(models, linear[-1:])  # no other layer is read
        found = {"rate": rate, "rate_chosen": "adaptive", "similarity": sim, "last": linear[-1]}
        return rate, found, [*warnings, *self.doubts(case, linear, "last")]


class FedUP(Pruning):
    """Zero the large weights that the clients and the others disagree on most (``methods`` 1)."""

    score: fedup.Score = RunningFedUP.score
    """What weights are ranked by."""

    @property
    def ranking(self) -> fedup.Score:
        """Return what weights are ranked by."""
        return self.score
