"""What a server's error replies mean: those that pass by themselves are asked again, all are said in words."""

from __future__ import annotations

import random
from typing import Any

import pytest
import redis.connection

from millstream import RedisUnavailable, redis_door
from millstream.redis_door import TRANSIENT, connect, connect_async, translated

URL = "redis://somebody:secret@redis.example:6379/0"

PASSING = {
    "BUSY Valkey is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE.": "busy with a script",
    "READONLY You can't write against a read only replica.": "is a replica now",
    "MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.": "without its primary",
    "NOREPLICAS Not enough good replicas to write.": "fewer replicas",
    "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)": "changed its role",
    "LOADING Valkey is loading the dataset in memory": "still loading",
}
LASTING = {
    "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.": "to its disk",
    "CLUSTERDOWN Hash slot not served": "cluster mode",
    "CROSSSLOT Keys in request don't hash to the same slot": "cluster mode",
    "OOM command not allowed when used memory > 'maxmemory'.": "is full",
    "NOPERM User somebody has no permissions to run the 'evalsha' command": "check its ACL",
    "ERR something else": "refused: something else",
}
LOGIN = {  # redis-py counts these among the connection errors, too
    "WRONGPASS invalid username-password pair or user is disabled.": "refused the password; check REDIS_URL",
    "NOAUTH Authentication required.": "asks for a password and got none; check REDIS_URL",
}


def raised(reply: str) -> Exception:
    """What redis-py makes of an error reply, over a connection of ours."""
    error: Exception = parsers()[0].parse_error(reply)
    return error


def parsers() -> list[Any]:
    """Of a blocking and of an asyncio connection."""
    made: list[Any] = [connect(URL), connect_async(URL)]
    return [each.connection_pool.connection_kwargs["parser_class"] for each in made]


@pytest.mark.parametrize("reply", [*PASSING, *LASTING, *LOGIN])
def test_every_reply_has_its_words(reply: str) -> None:
    """Found, and what to do; where, but neither user nor password."""
    with pytest.raises(RedisUnavailable) as caught, translated(URL):
        raise raised(reply)
    assert {**PASSING, **LASTING, **LOGIN}[reply] in str(caught.value)
    assert "redis.example:6379" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_what_passes_by_itself_is_asked_again() -> None:
    """redis-py's own retries see these replies as lost connections, and no others."""
    for reply in PASSING:
        assert isinstance(raised(reply), TRANSIENT), reply
    for reply in LASTING:
        assert not isinstance(raised(reply), TRANSIENT), reply


def test_both_kinds_of_connections_read_alike() -> None:
    """Blocking and asyncio."""
    for reply in (*PASSING, *LASTING):
        assert len({type(parser.parse_error(reply)) for parser in parsers()}) == 1
    assert issubclass(parsers()[0], redis.connection.DefaultParser)


def test_a_restart_of_a_second_and_a_half_is_never_heard_of() -> None:
    """However chance has it, the tries of a command reach further, and never beyond four seconds."""
    for seed in range(200):
        random.seed(seed)
        backoff = redis_door._backoff()
        waits = [backoff.compute(failures) for failures in range(1, redis_door.RETRIES + 1)]
        assert 1.7 < sum(waits) < 4
