"""Methods that cut or blur weights by statistics that clients send (``methods`` 2.11, 5).

A client answers with sums over the rows to forget and over its others. They add up to what one data
set would give, after whoever sends averages far above everybody's median is clipped.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from strategies.actions import Selection, joined, parted
from strategies.actions import Statistics as Question
from strategies.memory import Memory
from strategies.methods.interface import UNKNOWN, Network, Situation, Unlearned, done
from strategies.tuning import Kind, Schedule
from unlearning import channel_masks, fisher, masking, tfidf
from unlearning.errors import MissingNeedError, ParametersError, RefusedRequestError
from unlearning.fedup import prune
from unlearning.parameters import Parameters, trained_names
from unlearning.plan import Answer, Ask, Plan
from unlearning.randomness import generator
from unlearning.sums import (
    Statistics,
    added,
    check_statistics,
    clipped_to_median,
)

Sums = Literal["fisher", "activations", "gradients"]
NOTHING = Selection(forget="none")
MASKS = ("fisher-mask", "activation-mask", "grad-mask", "random-mask")
_SAME = "same_scores: what is forgotten and what remains look alike, so chance decides the mask"


class StatisticsError(RefusedRequestError):
    """Clients sent statistics that cannot be true."""


def checked(
    answers: Sequence[Answer],
    groups: Sequence[str],
    like: Mapping[str, Parameters],
    signed: bool,
    most: int | None = None,
) -> dict[str, list[Statistics]]:
    """Return every client's statistics, group by group, after checking them.

    Parameters
    ----------
    groups
        Names of the groups; the metric ``GROUP-count``, or ``count-GROUP``, says how many rows.
    like
        Group -> tensors of the names and shapes expected.
    most
        Rows that a group of one client can have; ``None`` where there is no bound.

    Raises
    ------
    StatisticsError
        If a client sent NaN, a negative sum, a count that cannot be, or what does not fit.
    """
    found: dict[str, list[Statistics]] = {group: [] for group in groups}
    for answer in answers:
        sent = parted(answer.arrays or {})
        for group in groups:
            count = answer.metrics.get(f"{group}-count", answer.metrics.get(f"count-{group}", 0))
            try:
                if not float(count).is_integer():
                    raise ParametersError(f"a number of rows is whole, and {count} is not")
                part = Statistics(sent.get(group, {}), int(count))
                check_statistics(part, like[group], most=most, signed=signed)
            except ParametersError as error:
                raise StatisticsError(
                    f"{answer.client} sent no usable statistics: {error}"
                ) from error
            found[group].append(part)
    return found


def together(parts: Sequence[Statistics]) -> Statistics:
    """Return what the clients' rows add up to, nobody far above the median."""
    return added(clipped_to_median(parts))


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
    schedule
        Of the rates in the rounds that follow.
    """

    name: str = "fisher-mask"
    network: Network = UNKNOWN
    rate: float = masking.USUAL
    most_samples: int = fisher.MOST_SAMPLES
    schedule: Kind = "replay"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for their sums, and mask the model."""
        match self.name:
            case "random-mask":
                trained = _trained(situation.model)
                draw = generator(situation.seed, "random mask", situation.number)
                masks = masking.random_mask(trained, self.rate, draw)
                return done(self._masked(situation, masks, ()))
            case "fisher-mask":
                return self._by_weights(situation)
        return self._by_channels(situation)

    def _by_weights(self, situation: Situation) -> Plan[Unlearned]:
        like = _trained(situation.model)
        parts = yield from self._asked(situation, "fisher", {"forget": like, "remain": like})
        scores = fisher.fisher_scores(together(parts["forget"]), _rest(parts["remain"]))
        masks = masking.top_share(scores, self.rate)
        return self._masked(situation, masks, (_SAME,) if masking.says_nothing(scores) else ())

    def _by_channels(self, situation: Situation) -> Plan[Unlearned]:
        layers = channels_of(self.network, situation.model)
        if self.name == "activation-mask":
            both = {"forget": layers, "remain": layers}
            parts = yield from self._asked(situation, "activations", both)
            scores = channel_masks.activation_scores(
                together(parts["forget"]), _rest(parts["remain"])
            )
        else:
            parts = yield from self._asked(situation, "gradients", {"forget": layers}, signed=True)
            total = together(parts["forget"])
            scores = {name: tensor / max(1, total.count) for name, tensor in total.sums.items()}
        chosen = masking.top_share(scores, self.rate)
        masks = channel_masks.parameter_masks(situation.model, self.network.convolutions, chosen)
        return self._masked(situation, masks, (_SAME,) if masking.says_nothing(scores) else ())

    def _asked(
        self,
        situation: Situation,
        kind: Sums,
        like: Mapping[str, Parameters],
        *,
        signed: bool = False,
    ) -> Plan[dict[str, list[Statistics]]]:
        answers = yield from asking(situation, kind, like, self.most_samples)
        return checked(answers, tuple(like), like, signed, self.most_samples)

    def _masked(
        self, situation: Situation, masks: Mapping[str, Tensor], warnings: tuple[str, ...]
    ) -> Unlearned:
        return Unlearned(
            prune(situation.model, masks),
            masks,
            {"rate": self.rate, "most_samples": self.most_samples},
            rate=self.rate,
            warnings=warnings,
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
        groups = [str(place) for place in range(self.network.classes)]
        like = dict.fromkeys(groups, layers)
        answers = yield from asking(situation, "classes", like, self.most_samples)
        most = 2 * self.most_samples  # of those to forget and of the others
        parts = checked(answers, groups, like, signed=False, most=most)
        scores = tfidf.tfidf_scores(
            [together(parts[group]) for group in groups], situation.selection.forget_class
        )
        masks = channel_masks.parameter_masks(
            situation.model,
            self.network.convolutions,
            masking.top_share(scores, self.rate, "tensor"),
            norm=self.norm,
            following=True,
        )
        settings = {"rate": self.rate, "norm": self.norm}
        schedule = Schedule(situation.number, self.schedule)
        model = prune(situation.model, masks)
        return Unlearned(model, masks, settings, rate=self.rate, schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Blur weights that the remaining data leave undetermined (FisherNoise, ``methods`` 5.6)."""

    name: str = "fisher-noise"
    network: Network = UNKNOWN
    recipe: Literal["golatkar", "eq2"] = "golatkar"
    most_samples: int = fisher.MOST_SAMPLES
    schedule: Kind = "replay"

    def freeze(self, memory: Memory, model: Parameters, clients: Collection[str]) -> None:
        """Keep nothing."""

    def plan(self, situation: Situation) -> Plan[Unlearned]:
        """Ask all clients for their sums, and add the noise."""
        model = situation.model
        like = {"forget": _trained(model), "remain": _trained(model)}
        answers = yield from asking(situation, "fisher", like, self.most_samples)
        parts = checked(answers, tuple(like), like, signed=False, most=self.most_samples)
        rest = together(parts["remain"])
        if not rest.count:
            raise MissingNeedError("noise is shaped by the remaining data, and no client has any")
        information = {name: tensor / rest.count for name, tensor in rest.sums.items()}
        draw = generator(situation.seed, "fisher noise", situation.number)
        if self.recipe == "eq2":
            scale = fisher.noise_scale(model, information)
            blurred = fisher.fisher_noise(model, information, scale, draw)
        else:
            chosen = situation.selection.forget_class
            blurred = fisher.golatkar_noise(
                model,
                information,
                draw,
                head=self.network.head,
                forgotten_class=chosen if chosen >= 0 else None,
            )
        schedule = Schedule(situation.number, self.schedule)
        return Unlearned(blurred, settings={"recipe": self.recipe}, schedule=schedule)


def asking(
    situation: Situation,
    kind: Literal["fisher", "activations", "gradients", "classes"],
    like: Mapping[str, Parameters],
    most_samples: int,
) -> Plan[list[Answer]]:
    """Ask all clients for statistics; of clients that leave, all rows are to be forgotten."""
    parties: list[tuple[Collection[str], Selection]] = [
        (situation.active, situation.selection if not situation.forgotten else NOTHING),
        (situation.forgotten, situation.selection),
    ]
    found: list[Answer] = []
    for to, selection in parties:
        if to:
            question = Question(**selection.rows(), kind=kind, most_samples=most_samples)
            found += yield Ask(
                Question.action,
                to=tuple(to),
                arrays=situation.model,
                config=question.config(),
                expects=joined(**like),
            )
    return found


def channels_of(network: Network, model: Parameters) -> dict[str, Tensor]:
    """Return one number per channel of every convolution, all 0."""
    if not network.convolutions:
        raise MissingNeedError(
            "a channel method needs a network with convolutions, and none is known"
        )
    return {
        found.layer: torch.zeros(len(model[f"{found.layer}.weight"]))
        for found in network.convolutions
    }


def _trained(model: Parameters) -> dict[str, Tensor]:
    return {
        name: torch.empty_like(
            model[name], dtype=torch.promote_types(model[name].dtype, torch.float32)
        )
        for name in trained_names(model)
    }


def _rest(parts: Sequence[Statistics]) -> Statistics | None:
    total = together(parts)
    return total if total.count else None
