"""What a server may ask of a client besides training: the settings of every client action.

An action's settings travel in ``config`` and are validated on both sides by the same model. A
``train.<step>`` is answered with a model of the global model's form, a ``query.<question>`` with
metrics and, where ``Ask.expects`` says so, arrays of another form.
"""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from unlearning import ascent, ffmu, label_flip, pcmu, verifi_marks
from unlearning.errors import SecateurError
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
    told: ClassVar[tuple[str, ...]] = ()
    """Metrics of an answer that say how a step went; all are 0 where there was nothing to do."""
    trains: ClassVar[bool] = False
    """Whether it is a round of training on the rows that remain; its answer weighs as they do."""

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
    told = ("steps", "distance", "stopped", "floor_measured")

    radius: float = Field(ge=0, allow_inf_nan=False)
    epochs: int = Field(ascent.EPOCHS, ge=1)
    learning_rate: float = Field(ascent.LEARNING_RATE, ge=0)
    momentum: float = Field(ascent.MOMENTUM, ge=0, lt=1)
    longest: float = Field(ascent.LONGEST, gt=0)
    farthest: float = Field(ascent.FARTHEST, gt=0)
    batch_size: int = Field(32, ge=1)
    floor: float = Field(0.12, ge=0, le=1)
    """Accuracy on the client's own test rows under which it stops, where there are some and the
    task has an accuracy; ``floor_measured`` says so."""


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

    Answered with ``w - Z_k``. Needs a client that keeps a batch log, which deletes these updates
    once it is told, with a later message, that the request was served.
    """

    action = "train.amnesiac"

    request: str = Field(min_length=1)
    """What the server calls it by. The same again is a repetition; another one says that what was
    answered before was not used, unless the client is told that it was."""


class MacForget(Selection):
    """Move the posterior of the selected rows to that of unseen ones (``methods`` 2.9)."""

    action = "train.macforget"
    told = ("steps", "stopped")

    steps: int = Field(20, ge=1)
    learning_rate: float = Field(0.01, ge=0)
    share: float = Field(0.1, ge=0, le=1)
    """Of each prunable tensor's entries, those with the largest gradients, that a step moves."""
    penalty: float = Field(1e-4, ge=0)
    """Weight of the L1 norm of the masked gradient."""


class Statistics(Selection):
    """Sums over the selected rows and over the others (``methods`` 2.11, 5).

    The answer carries ``joined(forget=..., remain=...)`` and the metrics ``forget-count`` and
    ``remain-count``; of ``classes``, ``joined(**{"0": ..., "1": ...})`` with ``0-count``, ... .
    """

    action = "query.statistics"

    kind: Literal["fisher", "activations", "gradients", "classes"]
    """Squared gradients of every trained tensor; channel activations; integrated gradients of
    channels, of the selected rows only; channel activations class by class."""
    sets: Literal["both", "forget", "remain"] = "both"
    """Of ``fisher`` and ``activations``: the sets that are wanted; of the other one nothing is
    computed or sent."""
    most_samples: int = Field(2000, ge=1)
    """Rows of either set that are enough, of every class the same number."""


class Curvature(Selection):
    """Hessian and gradient for the infinitesimal jackknife (``methods`` 2.14).

    The answer carries ``joined(hessian={layer: ...}, gradient={layer: ...})`` of the last layer,
    sums over all rows and over the selected ones, and the metrics ``hessian-count`` and
    ``gradient-count``; by the diagonal, squared gradients and gradients of every trained tensor.
    """

    action = "query.curvature"

    scope: Literal["last", "diag"] = "last"
    """The last layer, exactly; or all layers, by the diagonal of the Fisher information."""


class Rapid(Action):
    """One round of training with steps scaled by curvature (Rapid Retraining, ``methods`` 2.8)."""

    action = "train.rapid"
    trains = True

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    damping: float = Field(1e-2, gt=0)
    block: int = Field(3, ge=1)
    rapid_rate: float = Field(1e-3, gt=0)
    fisher: Literal["batch", "per_sample"] = "batch"


class Noisy(Action):
    """One round of noisy full-batch descent (``methods`` 2.15)."""

    action = "train.noisy"
    trains = True

    noisy_rate: float = Field(0.1, gt=0)
    decay: float = Field(1e-4, ge=0)
    clip: float = Field(1.0, gt=0)
    """Bound c on the norm of a sample's gradient."""
    noise: float = Field(1e-3, ge=0)
    """Standard deviation s."""
    steps: int = Field(1, ge=1)


class Rcad(Selection):
    """One round of training with uncertainty on perturbed data (RCAD, ``methods`` 2.13)."""

    action = "train.rcad"
    trains = True

    forget: Literal["none", "all", "class", "samples"] = "none"
    strength: float = Field(0.2, ge=0)
    """Lambda."""
    radius: float = Field(1.0, ge=0)
    """Alpha, the norm of a row's perturbation."""
    source: Literal["remain", "forget"] = "remain"
    """Which rows are perturbed: the batch's, or selected ones; who holds none of these trains as
    ever."""


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


class Mark(Action):
    """A round of training at whose end a leaver marks rows of its own (VeriFi, ``methods`` 2.10).

    Comes in the place of ``train``, with all that comes with it, and is answered alike.
    """

    action = "train.mark"

    kind: verifi_marks.Kind
    share: float = Field(verifi_marks.SHARE, gt=0, le=1)
    """kappa, of the rows to look for markers in."""
    epochs: int = Field(verifi_marks.EPOCHS, ge=1, le=2)
    """Of marking, on the markers alone."""
    rounds: int = Field(verifi_marks.WATCHED, ge=2)
    """Of ``forgettable``: rounds in which every row's loss is noted; in the last it marks."""
    noted: int = Field(0, ge=0)
    """How many of these rounds there were; at 0 the client begins anew."""

    @property
    def now(self) -> bool:
        """Return whether rows are marked in this round; otherwise losses are noted alone."""
        return self.kind == "erroneous" or self.noted >= self.rounds - 1


class Marks(Action):
    """The mean loss on the markers under the model that comes with it.

    The answer's metrics are ``loss``, ``before`` and ``after`` (see ``verifi_marks.check``), and
    ``markers``: how many there are.
    """

    action = "query.marks"

    first: bool = False
    """Whether the model is the first published one that has the marked update in it."""


def checked(
    name: str,
    kind: type[Action],
    settings: Mapping[str, Any],
    besides: Collection[str] = (),
    **told: Scalar,
) -> dict[str, Any]:
    """Return all settings of a step that a method is made with, those given in their types.

    A client passes over what it does not know, which other actions' settings may be; whoever sets a
    method must not, so this is asked where one is made.

    Parameters
    ----------
    name
        The method's.
    besides
        Settings that the method has of its own, for the message.
    told
        What the method itself fills in later, and a value that it may have.

    Raises
    ------
    SecateurError
        If there is no such setting, or a value cannot be.
    """
    own = [f for f in kind.model_fields if f not in told and f not in Selection.model_fields]
    if issubclass(kind, Selection):
        told = {"forget": "none", **told}
    for key, value in settings.items():
        if key not in own:
            raise SecateurError(
                f"{name} has no setting {key} = {value!r}; it has {', '.join([*besides, *own])}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise SecateurError(f"{name}: {key} = {value!r}: a setting must be a finite number")
    try:
        made = kind.model_validate({**told, **settings})
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(map(str, fault["loc"])).replace("-", "_")
        raise SecateurError(
            f"{name}: {key} = {settings.get(key)!r}: {fault['msg'].removeprefix('Value error, ')}"
        ) from error
    return made.model_dump(include=set(own))


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
