"""The infinitesimal jackknife on the last layer, or by the diagonal (``methods`` 2.14)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from strategies.actions import Curvature
from strategies.memory import Memory
from strategies.methods.interface import UNKNOWN, Network, Situation, Unlearned
from strategies.methods.survey import Findings, Survey, conduct, squares_of
from unlearning import jackknife
from unlearning.catalogue import Need
from unlearning.errors import MissingNeedError
from unlearning.parameters import Parameters, copied, trained_part
from unlearning.plan import Plan
from unlearning.sums import Statistics


@dataclass(frozen=True, kw_only=True)
class Jackknife:
    """Correct the model once, by the Hessian of all rows and the gradient of the forgotten.

    Sums of one client far longer than others' are shortened, and a correction longer than
    ``longest`` is refused: nothing else stands between a liar and the weights.

    Attributes
    ----------
    scope
        The last layer, exactly; all layers, by the diagonal of the Fisher information; or, with
        ``auto``, the last layer where it can be done. What training does not move stays: the last
        layer cannot be done where part of it is frozen, or the server knows of no classes.
    ridge, damping
        Added to the mean Hessian's diagonal, of the last layer and of the diagonal; over 0.
    longest
        Of the correction, in units of what is corrected; over 0.
    """

    name: str = "ij"
    scope: Literal["auto", "last", "diag"] = "auto"
    ridge: float = jackknife.RIDGE
    damping: float = jackknife.DAMPING
    longest: float = jackknife.LONGEST
    network: Network = UNKNOWN

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for sums over their rows, and correct the model.

        Raises
        ------
        MissingNeedError
            If the last layer is asked for, and cannot be done.
        ParametersError
            If the correction is too long.
        """
        model = situation.model
        last = self._last(model)
        if last is None:
            found = yield from self._by_diagonal(situation)
            gradient, hessian = found.totals["gradient"], found.totals["hessian"]
            trained = trained_part(model, self.network.trained)
            moved = jackknife.corrected_diagonally(trained, gradient, hessian, self.damping)
            after = copied(model) | moved
            told: dict[str, str | float] = {"scope": "diag", "damping": self.damping}
            names: Collection[str] = list(trained)
        else:
            layer, forms = last
            found = yield from self._of_the_last(situation, layer, forms)
            gradient, hessian = found.totals["gradient"], found.totals["hessian"]
            after = jackknife.corrected(model, layer, hessian, gradient, self.ridge)
            told = {"scope": "last", "ridge": self.ridge}
            names = [name for name in jackknife.names_of(layer) if name in model]
        length = jackknife.check_length(model, after, names, self.longest)
        warning = jackknife.warning(gradient.count, hessian.count)
        return Unlearned(
            after,
            settings={
                "rows": gradient.count,
                "of": hessian.count,
                **told,
                "length": round(length, 4),
                **found.settings,
            },
            warnings=(*found.warnings, *(() if warning is None else (warning,))),
        )

    def _last(self, model: Parameters) -> tuple[str, dict[str, dict[str, torch.Tensor]]] | None:
        """Return the last layer and the forms of its sums; ``None`` for the diagonal."""
        if self.scope == "diag":
            return None
        try:
            if not self.network.classes:
                raise MissingNeedError(
                    f"ij of the last layer needs {Need.CLASSES}, and the server knows of none; "
                    "set ij.scope=diag"
                )
            layer = jackknife.last_layer(model, self.network.trained)
            hessian, gradient = jackknife.expected(model, layer)
        except MissingNeedError:
            if self.scope == "last":
                raise
            return None
        return layer, {"hessian": hessian, "gradient": gradient}

    def _of_the_last(
        self, situation: Situation, layer: str, forms: Mapping[str, Parameters]
    ) -> Plan[Findings]:
        def check(groups: Mapping[str, Statistics]) -> None:
            hessian = groups["hessian"]
            jackknife.factorised(hessian.sums[layer], max(1, hessian.count), self.ridge)

        groups = {
            group: {name: torch.empty_like(tensor, device="cpu") for name, tensor in form.items()}
            for group, form in forms.items()
        }
        survey = self._survey("last", groups, signed=groups, shortened=groups, check=check)
        return (yield from conduct(situation, survey))

    def _by_diagonal(self, situation: Situation) -> Plan[Findings]:
        model = situation.model
        squares = squares_of(model, self.network.trained)
        slopes = {name: torch.empty_like(model[name]) for name in squares}
        groups = {"hessian": squares, "gradient": slopes}
        survey = self._survey("diag", groups, signed=("gradient",), shortened=("gradient",))
        return (yield from conduct(situation, survey))

    def _survey(
        self, scope: Literal["last", "diag"], groups: Mapping[str, Parameters], **more: Any
    ) -> Survey:
        return Survey(
            method=self.name,
            ask=lambda selection: Curvature(**selection.rows(), scope=scope),
            groups=groups,
            forgotten="gradient",
            whole="hessian",
            **more,
        )
