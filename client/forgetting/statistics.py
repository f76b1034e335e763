"""Sums over a holder's rows, from which a server, or the holder itself, makes masks and noise."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from client.forgetting.holding import classes_of, moving
from client.forgetting.interface import Holding, Outcome, Rows
from client.forgetting.squares import squared_gradients
from client.scratch import scratch_for
from client.task.structure import Structure, behind, outputs_of, readout, structure_of
from strategies.actions import Statistics as Settings
from strategies.actions import joined
from unlearning.channel_masks import activation_statistics, gradient_statistics
from unlearning.errors import MissingNeedError
from unlearning.fisher import balanced_rows, fisher_statistics
from unlearning.gradients import check_rows
from unlearning.parameters import Parameters
from unlearning.randomness import generator
from unlearning.sums import Statistics, added
from unlearning.tfidf import class_statistics

CHUNK = 256
"""Rows whose activations are held at once."""


def statistics(settings: Settings, model: Parameters, holding: Holding) -> Outcome:
    """Return sums over the rows to forget and over the others (``methods`` 2.11, 5.7).

    The network is in evaluation mode. Of either set at most ``most_samples`` rows count, of every
    class the same number.

    Returns
    -------
    Outcome
        ``joined(forget=..., remain=...)`` with metrics ``forget-count`` and ``remain-count``, or
        the one of them that is wanted; contributions by gradients of the rows to forget only; of
        ``classes``, a group and a count per class.

    Raises
    ------
    MissingNeedError
        If the model has no convolutions, or the task no classes, and the kind needs them.
    ParametersError
        If something is not finite, or a label is no class.
    """
    forget = _chosen(holding.forget, "forget", settings, holding)
    remain = _chosen(holding.remain, "remain", settings, holding)
    sets = {
        name: rows
        for name, rows in (("forget", forget), ("remain", remain))
        if settings.sets in ("both", name)
    }
    match settings.kind:
        case "fisher":
            found = {name: fisher_of(model, holding, rows) for name, rows in sets.items()}
        case "activations":
            look = _Channels(model, holding)
            found = {name: look.activations(rows) for name, rows in sets.items()}
        case "gradients":
            found = {"forget": _Channels(model, holding).contributions(forget)}
        case "classes":
            classes = classes_of(model, holding)
            both = torch.cat([forget[0], remain[0]]), torch.cat([forget[1], remain[1]])
            per_class = _Channels(model, holding).by_class(both, classes)
            return Outcome(
                joined(**{str(place): part.sums for place, part in enumerate(per_class)}),
                {f"{place}-count": part.count for place, part in enumerate(per_class)},
            )
    return Outcome(
        joined(**{name: part.sums for name, part in found.items()}),
        {f"{name}-count": part.count for name, part in found.items()},
    )


def _chosen(rows: Rows, which: str, settings: Settings, holding: Holding) -> Rows:
    inputs, targets = rows
    check_rows(inputs, targets)
    if len(inputs) <= settings.most_samples:
        return rows
    classes = targets.dim() == 1 and not targets.is_floating_point()
    labels = targets if classes else torch.zeros(len(targets))
    draw = generator(holding.training.seed, "statistics", which, *holding.purpose)
    places = balanced_rows(labels, settings.most_samples, draw)
    return inputs[places], targets[places]


def network_of(holding: Holding) -> nn.Module:
    """Return a network of the task's class on the holding's device; its weights mean nothing."""
    return scratch_for(holding.task, holding.device).model.eval()


def on_device(model: Parameters, holding: Holding) -> dict[str, Tensor]:
    """Return the model where the network is."""
    return {name: tensor.to(holding.device) for name, tensor in model.items()}


def fisher_of(model: Parameters, holding: Holding, rows: Rows) -> Statistics:
    """Return squared gradients, the quick way where the network allows it."""
    own, held = moving(model, holding)
    inputs, targets = (part.to(holding.device) for part in rows)
    quick = None
    if own is model:
        quick = squared_gradients(
            network_of(holding), on_device(model, holding), holding.loss, inputs, targets
        )
    return quick or fisher_statistics(own, held.forward, holding.loss, *rows)


def structure_for(holding: Holding) -> Structure:
    """Return the structure of the task's network, told by any row that there is.

    Raises
    ------
    MissingNeedError
        If there are no rows.
    """
    for inputs, _ in (holding.forget, holding.remain, holding.test):
        if len(inputs):
            return structure_of(network_of(holding), inputs[:1].to(holding.device))
    raise MissingNeedError("a network's structure needs a row to run it on, and there are none")


class _Channels:
    """Channels of the convolutions of one model."""

    def __init__(self, model: Parameters, holding: Holding) -> None:
        self._convolutions = structure_for(holding).convolutions
        if not self._convolutions:
            raise MissingNeedError(
                "a channel method needs a network with convolutions, and this one has none; take "
                "a model with some, or fisher-mask"
            )
        self._network = network_of(holding)
        self._model = on_device(model, holding)
        self._holding = holding

    def activations(self, rows: Rows) -> Statistics:
        """Return sums of activations after Conv(-BN)-ReLU."""
        return self._added(rows, lambda inputs, _: activation_statistics(self._rectified(inputs)))

    def contributions(self, rows: Rows) -> Statistics:
        """Return sums of integrated gradients."""

        def of(inputs: Tensor, targets: Tensor) -> Statistics:
            # One layer after the other: all of them together would not fit for large networks.
            parts = [
                gradient_statistics({layer: found}, {layer: head}, self._holding.loss, targets)
                for layer, found, head in self._paths(inputs)
            ]
            return Statistics(
                {layer: tensor for part in parts for layer, tensor in part.sums.items()},
                len(inputs),
            )

        return self._added(rows, of)

    def by_class(self, rows: Rows, classes: int) -> tuple[Statistics, ...]:
        """Return, per class, sums of what the convolutions put out."""
        layers = [convolution.layer for convolution in self._convolutions]

        def of(inputs: Tensor, targets: Tensor) -> tuple[Statistics, ...]:
            found = outputs_of(self._network, self._model, inputs, layers)
            return tuple(_cpu(part) for part in class_statistics(found, targets, classes))

        parts = [of(*chunk) for chunk in self._chunks(rows)]
        return tuple(added(of_class) for of_class in zip(*parts, strict=True))

    def _rectified(self, inputs: Tensor) -> dict[str, Tensor]:
        places = {convolution.layer: readout(convolution) for convolution in self._convolutions}
        found = outputs_of(self._network, self._model, inputs, list(places.values()))
        return {layer: found[place].relu() for layer, place in places.items()}

    def _paths(self, inputs: Tensor) -> list[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
        found = self._rectified(inputs)
        return [
            (
                convolution.layer,
                found[convolution.layer],
                behind(self._network, self._model, inputs, readout(convolution)),
            )
            for convolution in self._convolutions
        ]

    def _added(self, rows: Rows, of: Callable[[Tensor, Tensor], Statistics]) -> Statistics:
        return added([_cpu(of(*chunk)) for chunk in self._chunks(rows)])

    def _chunks(self, rows: Rows) -> Sequence[tuple[Tensor, Tensor]]:
        inputs, targets = (part.to(self._holding.device) for part in rows)
        return list(zip(torch.split(inputs, CHUNK), torch.split(targets, CHUNK), strict=True))


def _cpu(found: Statistics) -> Statistics:
    """Return sums where they can be added in float64, which not every device knows."""
    sums = {
        name: tensor.cpu().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in found.sums.items()
    }
    return Statistics(sums, found.count)
