"""The outbox: what was frozen stays frozen, and no text is lost or doubled, whatever the server answers."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any, Final

from hypothesis import settings as effort
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from millstream.calls import Ending, Frame
from millstream.events import compact
from worker.outbox import KEPT, MAX_FRAME, MAX_TEXT, Outbox

DONE: Final = compact("completed", finish_reasons={0: "stop"})
COMPLETED: Final = Ending("completed", b'{"0":"stop"}')


class Server:
    """The log as append.lua keeps it, which may lose its end, as in a failover."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.closed = False

    def append(self, frame: Frame) -> tuple[str, int]:
        seq, last = len(self.events), frame.first + len(frame.events) - 1
        if self.closed:
            return ("duplicate" if frame.events and last <= seq else "closed"), seq
        if frame.first > seq + 1:
            return "gap", seq
        if not frame.events:
            return "ok", seq
        if last <= seq:
            return "duplicate", seq
        self.events += frame.events[seq + 1 - frame.first :]
        self.closed = frame.ending is not None
        return "ok", len(self.events)


def text_of(events: list[bytes]) -> dict[int, str]:
    """The content of each choice."""
    said: dict[int, str] = {}
    for item in map(json.loads, events):
        index, text = (0, item) if isinstance(item, str) else (item[0], item[2]) if isinstance(item, list) else (0, "")
        said[index] = said.get(index, "") + text
    return {index: text for index, text in said.items() if text}


def pieces_of(events: list[bytes]) -> int:
    """How many upstream chunks of content the events count."""
    items = map(json.loads, events)
    return sum(1 if isinstance(item, str) else item[1] for item in items if isinstance(item, str | list))


class OutboxMachine(RuleBasedStateMachine):
    """Fills an outbox and answers its frames in every way a server and a network can."""

    @initialize()
    def begin(self) -> None:
        self.server = Server()
        self.stops: list[str] = []
        self.outbox = Outbox("job", ("state", "log"), "token", 1, 0, self.stops.append)
        self.said: dict[int, str] = {}
        self.pieces = 0
        self.split = False  # a piece became several events, each of which counts as one
        self.others: list[bytes] = []
        self.frame: Frame | None = None
        self.as_frozen: Any = None
        self.finished = False
        self.known: list[bytes] = []  # what was acknowledged

    # What the relay does

    @precondition(lambda self: not self.finished)
    @rule(index=st.integers(0, 2), text=st.text('ab\n"é', min_size=1, max_size=8))
    def a_piece_comes(self, index: int, text: str) -> None:
        self.outbox.text(index, text)
        self.said[index] = self.said.get(index, "") + text
        self.pieces += 1

    @precondition(lambda self: not self.finished)
    @rule(size=st.sampled_from([MAX_TEXT - 1, MAX_TEXT, MAX_TEXT + 1, 3 * MAX_TEXT, MAX_FRAME]))
    def a_large_piece_comes(self, size: int) -> None:
        self.outbox.text(0, "x" * size)
        self.said[0] = self.said.get(0, "") + "x" * size
        self.pieces += 1
        self.split = True

    @precondition(lambda self: not self.finished)
    @rule(number=st.integers(0, 99))
    def another_event_comes(self, number: int) -> None:
        event = compact("chunk", index=0, n=1, delta={"reasoning": f"{number}"})
        self.outbox.event(event)
        self.others.append(event)

    @precondition(lambda self: not self.finished)
    @rule()
    def the_answer_ends(self) -> None:
        self.outbox.finish(DONE, COMPLETED)
        self.others.append(DONE)
        self.finished = True

    # What the writer, the network and the server do

    @precondition(lambda self: not (self.outbox.ended or self.outbox.stopped))
    @rule()
    def it_is_frozen(self) -> None:
        self.frame = self.outbox.freeze()
        if self.as_frozen is None:
            self.as_frozen = deepcopy(self.frame)

    @precondition(lambda self: self.frame is not None)
    @rule()
    def it_arrives_and_the_reply_is_lost(self) -> None:
        assert self.frame is not None
        self.server.append(self.frame)

    @precondition(lambda self: self.frame is not None)
    @rule()
    def it_is_answered(self) -> None:
        assert self.frame is not None
        self._answer()

    def _answer(self) -> None:
        assert self.frame is not None
        code, seq = self.server.append(self.frame)
        if code in ("ok", "duplicate"):
            self.known[self.frame.first - 1 :] = self.frame.events
        self.frame = self.as_frozen = None
        self.outbox.answered(code, seq)

    @precondition(lambda self: not self.server.closed)
    @rule(lost=st.integers(1, 8))
    def the_server_loses_its_end(self, lost: int) -> None:
        left = max(0, len(self.server.events) - lost)
        # Only what the outbox still has: more is `log_lost`, which a test of its own is about.
        if sum(len(event) + 1 for event in self.known[left:]) <= KEPT:
            del self.server.events[left:]

    @rule()
    def time_passes(self) -> None:
        """There is always something that can happen."""

    # What must hold

    @invariant()
    def what_is_frozen_never_changes(self) -> None:
        if getattr(self, "as_frozen", None) is not None:
            assert self.frame == self.as_frozen
            assert self.outbox.freeze() is self.frame

    @invariant()
    def nothing_was_refused(self) -> None:
        assert getattr(self, "stops", []) == []

    def teardown(self) -> None:
        """In the end everything is there, once, in order."""
        if not hasattr(self, "outbox"):
            return
        while self.frame is not None or self.outbox.waiting or self.outbox.seq > len(self.server.events):
            self.frame = self.frame or self.outbox.freeze()
            assert len(self.frame.events) <= 1 or sum(map(len, self.frame.events)) <= MAX_FRAME
            self._answer()
        assert text_of(self.server.events) == self.said
        counted = pieces_of(self.server.events)
        assert counted >= self.pieces if self.split else counted == self.pieces
        objects = [event for event in self.server.events if event.startswith(b"{")]
        assert objects == self.others
        assert self.outbox.ended == self.server.closed == self.finished
        assert self.outbox.seq == len(self.server.events)
        assert not self.outbox.full


OutboxMachine.TestCase.settings = effort(max_examples=150, stateful_step_count=40, deadline=None)
TestOutboxMachine = OutboxMachine.TestCase
