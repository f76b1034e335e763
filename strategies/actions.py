"""What a server may ask of a client besides training: the settings of every client action.

An action's settings travel in ``config`` and are validated on both sides by the same model. A
``train.<step>`` is answered with a model of the global model's form, a ``query.<question>`` with
metrics and, where ``Ask.expects`` says so, arrays of another form.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from unlearning import ascent, ffmu, label_flip, pcmu
from unlearning.parameters import Parameters
from unlearning.partial_updates import FEW, MANY, Pattern
from unlearning.plan import Scalar

SEPARATOR = "/"
"""Between a group and a tensor's name, where one record carries tensors of several kinds."""


def joined(**groups: Parameters) -> dict[str, Tensor]:
    """Return several groups of tensors as one, to be sent in one record."""
    return {
        f"{group}{SEPARATOR}{name}": tensor
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }


def parted(tensors: Parameters) -> dict[str, dict[str, Tensor]]:
    """Return the groups that ``joined`` put together."""
    groups: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition(SEPARATOR)
        groups.setdefault(group, {})[own] = tensor
    return groups


class Action(BaseModel):
    """Settings of one action."""

    model_config = ConfigDict(
        extra="ignore",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    action: ClassVar[str]
    """Message type."""

    def config(self) -> dict[str, Scalar]:
        """Return the settings as they travel."""
        return self.model_dump(by_alias=True)


PATTERN = r"[0-9a-f]{32}"
"""A token is 128 random bits; it says nothing of the row it stands for."""


class Selection(Action):
    """Which of its rows a client is to forget; every action that forgets says so."""

    forget: Literal["none", "all", "class", "samples"]
    """Nothing, all that the client has, the rows of a class, or those that tokens stand for."""
    forget_class: int = -1
    """Of ``class``: its number, at least 0."""
    forget_tokens: str = Field("", pattern=rf"^({PATTERN}(,{PATTERN})*)?$")
    """Of ``samples``: tokens, separated by commas. A client passes over those that it does not
    know: they are another client's."""

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        if (self.forget == "class") != (self.forget_class >= 0):
            raise ValueError("a class is forgotten by its number, from 0 on")
        if (self.forget == "samples") != bool(self.forget_tokens):
            raise ValueError("samples are forgotten by their tokens")
        return self

    def rows(self) -> dict[str, Scalar]:
        """Return which rows are selected, for the settings of another action."""
        return {
            "forget": self.forget,
            "forget_class": self.forget_class,
            "forget_tokens": self.forget_tokens,
        }

    @property
    def tokens(self) -> tuple[str, ...]:
        """Return the tokens."""
        return tuple(self.forget_tokens.split(",")) if self.forget_tokens else ()


class Forget(Selection):
    """Never train on the selected rows again, also after a restart or a new import of the data.

    The answer's metric ``rows`` says how many there are.
    """

    action = "query.forget"

    dry: bool = False
    """Whether to say only what would be answered: nothing is dropped, and nothing written."""


class Ascend(Selection):
    """Climb the loss on the selected rows inside a ball (UN, PGA; ``methods`` 2.12).

    Comes with ``joined(reference=w_ref, leaver=w_k)``.
    """

    action = "train.ascend"

    radius: float = Field(ge=0, allow_inf_nan=False)
    epochs: int = Field(ascent.EPOCHS, ge=1)
    learning_rate: float = Field(ascent.LEARNING_RATE, ge=0)
    momentum: float = Field(ascent.MOMENTUM, ge=0, lt=1)
    longest: float = Field(ascent.LONGEST, gt=0)
    farthest: float = Field(ascent.FARTHEST, gt=0)
    batch_size: int = Field(32, ge=1)
    floor: float = Field(0.12, ge=0, le=1)
    """Accuracy on the client's own test rows under which it stops."""


class Partial(Selection):
    """What ascent and label flipping have in common (``methods`` 6.3, 6.4)."""

    partial: bool = True
    """Whether a step moves only some entries of a layer; otherwise the naive twin."""
    first: float = Field(ge=0, le=1)
    """Share of the first layer's entries that a step moves."""
    last: float = Field(ge=0, le=1)
    """Share of the last layer's."""
    pattern: Pattern = "comb"
    epochs: int = Field(label_flip.EPOCHS, ge=1)
    batch_size: int = Field(label_flip.BATCH_SIZE, ge=1)
    learning_rate: float = Field(ge=0)
    forgotten: float = Field(ascent.FORGOTTEN, ge=0, le=1)
    """Accuracy on the selected rows at which it stops."""


class Ascent(Partial):
    """Gradient ascent on the selected rows (``methods`` 6.4)."""

    action = "train.ascent"

    first: float = Field(FEW, ge=0, le=1)
    last: float = Field(MANY, ge=0, le=1)
    learning_rate: float = Field(ascent.PARTIAL_RATE, ge=0)
    longest: float = Field(ascent.LONGEST, gt=0)


class LabelFlip(Partial):
    """Training on the selected rows with wrong labels (``methods`` 6.3)."""

    action = "train.label_flip"  # Flower takes names of Python functions only

    first: float = Field(MANY, ge=0, le=1)
    last: float = Field(FEW, ge=0, le=1)
    learning_rate: float = Field(label_flip.LEARNING_RATE, ge=0)


class Batches(Selection):
    """Say whether the updates of all batches with a selected row could be taken back.

    Nothing is changed. The answer's metrics: ``rows``, how many there are, and ``first-round``, the
    first that is logged, 0 where nothing is. A client whose log lacks something refuses.
    """

    action = "query.batches"


class Amnesiac(Selection):
    """Subtract the updates of all batches that held a selected row (``methods`` 6.1, 6.2, 6.6).

    Answered with ``w - Z_k``. Needs a client that keeps a batch log, which loses these updates: to
    be asked once ``Batches`` was answered by all who are asked for it.
    """

    action = "train.amnesiac"


class MacForget(Selection):
    """Move the posterior of the selected rows to that of unseen ones (``methods`` 2.9)."""

    action = "train.macforget"

    steps: int = Field(20, ge=1)
    learning_rate: float = Field(0.01, ge=0)
    share: float = Field(0.1, ge=0, le=1)
    """Of each prunable tensor's entries, those with the largest gradients, that a step moves."""
    penalty: float = Field(1e-4, ge=0)
    """Weight of the L1 norm of the masked gradient."""


class Statistics(Selection):
    """Sums over the selected rows and over the others (``methods`` 2.11, 5).

    The answer carries ``joined(forget=..., remain=...)`` and the metrics ``forget-count`` and
    ``remain-count``; of ``classes``, ``joined(**{"0": ..., "1": ...})`` with ``count-0``, ... .
    """

    action = "query.statistics"

    kind: Literal["fisher", "activations", "gradients", "classes"]
    """Squared gradients of every trained tensor; channel activations; integrated gradients of
    channels, of the selected rows only; channel activations class by class."""
    most_samples: int = Field(2000, ge=1)
    """Rows of either set that are enough, of every class the same number."""


class Curvature(Selection):
    """The last layer's Hessian and gradient for the infinitesimal jackknife (``methods`` 2.14).

    The answer carries ``joined(hessian={layer: ...}, gradient={layer: ...})``, sums over all rows
    and over the selected ones, and the metrics ``hessian-count`` and ``gradient-count``.
    """

    action = "query.curvature"


class Rapid(Action):
    """One round of training with steps scaled by curvature (Rapid Retraining, ``methods`` 2.8)."""

    action = "train.rapid"

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    damping: float = Field(1e-2, gt=0)
    block: int = Field(3, ge=1)
    rapid_rate: float = Field(1e-3, gt=0)
    fisher: Literal["batch", "per_sample"] = "batch"


class Noisy(Action):
    """One round of noisy full-batch descent (``methods`` 2.15)."""

    action = "train.noisy"

    noisy_rate: float = Field(0.1, gt=0)
    decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    """Bound c on the norm of a sample's gradient."""
    noise: float = Field(1e-3, ge=0)
    """Standard deviation s."""
    steps: int = Field(1, ge=1)


class Rcad(Action):
    """One round of training with uncertainty on perturbed rows (RCAD, ``methods`` 2.13)."""

    action = "train.rcad"

    strength: float = Field(0.2, ge=0)
    """Lambda."""
    radius: float = Field(1.0, ge=0)
    """Alpha, the norm of a row's perturbation."""


LARGEST, CANCELLED, SAMPLES = "largest-gradient", "cancelled", "samples"
"""Metrics of an answer to ``Ffmu`` with ``local = "full"``: c, the largest |g| of a sample; the
coordinates that samples move and their mean does not; and how many samples there are."""


class Ffmu(Action):
    """One device's round of FFMU (``methods`` 3.3).

    Answered with ``w - Gbar`` (``unlearning.ffmu.as_model``), or, of FFMU-N, with the local model.
    """

    action = "train.ffmu"

    sigma: float = Field(pcmu.SIGMA, gt=0)
    lam_factor: float = Field(pcmu.LAM_FACTOR, ge=0)
    alpha_local: float = Field(pcmu.ALPHA, gt=0)
    mode: pcmu.Mode = "hard"
    local: Literal["path", "full"] = "path"
    """The mean gradient along local training, or one gradient of all rows at the global model."""
    clip: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of ``full``: bound on every entry of a row's gradient; 0 for none."""
    models: bool = False
    """FFMU-N: devices send models instead of gradients."""
    ffmu_rate: float = Field(ffmu.LEARNING_RATE, gt=0)
    """Learning rate of this round."""

    @model_validator(mode="after")
    def _check_local(self) -> Self:
        if self.models and self.local == "full":
            raise ValueError("FFMU-N sends what local training made: it needs local path")
        return self

    @property
    def quantiser(self) -> pcmu.Quantiser:
        """Return a device's quantiser."""
        return pcmu.Quantiser(
            sigma=self.sigma, lam_factor=self.lam_factor, mode=self.mode, alpha=self.alpha_local
        )


def read(kind: type[Action], config: Mapping[str, object]) -> Action:
    """Return the settings of an action as a client got them."""
    return kind.model_validate(dict(config))


SELECTIONS = ("all", "class", "samples")
"""What a ``Selection`` may select."""


def named() -> dict[str, str]:
    """Return a name for every action's message type: ``label-flip`` for ``train.label_flip``."""
    return {kind.action: name_of(kind.action) for kind in _kinds(Action)}


def name_of(action: str) -> str:
    """Return what people call the action of a message type."""
    return action.partition(".")[2].replace("_", "-")


def _kinds(base: type[Action]) -> Iterator[type[Action]]:
    for kind in base.__subclasses__():
        if "action" in vars(kind):
            yield kind
        yield from _kinds(kind)
