"""Methods that cut or blur weights by statistics that clients send (``methods`` 2.11, 5).

A client answers with sums over the rows to forget and over its others. They add up to what one data
set would give; ``strategies.methods.survey`` says whose count, and how much.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from strategies.actions import Selection
from strategies.actions import Statistics as Question
from strategies.memory import Memory
from strategies.methods.interface import UNKNOWN, Network, Situation, Unlearned, done
from strategies.methods.survey import Findings, Survey, conduct, squares_of
from strategies.tuning import Kind, Schedule
from unlearning import channel_masks, fisher, masking, tfidf
from unlearning.errors import MissingNeedError
from unlearning.fedup import prune
from unlearning.parameters import Parameters, copied, trained_part
from unlearning.plan import Plan
from unlearning.randomness import generator
from unlearning.sums import Statistics, means

Sums = Literal["fisher", "activations", "gradients", "classes"]
MASKS = ("fisher-mask", "activation-mask", "grad-mask", "random-mask")
_SAME = "same_scores: what is forgotten and what remains look alike, so chance decides the mask"


@dataclass(frozen=True, kw_only=True)
class Mask:
    """Zero what matters more for what is forgotten than for the rest (``methods`` 5.1 to 5.4).

    Attributes
    ----------
    network
        What is known of the models; methods by channels need its convolutions.
    rate
        Share of the weights, or of all channels, that is zeroed.
    most_samples
        Rows of either set, of each client, that are enough.
    form, scope
        Of ``fisher-mask``: how the two sets are compared, and among what the share is chosen.
    remain
        Of ``fisher-mask``: whether what remains counts; otherwise nobody is asked for it.
    schedule
        Of the rates in the rounds that follow.
    """

    name: str = "fisher-mask"
    network: Network = UNKNOWN
    rate: float = masking.USUAL
    most_samples: int = fisher.MOST_SAMPLES
    form: fisher.Form = "mean"
    scope: masking.Scope = "model"
    remain: Literal["all", "none"] = "all"
    schedule: Kind = "replay"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for their sums, and mask the model."""
        match self.name:
            case "random-mask":
                trained = squares_of(situation.model, self.network.trained)
                draw = generator(situation.seed, "random mask", situation.number)
                masks = masking.random_mask(trained, self.rate, draw)
                model, told = prune(situation.model, masks), {"rate": self.rate}
                schedule = Schedule(situation.number, self.schedule)
                return done(Unlearned(model, masks, told, schedule=schedule))
            case "fisher-mask":
                return self._by_weights(situation)
        return self._by_channels(situation)

    def _by_weights(self, situation: Situation) -> Plan[Unlearned]:
        like = squares_of(situation.model, self.network.trained)
        wanted = ("forget", "remain") if self.remain == "all" else ("forget",)
        found = yield from self._found(situation, "fisher", dict.fromkeys(wanted, like))
        rest = _rest(found.totals["remain"]) if self.remain == "all" else None
        scores = fisher.fisher_scores(found.totals["forget"], rest, self.form)
        masks = masking.top_share(scores, self.rate, self.scope)
        told = {"form": self.form, "scope": self.scope, "remain": self.remain}
        return self._masked(situation, masks, scores, found, told)

    def _by_channels(self, situation: Situation) -> Plan[Unlearned]:
        layers = channels_of(self.network, situation.model)
        if self.name == "activation-mask":
            both = {"forget": layers, "remain": layers}
            found = yield from self._found(situation, "activations", both)
            rest = _rest(found.totals["remain"])
            scores = channel_masks.activation_scores(found.totals["forget"], rest)
        else:
            found = yield from self._found(situation, "gradients", {"forget": layers})
            scores = means(found.totals["forget"])
        scores = _of_trained(scores, situation.model, self.network)
        masks = channel_masks.parameter_masks(
            situation.model,
            self.network.convolutions,
            masking.top_share(scores, self.rate),
            bias=self.name != "grad-mask",  # 5.3: filters only
        )
        return self._masked(situation, masks, scores, found)

    def _found(
        self, situation: Situation, kind: Sums, groups: Mapping[str, Parameters]
    ) -> Plan[Findings]:
        survey = Survey(
            method=self.name,
            ask=partial(
                _question, kind, "both" if len(groups) > 1 else "forget", self.most_samples
            ),
            groups=groups,
            others="remain" in groups,
            most=self.most_samples,
            signed=groups if kind == "gradients" else (),
        )
        return (yield from conduct(situation, survey))

    def _masked(
        self,
        situation: Situation,
        masks: Mapping[str, Tensor],
        scores: Parameters,
        found: Findings,
        more: Mapping[str, str] = MappingProxyType({}),
    ) -> Unlearned:
        masks = _only_trained(masks, self.network)
        chance = (_SAME,) if masking.says_nothing(scores) else ()
        told = {"rate": self.rate, "most_samples": self.most_samples, **more, **found.settings}
        return Unlearned(
            prune(situation.model, masks),
            masks,
            told,
            warnings=(*chance, *found.warnings),
            schedule=Schedule(situation.number, self.schedule),
        )


@dataclass(frozen=True, kw_only=True)
class ClassDiscriminative:
    """Zero the channels most specific to a class, by TF-IDF (``methods`` 2.11).

    Attributes
    ----------
    rate
        Share of every layer's channels.
    norm
        Whether a channel's normalisation is zeroed as well; otherwise a constant is left.
    """

    name: str = "tfidf"
    network: Network = UNKNOWN
    rate: float = tfidf.USUAL
    norm: bool = True
    most_samples: int = fisher.MOST_SAMPLES
    schedule: Kind = "replay"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for their channels' activations, class by class."""
        layers = channels_of(self.network, situation.model)
        chosen = situation.selection.forget_class
        groups = [str(place) for place in range(self.network.classes)]
        survey = Survey(
            method=self.name,
            ask=partial(_question, "classes", "both", self.most_samples),
            groups=dict.fromkeys(groups, layers),
            forgotten=str(chosen),
            elsewhere=True,
            most=self.most_samples,
        )
        found = yield from conduct(situation, survey)
        scores = tfidf.tfidf_scores([found.totals[group] for group in groups], chosen)
        masks = channel_masks.parameter_masks(
            situation.model,
            self.network.convolutions,
            masking.top_share(
                _of_trained(scores, situation.model, self.network), self.rate, "tensor"
            ),
            norm=self.norm,
            following=True,
        )
        masks = _only_trained(masks, self.network)
        told = {"rate": self.rate, "norm": self.norm, **found.settings}
        return Unlearned(
            prune(situation.model, masks),
            masks,
            told,
            warnings=found.warnings,
            schedule=Schedule(situation.number, self.schedule),
        )


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Blur weights that the remaining data leave undetermined (FisherNoise, ``methods`` 5.6).

    Attributes
    ----------
    recipe
        The authors' public code, or paper 001's eq. 2.
    alpha, relative
        Size of the noise, of the one and of the other.
    """

    name: str = "fisher-noise"
    network: Network = UNKNOWN
    recipe: Literal["golatkar", "eq2"] = "golatkar"
    alpha: float = fisher.ALPHA
    relative: float = fisher.RELATIVE
    most_samples: int = fisher.MOST_SAMPLES
    schedule: Kind = "replay"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for their sums, and add the noise."""
        model = situation.model
        trained = trained_part(model, self.network.trained)
        survey = Survey(
            method=self.name,
            ask=partial(_question, "fisher", "remain", self.most_samples),
            groups={"remain": squares_of(model, self.network.trained)},
            forgotten=None,
            most=self.most_samples,
        )
        found = yield from conduct(situation, survey)
        rest = found.totals["remain"]
        if not rest.count:
            raise MissingNeedError("noise is shaped by the remaining data, and no client has any")
        information = means(rest)
        draw = generator(situation.seed, "fisher noise", situation.number)
        if self.recipe == "eq2":
            scale = fisher.noise_scale(trained, information, self.relative)
            blurred = fisher.fisher_noise(trained, information, scale, draw)
        else:
            chosen = situation.selection.forget_class
            blurred = fisher.golatkar_noise(
                trained,
                information,
                draw,
                head=self.network.head,
                forgotten_class=chosen if chosen >= 0 else None,
                alpha=self.alpha,
            )
        told = {"recipe": self.recipe, **found.settings}
        schedule = Schedule(situation.number, self.schedule)
        blurred = copied(model) | blurred
        return Unlearned(blurred, settings=told, warnings=found.warnings, schedule=schedule)


def _question(
    kind: Sums, sets: Literal["both", "forget", "remain"], most_samples: int, selection: Selection
) -> Question:
    return Question(**selection.rows(), kind=kind, sets=sets, most_samples=most_samples)


def channels_of(network: Network, model: Parameters) -> dict[str, Tensor]:
    """Return one number per channel of every convolution, all 0, in the type of its sums."""
    if not network.convolutions:
        raise MissingNeedError(
            "a channel method needs a network with convolutions, and none is known"
        )
    weights = {found.layer: model[f"{found.layer}.weight"] for found in network.convolutions}
    return {
        layer: torch.zeros(len(weight), dtype=torch.promote_types(weight.dtype, torch.float32))
        for layer, weight in weights.items()
    }


def _of_trained(
    scores: Mapping[str, Tensor], model: Parameters, network: Network
) -> dict[str, Tensor]:
    """Return the scores of layers that training moves; clients send them of all."""
    trained = trained_part(model, network.trained)
    found = {layer: tensor for layer, tensor in scores.items() if f"{layer}.weight" in trained}
    if not found:
        raise MissingNeedError("a channel method needs a convolution that is not frozen")
    return found


def _only_trained(masks: Mapping[str, Tensor], network: Network) -> dict[str, Tensor]:
    return {n: t for n, t in masks.items() if network.trained is None or n in network.trained}


def _rest(total: Statistics) -> Statistics | None:
    return total if total.count else None
