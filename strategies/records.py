"""What happened: plain records of rounds and unlearnings, for stores, logs and reports."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from strategies.detectors.interface import Finding


class Phase(StrEnum):
    """What a round was for."""

    TRAIN = "train"
    UNLEARN = "unlearn"
    """A training round at whose end clients were forgotten."""
    RECOVER = "recover"
    RETRAIN = "retrain"


@dataclass
class MarkCheck:
    """What a client that left says of its marks (``methods`` 2.10); its word, and no proof."""

    client: str
    kind: str
    """``erroneous`` or ``forgettable``."""
    marked: int | None = None
    """Round whose model was the first with the marked update in it."""
    markers: int = 0
    before: float | None = None
    """Mean loss on the markers under the model that marking started from."""
    after: float | None = None
    """The same under the first published model with the marked update in it."""
    losses: dict[int, float] = field(default_factory=dict)
    """The same under the models of the rounds after it was forgotten, by their numbers."""
    rise: float | None = None
    needed: float | None = None
    """Rise that passes."""
    result: Literal["pass", "fail", "inconclusive"] = "inconclusive"
    reason: str = ""
    """Why it is inconclusive, or the request was withdrawn."""


@dataclass
class UnlearningRecord:
    """One unlearning, from its request to the end of its recovery."""

    number: int
    method: str
    cause: str
    """``malicious`` or ``privacy``, or both."""
    clients: tuple[str, ...]
    """Who was forgotten; of a class or samples, who held them, and stays."""
    targets: tuple[str, ...] = ()
    """What was forgotten, in words."""
    settings: Mapping[str, str | float | int] = field(default_factory=dict)
    zeroed: Mapping[str, int] = field(default_factory=dict)
    """Weights zeroed per prunable tensor."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Weights per prunable tensor."""
    guarantee: str = "none"
    """What the method promises; see ``unlearning.catalogue``."""
    seconds: float = 0.0
    memory_bytes: int = 0
    """Held by the method's memory when it ran."""
    rounds_asked: int = 0
    """Times that it asked clients; recovery comes on top."""
    bytes_sent: int = 0
    """Of models and statistics, to clients and back, for these."""
    progress: dict[str, float] = field(default_factory=dict)
    """How far holders got with the method's step: counts, sums and largest values."""
    warnings: list[str] = field(default_factory=list)
    percentiles: dict[str, float] = field(default_factory=dict)
    """Per client, the share of retained clients with less conflict; low hints at a mistake."""
    refused: str | None = None
    """Why nothing was done, if so. Clients to be forgotten stay in quarantine; holders of a class
    or samples go on, and what they dropped stays dropped."""
    recovery_rounds: int | None = None
    """``None`` while recovery goes on, or where none is needed."""
    recovery_ended_by: str | None = None
    """``recovered`` or ``cap``."""
    recovery_bound: int | None = None
    """FedUP's budget of recovery rounds."""
    recovery_target: float | None = None
    """Validation accuracy at which recovery ends."""
    marks: list[MarkCheck] = field(default_factory=list)
    """Of those who marked rows before they left, complete ``verifi_marks.WINDOW`` rounds later; and
    of those who were to, and whose request was withdrawn in this round."""


@dataclass
class RoundRecord:
    """One round."""

    number: int
    phase: Phase = Phase.TRAIN
    asked: tuple[str, ...] = ()
    participants: tuple[str, ...] = ()
    """Clients whose update entered the aggregate."""
    rejected: dict[str, str] = field(default_factory=dict)
    """Client -> why its reply was not used."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Client -> why it was excluded in this round."""
    capped: dict[str, float] = field(default_factory=dict)
    """Client -> reported weight that the cap lowered."""
    detector: str | None = None
    finding: Finding | None = None
    """``None`` where no detector looked."""
    flags_count: bool = False
    """Whether being flagged in this round can lead to quarantine; not in the warm-up, nor while the
    model recovers."""
    note: str = ""
    """Set when the previous model was kept, and why."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Clients' training metrics, averaged."""
    measures: dict[str, float | None] = field(default_factory=dict)
    """Measures of the model after the round; ``None`` where not measured."""
    unlearning: UnlearningRecord | None = None
    """The unlearning that ran at the end of this round."""
    seconds: float = 0.0
