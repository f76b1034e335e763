"""scikit-learn's Wisconsin breast cancer set: 569 rows of 30 measurements, installed with it."""

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer
from torch.utils.data import TensorDataset

from client.task import models
from client.task.classification import Classification, three_parts
from client.task.protocol import TaskOptions

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.125


def breast_cancer(options: TaskOptions) -> Classification:
    """Return the breast cancer task (malignant 0, benign 1); model ``mlp``."""
    raw = load_breast_cancer()
    inputs = torch.tensor(raw.data, dtype=torch.float32)
    targets = torch.tensor(raw.target, dtype=torch.int64)
    train, validation, test = three_parts(
        inputs, targets, test=TEST_SHARE, validation=VALIDATION_SHARE
    )
    mean, deviation = inputs[train].mean(dim=0), inputs[train].std(dim=0)
    return Classification(
        options=options,
        inputs=inputs[train],
        targets=targets[train],
        validation=TensorDataset(inputs[validation], targets[validation]),
        test=TensorDataset(inputs[test], targets[test]),
        classes=2,
        make_model=partial(
            models.build,
            options.model or "mlp",
            (30,),
            2,
            mean=mean.tolist(),
            deviation=deviation.tolist(),
        ),
    )
