"""One training step of many clients' models at once, and the trial that shows it is right.

The step is ``torch.func.vmap`` of one client's gradient over stacked models. Nobody's model is
trusted to bear that: two clients at once are compared with each alone before it is used.
"""

import collections
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import TensorDataset

from client.task.evaluation import load_state
from client.train import Job, precision
from strategies.screen import one_line
from unlearning.parameters import Parameters

log = logging.getLogger("secateur")

TRACE_AFTER = 24
"""Steps of one shape after which it pays to record its operations and replay them."""
KEPT_TRACES = 16
TRIED = 16
"""Examples with which training together is tried before it is trusted."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of the norm of the gradient, when one client at a time is compared with two at once."""

Step = Callable[..., tuple[dict[str, Tensor], Tensor]]
"""Parameters, masks, inputs, targets, weights -> gradients and losses; all with a client axis."""


class NotBatchableError(Exception):
    """Clients cannot, or had better not, be trained together; the message says why."""


class Mask(nn.Module):
    """Stands in for a dropout layer: multiplies by a mask that is drawn outside."""

    mask: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("mask", torch.ones(()), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs with the mask's zeros, the others scaled up."""
        return inputs * self.mask


class StackedStep:
    """One task's model, and the step that trains many clients' copies of it at once.

    Parameters
    ----------
    job
        Its task, device, precision and kind of data count; the more examples, the better the trial.
    start
        Any model.

    Attributes
    ----------
    model
        With masks in the place of its dropout layers.
    masks
        These, by the name of their buffer.
    mask_shapes
        What each multiplies, without the axis of examples; in the order of use.
    activations
        Bytes that one example's activations take.
    tried
        Examples that it was tried with; a trial with one says little.
    trainable
        Names of the parameters that get gradients.

    Raises
    ------
    NotBatchableError
        If training two clients at once does not give what training each alone does.
    """

    def __init__(self, job: Job, start: Parameters) -> None:
        self._task, self._device, self._settings = job.task, job.device, job.settings
        self.model = _model(job)
        self.masks = _without_dropout(self.model)
        load_state(self.model, start)
        self._sample = _sample(job)
        self.tried = len(self._sample[1])
        self.mask_shapes, self.activations = _shapes(self.model, self.masks, self._sample[0])
        self.trainable: tuple[str, ...] = tuple(
            name for name, p in self.model.named_parameters() if p.requires_grad
        )
        self._gradient = self._vectorised()
        self._traced: dict[tuple[int, int], Step] = {}
        self._unrecordable = False
        self._used: collections.Counter[tuple[int, int]] = collections.Counter()
        self._constants: dict[str, Tensor] = {}
        self._probe()

    def prepare(
        self, start: Parameters, shapes: Iterable[tuple[int, int]], *, record_all: bool
    ) -> bool:
        """Set the model, and record steps that come often enough.

        To be called while nothing trains.

        Parameters
        ----------
        start
            The round's model.
        shapes
            Clients and examples each of every step to come.
        record_all
            Whether to record whatever comes.

        Returns
        -------
        bool
            Whether every step is recorded. Recorded steps need no model, which threads could not
            share.
        """
        load_state(self.model, start)
        constants = {name: start[name] for name in start if name not in self.trainable}
        if any(
            not torch.equal(t, self._constants.get(n, t.new_empty(0))) for n, t in constants.items()
        ):
            # A model may read a buffer as a number, which is then part of what was recorded.
            self._traced.clear()
            self._constants = {name: tensor.clone() for name, tensor in constants.items()}
        wanted = collections.Counter(shapes)
        self._used.update(wanted)
        for shape in wanted:
            if record_all or self._used[shape] >= TRACE_AFTER:
                self._record(shape)
        while len(self._traced) > max(KEPT_TRACES, len(wanted)):
            self._traced.pop(next(shape for shape in self._traced if shape not in wanted))
        return all(shape in self._traced for shape in wanted)

    def of(self, clients: int, examples: int) -> Step:
        """Return the step for so many clients and examples each."""
        return self._traced.get((clients, examples), self._gradient)

    @torch.no_grad()  # as in training
    def _record(self, shape: tuple[int, int]) -> None:
        if shape in self._traced or self._unrecordable:
            return
        try:
            example = self._example(*shape)
            recorded = make_fx(self._gradient)(*example)
            _without_idle_steps(recorded)
            recorded.forward(*example)  # not everything that can be recorded can be replayed
            self._traced[shape] = recorded.forward  # calling a module looks for hooks first
        except Exception as error:  # noqa: BLE001  a user's model may do anything
            self._unrecordable = True
            log.info("training steps are not recorded: %s", one_line(error))

    def _vectorised(self) -> Step:
        """Return the step; a plain function of its tensors, as recording it needs."""

        def loss_of_one(output: Tensor, target: Tensor) -> Tensor:
            return self._task.loss(output.unsqueeze(0), target.unsqueeze(0))

        def loss(
            parameters: Mapping[str, Tensor],
            masks: Mapping[str, Tensor],
            inputs: Tensor,
            targets: Tensor,
            weights: Tensor,
        ) -> Tensor:
            with precision(self._settings, self._device):
                outputs = functional_call(self.model, {**parameters, **masks}, (inputs,))
                losses = vmap(loss_of_one)(outputs, targets)
            return (losses * weights).sum()

        return vmap(grad_and_value(loss), randomness="error")

    def _example(self, width: int, size: int) -> tuple[Any, ...]:
        """Return arguments of a step for ``width`` clients and ``size`` examples each."""
        parameters = dict(self.model.named_parameters())
        stack = {
            name: parameters[name].detach().expand(width, *parameters[name].shape).clone()
            for name in self.trainable
        }
        masks = {
            name: torch.ones(width, size, *shape, device=self._device)
            for name, shape in self.mask_shapes.items()
        }
        inputs, targets = (
            tensor[:1].expand(width, size, *tensor.shape[1:]).contiguous()
            for tensor in self._sample
        )
        return stack, masks, inputs, targets, torch.ones(width, size, device=self._device)

    def _probe(self) -> None:
        """Compare two clients at once, one of them padded, with each alone."""
        inputs, targets = self._sample
        count = len(targets)
        sizes = (count, max(1, count - 1))
        source = torch.Generator().manual_seed(0)
        masks = {
            name: torch.rand(2, count, *shape, generator=source).to(self._device)
            for name, shape in self.mask_shapes.items()
        }
        alone = [
            self._alone(
                {n: m[client, :size] for n, m in masks.items()}, inputs[:size], targets[:size]
            )
            for client, size in enumerate(sizes)
        ]
        # What gets no gradient no optimizer touches.
        self.trainable = tuple(n for n in self.trainable if n in alone[0][0])
        stack, _, _, _, weights = self._example(2, count)
        for client, size in enumerate(sizes):
            weights[client, :size], weights[client, size:] = 1 / size, 0
        twice = [torch.stack([tensor, tensor]) for tensor in (inputs, targets)]
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        with torch.no_grad():  # as in training
            gradients, losses = self._gradient(stack, masks, *twice, weights)
        for name, buffer in self.model.named_buffers():
            if not torch.equal(buffer, before[name]):
                raise NotBatchableError(f"training changes its buffer {name}")
        for client, (expected, loss) in enumerate(alone):
            whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            if not bool(torch.isfinite(loss) & torch.isfinite(whole)):
                raise NotBatchableError("its loss is not finite on the examples it was tried with")
            pairs = [(losses[client], loss, loss.abs())]
            pairs += [(gradients[n][client], g, whole) for n, g in expected.items()]
            for found, wanted, scale in pairs:
                if not bool((found - wanted).norm() <= TOLERANCE[self._settings.precision] * scale):
                    raise NotBatchableError(
                        "its loss is no mean over examples, or examples of a batch influence one "
                        "another"
                    )

    def _alone(
        self, masks: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return one client's gradients, of what has any, and its loss."""
        with precision(self._settings, self._device):
            outputs = functional_call(self.model, dict(masks), (inputs.clone(),))
            loss = self._task.loss(outputs, targets)
        parameters = dict(self.model.named_parameters())
        wanted = [parameters[name] for name in self.trainable]
        found = zip(
            self.trainable, torch.autograd.grad(loss, wanted, allow_unused=True), strict=True
        )
        return {name: gradient for name, gradient in found if gradient is not None}, loss.detach()


def tensors_of(job: Job) -> tuple[Tensor, Tensor]:
    """Return a client's inputs and targets."""
    if not isinstance(job.examples, TensorDataset) or len(job.examples.tensors) != 2:
        raise NotBatchableError("its data are not two tensors in memory")
    inputs, targets = job.examples.tensors
    return inputs, targets


def kind_of(job: Job) -> tuple[Any, ...]:
    """Return what jobs must share to be trained together in one round."""
    return *model_kind(job), job.settings, job.purpose[0]


def model_kind(job: Job) -> tuple[Any, ...]:
    """Return what jobs must share to be trained with the same ``BatchedTraining``."""
    shapes = [(tensor.shape[1:], tensor.dtype) for tensor in tensors_of(job)]
    return id(job.task), job.device, job.settings.precision, *shapes


def _sample(job: Job) -> tuple[Tensor, Tensor]:
    """Return copies of some of a client's examples, of as many classes as there are."""
    inputs, targets = tensors_of(job)
    usable = torch.arange(len(targets))
    if inputs.is_floating_point():
        usable = usable[torch.isfinite(inputs.flatten(1)).all(dim=1)]
    labels = targets[usable].reshape(len(usable), -1)[:, 0]
    # One example of each class before a second one of any, so that no class alone is looked at.
    repeats = torch.stack([(labels[:row] == label).sum() for row, label in enumerate(labels[:500])])
    chosen = usable[torch.argsort(repeats, stable=True)[:TRIED]]
    return inputs[chosen].clone().to(job.device), targets[chosen].clone().to(job.device)


def _model(job: Job) -> nn.Module:
    if job.device.type not in ("cpu", "cuda"):
        raise NotBatchableError(f"on {job.device.type} clients are trained one at a time")
    with torch.random.fork_rng(devices=[]):
        model = job.task.build_model().to(job.device).train()
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            raise NotBatchableError(f"{type(module).__name__} {name} couples a batch's examples")
        if isinstance(module, _ConvNd) and job.device.type == "cpu":
            raise NotBatchableError("on a CPU convolutions are slower stacked")
    if len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters())):
        raise NotBatchableError("some of its parameters are shared between layers")
    return model


def _without_dropout(model: nn.Module) -> dict[str, Mask]:
    """Put masks in the place of dropout layers; return them by the name of their buffer."""
    masks = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Dropout and module.p > 0:
            if not name:
                raise NotBatchableError("it is nothing but dropout")
            masks[f"{name}.mask"] = Mask(module.p)
            model.set_submodule(name, masks[f"{name}.mask"])
    return masks


@torch.no_grad()
def _shapes(
    model: nn.Module, masks: Mapping[str, Mask], inputs: Tensor
) -> tuple[dict[str, tuple[int, ...]], int]:
    """Return what each mask multiplies, in the order of use, and the bytes of all activations."""
    seen: list[tuple[nn.Module, tuple[int, ...]]] = []
    size = 0

    def look(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        nonlocal size
        size += output.nbytes if isinstance(output, Tensor) else 0
        if isinstance(module, Mask):
            if not arguments[0].is_contiguous():  # torch draws in the order of memory
                raise NotBatchableError("a dropout layer's input is not contiguous in memory")
            seen.append((module, tuple(arguments[0].shape[1:])))

    leaves = [module for module in model.modules() if not list(module.children())]
    hooks = [module.register_forward_hook(look) for module in leaves]
    try:
        model(inputs.clone())
    finally:
        for hook in hooks:
            hook.remove()
    names = {id(mask): name for name, mask in masks.items()}
    shapes = {names[id(mask)]: shape for mask, shape in seen}
    if len(shapes) < len(seen) or len(shapes) < len(masks):
        raise NotBatchableError("a dropout layer is used more or less than once")
    return shapes, size // len(inputs)


def _without_idle_steps(recorded: torch.fx.GraphModule) -> None:
    """Take out operations that only say a shape which a tensor has already: a fifth of a step."""
    aten = torch.ops.aten
    idle = (aten.expand.default, aten.view.default, aten._unsafe_view.default)
    for node in list(recorded.graph.nodes):
        if node.op == "call_function" and node.target in idle:
            before, after = node.args[0].meta["val"], node.meta["val"]
            if before.shape == after.shape and before.stride() == after.stride():
                node.replace_all_uses_with(node.args[0])
                recorded.graph.erase_node(node)
    recorded.recompile()
