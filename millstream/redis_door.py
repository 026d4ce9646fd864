"""The one door to Redis: how connections are made, retried and their errors translated. Nobody else opens one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import redis.asyncio
import redis.asyncio.connection
import redis.connection
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import EqualJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .errors import RedisUnavailable, SettingsError

RETRIES: Final = 6
"""Tries again of a command whose reply was lost or refused for a moment: after 0.1 s doubling to 1 s, half of each by
chance; 1.8 to 3.5 s in all, so that nobody hears of a restart that takes less.
"""

COMMAND_TIMEOUT: Final = 5.0
"""Seconds a command may take. Our longest script call is 256 KB; a server that needs more is in trouble."""

PIPELINE: Final = 500
"""Calls in one pipeline: what is buffered on both sides stays small, and the reply comes within COMMAND_TIMEOUT."""

TRANSIENT: Final = (RedisConnectionError, RedisTimeoutError)
"""What passes by itself: a restart, a failover, a dropped connection, and what the server says meanwhile."""

_IN_A_MOMENT: Final = {
    "LOADING": "is still loading its data",
    "BUSY": "is busy with a script that somebody runs for long (SCRIPT KILL ends one that has written nothing)",
    "READONLY": "is a replica now: a failover goes on, or REDIS_URL names the wrong server",
    "MASTERDOWN": "is a replica without its primary: a failover goes on, or REDIS_URL names the wrong server",
    "UNBLOCKED": "changed its role: a failover goes on",
    "NOREPLICAS": "has fewer replicas than its min-replicas-to-write asks for",
}
"""Error replies of a server that may serve again in a moment, and what they mean."""


class _PassingError(RedisConnectionError):
    """Such a reply. As a lost connection it makes redis-py ask again, in pipelines too, over a new connection: after a
    failover the address may lead to another server. redis-py itself treats LOADING so, and no other.
    """


def _asks_again(parser: Any) -> Any:
    """The parser, reading such replies as what passes by itself."""
    known = {**parser.EXCEPTION_CLASSES, **dict.fromkeys(_IN_A_MOMENT, _PassingError)}
    return type("PatientParser", (parser,), {"EXCEPTION_CLASSES": known})


_PARSER: Final = _asks_again(redis.connection.DefaultParser)
_ASYNC_PARSER: Final = _asks_again(redis.asyncio.connection.DefaultParser)

PASSING: Final = ("MISCONF", "TRYAGAIN")
"""How a server's other refusals begin that pass when its disk has come round."""


def connect(url: str, **options: Any) -> redis.Redis:
    """A pool of blocking connections; nothing is sent yet. Raises SettingsError for a URL that cannot be used."""
    retry = Retry(_backoff(), RETRIES)
    with _usable_url():
        made = redis.Redis.from_url(
            url, retry=retry, retry_on_error=list(TRANSIENT), parser_class=_PARSER, **_options(url), **options
        )
        pool = made.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # only here redis-py looks at the names of a URL's options
    return made


def connect_async(url: str, **options: Any) -> redis.asyncio.Redis:
    """A pool of asyncio connections; nothing is sent yet. Raises SettingsError for a URL that cannot be used."""
    retry = AsyncRetry(_backoff(), RETRIES)
    with _usable_url():
        made = redis.asyncio.Redis.from_url(
            url, retry=retry, retry_on_error=list(TRANSIENT), parser_class=_ASYNC_PARSER, **_options(url), **options
        )
        pool = made.connection_pool
        pool.connection_class(**pool.connection_kwargs)
    return made


@contextmanager
def _usable_url() -> Iterator[None]:
    """Words for a malformed URL; without redis-py's own, which may quote a piece of the password."""
    try:
        yield
    except (ValueError, TypeError, redis.exceptions.RedisError):
        raise SettingsError(
            "REDIS_URL: found an address that cannot be used, expected redis://[:PASSWORD@]HOST[:PORT][/DB]; "
            "check the port and the options, and write / # ? @ in a password as %2F %23 %3F %40"
        ) from None


def _backoff() -> EqualJitterBackoff:
    return EqualJitterBackoff(base=0.05, cap=1.0)


def _options(url: str) -> dict[str, Any]:
    options: dict[str, Any] = {"socket_timeout": COMMAND_TIMEOUT, "socket_connect_timeout": 2.0}
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    return options


def place(url: str) -> str:
    """Where a URL points, without user, password and query."""
    parts = urlsplit(url)
    return parts.path if parts.scheme == "unix" else f"{parts.hostname or '127.0.0.1'}:{parts.port or 6379}"


def is_local(url: str) -> bool:
    """Whether the URL points at this machine: a unix socket or a loopback address."""
    parts = urlsplit(url)
    host = parts.hostname or "127.0.0.1"
    if parts.scheme == "unix" or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def translated(url: str) -> Iterator[None]:
    """Turn what redis-py raises into RedisUnavailable, in words for people."""
    try:
        yield
    except redis.exceptions.RedisError as error:
        raise RedisUnavailable(words(error, url)) from error


def passes(error: RedisUnavailable) -> bool:
    """Whether waiting may mend it: Redis is away, loading, full, or busy; not a wrong password or a missing right."""
    cause = error.__cause__
    if isinstance(cause, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError):
        return False
    known = isinstance(cause, (*TRANSIENT, redis.exceptions.OutOfMemoryError))
    return known or (isinstance(cause, redis.exceptions.RedisError) and _code(cause) in PASSING)


def words(error: redis.exceptions.RedisError, url: str) -> str:
    """An error of redis-py in words for people."""
    where = place(url)
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if isinstance(error, redis.exceptions.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        found = "asks for a password and got none" if _code(error) == "NOAUTH" else "refused the password"
        return (
            f"Redis at {where} {found}; check REDIS_URL (redis://:PASSWORD@host:port/0, or redis://USER:PASSWORD@...)"
        )
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return (
            f"Redis at {where} is full (maxmemory): nothing was accepted; "
            "wait for ended jobs to expire, or give it more memory"
        )
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"Redis at {where} does not allow this user what is needed ({text}); check its ACL"
    code = _code(error)
    if code in _IN_A_MOMENT:
        return f"Redis at {where} {_IN_A_MOMENT[code]}; try again in a moment"
    if code == "MISCONF":
        return f"Redis at {where} cannot write to its disk and so takes nothing (MISCONF); look at its log"
    if code in ("CLUSTERDOWN", "MOVED", "CROSSSLOT"):
        return f"Redis at {where} runs in cluster mode ({code} {text}); Millstream needs a primary without it"
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return f"Redis at {where} cannot be reached ({text}); start it (make up starts one) or set REDIS_URL"
    return f"Redis at {where} refused: {text}"


def _code(error: redis.exceptions.RedisError) -> str:
    """The word an error reply begins with, which redis-py leaves out of some messages."""
    return str(error).split(" ", 1)[0] if error.status_code is None else str(error.status_code)
