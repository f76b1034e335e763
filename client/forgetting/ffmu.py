"""A client's round of FFMU (``methods`` 3.3): train by quantised steps, and send a gradient.

It is what a client does instead of training, on whatever it would have trained on: a ``Job`` says
so, and an attacker's may change it. There is neither momentum nor weight decay, and the optimiser
is FFMU's own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

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
from unlearning.margins import bounded_gradients
from unlearning.parameters import Parameters, trained_names
from unlearning.randomness import derive_seed, generator


def settings_of(config: Mapping[str, object]) -> Ffmu:
    """Return what the server said about the round."""
    return Ffmu.model_validate(dict(config))


def do(
    job: Job, start: Parameters, asked: Ffmu, *, draws: bool = True
) -> tuple[Parameters, dict[str, float]]:
    """Play a round from ``start``; return what to send, in the form of a model, and the metrics.

    Buffers are sent as the client left them. ``draws`` as for ``client.train.train``.

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
    if asked.local == "full":
        return at_once([job], start, asked)[0]
    _check_rows(job)
    scratch = scratch_for(job.task, job.device)
    scratch.load(start)
    origin = {name: tensor.to(exact_device(job.device)) for name, tensor in start.items()}
    made, metrics = _path(job, scratch, origin, asked, draws=draws)
    sent = scratch.state() | {name: made[name].cpu() for name in trained_names(start)}
    return job.sent(start, sent), metrics


def at_once(
    jobs: Sequence[Job], start: Parameters, asked: Ffmu
) -> list[tuple[Parameters, dict[str, float]]]:
    """Play a round of ``local = "full"`` for several clients of one task and device.

    Each sends the gradient of all its rows at ``start``, so that rows of several clients can be
    computed together; nothing is drawn, and statistics stay.

    Returns
    -------
    list
        As ``do``, for each job; of one job alone bit for bit, of several up to rounding.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``do``, whosever fault it is.
    """
    for job in jobs:
        _check_rows(job)
    task, device = jobs[0].task, jobs[0].device
    scratch, exact = scratch_for(task, device), exact_device(device)
    scratch.load(start)
    function = _Function(scratch.model.eval(), device)
    origin = {name: tensor.to(exact) for name, tensor in start.items()}
    rows = [gather(job.examples) for job in jobs]
    held = [(inputs.to(exact), targets.to(exact)) for inputs, targets in rows]
    found = bounded_gradients(
        origin, function.forward, task.loss, held, clip=asked.clip or math.inf
    )
    kept, sent = scratch.state(), []
    for job, (inputs, targets), bounded in zip(jobs, held, found, strict=True):
        with torch.no_grad():
            loss = float(task.loss(function.forward(origin, inputs), targets))
        told = {LARGEST: bounded.largest, CANCELLED: bounded.cancelled, SAMPLES: len(targets)}
        made = ffmu.as_model(origin, function.whole(bounded.gradient))
        own = kept | {name: made[name].cpu() for name in trained_names(start)}
        sent.append((job.sent(start, own), {"loss": loss, **told}))
    return sent


def _check_rows(job: Job) -> None:
    if not job.num_examples:
        raise MissingNeedError("a client without rows has no gradient to send; leave it out")


def _path(
    job: Job, scratch: Scratch, origin: Parameters, asked: Ffmu, *, draws: bool
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

    with torch.random.fork_rng(devices=[], enabled=draws):
        if draws:
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
