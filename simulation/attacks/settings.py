"""What attackers do in a scenario, as its ``[attack]`` table says it."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

DEFAULT_PAIRS = {
    "cifar10": ((3, 5), (1, 9)),
    "fashion-mnist": ((0, 6), (2, 4)),
    "mnist": ((4, 9), (3, 5)),
    "digits": ((1, 8), (4, 5)),
    "breast-cancer": ((0, 1),),
}
"""Classes that clean models confuse most, per built-in task; disjoint, the most confused first.

Measured for digits, MNIST and Fashion-MNIST by counting confusions of clean models on the test
data; for CIFAR-10 the usual pairs of cat and dog, and of car and truck.
"""


class Attack(BaseModel):
    """One attack, carried out by every malicious client (``methods`` 7.1)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["backdoor", "label-flip"]
    share: float = Field(gt=0, le=1)
    """Share of each attacker's training examples that are poisoned; the rest stay benign."""
    target: int = Field(0, ge=0)
    """Class that the backdoor's trigger is to produce."""
    pairs: tuple[tuple[int, int], ...] = ()
    """Class pairs whose labels are swapped, in order; empty for the task's most confused ones."""
    colluding: bool = True
    """Whether attackers share trigger, target and pairs; otherwise each has its own."""
    boost: float = Field(1.0, gt=0)
    """Factor on the attacker's update: model replacement uses about the number of clients."""
    start: int = Field(1, ge=1)
    """First round of poisoning."""
    every: int = Field(1, ge=1)
    """Poison only every so many rounds, from the start on."""
    group: int = Field(0, ge=0)
    """Attackers that start together; 0 for all."""
    stagger: int = Field(0, ge=0)
    """Rounds between the start of one group and the next."""

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if bool(self.group) != bool(self.stagger):
            raise ValueError("group and stagger go together: give both or neither")
        return self

    def active(self, attacker: int, number: int) -> bool:
        """Say whether attacker 0, 1, ... poisons in round ``number``."""
        start = self.start + (attacker // self.group * self.stagger if self.group else 0)
        return number >= start and (number - start) % self.every == 0


ATTACKS = {
    "backdoor": "A white 3 x 3 square in a corner makes the model answer the target class; the "
    "attackers' other examples stay benign",
    "label-flip": "The labels of two easily confused classes are swapped on a share of the "
    "attackers' examples",
}
"""Kind -> what it does; both can be boosted, intermittent or staggered."""
