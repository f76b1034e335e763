"""Clients whose training is linear regression by full-batch gradient steps: all in closed form.

With H_k = X_k'X_k / n_k and b_k = X_k'y_k / n_k a step is w - eta (H_k w - b_k), and the average of
the steps of some clients, weighted by p_k = n_k / sum n, that of H = sum p_k H_k and b likewise:

    w_R = w* + (I - eta H)^R (w_0 - w*),    H w* = b
"""

from dataclasses import dataclass

import torch

RATE = 0.1
"""eta; below 2 over the largest eigenvalue of every H, so that rounding errors do not grow."""


@dataclass(frozen=True)
class Regression:
    """One client's examples: inputs, shape (n, d), and targets, shape (n,)."""

    inputs: torch.Tensor
    targets: torch.Tensor

    @property
    def size(self):
        return len(self.targets)

    @property
    def hessian(self):
        return self.inputs.T @ self.inputs / self.size

    @property
    def offset(self):
        return self.inputs.T @ self.targets / self.size

    def step(self, w):
        """One full-batch gradient step, from the examples themselves."""
        errors = self.inputs @ w - self.targets
        return w - RATE * self.inputs.T @ errors / self.size


def regression(seed, size, truth):
    """Noisy examples of a linear function."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(size, len(truth), generator=draw, dtype=torch.float64)
    noise = torch.randn(size, generator=draw, dtype=torch.float64)
    return Regression(inputs, inputs @ truth + 0.1 * noise)


def shaped(seed, size, axes, curvatures, optimum):
    """Examples whose H has these eigenvectors (columns) and eigenvalues, and this optimum."""
    draw = torch.Generator().manual_seed(seed)
    drawn = torch.randn(size, len(optimum), generator=draw, dtype=torch.float64)
    columns = torch.linalg.qr(drawn).Q
    spread = torch.diag(torch.sqrt(size * torch.tensor(curvatures, dtype=torch.float64)))
    inputs = columns @ spread @ axes.T
    return Regression(inputs, inputs @ optimum)


def average(clients):
    """H and b of several clients together."""
    total = sum(client.size for client in clients)
    hessian = sum(client.size / total * client.hessian for client in clients)
    return hessian, sum(client.size / total * client.offset for client in clients)


def closed_form(clients, rounds, start):
    """The model after so many rounds among these clients."""
    hessian, offset = average(clients)
    assert float(torch.linalg.eigvalsh(hessian).max()) < 2 / RATE
    optimum = torch.linalg.solve(hessian, offset)
    shrink = torch.linalg.matrix_power(
        torch.eye(len(start), dtype=start.dtype) - RATE * hessian, rounds
    )
    return optimum + shrink @ (start - optimum)
