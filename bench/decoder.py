"""`python -m bench.decoder [REVISION]`: what decoding one chunk costs, here and at an earlier revision, taking turns.

Without sockets: an ordinary chunk's packet through the SSE decoder and the reader of chunks, in us of CPU. The other
revision is taken out of git into a temporary folder; without REVISION, the first one that had a decoder.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from .servers import ROOT
from .toolchain import BenchError

ROUNDS = 7
ALLOWED = 1.2
"""The decoder may cost so much more than it did before it learned something."""

_MEASURE = """
import json, time
from worker.upstream import chunks
from worker.upstream.sse import SseDecoder

event = {"id": "chatcmpl-stub00000012000123456789", "object": "chat.completion.chunk", "created": 1732264000,
         "model": "stub-2026-11", "service_tier": "default", "system_fingerprint": "fp_stub",
         "choices": [{"index": 0, "delta": {"content": "abcd"}, "logprobs": None, "finish_reason": None}],
         "obfuscation": "abcdefghijklmnopqrstuvwxyz"}
packet = b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\\n\\n"
cut = [packet[:100], packet[100:]]
decoder = SseDecoder()
parts = chunks.Chunks().parts if hasattr(chunks, "Chunks") else chunks.parts

def cost(packets, many):
    began = time.process_time()
    for _ in range(many):
        for each in packets:
            for data in decoder.feed(each):
                for part in parts(data):
                    pass
    return (time.process_time() - began) / many * 1e6

cost([packet], 20000)
print(json.dumps({
    "whole": min(cost([packet], 20000) for _ in range(5)),
    "cut in two": min(cost(cut, 20000) for _ in range(5)),
    "ten in a packet": min(cost([packet * 10], 2000) for _ in range(5)) / 10,
}))
"""


def _first() -> str:
    log = ["git", "log", "--diff-filter=A", "--format=%H", "--", "worker/upstream/sse.py"]
    return subprocess.run(log, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()[-1]


def _measure(folder: Path) -> dict[str, float]:
    env = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise BenchError(f"the decoder of {folder} does not run:\n{done.stderr[-800:]}")
    return dict(json.loads(done.stdout))


def main(revision: str) -> int:
    """Exit status: 0 within the allowance, 1 beyond it."""
    with tempfile.TemporaryDirectory(prefix="millstream-decoder-") as name:
        archive = ["git", "archive", revision, "worker", "millstream"]
        packed = subprocess.run(archive, cwd=ROOT, check=True, capture_output=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            tar.extractall(name, filter="data")
        # Only the decoder is wanted, and the package's own imports may need what is no longer installed.
        (Path(name) / "worker" / "upstream" / "__init__.py").write_text("")
        rounds = [(_measure(Path(name)), _measure(ROOT)) for _ in range(ROUNDS)]
    worst = 0.0
    for case in rounds[0][0]:
        then, now = (statistics.median(each[i][case] for each in rounds) for i in (0, 1))
        ratio = statistics.median(each[1][case] / each[0][case] for each in rounds)
        worst = max(worst, ratio)
        print(f"{case:16}  {revision[:7]} {then:5.2f} us   here {now:5.2f} us   x{ratio:.2f}")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else _first()))
