"""The upstreams: OpenAI-compatible APIs, asked through the openai package and read as bytes."""

from .answer import Answer, Verdict
from .chunks import Finish, Logprobs, Part, Piece, Usage
from .client import Upstream
from .config import UpstreamSettings, load
from .counts import Counts
from .failures import UpstreamFailure
from .stream import Stream

__all__ = [
    "Answer", "Counts", "Finish", "Logprobs", "Part", "Piece", "Stream", "Upstream", "UpstreamFailure",
    "UpstreamSettings", "Usage", "Verdict", "load",
]  # fmt: skip
