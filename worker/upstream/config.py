"""Which upstreams there are: the TOML file of MILLSTREAM_UPSTREAMS, or the one of OPENAI_BASE_URL. Pure.

The file holds no secrets: a key is named by the variable that has it. docs/upstreams.md explains every field and has
an example for each server that was tried.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeGuard
from urllib.parse import urlsplit

from millstream.errors import SettingsError
from millstream.meters import NO_LIMITS, WINDOW, Limits
from millstream.settings import HTTP_ADDRESS, Settings, is_http_address, shown_address

VARIABLE: Final = "MILLSTREAM_UPSTREAMS"
CONTINUES: Final = ("", "vllm", "llama.cpp", "deepseek", "mistral")
ENDS: Final = ("finish_reason", "done")
AUTHS: Final = ("bearer", "api-key")
LIMITS: Final = ("rpm", "tpm", "streams", "window", "models")

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_HEADER_NAME: Final = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_OURS: Final = frozenset({"authorization", "api-key", "host", "content-length", "content-type", "transfer-encoding",
                          "accept-encoding", "connection"})  # fmt: skip
_MAX_FILE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """One upstream. `limits`: what all workers together may ask it for one model; `models_limits`: other ones for
    models of these names or patterns, the first that fits.
    """

    name: str
    base_url: str
    api_key: str | None = field(default=None, repr=False)
    auth: str = "bearer"
    models: tuple[str, ...] = ("*",)
    aliases: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    query: Mapping[str, str] = field(default_factory=dict)
    stream_options: bool = True
    ends_with: str = "finish_reason"
    finish_reasons: frozenset[str] = frozenset()
    continue_with: str = ""
    limits: Limits = NO_LIMITS
    models_limits: Mapping[str, Limits] = field(default_factory=dict)
    breaker: bool = True
    foreign: bool = True
    """Whether it was named in the file: variables for OpenAI alone (organization, project) are then none of its."""

    @property
    def has_no_credentials(self) -> bool:
        """Whether it is asked over the internet with nothing that says who asks: hardly any answers then."""
        return self.base_url.startswith("https:") and self.api_key is None and not self.headers

    def serves(self, model: str) -> bool:
        """Whether a job that names this model may be sent here."""
        return model in self.aliases or any(fnmatchcase(model, pattern) for pattern in self.models)

    def model(self, model: str) -> str:
        """What the model of a job is called here."""
        return self.aliases.get(model, model)

    def limits_of(self, model: str) -> Limits:
        """The limits of a model, by what it is called here."""
        fitting = (limits for pattern, limits in self.models_limits.items() if fnmatchcase(model, pattern))
        return next(fitting, self.limits)


def load(settings: Settings, environ: Mapping[str, str]) -> list[UpstreamSettings]:
    """The upstreams of a worker, in their order. Raises SettingsError with one line that names file and key."""
    if settings.upstreams is None:
        if settings.api_key is not None and not _fits_a_header(settings.api_key):
            raise SettingsError("OPENAI_API_KEY: found a character that no header can carry; copy the key again")
        host = urlsplit(settings.base_url).hostname or "upstream"
        only = UpstreamSettings(
            name=host, base_url=settings.base_url, api_key=settings.api_key, breaker=settings.breaker, foreign=False,
            limits=Limits(settings.rpm or 0, settings.tpm or 0, settings.max_streams or 0, settings.interactive_share),
        )  # fmt: skip
        return [only]
    path = Path(settings.upstreams).expanduser()
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE + 1)
    except OSError as error:
        raise SettingsError(f"{VARIABLE}: cannot read {path}: {error.strerror or error}") from None
    if len(text) > _MAX_FILE:
        raise SettingsError(f"{VARIABLE}: {path} is larger than a megabyte; expected a TOML file naming upstreams")
    return parse(text, str(path), environ, breaker=settings.breaker, share=settings.interactive_share)


def parse(
    text: bytes, source: str, environ: Mapping[str, str], *, breaker: bool = True, share: float = 0.1
) -> list[UpstreamSettings]:
    """The upstreams a file's text names, in its order; `source` is the file's name, for errors."""
    try:
        document = tomllib.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # TOMLDecodeError and UnicodeDecodeError are both
        raise SettingsError(f"{source}: not TOML: {' '.join(str(error).split())[:200]}") from None
    top = _Table(source, "", document)
    top.check_known(("upstreams",))
    tables = top.take("upstreams", {}, "tables such as [upstreams.openai]", _is_table)
    if not tables:
        raise SettingsError(f"{source}: names no upstream; expected at least one table such as [upstreams.openai]")
    return [_upstream(source, name, table, environ, breaker, share) for name, table in tables.items()]


def _upstream(
    source: str, name: str, found: Any, environ: Mapping[str, str], breaker: bool, share: float
) -> UpstreamSettings:
    where = f"upstreams.{name}"
    if not _NAME.fullmatch(name):
        raise SettingsError(f"{source}: {where!r}: a name has 1 to 64 of A-Z a-z 0-9 _ . -")
    if not isinstance(found, dict):
        raise SettingsError(f"{source}: {where}: found {_kind(found)}, expected a table")
    table = _Table(source, where, found)
    table.check_known(FIELDS)
    base_url = table.take("base_url", None, HTTP_ADDRESS, is_http_address)
    if base_url is None:
        raise table.wrong("base_url", "is missing; expected the address that /chat/completions is appended to")
    limits, models_limits = _limits(table, share)
    return UpstreamSettings(
        name=name,
        base_url=base_url.rstrip("/"),
        api_key=_key(table, environ),
        auth=table.choice("auth", AUTHS),
        models=tuple(table.take("models", ["*"], "a list of names or patterns such as 'gpt-*'", _is_names)),
        aliases=table.texts("aliases", "a table: the model a job names = what it is called here"),
        headers=_headers(table),
        query=table.texts("query", "a table of texts"),
        stream_options=table.take("stream_options", True, "true or false", _is_bool),
        ends_with=table.choice("ends_with", ENDS),
        finish_reasons=frozenset(table.take("finish_reasons", [], "a list of words", _is_names_or_none)),
        continue_with=table.choice("continue_with", CONTINUES),
        limits=limits,
        models_limits=models_limits,
        breaker=breaker and table.take("breaker", True, "true or false", _is_bool),
    )


_NOT_KEYS: Final = ("name", "api_key", "foreign", "models_limits")
FIELDS: Final = (
    "api_key_env", *(each.name for each in fields(UpstreamSettings) if each.name not in _NOT_KEYS)
)  # fmt: skip


def _key(table: _Table, environ: Mapping[str, str]) -> str | None:
    variable = table.take("api_key_env", None, "the name of the variable that holds the key", _is_variable)
    if variable is None:
        return None
    key = environ.get(variable, "").strip()
    if not key:
        raise table.wrong("api_key_env", f"the variable {variable} is not set")
    if not _fits_a_header(key):
        raise table.wrong("api_key_env", f"{variable} holds something that no header can carry")
    return key


def _fits_a_header(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _headers(table: _Table) -> Mapping[str, str]:
    headers = table.texts("headers", "a table of texts")
    for name, value in headers.items():
        if name.lower() in ("authorization", "api-key"):
            raise table.wrong(f"headers.{name}", "a key does not belong into this file: use api_key_env (and auth)")
        if name.lower() in _OURS:
            raise table.wrong(f"headers.{name}", "is the worker's own header")
        if not _HEADER_NAME.fullmatch(name):
            raise table.wrong(f"headers.{name[:40]!r}", "is no name of a header")
        if not _fits_a_header(value):
            raise table.wrong(f"headers.{name}", "found a line break or another character that no header can carry")
    return headers


def _limits(table: _Table, share: float) -> tuple[Limits, Mapping[str, Limits]]:
    """The limits of every model, and those of some."""
    found = table.take("limits", {}, f"a table of {', '.join(LIMITS)}", _is_table)
    inner = _Table(table.source, f"{table.where}.limits", found)
    window = inner.take("window", WINDOW, "seconds from 1 to 3600", _is_window)
    models = inner.take("models", {}, "a table: a model's name or pattern = a table of limits", _is_table)
    special = {}
    for model, limits in models.items():
        if not _is_table(limits):
            raise inner.wrong(f"models.{model[:60]!r}", f"found {_kind(limits)}, expected a table of limits")
        one = _Table(table.source, f"{table.where}.limits.models.{model[:60]!r}", limits)
        special[model] = _limits_in(one, LIMITS[:3], share, window)
    return _limits_in(inner, LIMITS, share, window), special


def _limits_in(table: _Table, known: tuple[str, ...], share: float, window: float) -> Limits:
    table.check_known(known)
    rpm, tpm, streams = (table.take(name, 0, "a whole number of at least 1", _is_count) for name in LIMITS[:3])
    return Limits(rpm, tpm, streams, share, float(window))


class _Table:
    """A TOML table that is asked for its values, and says where it stands when one is wrong."""

    def __init__(self, source: str, where: str, found: Mapping[str, Any]) -> None:
        self.source, self.where, self._found = source, where, found

    def wrong(self, key: str, what: str) -> SettingsError:
        return SettingsError(f"{self.source}: {f'{self.where}.' if self.where else ''}{key}: {what}")

    def check_known(self, known: tuple[str, ...]) -> None:
        for key in self._found:
            if key in known:
                continue
            if key in ("api_key", "key", "token"):
                raise self.wrong(key, "a key does not belong into this file: name its variable with api_key_env")
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
            raise self.wrong(key[:60], f"unknown key; {hint}")

    def take(self, key: str, default: Any, expected: str, holds: Callable[[Any], bool]) -> Any:
        if key not in self._found:
            return default
        value = self._found[key]
        if not holds(value):
            shown = repr(value)[:60] if isinstance(value, str | int | float) else _kind(value)
            if key == "base_url" and isinstance(value, str):
                shown = shown_address(value)
            if key == "api_key_env":  # perhaps the key itself
                shown = "something else"
            raise self.wrong(key, f"found {shown}, expected {expected}")
        return value

    def choice(self, key: str, allowed: tuple[str, ...]) -> str:
        words = " or ".join(repr(each) for each in allowed)
        return str(self.take(key, allowed[0], words, lambda value: isinstance(value, str) and value in allowed))

    def texts(self, key: str, expected: str) -> Mapping[str, str]:
        found: Mapping[str, Any] = self.take(key, {}, expected, _is_table)
        for name, value in found.items():
            if not isinstance(value, str):
                raise self.wrong(f"{key}.{name[:60]}", f"found {_kind(value)}, expected text")
        return dict(found)


def _kind(value: Any) -> str:
    return {dict: "a table", list: "a list", str: "text", bool: "true or false"}.get(type(value), type(value).__name__)


def _is_table(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _is_bool(value: Any) -> TypeGuard[bool]:
    return isinstance(value, bool)


def _is_window(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= 3600


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_names_or_none(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) and each for each in value)


def _is_names(value: Any) -> bool:
    return bool(value) and _is_names_or_none(value)


def _is_variable(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is not None
