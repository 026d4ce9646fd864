"""The one door to Redis: how connections are made, retried and their errors translated. Nobody else opens one."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final
from urllib.parse import urlsplit

import redis.asyncio
import redis.exceptions
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import BusyLoadingError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from .errors import RedisUnavailable, SettingsError

RETRIES: Final = 6
"""Tries again of a command whose reply was lost or refused for a moment: 0.05 s doubling to 1 s, about 3 s in all."""

COMMAND_TIMEOUT: Final = 5.0
"""Seconds a command may take. Our longest script call is 256 KB; a server that needs more is in trouble."""

PIPELINE: Final = 500
"""Calls in one pipeline: what is buffered on both sides stays small, and the reply comes within COMMAND_TIMEOUT."""

TRANSIENT: Final = (RedisConnectionError, RedisTimeoutError, BusyLoadingError, ReadOnlyError)
"""What passes by itself: a restart, a failover, a dropped connection."""

PASSING: Final = ("BUSY", "MISCONF", "MASTERDOWN", "NOREPLICAS", "TRYAGAIN")
"""How a server's other refusals begin that pass when a script, a disk or a replica has come round."""


def connect(url: str, **options: Any) -> redis.Redis:
    """A pool of blocking connections; nothing is sent yet. Raises SettingsError for a URL that cannot be used."""
    retry = Retry(_backoff(), RETRIES)
    with _usable_url():
        made = redis.Redis.from_url(url, retry=retry, retry_on_error=list(TRANSIENT), **_options(url), **options)
        pool = made.connection_pool
        pool.connection_class(**pool.connection_kwargs)  # only here redis-py looks at the names of a URL's options
    return made


def connect_async(url: str, **options: Any) -> redis.asyncio.Redis:
    """A pool of asyncio connections; nothing is sent yet. Raises SettingsError for a URL that cannot be used."""
    retry = AsyncRetry(_backoff(), RETRIES)
    with _usable_url():
        made = redis.asyncio.Redis.from_url(
            url, retry=retry, retry_on_error=list(TRANSIENT), **_options(url), **options
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


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(base=0.05, cap=1.0)


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
    return known or str(cause).startswith(PASSING)


def words(error: redis.exceptions.RedisError, url: str) -> str:
    """An error of redis-py in words for people."""
    where = place(url)
    text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
    if isinstance(error, redis.exceptions.AuthenticationError) or "NOAUTH" in text or "WRONGPASS" in text:
        return f"Redis at {where} refused the password; check REDIS_URL (redis://:PASSWORD@host:port/0)"
    if isinstance(error, redis.exceptions.OutOfMemoryError):
        return (
            f"Redis at {where} is full (maxmemory): nothing was accepted; "
            "wait for ended jobs to expire, or give it more memory"
        )
    if isinstance(error, redis.exceptions.NoPermissionError):
        return f"Redis at {where} does not allow this user what is needed ({text}); check its ACL"
    if isinstance(error, BusyLoadingError):
        return f"Redis at {where} is still loading its data; try again in a moment"
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        return f"Redis at {where} cannot be reached ({text}); start it (make up starts one) or set REDIS_URL"
    return f"Redis at {where} refused: {text}"


def split_pairs(reply: Sequence[bytes]) -> dict[bytes, bytes]:
    """A flat reply of field, value, field, value as a dict."""
    return dict(zip(reply[::2], reply[1::2], strict=True))
