"""The upstream: an OpenAI-compatible API, asked through the openai package and read as bytes."""

from .answer import Answer, Verdict
from .chunks import Finish, Piece, Usage
from .client import Upstream
from .failures import UpstreamFailure
from .stream import Stream

__all__ = ["Answer", "Finish", "Piece", "Stream", "Upstream", "UpstreamFailure", "Usage", "Verdict"]
