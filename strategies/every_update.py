"""Whether somebody looks at every client's update, so that all of a round are held at once."""

import logging
from collections.abc import Iterable

from flwr.app import Message
from flwr.serverapp.strategy import Strategy

from strategies import averaging
from strategies.detectors.interface import Detector
from strategies.forgetting import Forgetting
from strategies.memory import EVERY_UPDATE
from unlearning.catalogue import Need
from unlearning.parameters import Parameters, byte_size

log = logging.getLogger("secateur")

LARGE_ROUND = 2**30
"""Bytes of updates held at once from which on a warning tells of them."""


def needs_every_update(
    strategy: Strategy, detector: Detector | None, forgetting: Forgetting
) -> str | None:
    """Return what looks at every client's update; ``None`` if a mean is enough."""
    if detector is not None:
        return f"detector {detector.name}"
    if Need.BATCH_LOG in forgetting.offers:
        return str(Need.BATCH_LOG)
    if every := EVERY_UPDATE & set(forgetting.memory.needs):
        return f"the {min(every)}"
    if not averaging.needs_mean_only(strategy):
        return f"strategy {type(strategy).__name__}"
    return None


class Holder:
    """Holds all replies of a round, and says once what that costs, and again where it grows."""

    def __init__(self) -> None:
        self._told_size = 0

    def hold(self, replies: Iterable[Message], model: Parameters, why: str) -> list[Message]:
        """Return all replies, each with a model as large as this one."""
        kept = list(replies)
        size = byte_size([model]) * len(kept)
        if size > self._told_size:
            self._told_size = size
            level = logging.WARNING if size > LARGE_ROUND else logging.INFO
            log.log(
                level,
                "%d clients' updates are held at once, %.1f MB, because %s needs them all",
                len(kept),
                size / 1e6,
                why,
            )
        return kept
