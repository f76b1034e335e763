"""The roster: who may take part, who is quarantined and who is banned, and why."""

from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum


class Status(StrEnum):
    """What a client may do."""

    ACTIVE = "active"
    QUARANTINED = "quarantined"
    """Takes no part; its influence is still in the model."""
    BANNED = "banned"
    """Takes no part; its influence was removed."""


@dataclass(frozen=True, kw_only=True)
class Hysteresis:
    """How often a client must be flagged before it is quarantined.

    A client is quarantined when ``hits`` of the last ``window`` rounds that it took part in flagged
    it; rounds up to ``warm_up`` do not count, because early updates say little.
    """

    hits: int = 3
    window: int = 4
    warm_up: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.hits <= self.window:
            raise ValueError(
                f"hits must lie in [1, window], got hits={self.hits}, window={self.window}"
            )
        if self.warm_up < 0:
            raise ValueError(f"warm_up must not be negative, got {self.warm_up}")


@dataclass
class Entry:
    """One client."""

    status: Status = Status.ACTIVE
    reason: str = ""
    """Why it is not active."""
    since: int | None = None
    """Round in which it stopped being active."""
    strikes: int = 0
    """Replies that broke a rule of the screen."""
    recent: deque[bool] = field(default_factory=deque)
    """Whether it was flagged, for the newest rounds it took part in."""


class Roster:
    """State of every client the federation has seen."""

    def __init__(self, hysteresis: Hysteresis | None = None) -> None:
        self._hysteresis = hysteresis or Hysteresis()
        self._entries: dict[str, Entry] = {}

    def entry(self, client: str) -> Entry:
        """Return a client's entry; one not seen before is active."""
        return self._entries.setdefault(client, Entry())

    def may_take_part(self, client: str) -> bool:
        """Say whether a client is active."""
        return client not in self._entries or self._entries[client].status is Status.ACTIVE

    def clients(self, status: Status) -> tuple[str, ...]:
        """Return the clients of one status, sorted."""
        return tuple(sorted(c for c, entry in self._entries.items() if entry.status is status))

    def statuses(self) -> dict[str, str]:
        """Return every client's status, sorted by client."""
        return {client: str(entry.status) for client, entry in sorted(self._entries.items())}

    def strike(self, clients: Iterable[str]) -> None:
        """Count a broken rule against each client."""
        for client in clients:
            self.entry(client).strikes += 1

    def record_flags(self, participants: Iterable[str], flagged: Collection[str]) -> list[str]:
        """Note who was flagged in a round; return who has now been flagged too often, sorted."""
        due = []
        for client in sorted(participants):
            entry = self.entry(client)
            entry.recent.append(client in flagged)
            while len(entry.recent) > self._hysteresis.window:
                entry.recent.popleft()
            if client in flagged and sum(entry.recent) >= self._hysteresis.hits:
                due.append(client)
        return due

    def quarantine(self, clients: Iterable[str], number: int, reason: str) -> None:
        """Exclude clients at once."""
        for client in clients:
            self._move(client, Status.QUARANTINED, number, reason)

    def ban(self, clients: Iterable[str], number: int, reason: str) -> None:
        """Exclude clients for good, once their influence has been removed."""
        for client in clients:
            self._move(client, Status.BANNED, number, reason)

    def clear_flags(self) -> None:
        """Forget who was flagged lately, because the rounds to come will not be comparable."""
        for entry in self._entries.values():
            entry.recent.clear()

    def _move(self, client: str, status: Status, number: int, reason: str) -> None:
        entry = self.entry(client)
        entry.status, entry.reason = status, reason
        entry.since = number if entry.since is None else entry.since
