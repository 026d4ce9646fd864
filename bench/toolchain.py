"""Builds the stub with the machine's own C compiler, once per version of its source."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = ("stub.c", "stub_tls.c", "stub_tls.h")


class BenchError(Exception):
    """The bench cannot measure; the message says what it found and what it needs."""


def cache_folder() -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "millstream-bench"


def build_stub(*, tls: bool = False, cache: Path | None = None) -> Path:
    """The path of the stub's binary, compiled if this source never was.

    Raises BenchError naming the missing compiler or, with `tls`, the missing OpenSSL headers.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise BenchError("no C compiler: the bench's upstream is a C program. Install one (Debian: apt install gcc).")
    digest = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in SOURCES)).hexdigest()[:16]
    folder = cache or cache_folder()
    binary = folder / f"stub{'-tls' if tls else ''}-{digest}"
    if binary.exists():
        return binary
    folder.mkdir(parents=True, exist_ok=True)
    fresh = binary.with_suffix(f".{os.getpid()}")
    command = [compiler, "-O2", "-std=c11", "-o", str(fresh), str(HERE / "stub.c")]
    if tls:
        command += ["-DTLS", str(HERE / "stub_tls.c"), "-lssl", "-lcrypto"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if outcome.returncode:
        need = "OpenSSL 3's headers (Debian: apt install libssl-dev) and " if tls else ""
        raise BenchError(f"{compiler} could not build the stub; it needs {need}Linux headers:\n{outcome.stderr[-800:]}")
    fresh.rename(binary)  # whole or not at all, whoever else builds it now
    return binary
