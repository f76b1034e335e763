"""What can be set: ``training.KEY``, ``tune.KEY``, and the keys of a method itself."""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from strategies.messages import LocalTraining
from strategies.methods.settings import Keys
from unlearning.errors import SecateurError


class SettingsError(SecateurError):
    """Settings that cannot be used; the message lists every fault."""

    exit_code = 2


class Training(LocalTraining):
    """Training on one machine: as a client's of a single round, and of several epochs."""

    model_config = Keys.model_config

    local_epochs: int = Field(8, ge=1, alias="epochs")
    """Passes over the data. Milestones count them too."""
    batch_size: int = Field(64, ge=1)
    """Examples per step."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Of SGD: a single round is short, and small data sets are not learned without."""
    concentration: float = Field(0, ge=0, le=1)
    """Share of an epoch's batches that hold rows to forget; 0 where chance decides."""


class Tuning(Keys):
    """Fine-tuning on the rows that remain."""

    epochs: int | None = Field(None, ge=0)
    """Passes; the method's own number unless given."""
    schedule: Literal["replay", "constant"] = "replay"
    """The training's rates in fewer epochs (``methods`` 5), or its first rate all the time."""
    learning_rate: float | None = Field(None, gt=0)
    """First rate; the training's unless given."""


Model = TypeVar("Model", bound=BaseModel)


def read(kind: type[Model], values: Mapping[str, Any], what: str = "") -> Model:
    """Check names, types and ranges, and report every fault at once.

    Parameters
    ----------
    what
        Table that the keys are in, if any.

    Raises
    ------
    SettingsError
    """
    prefix = f"{what}." if what else ""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = prefix + ".".join(str(part) for part in fault["loc"][:1])
            if fault["type"] == "extra_forbidden":
                known = ", ".join(
                    prefix + (field.alias or name) for name, field in kind.model_fields.items()
                )
                faults.append(f"unknown key {key!r}; known are {known or 'none'}")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                faults.append(f"{key} = {fault['input']!r}: {message[0].lower()}{message[1:]}")
        raise SettingsError("settings: " + "; ".join(dict.fromkeys(faults))) from error


def tables(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Read ``KEY=VALUE`` pairs into the tables ``training``, ``tune`` and, without a name, ``""``.

    Values are TOML, and plain text where that fails.

    Raises
    ------
    SettingsError
    """
    found: dict[str, dict[str, Any]] = {"training": {}, "tune": {}, "": {}}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        table, _, name = key.strip().rpartition(".")
        if not separator or not name:
            raise SettingsError(f"--set takes KEY=VALUE, got {pair!r}")
        if table not in found:
            raise SettingsError(f"{key.strip()} names no table; there are training and tune")
        try:
            found[table][name] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            found[table][name] = text
    return found
