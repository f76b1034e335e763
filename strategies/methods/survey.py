"""Sums that clients are asked for: who is asked, whose sums count, and what they add up to.

Whoever stays is asked for sums over its other rows, and whoever holds what is to be forgotten for
sums over these as well (``methods`` 5.7). Nothing proves them, so that

- what no data could give is left out, as the screen leaves out a model: too many rows, a negative
  square, tensors that do not fit. The record says whose and why;
- a client's rows weigh no more than the screen lets it weigh in an average of models, and where its
  averages are far below the others' no more than the median client's rows of that set;
- averages far above everybody's median are clipped, and the record says how much of the whole.

Without half of those asked, or without anybody who holds what is to be forgotten, the request is
refused with all reasons.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from strategies.actions import Action, Selection, joined, parted
from strategies.methods.interface import Situation
from strategies.rounds import replies_needed
from strategies.screen import Screen
from unlearning.errors import ParametersError, RefusedRequestError
from unlearning.parameters import Parameters, trained_part
from unlearning.plan import Answer, Ask, Plan
from unlearning.sums import (
    COMPARABLE,
    Clipped,
    Statistics,
    added,
    check_statistics,
    clipped_by_norm,
    clipped_to_median,
    limited,
    undiluted,
)

NOTHING = Selection(forget="none")
QUORUM = 0.5
"""Share of the clients asked whose sums must be usable."""
MUCH = 0.9
"""Share of a set's mass past which clipping is worth a warning. Of honest clients' squares, which
have few large entries, up to 0.7 was clipped: digits, 10 clients with about 11 rows of a class."""


class StatisticsError(RefusedRequestError):
    """Too few clients sent statistics that can be true."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """One question to all clients.

    Attributes
    ----------
    method
        Who asks, for messages.
    ask
        What is to be forgotten at a client -> the question.
    groups
        Name of a set of rows -> tensors of the names and shapes of its sums. The answer carries
        ``joined`` groups, and the metric ``GROUP-count`` says how many rows.
    forgotten
        The group of rows to forget, without which the method can do nothing; ``None`` where it
        needs none.
    others
        Whether clients are asked that are to forget nothing.
    elsewhere
        Whether these may have rows in the group to forget all the same, as of a class that is
        forgotten at some clients only.
    most
        Rows that a group of one client can have; ``None`` where there is no bound.
    whole
        The group of all rows, where groups overlap.
    signed, shortened
        Groups whose sums may be negative; and those that are clipped by their length.
    check
        Raises ``ParametersError`` if one client's groups cannot be true in another way.
    """

    method: str
    ask: Callable[[Selection], Action]
    groups: Mapping[str, Parameters]
    forgotten: str | None = "forget"
    others: bool = True
    elsewhere: bool = False
    most: int | None = None
    whole: str | None = None
    signed: Collection[str] = ()
    shortened: Collection[str] = ()
    check: Callable[[Mapping[str, Statistics]], None] = lambda groups: None

    def asks(self, situation: Situation) -> list[Ask]:
        """Return whom to ask, and what; of clients that leave, all rows are to be forgotten."""
        concerned = frozenset(situation.holders)
        staying = () if situation.forgotten else situation.active
        parties = [
            (tuple(c for c in situation.active if c not in concerned), NOTHING),
            (tuple(c for c in staying if c in concerned), situation.selection),
            (situation.forgotten, situation.selection),
        ]
        found = []
        for to, selection in parties if self.others else parties[1:]:
            if to:
                asked = self.ask(selection)
                found.append(
                    Ask(
                        asked.action,
                        to=to,
                        arrays=situation.model,
                        config=asked.config(),
                        expects=joined(**self.groups),
                        everybody=selection is not NOTHING,  # who holds it may refuse the step
                        away=True,
                    )
                )
        return found

    def read(self, answer: Answer, held: int | None) -> dict[str, Statistics]:
        """Return one client's statistics.

        Parameters
        ----------
        held
            Rows to forget that the client can have at most; ``None`` where that is not known.

        Raises
        ------
        ParametersError
            If no data could give them.
        """
        sent = parted(answer.arrays or {})
        found = {}
        for group, like in self.groups.items():
            count = answer.metrics.get(f"{group}-count", 0)
            if not float(count).is_integer():
                raise ParametersError(f"a number of rows is whole, and {count} is not")
            bounds = [self.most, held if group == self.forgotten else None]
            most = min((bound for bound in bounds if bound is not None), default=None)
            found[group] = Statistics(sent.get(group, {}), int(count))
            check_statistics(found[group], like, most=most, signed=group in self.signed)
        self.check(found)
        return found

    def weighed(self, groups: Mapping[str, Statistics], rows: float) -> dict[str, Statistics]:
        """Return statistics that weigh no more than so many rows, all groups in proportion."""
        counted = [self.whole] if self.whole is not None else list(groups)
        whole = sum(groups[group].count for group in counted)
        share = min(1.0, rows / whole) if whole else 1.0
        return {
            group: limited(part, max(1, math.floor(share * part.count + 1e-9)))
            for group, part in groups.items()
        }


@dataclass(frozen=True)
class Findings:
    """What a survey found.

    Attributes
    ----------
    totals
        Group -> sums over all clients.
    settings, warnings
        For the record.
    """

    totals: Mapping[str, Statistics]
    settings: Mapping[str, float | int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def conduct(situation: Situation, survey: Survey) -> Plan[Findings]:
    """Ask all clients, and add up what they sent.

    Raises
    ------
    StatisticsError
        If too few clients sent usable statistics, or none that holds what is to be forgotten; or if
        sums over what is to be forgotten are all 0.
    """
    asks = survey.asks(situation)
    answers: list[Answer] = []
    for question in asks:
        answers += yield question
    usable, reasons = _usable(situation, survey, answers)
    _check_quorum(survey, sum(len(question.to) for question in asks), usable, reasons)
    clipped = {}
    for group in survey.groups:
        parts = [groups[group] for groups in usable.values()]
        if survey.whole is None:  # a part of a whole weighs as its rows do in training
            parts = undiluted(parts)
        clip = clipped_by_norm if group in survey.shortened else clipped_to_median
        clipped[group] = clip(parts)
    totals = {group: added(found.parts) for group, found in clipped.items()}
    if survey.forgotten is not None:
        _check_told(survey.method, totals[survey.forgotten])
    action = asks[0].action
    warnings = [f"unheard: {action} is without {c}: {why}" for c, why in reasons.items()]
    warnings += [
        f"unheard_holder: {client} dropped {rows} rows, and no sums over them came in"
        for client, rows in sorted(_dropped(situation).items())
        if rows and client not in usable
    ]
    settings = {
        "clients": len(usable),
        "clipped": round(max((found.share for found in clipped.values()), default=0.0), 4),
    }
    return Findings(totals, settings, (*warnings, *_clipping(clipped)))


def squares_of(model: Parameters, trained: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return the form of sums of squared gradients: of every trained tensor, float32 or wider.

    ``trained`` as for ``trained_part``.
    """
    return {
        name: torch.empty_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in trained_part(model, trained).items()
    }


def _usable(
    situation: Situation, survey: Survey, answers: Sequence[Answer]
) -> tuple[dict[str, dict[str, Statistics]], dict[str, str]]:
    """Return statistics by client, and why others' are not used."""
    usable: dict[str, dict[str, Statistics]] = {}
    reasons: dict[str, str] = {}
    # Some were asked apart from the others; of all together, nobody outweighs them.
    for answer in Screen().cap(answers)[0]:
        try:
            found = survey.read(answer, _held(situation, survey, answer.client))
        except ParametersError as error:
            reasons[answer.client] = f"no usable statistics: {error}"
        else:
            usable[answer.client] = survey.weighed(found, float(answer.num_examples))
    return usable, reasons


def _held(situation: Situation, survey: Survey, client: str) -> int | None:
    """Return how many rows to forget a client can have: as many as it said when it dropped them."""
    if client in situation.holders:
        return _dropped(situation).get(client)
    return None if survey.elsewhere else 0


def _dropped(situation: Situation) -> Mapping[str, int]:
    """Return what each holder dropped of what the method is about, and of nothing else."""
    (own, *others) = (entry.dropped for entry in situation.pending)
    return situation.dropped if own is None or others else own.rows


def _check_quorum(
    survey: Survey,
    asked: int,
    usable: Mapping[str, Mapping[str, Statistics]],
    reasons: Mapping[str, str],
) -> None:
    told = "".join(f"; {client}: {why}" for client, why in reasons.items())
    needed = replies_needed(QUORUM, asked)
    if len(usable) < needed:
        raise StatisticsError(
            f"{survey.method} needs usable statistics of {needed} of {asked} clients, and "
            f"{len(usable)} sent some{told}; it is tried again later"
        )
    group = survey.forgotten
    if group is not None and not any(groups[group].count for groups in usable.values()):
        raise StatisticsError(
            f"{survey.method} needs usable statistics of somebody who holds what is to be "
            f"forgotten, and none came{told}; it is tried again later, or ask for another method"
        )


def _check_told(method: str, total: Statistics) -> None:
    if not any(bool(tensor.any()) for tensor in total.sums.values()):
        raise StatisticsError(
            f"{method} cannot tell what to change: sums over the {total.count} rows to forget are "
            "all 0; ask for another method"
        )


def _clipping(clipped: Mapping[str, Clipped]) -> list[str]:
    few = [
        f"{group} of {found.compared}"
        for group, found in clipped.items()
        if 0 < found.compared < COMPARABLE
    ]
    much = [f"{found.share:.0%} of {g}" for g, found in clipped.items() if found.share > MUCH]
    warnings = []
    if few:
        warnings.append(
            f"unclipped: too few clients to compare, and what they sent was believed: "
            f"{', '.join(few)}"
        )
    if much:
        warnings.append(f"clipped: somebody's sums are far from the others': {', '.join(much)}")
    return warnings
