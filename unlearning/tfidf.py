"""Class-discriminative pruning: silence the channels that are most specific to a class.

    J. Wang, S. Guo, X. Xie, H. Qi. "Federated Unlearning via Class-Discriminative Pruning."
    WWW 2022, arXiv:2110.11794.

A channel is to a class what a word is to a document (``methods`` 2.11). Clients send, per class
and layer, the sum of every channel's activation; with A[u, j] the average over samples of class u
and u* the class to forget, a layer's scores are

    TF_j  = A[u*, j] / sum_j A[u*, j]
    IDF_j = log((1 + C) / (1 + #{u : A[u, j] >= mean_j' A[u, j']}))
    score = TF IDF

and the top ceil(R_c ch) channels of each layer are silenced: ``masking.top_share`` per tensor,
then ``channel_masks.parameter_masks`` with bias, norm and following.

The source averages the clients' averages; sums and counts weigh every sample alike.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unlearning.channel_masks import channel_means, check_layers
from unlearning.errors import MissingNeedError, ParametersError
from unlearning.label_flip import check_classes
from unlearning.parameters import check_alike, check_finite
from unlearning.sums import Statistics, means

SMALL, USUAL = 0.02, 0.05
"""Shares R_c of a layer's channels: of paper 001, and of the source's public code."""


def class_statistics(
    activations: Mapping[str, Tensor], labels: Tensor, classes: int
) -> tuple[Statistics, ...]:
    """Return, per class, the sums of every channel's activation over its samples.

    Parameters
    ----------
    activations
        Layer -> outputs of the convolution, before normalisation, shape (n, ch, ...). Negative
        ones count as 0, as behind a ReLU.
    labels
        Shape (n,), integers in [0, C).
    classes
        Number C of classes.

    Returns
    -------
    tuple
        C statistics with sums of shape (ch,) per layer; to be added over clients class by class.

    Raises
    ------
    MissingNeedError
        If there are no classes or no convolutions.
    ParametersError
        If a label is out of range, rows do not match or an activation is not finite.
    """
    check_classes(labels, classes)
    if check_layers(activations) != len(labels):
        raise ParametersError(
            f"activations of {check_layers(activations)} samples cannot go with {len(labels)} "
            "labels"
        )
    averages = {layer: channel_means(tensor.relu()) for layer, tensor in activations.items()}
    check_finite(averages)
    found = []
    for one in range(classes):
        mine = labels == one
        sums = {layer: average[mine].sum(dim=0) for layer, average in averages.items()}
        found.append(Statistics(sums, int(mine.sum())))
    return tuple(found)


def tfidf_scores(statistics: Sequence[Statistics], target: int) -> dict[str, Tensor]:
    """Return how specific every channel is to a class, shape (ch,) per layer, in float64.

    Parameters
    ----------
    statistics
        Per class; those that nobody has samples of are left out, of C as well.
    target
        Class u* to forget.

    Returns
    -------
    dict
        Scores of at least 0; 0 for a channel that is active for all classes, or never for u*.

    Raises
    ------
    MissingNeedError
        If nobody has samples of the class, or of any other.
    ParametersError
        If the class is out of range, or statistics differ in layers or channels or are negative.
    """
    if not 0 <= target < len(statistics):
        raise ParametersError(f"classes are numbered from 0 to {len(statistics) - 1}, got {target}")
    present = [place for place, found in enumerate(statistics) if found.count]
    if target not in present or len(present) < 2:
        raise MissingNeedError(
            f"what is specific to class {target} needs samples of it and of another class, and "
            f"there are samples of {present}"
        )
    averages = [means(statistics[place]) for place in present]
    check_alike(*averages)
    scores = {}
    for layer in averages[0]:
        table = torch.stack([average[layer].double() for average in averages])
        if bool((table < 0).any()):
            raise ParametersError(f"activations of {layer} are negative, and a ReLU's are not")
        scores[layer] = _scores(table, present.index(target))
    check_finite(scores)
    return scores


def _scores(table: Tensor, target: int) -> Tensor:
    total = table[target].sum()
    frequency = table[target] / total if float(total) > 0 else torch.zeros_like(table[target])
    # Where all channels are equal, rounding must not put their mean above them.
    usual = table.mean(dim=1, keepdim=True) * (1 - 1e-12)
    active = (table >= usual).sum(dim=0).double()
    return frequency * torch.log((1 + len(table)) / (1 + active))
