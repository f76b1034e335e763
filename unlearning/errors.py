"""Errors that a user can act on.

SecateurError               one line: the rule, the value, the remedy
├── BenignMajorityError     too many clients are to be forgotten at once
├── NoLastRoundError        a method needs a round that was not remembered
└── ParametersError         two models that should be alike are not, or hold NaN or Inf
"""


class SecateurError(Exception):
    """Base of all errors whose message is meant for the user, without a traceback."""

    exit_code = 1
    """Exit status of a command that ends with this error: 1 failed, 2 misuse."""


class BenignMajorityError(SecateurError):
    """Half or more of the participants are to be forgotten; nobody honest is left to compare to."""


class NoLastRoundError(SecateurError):
    """The round that a method needs was not remembered."""


class ParametersError(SecateurError, ValueError):
    """Parameter maps that should be alike differ, or hold values that are not finite."""
