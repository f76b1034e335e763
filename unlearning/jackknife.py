"""Infinitesimal jackknife: one linear correction per deletion.

With the mean Hessian H of the objective at w, over all n samples (``methods`` 2.14),

    w' = w + (1/n) H^-1 sum over the forgotten of grad l_i(w)

Removing points from a sum of losses moves w along + their gradients. H may stay as it is over
several deletions. ``corrected`` takes the exact one of the last layer, a softmax regression on
features x with bias, 1 appended to x, and leaves all other layers as they are:

    grad l_i = (p_i - e_y) x_i',    H = 1/n sum_i kron(diag(p_i) - p_i p_i', x_i x_i') + ridge

``corrected_diagonally`` moves every trained tensor, with ``diag(F) + 1e-2`` for H; on deep networks
that forgets little.

Hessian and gradient are sums over samples, which clients send and the server adds
(``unlearning.sums``, signed). The error is O((m/n)^2) for m of n samples where the loss is convex
and w is the minimum of ``1/n sum l_i + ridge/2 ||w||^2``; otherwise the correction is a heuristic.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn import functional

from unlearning.distillation import Forward, Loss
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.fisher import influence_step
from unlearning.gradients import check_rows, chunked_gradient
from unlearning.label_flip import check_classes
from unlearning.parameters import (
    Parameters,
    check_finite,
    copied,
    norm,
    prunable_names,
    trained_part,
)
from unlearning.sums import Statistics, check_statistics, means

RIDGE, DAMPING = 1e-3, 1e-2
"""What is added to H's diagonal: of the last layer, and of the Fisher information (2.14)."""
MOST_UNKNOWNS = 4000
"""A Hessian of as many unknowns takes 128 MB: float64, since it is inverted."""
LONGEST = 2.0
"""Longest correction that a server believes, in units of what is corrected. On digits, up to 5 % of
the samples took 0.03 to 0.57 of a trained last layer, and 1.1 of one trained for two epochs."""
MOST_FORGOTTEN = 0.05
"""Share of the samples past which a linear correction is not to be trusted."""


def warning(forgotten: int, samples: int) -> str | None:
    """Return a line to report where too many samples are forgotten at once, over 5 %."""
    if forgotten <= MOST_FORGOTTEN * samples + 1e-9:
        return None
    return (
        f"{forgotten} of {samples} samples are more than {MOST_FORGOTTEN:.0%}: a linear correction "
        "is not to be trusted; retrain, or forget fewer at once"
    )


# ---------------------------------------------------------------- the last layer


def last_layer(model: Parameters, trained: Collection[str] | None = None) -> str:
    """Return the name of the last linear layer, that of its weight without ``.weight``.

    Parameters
    ----------
    trained
        Names of what training moves; ``None`` to take all of the layer for it.

    Raises
    ------
    MissingNeedError
        If the last weight is none of a linear layer, or training does not move all of the layer.
    """
    names = prunable_names(model)
    if not names or model[names[-1]].dim() != 2:
        raise MissingNeedError(
            "the infinitesimal jackknife needs a model that ends in a linear layer"
        )
    layer = names[-1].rpartition(".")[0]
    frozen = sorted({n for n in names_of(layer) if n in model} - set(trained_part(model, trained)))
    if frozen:
        raise MissingNeedError(
            "the infinitesimal jackknife corrects the last layer as a whole, and training does not "
            f"move {', '.join(frozen)}; set the scope to diag (ij.scope=diag in a federation)"
        )
    return layer


def names_of(layer: str) -> tuple[str, str]:
    """Return the names of a layer's weight and bias; there need be no bias."""
    prefix = f"{layer}." if layer else ""
    return f"{prefix}weight", f"{prefix}bias"


def expected(model: Parameters, layer: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the forms of Hessian and gradient, to check what clients send against.

    Returns
    -------
    tuple
        Layer -> tensor without memory, of shape (q, q) and (q,). The q = C (d + 1) unknowns are
        ordered by class, and of a class are the d weights and then the bias. Without bias q = C d.

    Raises
    ------
    MissingNeedError
        If there is no such layer, or q is over 4,000.
    """
    weight, bias = names_of(layer)
    if weight not in model or model[weight].dim() != 2:
        raise MissingNeedError(f"the model has no linear layer called {layer!r}")
    size = model[weight].numel() + (len(model[weight]) if bias in model else 0)
    if size > MOST_UNKNOWNS:
        raise MissingNeedError(
            f"layer {layer!r} has {size:,} unknowns, and a Hessian is inverted up to "
            f"{MOST_UNKNOWNS:,}; set the scope to diag (ij.scope=diag in a federation)"
        )
    return (
        {layer: torch.empty(size, size, dtype=torch.float64, device="meta")},
        {layer: torch.empty(size, dtype=torch.float64, device="meta")},
    )


def features(
    model: Parameters, forward: Forward, inputs: Tensor, layer: str, chunk: int = 256
) -> tuple[Tensor, Tensor]:
    """Return what the last layer is given for every row, and the logits it makes of it.

    No hook into a network is needed: the features are the gradient of a row's first logit with
    respect to the weights that lead to it.

    Parameters
    ----------
    forward
        Of a network in evaluation mode.
    inputs
        n rows.
    chunk
        Rows at once, at least 1.

    Returns
    -------
    tuple
        Shape (n, d + 1), the last column 1, or (n, d) for a layer without bias; and (n, C). Both
        float64.

    Raises
    ------
    MissingNeedError
        If the logits are not linear in the features, that is the layer is not the last.
    """
    expected(model, layer)
    weight, bias = names_of(layer)
    matrix = model[weight].detach()

    def first_logit(leading: Tensor, row: Tensor) -> Tensor:
        whole = torch.cat([leading.unsqueeze(0), matrix[1:]])
        return forward({**model, weight: whole}, row.unsqueeze(0))[0, 0]

    slopes = torch.func.vmap(torch.func.grad(first_logit), in_dims=(None, 0))
    found, logits = [matrix.new_zeros(0, matrix.shape[1])], [matrix.new_zeros(0, len(matrix))]
    for rows in torch.split(inputs, chunk) if len(inputs) else ():
        found.append(slopes(matrix[0], rows))
        with torch.no_grad():
            logits.append(forward(model, rows))
    entering, leaving = torch.cat(found), torch.cat(logits)
    made = functional.linear(entering, matrix, model.get(bias))
    if leaving.shape != made.shape or not torch.allclose(made, leaving, rtol=1e-3, atol=1e-3):
        raise MissingNeedError(f"the model does not end in the linear layer {layer!r}")
    if bias in model:
        entering = functional.pad(entering, (0, 1), value=1.0)
    return entering.double(), leaving.double()


def softmax_hessian(entering: Tensor, logits: Tensor) -> Tensor:
    """Return ``sum_i kron(diag(p_i) - p_i p_i', x_i x_i')``, shape (q, q), without ridge.

    Parameters
    ----------
    entering, logits
        Shape (n, k) and (n, C); q = C k.
    """
    classes, width = logits.shape[1], entering.shape[1]
    posteriors = logits.softmax(dim=1)
    result = entering.new_zeros(classes, width, classes, width)
    for one in range(classes):
        for other in range(one, classes):
            factors = posteriors[:, one] * (float(one == other) - posteriors[:, other])
            block = entering.T @ (factors.unsqueeze(1) * entering)
            # A product of floating-point matrices is symmetric only nearly.
            result[one, :, other] = (block + block.T) / 2
            result[other, :, one] = result[one, :, other]
    return result.reshape(classes * width, classes * width)


def softmax_gradient(entering: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return ``sum_i (p_i - e_y) x_i'``, flattened to shape (q,); zero without rows."""
    check_classes(labels, logits.shape[1])
    check_rows(logits, labels)
    errors = logits.softmax(dim=1) - functional.one_hot(labels.long(), logits.shape[1])
    return (errors.T @ entering).reshape(-1)


def hessian_statistics(
    model: Parameters, forward: Forward, inputs: Tensor, layer: str
) -> Statistics:
    """Return the last layer's Hessian as a sum over rows; send it once, for all samples.

    Raises
    ------
    MissingNeedError
        As ``features``.
    """
    entering, logits = features(model, forward, inputs, layer)
    return Statistics({layer: softmax_hessian(entering, logits)}, len(inputs))


def gradient_statistics(
    model: Parameters, forward: Forward, inputs: Tensor, labels: Tensor, layer: str
) -> Statistics:
    """Return the last layer's gradient as a sum over the rows to forget, of classes ``labels``.

    Raises
    ------
    MissingNeedError, ParametersError
        As ``features`` and ``softmax_gradient``.
    """
    entering, logits = features(model, forward, inputs, layer)
    return Statistics({layer: softmax_gradient(entering, logits, labels)}, len(inputs))


def correction(hessian: Tensor, gradient: Tensor, samples: int, ridge: float = RIDGE) -> Tensor:
    """Return ``(1/n) (H/n + ridge)^-1 g`` for sums H and g, by Cholesky decomposition.

    Parameters
    ----------
    hessian, gradient
        Shape (q, q), symmetric and with no negative eigenvalue, and (q,).
    samples
        Number n of samples in H, at least 1.
    ridge
        Over 0.

    Returns
    -------
    Tensor
        Shape (q,), float64.

    Raises
    ------
    ParametersError
        If H is not symmetric, or H with ridge is not positive definite, as no data make it.
    """
    factor = factorised(hessian, samples, ridge)
    return torch.cholesky_solve(gradient.double().unsqueeze(1), factor).squeeze(1) / samples


def factorised(hessian: Tensor, samples: int, ridge: float = RIDGE) -> Tensor:
    """Return the Cholesky factor of ``H/n + ridge``; arguments and errors as of ``correction``.

    What passes for each client passes for their sum.
    """
    if samples < 1 or not ridge > 0:
        raise ParametersError(
            f"a Hessian is of at least 1 sample and its ridge over 0, got {samples}, {ridge}"
        )
    average = hessian.double() / samples
    if not torch.allclose(average, average.T, rtol=1e-6, atol=1e-9):
        raise ParametersError("a Hessian is symmetric, and these sums are not")
    damped = average + ridge * torch.eye(len(average), dtype=torch.float64, device=average.device)
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ParametersError(
            f"a Hessian has no negative eigenvalues, and these sums have, with a ridge of {ridge}; "
            "raise the ridge"
        )
    return factor


def corrected(
    model: Parameters,
    layer: str,
    hessian: Statistics,
    gradient: Statistics,
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    """Return the model with its last layer corrected; everything else is a copy.

    Parameters
    ----------
    hessian
        Over all n samples, the forgotten ones included, from before the first deletion if need be.
    gradient
        Over the forgotten samples, at most n; of none the model stays as it is.

    Raises
    ------
    MissingNeedError
        As ``expected``, or if the Hessian is of no samples.
    ParametersError
        If sums do not fit the layer, or as ``correction``.
    """
    square, vector = expected(model, layer)
    check_statistics(hessian, square, signed=True)
    check_statistics(gradient, vector, most=hessian.count, signed=True)
    if not hessian.count:
        raise MissingNeedError("a Hessian needs at least one sample, and no client has any")
    weight, bias = names_of(layer)
    moved = correction(hessian.sums[layer], gradient.sums[layer], hessian.count, ridge)
    rows = moved.reshape(len(model[weight]), -1)
    result, width = copied(model), model[weight].shape[1]
    result[weight] = (model[weight].double() + rows[:, :width]).to(model[weight].dtype)
    if bias in model:
        result[bias] = (model[bias].double() + rows[:, width]).to(model[bias].dtype)
    check_finite(result)
    return result


def check_length(
    model: Parameters, after: Parameters, names: Collection[str], longest: float = LONGEST
) -> float:
    """Return how long a correction is, in units of the norm of the tensors corrected.

    Raises
    ------
    ParametersError
        If that is more than ``longest``.
    """
    before = {name: model[name].double() for name in names}
    size = norm(before)
    moved = norm({name: after[name].double() - tensor for name, tensor in before.items()})
    if moved > longest * size:
        raise ParametersError(
            f"a correction of length {moved:.3g} is more than {longest:g} times what it corrects, "
            f"{size:.3g}: the sums are false or a linear correction does not fit; retrain"
        )
    return moved / size if size else 0.0


# ---------------------------------------------------------------- all layers, by the diagonal


def slope_statistics(
    model: Parameters, forward: Forward, loss: Loss, inputs: Tensor, targets: Tensor
) -> Statistics:
    """Return the gradient of every trained tensor as a sum over the rows to forget.

    Parameters
    ----------
    forward
        Of a network in evaluation mode.
    inputs, targets
        m rows each; without rows all sums are 0.

    Raises
    ------
    ParametersError
        If rows do not match or a gradient is not finite.
    """
    averages = chunked_gradient(model, forward, loss, inputs, targets)
    sums = {name: tensor * len(inputs) for name, tensor in averages.items()}
    check_finite(sums)
    return Statistics(sums, len(inputs))


def corrected_diagonally(
    model: Parameters, gradient: Statistics, fisher: Statistics, damping: float = DAMPING
) -> dict[str, Tensor]:
    """Return the model after ``fisher.influence_step`` by sums from clients.

    Parameters
    ----------
    gradient
        ``slope_statistics`` over the forgotten samples.
    fisher
        ``fisher.fisher_statistics`` over all samples, the forgotten ones included.

    Raises
    ------
    MissingNeedError
        If ``fisher`` is of no samples.
    ParametersError
        If sums do not fit, or as ``influence_step``.
    """
    average = means(fisher)
    check_statistics(gradient, average, most=fisher.count, signed=True)
    return influence_step(model, gradient.sums, average, fisher.count, damping)
