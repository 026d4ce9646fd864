"""What the tests of a run did to the world: counted where it is done, so that no report depends on a test's honesty."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace


@dataclass
class Tally:
    """Counts that only grow. `trials` are a test's own: how often it tried what its name says."""

    trials: int = 0
    worker_kills: int = 0
    redis_kills: int = 0
    stops: int = 0
    shutdowns: int = 0
    cancels: int = 0
    events: int = 0
    """Events of logs and of consumers' lists that the oracle has looked at."""

    def copy(self) -> Tally:
        return replace(self)

    def since(self, before: Tally) -> Tally:
        """What came after an earlier copy."""
        return Tally(**{name: count - getattr(before, name) for name, count in asdict(self).items()})

    def add(self, other: Tally) -> None:
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))


TALLY = Tally()
"""Of this process, from its start."""
