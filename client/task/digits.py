"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, installed with it."""

from functools import partial

import torch
from sklearn.datasets import load_digits

from client.task import models
from client.task.classification import Classification, in_parts, three_parts
from client.task.protocol import TaskOptions

TEST_SHARE, VALIDATION_SHARE = 0.2, 0.125  # of all, and of the rest: 20 % and 10 %
LARGEST_PIXEL = 16.0


def digits(options: TaskOptions) -> Classification:
    """Return the digits task; models ``cnn`` (default) and ``mlp``."""
    raw = load_digits()
    inputs = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / LARGEST_PIXEL
    targets = torch.tensor(raw.target, dtype=torch.int64)
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
