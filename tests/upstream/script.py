"""What to answer, as a list of steps. Pure data: `rendering` turns it into bytes, `playing` into time and packets.

Steps that put bytes into the body are rendered as server-sent events unless they say otherwise. The response head is
sent by the first of them, or by `Headers`, whichever comes first; a script that runs out ends its body properly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Framing = Literal["chunked", "close", "content-length"]
Json = Mapping[str, object] | Sequence[object] | str | int | float | bool | None


@dataclass(frozen=True)
class Status:
    """A whole, unstreamed response; the script ends here. A `body` that is not text or bytes is sent as JSON."""

    code: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Json | bytes = ""


@dataclass(frozen=True)
class Headers:
    """The head of the stream, now: what follows may come late. `headers` are laid over the usual ones."""

    headers: Mapping[str, str] = field(default_factory=dict)
    code: int = 200


@dataclass(frozen=True)
class Chunk:
    """One `chat.completion.chunk`. What is None is left out of the delta.

    `content` may be of a wrong type on purpose. `reasoning` goes out under `reasoning_field` (DeepSeek and older
    vLLM say `reasoning_content`; newer vLLM, OpenRouter and Ollama `reasoning`). `raw` is laid over the chunk's top
    level last, so `raw={"choices": None}` breaks exactly that.
    """

    content: object = None
    index: int = 0
    role: str | None = None
    reasoning: str | None = None
    reasoning_field: str = "reasoning_content"
    refusal: str | None = None
    tool_calls: Sequence[Mapping[str, object]] | None = None
    finish_reason: str | None = None
    usage: Mapping[str, object] | None = None
    raw: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Text:
    """`n_chunks` chunks (None: endless) of the text of `seed`, one every `pace_seconds`, the first at once.

    A paced one ends sooner if the test opens the gate `until`: so that many can be seen at the same time, however long
    that takes.
    With `choices` over 1, that many indices take turns, chunk by chunk; each gets `n_chunks`, and index i speaks with
    `seed + i`. The schedule is absolute: a server that was late catches up, sending what is overdue in one write.
    """

    n_chunks: int | None
    pace_seconds: float = 0.0
    seed: int = 0
    index: int = 0
    choices: int = 1
    until: str | None = None


@dataclass(frozen=True)
class Finish:
    """The chunk with the finish reason, an empty delta, of one index. The reason may be "" or nonsense."""

    reason: str | None = "stop"
    index: int = 0


@dataclass(frozen=True)
class Usage:
    """The usage chunk with no choices. Tokens not given are counted: one per chunk with content sent so far."""

    prompt_tokens: int = 7
    completion_tokens: int | None = None


@dataclass(frozen=True)
class Event:
    """Any server-sent event: `data` is text (its lines become data lines) or JSON; None sends no data line."""

    data: Json = None
    event: str | None = None
    id: str | None = None
    retry: int | None = None


@dataclass(frozen=True)
class Comment:
    """A comment line and an empty line, as proxies and slow models send to keep a connection alive."""

    text: str = "keep-alive"


@dataclass(frozen=True)
class Ping:
    """`event: ping` with an empty JSON object for data: an event that is no content."""


@dataclass(frozen=True)
class Done:
    """`data: [DONE]`."""


@dataclass(frozen=True)
class Raw:
    """These bytes of body, as they are."""

    data: bytes


@dataclass(frozen=True)
class Filler:
    """`total_bytes` (None: endless) times one byte, in 64 KiB blocks: a huge line; with gzip, a bomb. No line end."""

    total_bytes: int | None
    byte: bytes = b"a"


@dataclass(frozen=True)
class Pause:
    """Nothing for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class WaitFor:
    """Nothing until the test opens this gate (`upstream.open_gate(name)`), which stays open."""

    gate: str


@dataclass(frozen=True)
class Stall:
    """Nothing until the client leaves or the server stops; with a comment every so many seconds if asked to."""

    comment_every: float | None = None


@dataclass(frozen=True)
class Split:
    """From here on `every` bytes a write (and, if chunked, an HTTP chunk), `pause_seconds` or a loop turn before each.

    It counts bytes of the body as sent, so it cuts through events, lines, CRLF and UTF-8 characters alike. A client
    on the same loop reads them one by one; one elsewhere may find several at once, the fewer the longer the pause.
    """

    every: int = 1
    pause_seconds: float = 0.0


@dataclass(frozen=True)
class Reset:
    """A TCP reset, after the client's kernel has been handed all that came before."""


@dataclass(frozen=True)
class Close:
    """A FIN here: a legal end if framed by the close, else one the client can tell is early."""


@dataclass(frozen=True)
class CutChunked:
    """A FIN inside an HTTP chunk: its size promises `data` and 100 bytes more, which never come."""

    data: bytes = b'data: {"id":"chatcmpl-cut'


@dataclass(frozen=True)
class Wire:
    """These bytes on the connection as they are: the head and the framing are the script's own, lies included.

    A script with such a step has no other bytes in it than those of such steps, and ends with a FIN.
    """

    data: bytes


BodyStep = Chunk | Text | Finish | Usage | Event | Comment | Ping | Done | Raw | Filler
Step = BodyStep | Status | Headers | Pause | WaitFor | Stall | Split | Reset | Close | CutChunked | Wire

BOM = Raw(b"\xef\xbb\xbf")


@dataclass(frozen=True, init=False)
class Script:
    """Steps, and how their bytes are laid on the wire.

    `framing` is how the client learns where the body ends. With `content-length` the length announced is that of
    every body step, those behind a `Close` or `Reset` included: put there what the client shall miss. `line_end` and
    `colon` (": " or ":") shape the events; `gzip` compresses the body, flushed at every event.
    """

    steps: tuple[Step, ...]
    framing: Framing
    line_end: str
    colon: str
    gzip: bool

    def __init__(
        self, *steps: Step, framing: Framing = "chunked", line_end: str = "\n", colon: str = ": ", gzip: bool = False
    ) -> None:
        if framing != "chunked" and any(isinstance(step, CutChunked) for step in steps):
            raise ValueError(f"CutChunked needs chunked framing, this script says {framing!r}: use Close")
        for name, value in zip(
            ("steps", "framing", "line_end", "colon", "gzip"), (steps, framing, line_end, colon, gzip), strict=True
        ):
            object.__setattr__(self, name, value)

    @property
    def body_steps(self) -> tuple[BodyStep, ...]:
        """The steps that put bytes into the body, in order."""
        return tuple(step for step in self.steps if isinstance(step, BodyStep))
