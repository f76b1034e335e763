"""scikit-learn's Wisconsin breast cancer set: 569 rows of 30 measurements, installed with it."""

from functools import partial

import torch

from client.task import models
from client.task.classification import Classification, in_parts, three_parts
from client.task.protocol import TaskOptions
from client.task.tables import installed_table

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.125


def breast_cancer(options: TaskOptions) -> Classification:
    """Return the breast cancer task (malignant 0, benign 1); model ``mlp``."""
    table = torch.from_numpy(installed_table("breast_cancer.csv", header=True))
    inputs = table[:, :-1].float()
    targets = table[:, -1].long()
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
