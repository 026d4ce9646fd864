r"""A scripted upstream: an OpenAI-compatible API on raw sockets, for what no real model can be asked to do.

In a test's own loop, or in a thread (plain `with`) for a synchronous test:

    async with ScriptedUpstream() as upstream:
        client = AsyncOpenAI(base_url=upstream.base_url, api_key="k", max_retries=0)

Nothing ordered, it streams `expected_text(DEFAULT_CHUNKS, seed_of(prompt))` well. Order what shall happen instead:

    upstream.script(error(503), error(500), answer(Text(200, pace_seconds=0.02, seed=7)))    # the next three requests
    upstream.on(Script(Text(7), Reset()), answer(Text(50)), model="m")    # for each prompt: first a reset, then well
    upstream.on(lambda request: good_answer(request, n_chunks=len(request.prompt)))          # whatever you like

A script is a list of steps, played in order, that ends its body properly when it runs out:

    Script(Text(3), framing="close")                       a clean end with neither finish reason nor [DONE]
    Script(Text(7), Close()), Script(Text(7), CutChunked())   a FIN between HTTP chunks, and inside one
    Script(Text(7), Stall()), Script(Stall(comment_every=0.5))    silence; nothing but comments
    Script(Pause(2), Text(1)), Script(Headers(), Pause(2))    headers late; headers at once and the first event late
    Script(BOM, Split(1), *answer(Text(9)).steps, line_end="\r\n")    byte by byte, with BOM and CRLF
    Script(Chunk(raw={"choices": None})), Script(Raw(b"data: {"))     broken chunks; any bytes
    Script(Wire(b"HTTP/1.1 200 OK\r\ncontent-length: lots\r\n\r\n"))      any bytes in place of HTTP
    Script(Filler(150_000_000), gzip=True)                 a bomb; Filler(None) never ends
    answer(Text(9, choices=3), choices=3)                  n=3, taking turns
    html(), redirect(url), azure(Text(9)), rate_limited({"retry-after": "2"}), error_event(), tool_call("f", ["{", "}"])

Tests wait on conditions, never on time. Hold a stream at a gate, and watch the journal:

    upstream.script(answer(Text(3), WaitFor("go"), Text(3)))
    [entry] = await upstream.journal.wait_for_async(lambda journal: journal.waiting_for("go"))
    upstream.open_gate("go")
    upstream.journal.wait_for(lambda j: j.open_streams == 0)          # in a synchronous test
    assert entry.outcome == "client_closed" and entry.chunks_sent == 3
    assert upstream.requests_for("the prompt")[0].request.json["stream_options"] == {"include_usage": True}

Requests are checked as the API would (401, 404 `model_not_found` for the model `unknown`, 400 naming the parameter);
scripts answer only valid ones. `dead_ends` has addresses that refuse, hang or stay silent. In another process
(`python -m tests.upstream --port 0`) scripts are ordered in the model's name: see `model_name`.
"""

from .answers import (
    DEFAULT_CHUNKS,
    answer,
    azure,
    error,
    error_event,
    good_answer,
    html,
    rate_limited,
    redirect,
    tool_call,
)
from .dead_ends import black_hole, never_accepted, refused
from .journal import Exchange, Journal
from .request import Request
from .script import (
    BOM,
    Chunk,
    Close,
    Comment,
    CutChunked,
    Done,
    Event,
    Filler,
    Finish,
    Headers,
    Pause,
    Ping,
    Raw,
    Reset,
    Script,
    Split,
    Stall,
    Status,
    Text,
    Usage,
    WaitFor,
    Wire,
)
from .server import ScriptedUpstream
from .text import expected_text, seed_of

__all__ = [
    "BOM",
    "DEFAULT_CHUNKS",
    "Chunk",
    "Close",
    "Comment",
    "CutChunked",
    "Done",
    "Event",
    "Exchange",
    "Filler",
    "Finish",
    "Headers",
    "Journal",
    "Pause",
    "Ping",
    "Raw",
    "Request",
    "Reset",
    "Script",
    "ScriptedUpstream",
    "Split",
    "Stall",
    "Status",
    "Text",
    "Usage",
    "WaitFor",
    "Wire",
    "answer",
    "azure",
    "black_hole",
    "error",
    "error_event",
    "expected_text",
    "good_answer",
    "html",
    "never_accepted",
    "rate_limited",
    "redirect",
    "refused",
    "seed_of",
    "tool_call",
]
