"""The Lua scripts as the server gets them."""

from __future__ import annotations

import hashlib
import re

import pytest

from millstream.scripts import NAMES, load


@pytest.mark.parametrize("name", NAMES)
def test_the_name_the_server_knows_is_the_hash_of_the_text(name: str) -> None:
    """EVALSHA finds what EVAL left there, with and without the header."""
    for header in (True, False):
        script = load(name, header=header)
        assert script.sha == hashlib.sha1(script.text.encode()).hexdigest()
        assert script.text.startswith("#!lua") == header
        assert script is load(name, header=header), "it is read once"


@pytest.mark.parametrize("name", NAMES)
def test_only_what_adds_load_is_refused_by_a_full_server(name: str) -> None:
    """What can only help a full server may run there; accepting a job or starting one may not."""
    first = load(name).text.splitlines()[0]
    assert first == ("#!lua" if name in ("submit", "take") else "#!lua flags=allow-oom")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_states_what_it_takes_and_returns(name: str) -> None:
    """Whoever calls it from another language reads KEYS, ARGV and the replies at its head."""
    text = load(name).text
    for heading in ("-- KEYS", "-- ARGV", "-- Returns"):
        assert heading in text


@pytest.mark.parametrize("name", NAMES)
def test_a_fragment_is_put_in_front_once(name: str) -> None:
    """`-- uses:` brings the shared functions, and they come before their use."""
    text = load(name).text
    assert text.count("local function end_job") == (1 if "-- uses: _ending" in text else 0)


@pytest.mark.parametrize("name", NAMES)
def test_no_script_reads_another_clock_or_chance(name: str) -> None:
    """Times are the server's, so that workers' clocks may differ; nothing is random, so that a retry does the same."""
    text = re.sub(r"--.*", "", load(name).text)
    assert not re.search(r"os\.time|os\.clock|math\.random|RANDOMKEY|SRANDMEMBER", text)
