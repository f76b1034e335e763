"""Settings of one federation: every run-config key, its type, range, default and meaning.

Field ``round_deadline`` is key ``round-deadline``. Flower wants every key listed in
``pyproject.toml`` before it may be overridden; a test holds that list to this one.
"""

import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationError, model_validator

from client.task.protocol import TaskOptions
from strategies.messages import LocalTraining
from strategies.tuning import Kind
from unlearning import ffmu, pcmu
from unlearning.catalogue import METHODS
from unlearning.errors import SecateurError


class SettingsError(SecateurError):
    """Settings that cannot be used; the message lists every fault."""

    exit_code = 2


class Settings(TaskOptions, LocalTraining):
    """One federation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        alias_generator=lambda name: name.replace("_", "-"),
    )

    rounds: int = Field(10, ge=1)
    """Training rounds; recovery may add to them."""
    strategy: Literal["fedavg", "fedprox", "fedmedian", "fedadam", "ffmu", "ffmu-n"] = "fedavg"
    """Flower strategy to wrap."""
    sigma: float = Field(pcmu.SIGMA, gt=0, allow_inf_nan=False)
    """Of FFMU: deviation of the noise that gradients are smoothed with."""
    lam_factor: float = Field(pcmu.LAM_FACTOR, ge=0, allow_inf_nan=False)
    """Of FFMU: where quantised gradients leave zero, in units of sigma squared."""
    quantiser: pcmu.Mode = "hard"
    """Of FFMU: what is stepped along; only ``hard`` can be certified."""
    alpha_local: float = Field(pcmu.ALPHA, gt=0, allow_inf_nan=False)
    """Of FFMU: scale of a client's quantised steps."""
    alpha_server: float = Field(ffmu.ALPHA_SERVER, gt=0, allow_inf_nan=False)
    """Of FFMU: scale of the server's."""
    local_gradient: Literal["path", "full"] = "path"
    """Of FFMU: the mean along local training, or one of all data, which can be certified."""
    gradient_clip: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of FFMU with local-gradient full: bound on entries of a sample's gradient; 0 for none."""
    lipschitz: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of FFMU's paper certificate: L of a sample's gradient in its input; 0 to estimate it."""
    certify_samples: int = Field(1, ge=1)
    """Of FFMU's certificates: samples in the request that they are about."""
    gradient_weights: Literal["uniform", "samples"] = "uniform"
    """Of FFMU: whether clients count the same, which can be certified, or by their samples."""
    min_clients: int = Field(2, ge=1)
    """Clients that must be connected for a round to begin."""
    fraction_train: float = Field(1.0, gt=0, le=1)
    """Share of the clients that train in a round."""
    fraction_evaluate: float = Field(0.0, ge=0, le=1)
    """Share of the clients that evaluate after a round."""
    round_deadline: float = Field(600.0, gt=0)
    """Seconds that a round waits for clients, and then for their replies."""
    quorum: float = Field(0.5, ge=0, le=1)
    """Share of the clients asked that must send a usable reply for the round to count."""
    identity: Literal["node", "partition"] = "node"
    """What a client is: its Flower node, or, in a simulation only, its partition."""

    weight_cap: float = Field(2.0, ge=1)
    """Largest weight of one client in an average, in units of the round's median."""
    norm_limit: float = Field(20.0, gt=1)
    """Largest update of one client, in units of the round's median norm."""

    detector: Literal["cohort", "lfighter", "fldetector", "none"] = "cohort"
    """Who looks for malicious clients."""
    detector_threshold: float = Field(0.0, ge=0)
    """Decision threshold; 0 for the detector's default."""
    warm_up: int = Field(5, ge=0)
    """Rounds in which flags do not count yet."""
    hits: int = Field(3, ge=1)
    """Flags within the window that put a client in quarantine."""
    window: int = Field(4, ge=1)
    """Rounds that the hits are counted over."""

    method: str = "fedup"
    """How clients that a detector finds are forgotten: see ``secateur methods``; or none."""
    ready_methods: str = "rollback"
    """Other methods that requests may need, with commas; what they need is recorded too."""
    pruning_rate: float | Literal["adaptive"] = "adaptive"
    """Share of each prunable tensor that FedUP zeroes, in [0, 1]."""
    pruning_score: Literal["abs", "signed", "diff", "malmag"] = "abs"
    """What FedUP ranks weights by."""
    method_settings: str = ""
    """Of other methods: ``METHOD.KEY=VALUE`` pairs with commas; see ``strategies.methods``."""
    drift_strength: float = Field(0.4, ge=0)
    """Share of their pull that drift subtraction takes back; 0.3 where clients differ much."""
    ledger_memory: float = Field(1.0, gt=0, le=1)
    """What is left of a pull after a round, for drift subtraction; 0.9 remembers about ten."""
    history_interval: int = Field(2, ge=1)
    """Rounds from one recorded round to the next where some are enough."""
    memory_dir: str = ""
    """Folder for what methods need of past rounds; empty to keep it no longer than the run."""
    memory_limit: int = Field(4096, ge=0)
    """Megabytes that it may take; 0 for no limit. Histories that would grow beyond are given up."""
    rate_limit: int = Field(10, ge=1)
    """Rounds between two unlearnings, at least."""
    recovery_tolerance: float = Field(0.02, ge=0, lt=1)
    """Recovery ends within this of the validation accuracy before."""
    recovery_cap: int = Field(20, ge=1)
    """Recovery rounds, at most."""
    recovery_schedule: Kind = "replay"
    """Learning rates after masks and noise: the training's in five rounds, or its first one."""

    def task_options(self) -> TaskOptions:
        """Return what the task is told; equal options find the same task object."""
        return TaskOptions.model_validate(self.model_dump(include=set(TaskOptions.model_fields)))

    @property
    def methods(self) -> tuple[str, ...]:
        """Return every method to be made ready, the default first."""
        named = (self.method, *(part.strip() for part in self.ready_methods.split(",")))
        return tuple(dict.fromkeys(name for name in named if name not in ("", "none")))

    @model_validator(mode="after")
    def _check_relations(self) -> Self:
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(
                    f"there is no method {name!r}; choose one of {', '.join(METHODS)}, or none"
                )
        if self.hits > self.window:
            raise ValueError(
                f"hits = {self.hits} can never be reached within window = {self.window} rounds"
            )
        if self.strategy == "ffmu-n" and self.local_gradient == "full":
            raise ValueError(
                "local-gradient = full is not for strategy ffmu-n, whose clients send what local "
                "training made; use path"
            )
        if self.pruning_rate != "adaptive" and not 0 <= self.pruning_rate <= 1:
            raise ValueError(
                f'pruning-rate = {self.pruning_rate} is outside [0, 1]; give a share, or "adaptive"'
            )
        if self.method_settings:
            from strategies.methods.settings import read_method_settings  # noqa: PLC0415  slow

            try:
                read_method_settings(self.method_settings)
            except SecateurError as error:
                raise ValueError(str(error)) from error
        return self


def read_settings(values: Mapping[str, Any]) -> Settings:
    """Check names, types and ranges, and report every fault at once.

    Raises
    ------
    SettingsError
    """
    try:
        return Settings.model_validate(dict(values))
    except ValidationError as error:
        raise SettingsError("settings: " + "; ".join(describe(error))) from error


def parse_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE`` pairs; values are TOML, and plain text where that fails.

    Raises
    ------
    SettingsError
    """
    overrides: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set takes KEY=VALUE, got {pair!r}")
        try:
            overrides[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            overrides[key.strip()] = text
    return overrides


def describe(error: ValidationError) -> list[str]:
    """Return one sentence per fault: the key, the value and the rule."""
    faults = []
    for fault in error.errors():
        key = ".".join(
            str(part) for part in fault["loc"] if part not in ("float", "literal['adaptive']")
        )
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "extra_forbidden":
            message = f"unknown key {key!r}"
        elif fault["type"] == "missing":
            message = f"missing key {key!r}"
        elif key and fault["type"] != "value_error":
            rule = message[0].lower() + message[1:]
            message = f"{key} = {fault['input']!r}: {rule}"
        if message not in faults:
            faults.append(message)
    return faults
