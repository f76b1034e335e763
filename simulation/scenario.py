"""Scenarios: one experiment each, as TOML. Unknown keys are refused, all faults told at once."""

import tomllib
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.settings import Settings, describe
from simulation.attacks.settings import Attack
from simulation.requests import Asked
from unlearning.catalogue import DATA
from unlearning.errors import SecateurError

UNTOLD = {"seed", "data-dir", "device"}
"""Overrides that do not change what a scenario is about."""
TABLES = ("clients", "attack", "baselines", "settings")


class ScenarioError(SecateurError):
    """A scenario that does not exist or cannot be used; the message lists every fault."""

    exit_code = 2


class Clients(BaseModel):
    """Who takes part."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    total: int = Field(ge=1)
    malicious: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _check_minority(self) -> Self:
        most = (self.total - 1) // 2
        if self.malicious > most:
            raise ValueError(
                f"{self.malicious} of {self.total} clients are malicious, but attackers must be a "
                f"strict minority: at most {most}"
            )
        return self


class Baselines(BaseModel):
    """What the result is compared to, in the same run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    natural: bool = True
    """The same recovery rounds without the attackers and without unlearning."""
    retrain: bool = True
    """Training from the start without the attackers."""


class Scenario(BaseModel):
    """One experiment."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: str
    summary: str = Field(min_length=1)
    """What the scenario shows, in one sentence."""
    clients: Clients
    attack: Attack | None = None
    requests: tuple[Asked, ...] = ()
    may_be_refused: bool = Field(False, alias="may-be-refused")
    """Whether a request that is refused is a result; otherwise it is an error that ends the run."""
    baselines: Baselines = Baselines()
    settings: Settings

    @model_validator(mode="after")
    def _check_attack(self) -> Self:
        if self.clients.malicious and self.attack is None:
            raise ValueError("clients.malicious needs an [attack] table that says what they do")
        if self.settings.min_clients > self.clients.total:
            raise ValueError(
                f"settings.min-clients = {self.settings.min_clients} is more than the "
                f"{self.clients.total} clients there are"
            )
        return self

    @model_validator(mode="after")
    def _check_requests(self) -> Self:
        last, rounds = self.clients.total - 1, self.settings.rounds
        for asked in self.requests:
            unknown = [partition for partition in asked.clients if partition > last]
            if unknown:
                raise ValueError(
                    f"requests: clients = {list(asked.clients)} names {unknown[0]}, and partitions "
                    f"are numbered from 0 to {last}"
                )
            if asked.round > rounds:
                raise ValueError(
                    f"requests: round = {asked.round} is never played; ask after one of the "
                    f"{rounds} rounds, or set more rounds"
                )
        return self

    @property
    def keeps(self) -> bool:
        """Say whether clients must keep something on their disks."""
        asked = any(request.target in DATA or request.marks for request in self.requests)
        return asked or self.settings.batch_log != "off"


def built_in() -> Iterator[tuple[str, str]]:
    """Yield name and summary of every scenario that comes with Secateur, sorted by name."""
    folder = resources.files("simulation") / "scenarios"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            raw = tomllib.loads(entry.read_text(encoding="utf-8"))
            yield entry.name.removesuffix(".toml"), str(raw["summary"])


def load_scenario(name: str, overrides: Mapping[str, Any] | None = None) -> Scenario:
    """Return a built-in scenario by name, or one from a TOML file.

    Parameters
    ----------
    name
        Name, or path that ends in ``.toml``.
    overrides
        Dotted key -> value, applied before anything is checked. A key without a dot is one of
        ``[settings]``.

    Raises
    ------
    ScenarioError
    """
    return parse_scenario(_read(name), overrides or {})


def _read(name: str) -> dict[str, Any]:
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise ScenarioError(f"there is no scenario file {name}")
        try:
            text, title = path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            raise ScenarioError(f"scenario {name} cannot be read as UTF-8 text: {error}") from error
    else:
        known = [scenario for scenario, _ in built_in()]
        if name not in known:
            raise ScenarioError(
                f"there is no scenario {name!r}; choose one of {', '.join(known)}, or give a path "
                "that ends in .toml"
            )
        entry = resources.files("simulation") / "scenarios" / f"{name}.toml"
        text, title = entry.read_text(encoding="utf-8"), name
    try:
        return {"name": title, **tomllib.loads(text)}
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"scenario {name}: not valid TOML: {error}") from error


def parse_scenario(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> Scenario:
    """Apply ``extends`` and overrides, and check; every fault is reported at once.

    ``extends = "demo"`` takes over whatever the scenario does not say itself, key by key.
    """
    merged = _extended(raw, ())
    for table in TABLES:
        if not isinstance(merged.get(table, {}), dict):
            raise ScenarioError(f"{table} must be a table, got {merged[table]!r}")
    merged.setdefault("settings", {})
    for key, value in overrides.items():
        table, _, field = key.rpartition(".")
        table = table or "settings"
        if table not in TABLES:
            raise ScenarioError(
                f"{key} names no table of a scenario; tables are {', '.join(TABLES)}"
            )
        merged.setdefault(table, {})[field] = value
    # A simulation knows its clients by their partition, and says so unless told otherwise.
    merged["settings"].setdefault("identity", "partition")
    try:
        scenario = Scenario.model_validate(merged)
    except ValidationError as error:
        raise ScenarioError(f"scenario {merged['name']}: {'; '.join(describe(error))}") from error
    update: dict[str, Any] = {} if scenario.clients.malicious else {"attack": None}
    changes = {key: value for key, value in overrides.items() if key not in UNTOLD}
    if changes:
        told = ", ".join(f"{key} = {value}" for key, value in changes.items())
        update["summary"] = f"{scenario.summary} (changed here: {told})"
    return scenario.model_copy(update=update)


def _extended(raw: Mapping[str, Any], seen: tuple[str, ...]) -> dict[str, Any]:
    """Return a scenario with whatever it extends filled in, key by key."""
    merged: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in raw.items()
    }
    if "extends" not in merged:
        return merged
    base = str(merged.pop("extends"))
    if base in seen:
        raise ScenarioError(f"scenarios extend one another in a circle: {', '.join((*seen, base))}")
    for key, value in _extended(_read(base), (*seen, base)).items():
        if isinstance(value, Mapping):
            own = merged.get(key, {})
            merged[key] = {**value, **own} if isinstance(own, Mapping) else own
        else:
            merged.setdefault(key, value)
    return merged
