"""Verdicts: is the unlearned model equivalent to the retrained one? Numbers, never just "yes".

A verdict passes only if the *whole* confidence interval of the difference lies inside the stated
tolerance, fails only if it lies outside, and is inconclusive otherwise (``methods`` 8.1). What was
not measured is inconclusive.
"""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Z_95 = 1.959964
"""97.5th percentile of the normal distribution."""


@dataclass(frozen=True)
class Verdict:
    """One question, its answer, and the numbers behind it."""

    result: Literal["pass", "fail", "inconclusive"]
    value: float | None = None
    """Of the unlearned model."""
    baseline: float | None = None
    """Of the retrained model."""
    tolerance: float | None = None
    """Largest acceptable difference."""
    interval: tuple[float, float] | None = None
    """95 % confidence interval of value - baseline."""


NOT_MEASURED = Verdict("inconclusive")


def paired_interval(hits: Tensor, baseline_hits: Tensor) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two shares measured on the same examples.

    Agresti and Min, "Simple improved confidence intervals for comparing matched proportions",
    Statistics in Medicine 24, 2005: half an observation is added to each cell of the 2 x 2 table,
    so that the interval does not collapse when the models never disagree.

    Parameters
    ----------
    hits, baseline_hits
        Bool, shape (n,): whether each model hit each example; n >= 1.
    """
    count = hits.numel() + 2.0
    only_first = float((hits & ~baseline_hits).sum()) + 0.5
    only_second = float((~hits & baseline_hits).sum()) + 0.5
    centre = (only_first - only_second) / count
    variance = (only_first + only_second) / count - centre**2
    half = Z_95 * math.sqrt(variance / count)
    return centre - half, centre + half


def equivalence(hits: Tensor, baseline_hits: Tensor, tolerance: float) -> Verdict:
    """Judge whether a share equals the baseline's within ``tolerance``, on the same examples."""
    low, high = paired_interval(hits, baseline_hits)
    if -tolerance <= low and high <= tolerance:
        result: Literal["pass", "fail", "inconclusive"] = "pass"
    elif high < -tolerance or low > tolerance:
        result = "fail"
    else:
        result = "inconclusive"
    return Verdict(
        result,
        float(hits.double().mean()),
        float(baseline_hits.double().mean()),
        tolerance,
        (low, high),
    )
