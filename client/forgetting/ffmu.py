"""A client's round of FFMU (``methods`` 3.3): train by quantised steps, and send a gradient.

It is what a client does instead of training, on whatever it would have trained on: a ``Job`` says
so, and an attacker's may change it. There is neither momentum nor weight decay, and the optimiser
is FFMU's own.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from client.forgetting.interface import Rows
from client.scratch import Scratch, scratch_for
from client.task.device import exact_device
from client.task.evaluation import batches, gather
from client.train import Job, order_seed, seed_dropout
from strategies.actions import CANCELLED, LARGEST, SAMPLES, Ffmu
from unlearning import ffmu
from unlearning.errors import MissingNeedError
from unlearning.gradients import gradient
from unlearning.margins import bounded_gradient
from unlearning.parameters import Parameters, trained_names
from unlearning.randomness import derive_seed, generator


def settings_of(config: Mapping[str, object]) -> Ffmu:
    """Return what the server said about the round."""
    return Ffmu.model_validate(dict(config))


def do(job: Job, start: Parameters, asked: Ffmu) -> tuple[Parameters, dict[str, float]]:
    """Play a round from ``start``; return what to send, in the form of a model, and the metrics.

    Buffers are sent as the client left them.

    Returns
    -------
    tuple
        ``w - Gbar``, or the local model of FFMU-N, on the CPU. The mean loss of the last epoch,
        and of ``local = "full"``, where it is the loss at ``start``, what certificates need.

    Raises
    ------
    MissingNeedError
        If there are no rows.
    ParametersError
        If the round leads to values that are not finite.
    """
    if not job.num_examples:
        raise MissingNeedError("a client without rows has no gradient to send; leave it out")
    scratch = scratch_for(job.task, job.device)
    scratch.load(start)
    origin = {name: tensor.to(exact_device(job.device)) for name, tensor in start.items()}
    made, metrics = (_full if asked.local == "full" else _path)(job, scratch, origin, asked)
    sent = scratch.state() | {name: made[name].cpu() for name in trained_names(start)}
    return job.sent(start, sent), metrics


def _path(
    job: Job, scratch: Scratch, origin: Parameters, asked: Ffmu
) -> tuple[Parameters, dict[str, float]]:
    """Return what is sent after local training over batches."""
    settings, epochs = job.settings, range(job.settings.local_epochs)
    function = _Function(scratch.model.train(), job.device)
    home = exact_device(job.device)
    losses: list[tuple[float, int]] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        value = job.task.loss(outputs, targets)
        losses.append((value.item(), len(targets)))
        return value

    def rows() -> Iterator[Rows]:
        for epoch in epochs:
            losses.clear()
            order = torch.Generator().manual_seed(order_seed(settings, job.purpose, epoch))
            for inputs, targets in batches(job.examples, settings.batch_size, order):
                yield inputs.to(home), targets.to(home)

    def gradient_of(model: Parameters, batch: Rows) -> dict[str, Tensor]:
        return function.whole(gradient(model, function.forward, loss, *batch))

    with torch.random.fork_rng(devices=[]):
        seed_dropout(job.device, derive_seed(settings.seed, "dropout", *job.purpose))
        local, mean = ffmu.device_round(
            origin,
            rows(),
            gradient_of,
            asked.ffmu_rate,
            asked.quantiser,
            generator(settings.seed, "quantiser", *job.purpose),
        )
    told = sum(value * size for value, size in losses) / sum(size for _, size in losses)
    return local if asked.models else ffmu.as_model(origin, mean), {"loss": told}


def _full(
    job: Job, scratch: Scratch, origin: Parameters, asked: Ffmu
) -> tuple[Parameters, dict[str, float]]:
    """Return the gradient of all rows at ``origin``; nothing is drawn, statistics stay."""
    function = _Function(scratch.model.eval(), job.device)
    inputs, targets = (part.to(exact_device(job.device)) for part in gather(job.examples))
    found = bounded_gradient(
        origin, function.forward, job.task.loss, inputs, targets, clip=asked.clip or math.inf
    )
    with torch.no_grad():
        loss = float(job.task.loss(function.forward(origin, inputs), targets))
    told = {LARGEST: found.largest, CANCELLED: found.cancelled, SAMPLES: len(targets)}
    return ffmu.as_model(origin, function.whole(found.gradient)), {"loss": loss, **told}


class _Function:
    """A network as a function of its trained tensors; buffers are the network's own.

    Tensors come and go where gradients can be added and quantised in float64.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._network, self._device = network, device
        first: dict[int, str] = {}
        self._twins: dict[str, str] = {}
        """Further names of a tensor that layers share -> its first name."""
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if parameter.requires_grad:
                known = first.setdefault(id(parameter), name)
                if known != name:
                    self._twins[name] = known
        self._names = tuple(first.values())

    def forward(self, model: Parameters, inputs: Tensor) -> Tensor:
        """Return the network's outputs for parameters and inputs."""
        here = {name: model[name].to(self._device) for name in self._names}
        outputs: Tensor = functional_call(self._network, here, (inputs.to(self._device),))
        return outputs.to(exact_device(self._device))

    def whole(self, gradients: Parameters) -> dict[str, Tensor]:
        """Return gradients that say the same under every name of a shared tensor."""
        return {name: gradients[self._twins.get(name, name)] for name in gradients}
