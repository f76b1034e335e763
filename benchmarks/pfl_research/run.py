"""The same federation with pfl-research (arXiv:2404.06430), in an environment of its own.

Run as ``python -m benchmarks.pfl_research.run FILE ROUNDS STARTED`` from the repository's root.

Its fast ways for small models: every user's data is made once, as tensors in memory, so that its
data sets keep their batches too; models change in place, in one process; no metric is computed
that nobody reads; nothing is logged.
"""

import sys
import time
from typing import Any

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import MinimizeReuseUserSampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn import functional

from benchmarks import plain


class Model(nn.Module):
    """What pfl wants of a module: a loss and metrics."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy; the network is in training mode."""
        return functional.cross_entropy(self.network(inputs), targets)

    @torch.inference_mode()
    def metrics(self, inputs: Tensor, targets: Tensor, *, central: bool = False) -> dict[str, Any]:
        """Return the accuracy on the server's data, and nothing on users' data."""
        if not central:
            return {}  # pfl evaluates users in its first iteration whatever it is told
        self.eval()
        hits = int((self.network(inputs).argmax(dim=1) == targets).sum())
        self.train()
        return {"accuracy": Weighted(hits, len(targets))}


class Evaluation(TrainingProcessCallback):
    """Evaluate in every round; pfl's own callback leaves out the first."""

    def __init__(self, work: plain.Work) -> None:
        self.parts = [
            PyTorchTensorDataset(examples, eval_kwargs={"central": True})
            for examples in (work.validation, work.test)
        ]
        self.params = NNEvalHyperParams(local_batch_size=plain.EVALUATION_BATCH)
        self.accuracy = 0.0
        self.ends: list[float] = []

    def on_train_begin(self, *, model: PyTorchModel) -> Metrics:
        """Evaluate the initial model."""
        for part in self.parts:
            metrics = model.evaluate(part, eval_params=self.params)
        self.accuracy = float(next(value for _, value in metrics).overall_value)
        self.ends.append(time.monotonic())
        return Metrics()

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Evaluate the model of this round."""
        return False, self.on_train_begin(model=model)


def main(path: str, rounds: str, started: str) -> None:
    """Train with pfl-research and report."""
    work = plain.read(path)
    meta = work.meta
    torch.manual_seed(meta["seed"])
    module = Model(plain.build_model(work)).train()
    # Pseudo-gradients applied with rate 1: the new model is the weighted mean of the users'.
    model = PyTorchModel(
        module, torch.optim.SGD, central_optimizer=torch.optim.SGD(module.parameters(), lr=1.0)
    )
    users = [
        PyTorchTensorDataset(examples, user_id=str(n)) for n, examples in enumerate(work.clients)
    ]
    data = FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(range(len(users))))
    evaluation = Evaluation(work)
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=int(rounds),
            evaluation_frequency=int(rounds) + 1,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=SimulatedBackend(data, data, postprocessors=[WeightByDatapoints()]),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=meta["local_epochs"],
            local_learning_rate=meta["learning_rate"],
            local_batch_size=meta["batch_size"],
        ),
        model_eval_params=evaluation.params,
        callbacks=[evaluation],
        send_metrics_to_platform=False,
    )
    plain.report(float(started), evaluation.ends, evaluation.accuracy, "pfl")


if __name__ == "__main__":
    main(*sys.argv[1:])
