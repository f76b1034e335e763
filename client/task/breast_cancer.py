"""scikit-learn's Wisconsin breast cancer set: 569 rows of 30 measurements, installed with it."""

from functools import partial

import torch
from sklearn.datasets import load_breast_cancer

from client.task import models
from client.task.classification import Classification, in_parts, three_parts
from client.task.protocol import TaskOptions

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.125


def breast_cancer(options: TaskOptions) -> Classification:
    """Return the breast cancer task (malignant 0, benign 1); model ``mlp``."""
    raw = load_breast_cancer()
    inputs = torch.tensor(raw.data, dtype=torch.float32)
    targets = torch.tensor(raw.target, dtype=torch.int64)
    parts = three_parts(inputs, targets, test=TEST_SHARE, validation=VALIDATION_SHARE)
    mean, deviation = inputs[parts[0]].mean(dim=0), inputs[parts[0]].std(dim=0)
    return in_parts(
        options,
        inputs,
        targets,
        parts,
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
