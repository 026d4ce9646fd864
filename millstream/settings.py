"""All settings, read from the environment once, validated, frozen and passed down.

Nobody else reads the environment. `describe()` is the table in `--help` and docs/operations.md.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final
from urllib.parse import urlsplit

from .errors import SettingsError
from .keys import DEFAULT_PREFIX, Keys

PREFIX_VARIABLE = "MILLSTREAM_"
_PREFIX_PATTERN = re.compile(r"[A-Za-z0-9_.-]{1,32}")


def _number(low: float, high: float, what: str) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = float(text)
        if not low <= value <= high:  # also refuses NaN
            raise ValueError(what)
        return value

    parse.__doc__ = f"{what} from {low:g} to {high:g}"
    return parse


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise ValueError(text)
        return value

    parse.__doc__ = f"a whole number from {low} to {high}"
    return parse


def _flag(text: str) -> bool:
    """1 or 0"""
    return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False, "": False}[text.lower()]


def _prefix(text: str) -> str:
    """1 to 32 of A-Z a-z 0-9 _ . -"""
    if not _PREFIX_PATTERN.fullmatch(text):
        raise ValueError(text)
    return text


def _log_format(text: str) -> str:
    """json or console"""
    if text not in ("json", "console"):
        raise ValueError(text)
    return text


def _redis_url(text: str) -> str:
    """redis://, rediss:// or unix:// and an address (a password's / # ? @ written as %2F %23 %3F %40)"""
    parts = urlsplit(text)  # raises for a port that is none, such as the rest of a password with a slash in it
    if parts.scheme not in ("redis", "rediss", "unix") or not (parts.path if parts.scheme == "unix" else parts.netloc):
        raise ValueError(text)
    if parts.port == 0:
        raise ValueError(text)
    return text


HTTP_ADDRESS: Final = "http:// or https://, a host and perhaps a path, without user, query or fragment"
"""What `is_http_address` accepts, in words."""


def is_http_address(value: Any) -> bool:
    """Whether /chat/completions can be appended to it, and it can be shown: it has no place for a key."""
    if not isinstance(value, str) or not value.isascii() or not value.isprintable() or " " in value:
        return False
    try:
        parts = urlsplit(value)
        port = parts.port
    except ValueError:
        return False
    named = parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0
    return named and "@" not in parts.netloc and "?" not in value and "#" not in value


def shown_address(text: str) -> str:
    """What was found instead of such an address; user, query and fragment may be a key."""
    return "an address with @, ? or # in it" if any(mark in text for mark in "@?#") else repr(text[:80])


def _http_url(text: str) -> str:
    if not is_http_address(text):
        raise ValueError(text)
    return text.rstrip("/")


_http_url.__doc__ = HTTP_ADDRESS


def _setting(variable: str, parse: Callable[[str], Any], default: Any, about: str, *, secret: bool = False) -> Any:
    return field(
        default=default,
        repr=not secret,
        metadata={"variable": variable, "parse": parse, "about": about, "secret": secret},
    )


_seconds = _number(0.05, 7 * 86400, "seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting with its default. Times are seconds unless the name says otherwise."""

    redis_url: str = _setting(
        "REDIS_URL", _redis_url, "redis://127.0.0.1:6379/0", "the Redis or Valkey primary", secret=True
    )
    api_key: str | None = _setting("OPENAI_API_KEY", str, None, "the upstream's key", secret=True)
    base_url: str = _setting("OPENAI_BASE_URL", _http_url, "https://api.openai.com/v1", "the upstream's address")
    upstreams: str | None = _setting(
        PREFIX_VARIABLE + "UPSTREAMS", str, None, "a TOML file that names several upstreams (docs/upstreams.md)"
    )
    breaker: bool = _setting(
        PREFIX_VARIABLE + "BREAKER", _flag, True, "spare an upstream that is down: retry budget and breaker"
    )
    prefix: str = _setting(PREFIX_VARIABLE + "PREFIX", _prefix, DEFAULT_PREFIX, "first part of every name in Redis")
    model: str = _setting(PREFIX_VARIABLE + "MODEL", str, "gpt-4o-mini", "model of jobs that name none")
    streams: int = _setting(PREFIX_VARIABLE + "STREAMS", _whole(1, 10_000), 200, "jobs one worker runs at once")
    lease: float = _setting(
        PREFIX_VARIABLE + "LEASE", _number(0.5, 3600, "seconds"), 15.0, "until a silent worker's job goes to another"
    )
    max_attempts: int = _setting(
        PREFIX_VARIABLE + "MAX_ATTEMPTS", _whole(1, 100), 3, "broken or lost attempts until a job fails"
    )
    retries: int = _setting(PREFIX_VARIABLE + "RETRIES", _whole(0, 100), 5, "requests again within an attempt")
    rpm: int | None = _setting(
        PREFIX_VARIABLE + "RPM", _whole(1, 10**9), None, "requests a minute and model, of all workers; unset: no limit"
    )
    tpm: int | None = _setting(
        PREFIX_VARIABLE + "TPM", _whole(1, 10**12), None, "tokens a minute and model, of all workers; unset: no limit"
    )
    max_streams: int | None = _setting(
        PREFIX_VARIABLE + "MAX_STREAMS",
        _whole(1, 10**6),
        None,
        "streams at once and model, of all workers; unset: no limit",
    )
    interactive_share: float = _setting(
        PREFIX_VARIABLE + "INTERACTIVE_SHARE",
        _number(0, 0.9, "a part"),
        0.1,
        "of every limit, what batch leaves to interactive",
    )
    retention: float = _setting(
        PREFIX_VARIABLE + "RETENTION", _number(1, 30 * 86400, "seconds"), 3600.0, "how long an ended job is kept"
    )
    flush_ms: float | None = _setting(
        PREFIX_VARIABLE + "FLUSH_MS",
        _number(0, 1000, "milliseconds"),
        None,
        "least time between writes; unset: by load",
    )
    connect_timeout: float = _setting(PREFIX_VARIABLE + "CONNECT_TIMEOUT", _seconds, 5.0, "to connect to the upstream")
    first_token_timeout: float = _setting(
        PREFIX_VARIABLE + "FIRST_TOKEN_TIMEOUT", _seconds, 120.0, "from request to first content"
    )
    idle_timeout: float = _setting(PREFIX_VARIABLE + "IDLE_TIMEOUT", _seconds, 60.0, "between contents of a stream")
    total_timeout: float = _setting(PREFIX_VARIABLE + "TOTAL_TIMEOUT", _seconds, 3600.0, "for one whole answer")
    grace: float = _setting(
        PREFIX_VARIABLE + "GRACE", _number(0, 86400, "seconds"), 30.0, "for running jobs at shutdown"
    )
    log: str = _setting(PREFIX_VARIABLE + "LOG", _log_format, "json", "log lines for machines or people")
    allow_insecure_redis: bool = _setting(
        PREFIX_VARIABLE + "ALLOW_INSECURE_REDIS", _flag, False, "accept a Redis elsewhere that asks no password"
    )

    @property
    def keys(self) -> Keys:
        """The names under this prefix."""
        return Keys(self.prefix)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Settings:
        """Read and validate the environment; `overrides` (not None) win over it.

        Raises SettingsError naming the variable, what was found and what is expected.
        """
        environ = os.environ if environ is None else environ
        values: dict[str, Any] = {}
        for each in fields(cls):
            if (text := environ.get(each.metadata["variable"], "").strip()) != "":
                values[each.name] = _parse(each.metadata, text)
        values.update({name: value for name, value in overrides.items() if value is not None})
        return cls(**values)


def _parse(metadata: Mapping[str, Any], text: str) -> Any:
    parse = metadata["parse"]
    try:
        return parse(text)
    except (ValueError, KeyError):
        shown = shown_address(text) if parse is _http_url else "a value" if metadata["secret"] else repr(text[:80])
        expected = parse.__doc__ if parse is not str else "text"
        raise SettingsError(f"{metadata['variable']}: found {shown}, expected {expected}") from None


def misspelled(environ: Mapping[str, str]) -> list[tuple[str, str]]:
    """Pairs of (variable that nobody reads, the setting it is nearly called): somebody meant that one."""
    known = [each.metadata["variable"] for each in fields(Settings)]
    strange = sorted(name for name in environ if name.startswith(PREFIX_VARIABLE) and name not in known)
    found = [(name, difflib.get_close_matches(name, known, 1, 0.85)) for name in strange]
    return [(name, near[0]) for name, near in found if near]


def describe() -> list[tuple[str, str, str]]:
    """Rows of (variable, default, what it is), in the order of the class."""
    rows = []
    for each in fields(Settings):
        default = "" if each.default is None else each.default
        shown = (
            f"{default:g}"
            if isinstance(default, float)
            else str(int(default) if isinstance(default, bool) else default)
        )
        rows.append((each.metadata["variable"], shown, each.metadata["about"]))
    return rows
