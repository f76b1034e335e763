"""What may be set of the methods of a federation, and the methods made so.

The run's setting ``method-settings`` is pairs ``METHOD.KEY=VALUE`` with commas between them:

    fisher-mask.rate=0.02,fisher-mask.scope=layer,ascent.epochs=3

Here is every method that has such settings, with their types, ranges and defaults. Those of a
client's step are the step's own (``strategies.actions``).
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from strategies.actions import (
    Action,
    Ascend,
    Ascent,
    LabelFlip,
    MacForget,
    Noisy,
    Rapid,
    Rcad,
    Selection,
)
from strategies.methods.holders import ascending, climbing, flipping, macforget
from strategies.methods.interface import Method, Network
from strategies.methods.jackknife import Jackknife
from strategies.methods.masks import ClassDiscriminative, Mask, Noise
from strategies.methods.retraining import noisy, rapid, rcad
from strategies.methods.verifi import ScaleToUnlearn
from unlearning import fisher, jackknife, masking, tfidf
from unlearning.errors import SecateurError


class MethodSettingsError(SecateurError):
    """Settings of methods that cannot be used."""

    exit_code = 2


def kebab(name: str) -> str:
    """Return the key of a field."""
    return name.replace("_", "-")


class Keys(BaseModel):
    """Settings of a method; a key that it does not know is a fault."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        allow_inf_nan=False,
        alias_generator=kebab,
    )


# ---------------------------------------------------------------- masks and noise


class Share(Keys):
    """Of a mask."""

    rate: float = Field(masking.USUAL, ge=0, le=1)
    """Share R to zero, of all that is scored; 0.02 for CIFAR (``methods`` 5.1)."""


class Sampled(Keys):
    """Of what is computed from rows."""

    most_samples: int = Field(fisher.MOST_SAMPLES, ge=1)
    """Rows of either set, of each holder, that are enough."""


class Fisher(Share, Sampled):
    """FisherMask (5.1)."""

    form: fisher.Form = "mean"
    """How what is forgotten and what remains are compared."""
    scope: masking.Scope = "model"
    """Among what the share is chosen."""
    remain: Literal["all", "none"] = "all"
    """Whether what remains counts; otherwise what is forgotten alone decides."""


class Channels(Share, Sampled):
    """ActivationMask and GradMask (5.2, 5.3)."""


class Blur(Sampled):
    """FisherNoise (5.6)."""

    recipe: Literal["golatkar", "eq2"] = "golatkar"
    """The authors' public code, or the formula of paper 001."""
    alpha: float = Field(fisher.ALPHA, ge=0)
    """Of ``golatkar``."""
    relative: float = Field(fisher.RELATIVE, ge=0)
    """Of ``eq2``: the mean deviation, in units of the weights' root mean square."""


class TfIdf(Share, Sampled):
    """Class-discriminative pruning (2.11)."""

    rate: float = Field(tfidf.USUAL, ge=0, le=1)
    """Share of every layer's channels to silence."""
    bn: bool = True
    """Whether a channel's normalisation is silenced too."""


# ---------------------------------------------------------------- others


class Linear(Keys):
    """The infinitesimal jackknife (2.14)."""

    scope: Literal["auto", "last", "diag"] = "auto"
    """The last layer, exactly; all layers, by the diagonal; or the first of them that can be."""
    ridge: float = Field(jackknife.RIDGE, gt=0)
    damping: float = Field(jackknife.DAMPING, gt=0)
    longest: float = Field(jackknife.LONGEST, gt=0)
    """Of the correction, in units of what is corrected."""


class Strength(Keys):
    """Of methods whose holders change the model."""

    strength: float = Field(1.0, ge=0)
    """What a holder's share of the change is multiplied by."""


class Radius(Keys):
    """PGA's ball (2.12)."""

    radius: Annotated[float, Field(ge=0)] | Literal["random", "start"] = "random"
    """A number; or by the others' distance from freshly initialised models, or from the start."""


class Rounds(Keys):
    """Of methods that play rounds."""

    share: float = Field(gt=0)
    """Rounds in units of those that are undone, or were played so far."""


class Strong(Keys):
    """VeriFi (2.10)."""

    strong: bool = False
    """Whether to take the leavers' last contribution back once more."""


def _step(base: type[Keys], step: type[Action], **more: Any) -> type[Keys]:
    """Return the keys of a client's step, but for what the request or the method decides."""
    decided = Selection.model_fields.keys() | base.model_fields.keys()
    own = {
        name: (field.annotation, field)
        for name, field in step.model_fields.items()
        if name not in decided
    }
    fields: dict[str, Any] = {**own, **more}
    return create_model(step.__name__, __base__=base, **fields)


def _rounds(step: type[Action], share: float) -> type[Keys]:
    return _step(Rounds, step, share=(float, Field(share, gt=0)))


# ---------------------------------------------------------------- which method has which

Given = Mapping[str, Any]
"""Field -> value, of those that were set."""


@dataclass(frozen=True)
class Configurable:
    """One method."""

    keys: type[Keys]
    make: Callable[[Network, Given], Method]


def _mask(name: str) -> Callable[[Network, Given], Method]:
    return lambda network, given: Mask(name=name, network=network, **given)


def _plain(make: Callable[..., Method]) -> Callable[[Network, Given], Method]:
    return lambda network, given: make(**given)


def _pruning(network: Network, given: Given) -> Method:
    renamed = {("norm" if name == "bn" else name): value for name, value in given.items()}
    return ClassDiscriminative(network=network, **renamed)


CONFIGURABLE: dict[str, Configurable] = {
    "fisher-mask": Configurable(Fisher, _mask("fisher-mask")),
    "activation-mask": Configurable(Channels, _mask("activation-mask")),
    "grad-mask": Configurable(Channels, _mask("grad-mask")),
    "random-mask": Configurable(Share, _mask("random-mask")),
    "fisher-noise": Configurable(Blur, lambda network, given: Noise(network=network, **given)),
    "tfidf": Configurable(TfIdf, _pruning),
    "ij": Configurable(Linear, lambda network, given: Jackknife(network=network, **given)),
    "ascent": Configurable(_step(Strength, Ascent), _plain(ascending)),
    "label-flip": Configurable(_step(Strength, LabelFlip), _plain(flipping)),
    "macforget": Configurable(_step(Strength, MacForget), _plain(macforget)),
    "pga": Configurable(_step(Radius, Ascend), _plain(climbing)),
    "rapid-retraining": Configurable(_rounds(Rapid, 0.5), _plain(rapid)),
    "noisy-gd": Configurable(_rounds(Noisy, 0.2), _plain(noisy)),
    "rcad": Configurable(_rounds(Rcad, 1.0), _plain(rcad)),
    "verifi": Configurable(Strong, _plain(ScaleToUnlearn)),
}
"""Others have keys of the run's own (FedUP, drift, FedEraser, FAST) or nothing to set."""


def defaults_of(method: str) -> dict[str, Any]:
    """Return what may be set of a method, with the defaults; nothing where there is nothing."""
    if method not in CONFIGURABLE:
        return {}
    fields = CONFIGURABLE[method].keys.model_fields.items()
    return {field.alias or name: field.default for name, field in fields}


def read_method_settings(text: str) -> dict[str, dict[str, Any]]:
    """Return the settings that were given, method by method, by field.

    Raises
    ------
    MethodSettingsError
        If a pair is none, or names an unknown method or key, or a value that cannot be.
    """
    found: dict[str, dict[str, Any]] = {}
    for pair in text.split(",") if text.strip() else ():
        name, equals, value = pair.partition("=")
        method, dot, key = (part.strip() for part in name.partition("."))
        if not (equals and dot and key):
            raise MethodSettingsError(
                "method-settings takes METHOD.KEY=VALUE pairs with commas between them, got "
                f"{pair.strip()!r}"
            )
        if method not in CONFIGURABLE:
            raise MethodSettingsError(
                f"method-settings: no method {method!r} has settings of its own; these have: "
                f"{', '.join(CONFIGURABLE)}"
            )
        if key in found.setdefault(method, {}):
            raise MethodSettingsError(f"method-settings: {method}.{key} is set twice; set it once")
        found[method][key] = _value(value.strip())
    return {method: _checked(method, values) for method, values in found.items()}


def configured(network: Network, text: str) -> dict[str, Method]:
    """Return every method that has settings, made with those given.

    Raises
    ------
    MethodSettingsError
        As ``read_method_settings``.
    """
    given = read_method_settings(text)
    return {name: entry.make(network, given.get(name, {})) for name, entry in CONFIGURABLE.items()}


def _value(text: str) -> Any:
    """Read TOML, and plain text where that fails."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _checked(method: str, values: Mapping[str, Any]) -> dict[str, Any]:
    try:
        read = CONFIGURABLE[method].keys.model_validate(dict(values))
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0])
        known = ", ".join(defaults_of(method))
        if fault["type"] == "extra_forbidden":
            raise MethodSettingsError(
                f"method-settings: {method} has no setting {key!r}; it has {known}"
            ) from error
        message = fault["msg"].removeprefix("Value error, ")
        raise MethodSettingsError(
            f"method-settings: {method}.{key} = {fault['input']!r}: "
            f"{message[0].lower()}{message[1:]}; the default is {defaults_of(method)[key]!r}"
        ) from error
    return read.model_dump(exclude_unset=True)
