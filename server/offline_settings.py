"""What a method on models in files is: its settings, and the plan that it makes of a ``Case``.

Settings are what ``--set KEY=VALUE`` may change; field ``prune_bias`` is key ``prune-bias``.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from server.offline import Case
from strategies.methods.interface import Unlearned
from unlearning.catalogue import METHODS, Need
from unlearning.errors import ParametersError
from unlearning.parameters import prunable_names
from unlearning.plan import Plan

OPTIONS = {
    Need.INITIAL: "--history DIR",
    Need.LEDGER: "--history DIR",
    Need.SAMPLED_HISTORY: "--history DIR",
    Need.HISTORY: "--history DIR",
    Need.CHECKPOINTS: "--history DIR",
    Need.ROOT: "--data FILE with inputs and targets, and --task NAME",
    Need.UNLABELLED: "--data FILE with inputs, and --task NAME",
}
"""What brings what a method may need; the last round is always there."""


def _split(value: object) -> object:
    """Read ``a,b`` as a list."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
"""Names of tensors, with commas."""
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Method(BaseModel, ABC):
    """The settings of one method, and how it is run."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, alias_generator=lambda name: name.replace("_", "-")
    )

    gap: ClassVar[str] = "what was sent in it stays"
    """What a round means for the result that is not recorded."""

    def needs(self, name: str) -> frozenset[Need]:
        """Return what must be there; ``name`` is that in the catalogue."""
        return METHODS[name].needs & OPTIONS.keys()

    @abstractmethod
    def plan(self, case: Case) -> Plan[Unlearned]:
        """Return the plan that forgets ``case.forgotten``."""

    @property
    def enough(self) -> bool:
        """Return whether some of the answers to an ask will do."""
        return False

    def told(self, **found: Any) -> dict[str, Any]:
        """Return the settings that were used, and what was found of them."""
        return self.model_dump(mode="json") | found


class Asking(Method):
    """A method that asks clients to train."""

    answers: Literal["all", "enough"] = "all"
    """Whether to wait for everybody who is asked, or to go on with those who have answered."""

    @property
    def enough(self) -> bool:
        """Return whether some of the answers to an ask will do."""
        return self.answers == "enough"


class Ordered(Method):
    """A method that has to know the layers."""

    order: Names = ()
    """Weights of linear and convolutional layers, first to last; by name and shape by default."""

    def prunable(self, case: Case) -> tuple[str, ...]:
        """Return the weights of linear and convolutional layers, first to last."""
        schema = case.before.schema
        for name in self.order:
            if name not in schema or not schema[name].is_floating_point():
                raise ParametersError(
                    f"order names {name!r}, and the model has no such tensor of numbers; it has "
                    f"{', '.join(n for n, t in schema.items() if t.dim() > 1)}"
                )
        found = tuple(dict.fromkeys(self.order)) or prunable_names(schema)
        if not found:
            raise ParametersError(
                "no tensor is named *.weight and has two or more dimensions; name the weights of "
                "linear and convolutional layers with --set order=A,B"
            )
        return found

    def doubts(self, case: Case, names: Sequence[str], place: str) -> list[str]:
        """Return a warning where the order of layers is a guess and decides something."""
        told = self.order or case.before.order_told
        # Names that differ in numbers alone, such as fc1 and fc2, are surely in order.
        if told or len({re.sub(r"\d+", "", name) for name in names}) < 2:
            return []
        name = names[0 if place == "first" else -1]
        return [f"{name} was taken for the {place} layer, by its name; see --set order=A,B"]
