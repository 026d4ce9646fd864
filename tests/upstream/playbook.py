"""Which script answers which request: the API's own rules first, then what the test has ordered, then a good answer."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from . import model_name
from .answers import error, good_answer
from .request import Request
from .script import Script, Status

Source = Script | Callable[[Request], Script]
PATH = "/chat/completions"  # under any base: every cloud has its own


@dataclass(frozen=True)
class _Rule:
    model: str | None
    prompt: str | None
    sources: tuple[Source, ...]

    def fits(self, request: Request) -> bool:
        return self.model in (None, request.model) and self.prompt in (None, request.prompt)


class Playbook:
    """Ordered scripts. Safe to fill from any thread while the server answers."""

    def __init__(self, *, require_key: bool = False, default: Source = good_answer) -> None:
        """With `require_key`, no key and the key `bad` are 401. `default` answers what nothing else does."""
        self._require_key = require_key
        self._default = default
        self._queue: deque[Source] = deque()
        self._rules: deque[_Rule] = deque()
        self._seen: Counter[tuple[object, ...]] = Counter()

    def queue(self, *sources: Source) -> None:
        """The next valid requests, whatever they ask, are answered by these, one each."""
        self._queue.extend(sources)

    def rule(self, model: str | None, prompt: str | None, *sources: Source) -> None:
        """Requests that fit get these in turn, each prompt on its own; the last stays. A later rule goes first."""
        if not sources:
            raise ValueError("on() needs at least one script")
        self._rules.appendleft(_Rule(model, prompt, sources))

    def choose(self, request: Request) -> Script:
        """The script for this request; choosing counts as having answered."""
        refused = refusal(request, require_key=self._require_key)
        if refused is not None:
            return refused
        source = self._pick(request)
        return source if isinstance(source, Script) else source(request)

    def _pick(self, request: Request) -> Source:
        if self._queue:
            return self._queue.popleft()
        for rule in list(self._rules):
            if rule.fits(request):
                return rule.sources[min(self._nth((id(rule), request.prompt)), len(rule.sources)) - 1]
        if request.model.startswith(model_name.PREFIX):
            try:
                return model_name.script_for(request, self._nth((request.model, request.prompt)))
            except ValueError as wrong:
                return error(400, str(wrong), param="model")
        return self._default

    def _nth(self, what: tuple[object, ...]) -> int:
        self._seen[what] += 1
        return self._seen[what]


def refusal(request: Request, *, require_key: bool = False) -> Script | None:
    """The script that refuses this request as OpenAI would, None if it is a plausible chat completion."""
    path = request.path.partition("?")[0]
    if require_key and request.key in ("", "bad"):
        code = "invalid_api_key" if request.key else None
        return error(401, "Incorrect API key provided or none at all.", error_code=code)
    if path == "/v1/models":
        listed = [{"id": name, "object": "model", "created": 1732264000, "owned_by": "tests"} for name in MODELS]
        return Script(Status(body={"object": "list", "data": listed}))
    if not path.endswith(PATH):
        return error(404, f"Invalid URL ({request.method} {path})")
    if request.method != "POST":
        return error(405, f"Not allowed to {request.method} on {path}", headers={"allow": "POST"})
    if not isinstance(request.json, dict):
        return error(400, "We could not parse the JSON body of your request: an object was expected.")
    if request.model == "unknown":
        return error(404, "The model `unknown` does not exist.", error_code="model_not_found", param="model")
    wrong = next((param for param, holds in _RULES if not holds(request.json)), None)
    return None if wrong is None else error(400, f"Invalid value for '{wrong}'.", param=wrong)


MODELS = ("scripted", "gpt-4o-mini")


def _messages(body: dict[str, object]) -> bool:
    messages = body.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def _number(name: str, low: float, high: float, kind: type | tuple[type, ...]) -> Callable[[dict[str, object]], bool]:
    def holds(body: dict[str, object]) -> bool:
        value = body.get(name)
        return value is None or (isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high)  # type: ignore[operator]

    return holds


# What a parameter must be; enough to catch a client that sends nonsense, not a copy of OpenAI's schema.
_RULES: tuple[tuple[str, Callable[[dict[str, object]], bool]], ...] = (
    ("model", lambda body: isinstance(body.get("model"), str) and bool(body["model"])),
    ("messages", _messages),
    ("stream", lambda body: body.get("stream") in (None, True, False)),
    ("stream_options", lambda body: body.get("stream_options") is None or body.get("stream") is True),
    ("n", _number("n", 1, 128, int)),
    ("temperature", _number("temperature", 0, 2, (int, float))),
    ("top_p", _number("top_p", 0, 1, (int, float))),
    ("max_tokens", _number("max_tokens", 1, 10**9, int)),
    ("max_completion_tokens", _number("max_completion_tokens", 1, 10**9, int)),
)
