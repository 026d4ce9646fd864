"""What a worker wants of its Redis before it starts: reachable, private, durable, and never evicting."""

from __future__ import annotations

from typing import Any, Final

import redis
import redis.exceptions
import structlog

from millstream.errors import RedisUnavailable, SettingsError
from millstream.redis_door import is_local, place, translated
from millstream.settings import Settings

OLDEST: Final = (7, 0)
"""Script flags (`allow-oom`) came with Redis 7.0; every Valkey has them."""

log = structlog.get_logger()


def check(connection: redis.Redis, settings: Settings) -> None:
    """Refuse what would be unsafe, warn of what would break a promise. Raises SettingsError, RedisUnavailable."""
    where = place(settings.redis_url)
    with translated(settings.redis_url):
        info: dict[str, Any] = connection.info()
    version = tuple(int(part) for part in str(info.get("redis_version", "0.0")).split(".")[:2])
    if version < OLDEST:
        raise RedisUnavailable(
            f"Redis at {where} is version {info['redis_version']}, at least 7.0 is needed; "
            "update it, or give REDIS_URL another server"
        )
    if info.get("cluster_enabled"):
        raise SettingsError(
            f"Redis at {where} runs in cluster mode, where a script cannot touch a job and its queue at once; "
            "give REDIS_URL a primary that stands alone, or with replicas behind Sentinel"
        )
    if info.get("role", "master") != "master":
        raise RedisUnavailable(
            f"Redis at {where} is a replica and takes no writes; give REDIS_URL its primary, "
            f"{info.get('master_host')}:{info.get('master_port')}"
        )
    if (
        not is_local(settings.redis_url)
        and not settings.allow_insecure_redis
        and _lets_anybody_in(connection, settings)
    ):
        raise SettingsError(
            f"Redis at {where} asks for no password and is not on this machine: set one (and put it in REDIS_URL), "
            "or MILLSTREAM_ALLOW_INSECURE_REDIS=1 if the network protects it"
        )
    if info.get("maxmemory_policy", "noeviction") != "noeviction":
        log.warning(
            "redis.evicts", policy=info["maxmemory_policy"], at=where,
            promise="logs may vanish while jobs run; CONFIG SET maxmemory-policy noeviction",
        )  # fmt: skip
    if not info.get("aof_enabled"):
        log.warning(
            "redis.not_durable",
            at=where,
            promise="accepted jobs are lost when the server dies; CONFIG SET appendonly yes",
        )


def _lets_anybody_in(connection: redis.Redis, settings: Settings) -> bool:
    """Whether a connection without credentials may do something."""
    options = {**connection.connection_pool.connection_kwargs}
    for name in ("password", "username", "credential_provider"):
        options.pop(name, None)
    pool = redis.ConnectionPool(connection_class=connection.connection_pool.connection_class, **options)
    try:
        with translated(settings.redis_url):
            redis.Redis(connection_pool=pool).ping()
    except RedisUnavailable as error:
        cause = error.__cause__
        return not isinstance(cause, redis.exceptions.AuthenticationError | redis.exceptions.NoPermissionError)
    finally:
        pool.disconnect()
    return True
