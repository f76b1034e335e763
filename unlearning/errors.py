"""Errors that a user can act on.

SecateurError                   one line: the rule, the value, the remedy
├── RefusedRequestError         a request that is not served; nothing was touched
│   ├── BenignMajorityError     too many clients are to be forgotten at once
│   ├── TooFewClientsError      too few would be left for a round
│   ├── MissingNeedError        a method needs what was not recorded or is not at hand
│   │   ├── NoLastRoundError    ... a round that was not remembered
│   │   ├── NoBatchLogError     ... batches that were not logged
│   │   └── NeedsRetainedClientsError  ... help of the clients that stay
│   ├── UnsafeMethodError       a method trusts clients that must not be trusted
│   ├── ImpossibleRequestError  no method serves such a request
│   ├── NoExactMethodError      exact forgetting was asked for, of a method that is not
│   ├── NotCertifiedError       a deletion that the training does not certify
│   └── BudgetError             forgetting would take more rounds than allowed
└── ParametersError             two models that should be alike are not, or a number is out of range
    └── NotFiniteError          ... or a model holds NaN or Inf
"""


class SecateurError(Exception):
    """Base of all errors whose message is meant for the user, without a traceback."""

    exit_code = 1
    """Exit status of a command that ends with this error: 1 failed, 2 misuse."""


class RefusedRequestError(SecateurError):
    """A request to forget that is not served; the model and the roster are as they were."""


class BenignMajorityError(RefusedRequestError):
    """Half or more of the participants are to be forgotten; nobody honest is left to compare to."""


class TooFewClientsError(RefusedRequestError):
    """Fewer clients would be left than a round waits for."""


class MissingNeedError(RefusedRequestError):
    """A method needs what was not recorded, or is not at hand."""


class NoLastRoundError(MissingNeedError):
    """The round that a method needs was not remembered."""


class NeedsRetainedClientsError(MissingNeedError):
    """A method needs that the clients that stay answer, and they will not."""


class UnsafeMethodError(RefusedRequestError):
    """A method trusts the clients to be forgotten, and they are malicious."""


class ImpossibleRequestError(RefusedRequestError):
    """No method serves such a request."""


class NoExactMethodError(RefusedRequestError):
    """Exact forgetting was asked for, of a method that does not give it."""


class BudgetError(RefusedRequestError):
    """Forgetting would take more rounds than are allowed."""


class ParametersError(SecateurError, ValueError):
    """Parameter maps that should be alike differ, or hold values that are not finite."""


class NotFiniteError(ParametersError):
    """A model holds NaN or Inf: whatever made it diverged."""


class NoBatchLogError(MissingNeedError):
    """Amnesiac unlearning without the log of batches that it subtracts."""


class NotCertifiedError(RefusedRequestError):
    """The training does not certify that a deletion would leave the model as it is."""
