"""Scripts in a model's name, for a server in another process: `scripted:chunks=200,pace=0.02,seed=7,reset_after=7`.

| field | means | default |
|---|---|---|
| `chunks`, `pace`, `seed` | the text: chunks per choice, seconds between them, `Text`'s seed | 20, 0, of the prompt |
| `until` | the text ends when this gate is opened, after `chunks` at the latest | |
| `first` | seconds before the response head | 0 |
| `finish` | the finish reason; `none` leaves the chunk out | stop |
| `done` | 0 leaves `[DONE]` out | 1 |
| `framing`, `gzip` | `chunked`, `close` or `content-length`; 1 to compress | chunked, 0 |
| `split` | bytes per packet | whole events |
| `status`, `retry_after` | the fault is this status, with this `retry-after` header (seconds) | |
| `reset_after`, `close_after`, `cut_after`, `stall_after`, `error_after` | the fault comes after so many chunks | |
| `times` | how many requests for one prompt meet the fault before all is well; 0: every one | 0 |

At most one fault. `error_after` sends an error object and ends the stream properly.
"""

from __future__ import annotations

from collections.abc import Callable

from .answers import DEFAULT_CHUNKS, error, error_event, good_answer
from .request import Request
from .script import (
    Chunk,
    Close,
    CutChunked,
    Done,
    Finish,
    Framing,
    Pause,
    Reset,
    Script,
    Split,
    Stall,
    Step,
    Text,
    Usage,
)
from .text import seed_of

PREFIX = "scripted:"

_FAULT_STEPS: dict[str, Callable[[], Step]] = {
    "reset_after": Reset,
    "close_after": Close,
    "cut_after": CutChunked,
    "stall_after": Stall,
    "error_after": error_event,
}
_FAULTS = ("status", *_FAULT_STEPS)
_INTS = frozenset({"chunks", "seed", "done", "gzip", "split", "status", "times", *_FAULT_STEPS})
_FLOATS = frozenset({"pace", "first", "retry_after"})
_FRAMINGS: dict[str, Framing] = {"chunked": "chunked", "close": "close", "content-length": "content-length"}


class Wish:
    """The fields of one model name, read and checked. Raises ValueError naming the field that is wrong."""

    def __init__(self, model: str) -> None:
        """Reads what follows `scripted:`."""
        self._numbers: dict[str, float] = {}
        self.finish = "stop"
        self.until: str | None = None
        self.framing: Framing = "chunked"
        for part in filter(None, model.removeprefix(PREFIX).split(",")):
            name, _, value = part.partition("=")
            self._take(name, value)
        self.fault = next((name for name in _FAULTS if name in self._numbers), None)
        if sum(name in self._numbers for name in _FAULTS) > 1:
            raise ValueError(f"more than one fault in {model!r}: at most one of {', '.join(_FAULTS)}")

    def _take(self, name: str, value: str) -> None:
        try:
            if name in _INTS:
                self._numbers[name] = int(value)
            elif name in _FLOATS:
                self._numbers[name] = float(value)
            elif name == "finish":
                self.finish = value
            elif name == "until":
                self.until = value
            elif name == "framing":
                self.framing = _FRAMINGS[value]
            else:
                raise KeyError(name)
        except (ValueError, KeyError):
            raise ValueError(f"cannot read {name}={value} in the model name; see tests.upstream.model_name") from None

    def integer(self, name: str, default: int = 0) -> int:
        """A whole number of the name."""
        return int(self._numbers.get(name, default))

    def seconds(self, name: str) -> float:
        """A duration of the name, 0 if it has none."""
        return self._numbers.get(name, 0.0)


def script_for(request: Request, nth: int) -> Script:
    """The script of this model name for the `nth` request (1, 2, ...) with the same name and prompt."""
    wish = Wish(request.model)
    times = wish.integer("times")
    fault = wish.fault if times == 0 or nth <= times else None
    if fault == "status":
        after = wish.seconds("retry_after")
        headers = {"retry-after": f"{after:g}"} if after else {}
        return error(wish.integer("status"), type="server_error", headers=headers)
    seed = wish.integer("seed", seed_of(request.prompt))
    n_chunks = wish.integer("chunks", DEFAULT_CHUNKS)
    if not request.stream:
        return good_answer(request, n_chunks, seed=seed)
    return Script(
        *([Pause(wish.seconds("first"))] if wish.seconds("first") else []),
        *([Split(wish.integer("split"))] if wish.integer("split") else []),
        *_stream(request, wish, fault, n_chunks, seed),
        framing=wish.framing,
        gzip=bool(wish.integer("gzip")),
    )


def _stream(request: Request, wish: Wish, fault: str | None, n_chunks: int, seed: int) -> list[Step]:
    choices = range(request.choices)
    steps: list[Step] = [Chunk("", role="assistant", index=i) for i in choices]
    if fault is not None:
        before = min(wish.integer(fault), n_chunks)
        # Nothing at all is sent before a fault after 0 chunks: not even the role, or a client might count it.
        steps = [*steps, Text(before, wish.seconds("pace"), seed, choices=request.choices)] if before else []
        return [*steps, _FAULT_STEPS[fault]()]
    steps.append(Text(n_chunks, wish.seconds("pace"), seed, choices=request.choices, until=wish.until))
    if wish.finish != "none":
        steps += [Finish(wish.finish, index=i) for i in choices]
    if request.include_usage:
        steps.append(Usage())
    return [*steps, Done()] if wish.integer("done", 1) else steps
