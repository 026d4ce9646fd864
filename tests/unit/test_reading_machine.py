"""Random interleavings of a writer, a channel that loses and doubles, and a consumer: the list is always the log."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from millstream import Chunk, Completed, Started
from millstream.events import AnyEvent, Event, Unknown
from millstream.reading import SILENCE, Following, Page
from millstream.testing import ManualClock

PAGE = 3
"""Events on a page here: small, so that logs have many."""

steps: Counter[str] = Counter()


class Reader(RuleBasedStateMachine):
    """One job, one follower as the clients' shells drive it: what is due is read before anything is listened to."""

    @initialize(after=st.integers(0, 12), length=st.integers(0, 12))
    def begin(self, after: int, length: int) -> None:
        self.log: list[AnyEvent] = []
        for _ in range(length):
            self._append("chunk")
        self.after = min(after, length)
        self.clock = ManualClock()
        self.following = Following(["j"], self.after, clock=self.clock)
        self.wire: list[AnyEvent | None] = []  # what is on its way; None = a renewed subscription
        self.taken: list[Event] = []
        self.connected = True

    def _append(self, kind: str) -> AnyEvent:
        seq, attempt = len(self.log) + 1, self.log[-1].attempt if self.log else 1
        event: AnyEvent
        if kind == "started":
            event = Started(seq=seq, attempt=attempt + 1, at=0.0)
        elif kind == "later":
            event = Unknown(seq=seq, attempt=attempt, at=0.0, type="later")
        elif kind == "completed":
            event = Completed(seq=seq, attempt=attempt, at=0.0)
        else:
            event = Chunk(seq=seq, attempt=attempt, at=0.0, delta={"content": str(seq)})
        self.log.append(event)
        return event

    @property
    def closed(self) -> bool:
        return bool(self.log) and self.log[-1].terminal

    @precondition(lambda self: not self.closed)
    @rule(kinds=st.lists(st.sampled_from(["chunk", "chunk", "chunk", "later", "started"]), min_size=1, max_size=5))
    def publish(self, kinds: list[str]) -> None:
        events = [self._append(kind) for kind in kinds]
        if self.connected:
            self.wire += events
        steps["published"] += len(events)

    @precondition(lambda self: not self.closed)
    @rule()
    def end(self) -> None:
        event = self._append("completed")
        if self.connected:
            self.wire.append(event)

    @precondition(lambda self: self.wire)
    @rule(at=st.integers(0, 100))
    def lose(self, at: int) -> None:
        del self.wire[at % len(self.wire)]
        steps["lost"] += 1

    @precondition(lambda self: self.wire)
    @rule(at=st.integers(0, 100))
    def double(self, at: int) -> None:
        self.wire.append(self.wire[at % len(self.wire)])
        steps["doubled"] += 1

    @precondition(lambda self: self.connected)
    @rule()
    def disconnect(self) -> None:
        self.connected = False
        self.wire.clear()
        steps["disconnected"] += 1

    @precondition(lambda self: not self.connected)
    @rule(by_redis_py=st.booleans())
    def connect(self, by_redis_py: bool) -> None:
        self.connected = True
        if by_redis_py:
            self.wire.append(None)  # unnoticed but for the acknowledgement
        else:
            self.following.reconnected()

    @rule()
    def wait(self) -> None:
        self.clock.advance(SILENCE)

    @rule(times=st.integers(1, 20))
    def step(self, times: int) -> None:
        for _ in range(times):
            self._step()

    def _step(self) -> None:
        if due := self.following.due():
            cursor = due[0].cursor
            events = self.log[max(0, cursor - 1) :][:PAGE]
            last = len(events) < PAGE
            page = Page(events, len(self.log), last=last, closed=self.closed)
            self.taken += [event for _, event in self.following.read(due[0], page)]
            steps["read"] += 1
        elif self.wire:
            message = self.wire.pop(0)
            if message is None:
                self.following.reconnected("j")
            else:
                self.taken += self.following.heard("j", message)
            steps["heard"] += 1

    @invariant()
    def the_list_is_a_prefix_of_the_log(self) -> None:
        if hasattr(self, "log"):
            assert self.taken == self._shown()[: len(self.taken)]

    def _shown(self) -> list[Event]:
        return [event for event in self.log[self.after :] if isinstance(event, Event)]

    def teardown(self) -> None:
        """However it went: once things calm down, the list is the log, and an ended job is known to have ended."""
        if not hasattr(self, "log"):
            return
        if not self.closed:
            self._append("completed")
        self.clock.advance(SILENCE)
        while self.following.open and (self.following.due() or self.wire):
            self._step()
        assert self.taken == self._shown()
        assert not self.following.open
        steps["trials"] += 1


def test_whatever_the_channel_does_the_list_is_the_log(say: Callable[[str], None]) -> None:
    """Lost, doubled and late messages, silent reconnects, any cursor: every event once, in order, none missing."""
    steps.clear()
    run_state_machine_as_test(Reader, settings=settings(max_examples=300, stateful_step_count=40, deadline=None))
    say(f"reading machine: {dict(steps)}")
    assert steps["trials"] >= 300
