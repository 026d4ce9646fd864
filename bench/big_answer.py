"""Worker memory while one job streams 100 MB of text as fast as everything between takes it."""

from __future__ import annotations

import time
from dataclasses import dataclass

from . import proc
from .systems import Product
from .toolchain import BenchError
from .world import World, world

_CONTENT = 256
"""Characters a chunk: with the usual 4, the 7 GB of JSON around 100 MB would take minutes and show nothing else."""
_WARM_UP_MB = 8
_LIMIT_S = 300


@dataclass(frozen=True)
class BigAnswer:
    """`rss_kb` are readings every 50 ms; `growth_kb` is their highest less that after an answer of 8 MB."""

    text_mb: float
    seconds: float
    base_kb: int
    growth_kb: int
    rss_kb: list[int]


def measure(*, text_mb: int = 100) -> BigAnswer:
    product = Product()
    with world() as here:
        product.start(here, 200)
        here.settle(product.pids())
        base = _stream(product, here, _WARM_UP_MB)[-1]
        began = time.monotonic()
        readings = _stream(product, here, text_mb)
        seconds = time.monotonic() - began
    return BigAnswer(text_mb, seconds, base, max(readings) - base, readings)


def _stream(product: Product, here: World, text_mb: int) -> list[int]:
    """RSS of the worker, KB, over one answer and at its end. Raises BenchError unless all of the text was kept."""
    size = text_mb << 20
    job = product.submit(f"stub:rate=0,chunks={size // _CONTENT},content={_CONTENT}")
    readings, until = [], time.monotonic() + _LIMIT_S
    while (status := str(product.client.status(job).status)) in ("queued", "in_progress"):
        here.processes.check()
        readings.append(proc.memory_kb(product.pids())[0])
        if time.monotonic() > until:
            raise BenchError(f"{text_mb} MB of text were not through within {_LIMIT_S} s")
        time.sleep(0.05)
    kept = int(here.valkey.client.memory_usage(f"millstream:{{{job}}}:log", samples=0) or 0)
    if status != "completed" or kept < size:
        raise BenchError(f"the answer of {text_mb} MB ended as {status} with {kept} bytes in its log")
    return [*readings, proc.memory_kb(product.pids())[0]]
