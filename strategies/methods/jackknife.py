"""The infinitesimal jackknife on the last layer (``methods`` 2.14)."""

from collections.abc import Collection
from dataclasses import dataclass

import torch

from strategies.actions import Curvature, joined
from strategies.memory import Memory
from strategies.methods.interface import Situation, Unlearned
from strategies.methods.masks import checked
from unlearning import jackknife
from unlearning.parameters import Parameters
from unlearning.plan import Ask, Plan
from unlearning.sums import added


@dataclass(frozen=True, kw_only=True)
class Jackknife:
    """Correct the last layer once, by the Hessian of all rows and the gradient of the forgotten.

    Attributes
    ----------
    ridge
        Added to the mean Hessian's diagonal, over 0.
    """

    name: str = "ij"
    ridge: float = jackknife.RIDGE

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for sums over their rows, and correct the model."""
        model = situation.model
        layer = jackknife.last_layer(model)
        forms = zip(("hessian", "gradient"), jackknife.expected(model, layer), strict=True)
        like = {
            group: {name: torch.empty_like(tensor, device="cpu") for name, tensor in form.items()}
            for group, form in forms
        }
        answers = yield Ask(
            Curvature.action,
            to=situation.active,
            arrays=model,
            config=Curvature(**situation.selection.rows()).config(),
            expects=joined(**like),
        )
        parts = checked(answers, tuple(like), like, signed=True)
        hessian, gradient = added(parts["hessian"]), added(parts["gradient"])
        warning = jackknife.warning(gradient.count, hessian.count)
        return Unlearned(
            jackknife.corrected(model, layer, hessian, gradient, self.ridge),
            settings={"rows": gradient.count, "of": hessian.count, "ridge": self.ridge},
            warnings=() if warning is None else (warning,),
        )
