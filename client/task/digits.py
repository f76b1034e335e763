"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, installed with it."""

from functools import partial

import torch

from client.task import models
from client.task.classification import Classification, in_parts, three_parts
from client.task.protocol import TaskOptions
from client.task.tables import installed_table

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.125  # of all, and of the rest: 20 % and 10 %
LARGEST_PIXEL = 16.0


def digits(options: TaskOptions) -> Classification:
    """Return the digits task; models ``cnn`` (default) and ``mlp``."""
    table = torch.from_numpy(installed_table("digits.csv.gz", header=False))
    inputs = table[:, :-1].reshape(-1, 1, 8, 8).float() / LARGEST_PIXEL
    targets = table[:, -1].long()
    parts = three_parts(inputs, targets, test=TEST_SHARE, validation=VALIDATION_SHARE)
    return in_parts(
        options,
        inputs,
        targets,
        parts,
        classes=10,
        make_model=partial(
            models.build, options.model or "cnn", (1, 8, 8), 10, mean=[0.0], deviation=[1.0]
        ),
    )
