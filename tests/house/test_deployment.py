"""What docker-compose.yml and the Dockerfile promise an operator, read from the files themselves."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from millstream.settings import Settings

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
# Decided in the file rather than passed on: the compose network has a password.
DECIDED_HERE = {"MILLSTREAM_ALLOW_INSECURE_REDIS"}


def _seconds(text: str) -> int:
    found = re.fullmatch(r"(\d+)s", text)
    assert found, f"{text} is not in seconds"
    return int(found[1])


def test_every_setting_reaches_the_worker() -> None:
    """A setting that stands in .env and is silently not passed on looks like a setting that does not work."""
    known = {each.metadata["variable"] for each in dataclasses.fields(Settings)}
    assert known - DECIDED_HERE - SERVICES["worker"]["environment"].keys() == set()


def test_what_is_read_where_a_job_is_submitted_reaches_the_producer() -> None:
    """A producer with another lease than its workers looks after a queued job at another time (docs/operations.md)."""
    operations = (ROOT / "docs" / "operations.md").read_text()
    [here] = [line for line in operations.split("\n- ") if "are read where a job is submitted" in line]
    read = set(re.findall(r"`(MILLSTREAM_\w+)`", here)) | {"MILLSTREAM_PREFIX"}
    assert {"MILLSTREAM_LEASE", "MILLSTREAM_RETENTION"} <= read <= SERVICES["producer"]["environment"].keys()


def test_secrets_are_passed_by_name_alone() -> None:
    """The files are shared and committed; the key goes to the worker only."""
    assert SERVICES["worker"]["environment"]["OPENAI_API_KEY"] is None
    assert "OPENAI_API_KEY" not in SERVICES["producer"]["environment"]
    for name in ("worker", "producer"):
        assert SERVICES[name]["environment"]["REDIS_URL"].startswith("redis://:${REDIS_PASSWORD:?")
    assert SERVICES["redis"]["environment"]["REDIS_PASSWORD"].startswith("${REDIS_PASSWORD:?")


def test_redis_keeps_what_it_accepted() -> None:
    """The guarantees stand on AOF, noeviction and a volume (README)."""
    script = SERVICES["redis"]["command"][-1]
    assert "appendonly yes\nappendfsync everysec\n" in script
    assert "maxmemory-policy noeviction\n" in script
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_redis_asks_a_password_and_is_reached_from_nowhere_else() -> None:
    """A Redis on the network is a shell on the network; the password must not show in `ps` either."""
    *words, script = SERVICES["redis"]["command"]
    server_line, *settings = script.splitlines()
    assert 'requirepass "$$REDIS_PASSWORD"' in settings
    assert "PASSWORD" not in server_line + "".join(words)
    assert "network_mode" not in SERVICES["redis"]
    assert all(str(port).startswith("127.0.0.1:") for port in SERVICES["redis"].get("ports", []))


@pytest.mark.parametrize("name", SERVICES)
def test_no_service_stops_before_it_has_finished(name: str) -> None:
    """A container killed within the worker's own grace would break streams that were about to end."""
    if name == "producer":
        assert SERVICES[name]["profiles"] == ["producer"], "a one-off command: nothing to wait for"
        return
    grace = SERVICES[name]["environment"].get("MILLSTREAM_GRACE", Settings().grace)
    assert _seconds(SERVICES[name]["stop_grace_period"]) > float(grace)


def test_workers_scale_and_come_back() -> None:
    """`--scale worker=4` needs services without a fixed name or port, and a crash needs a restart."""
    worker = SERVICES["worker"]
    assert not {"container_name", "ports", "hostname"} & worker.keys()
    assert worker["restart"] == "unless-stopped"
    assert worker["depends_on"] == {"redis": {"condition": "service_healthy"}}


@pytest.mark.parametrize("name", ["worker", "producer"])
def test_our_containers_hold_no_rights(name: str) -> None:
    """They handle foreign text: no root, no capability, no writable file system."""
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.findall(r"^USER (.+)$", DOCKERFILE, re.MULTILINE) == ["10001:10001"]


def test_the_image_installs_nothing_that_is_not_locked() -> None:
    """Each file that pip fetches for the image is known by its hash."""
    installs = [line for line in DOCKERFILE.splitlines() if '"install"' in line]
    assert len(installs) == 1
    assert '"--require-hashes"' in installs[0]


def test_signals_reach_python() -> None:
    """In shell form a shell would be process 1 and keep SIGTERM to itself: no drain, and a kill after the grace."""
    assert 'ENTRYPOINT ["python", "-m"]\nCMD ["worker"]' in DOCKERFILE
    assert "STOPSIGNAL SIGTERM" in DOCKERFILE


@pytest.mark.parametrize("lock", sorted(path.name for path in ROOT.glob("requirements*.txt")))
def test_a_lock_pins_every_package_by_hash_and_names_no_address(lock: str) -> None:
    """Any index that serves the same bytes will do, and no other bytes will."""
    text = (ROOT / lock).read_text()
    entries = re.split(r"^(?=[a-z0-9])", text, flags=re.MULTILINE)[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[a-z0-9-]+==\S+ ", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert not re.search(r"://|--index|--find-links|--extra-index", text)


def test_every_locked_runtime_package_is_locked_alike_for_development() -> None:
    """What is tested is what the image runs."""

    def pins(name: str) -> set[str]:
        return set(re.findall(r"^[a-z0-9-]+==\S+", (ROOT / name).read_text(), re.MULTILINE))

    assert pins("requirements.txt") <= pins("requirements-dev.txt")
