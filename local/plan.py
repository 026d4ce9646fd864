"""What the environment asks for: whose Redis, whose model. Pure: the environment comes in as a mapping."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from millstream.settings import Settings

from . import model

# Any of these says that the prompts are for a model elsewhere.
_UPSTREAM_VARIABLES = ("OPENAI_API_KEY", "OPENAI_BASE_URL", "MILLSTREAM_UPSTREAMS")


@dataclass(frozen=True, slots=True)
class Plan:
    """`redis_url` is the server to use, None to start one; `local_model` whether to start the model.

    `upstream` says in one line, without secrets, where the prompts go and why.
    """

    redis_url: str | None = field(repr=False)  # may hold a password, as the environment does
    local_model: bool
    upstream: str
    _environ: Mapping[str, str] = field(repr=False)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Self:
        """Raises SettingsError when a variable holds what cannot be used."""
        settings = Settings.from_env(environ)
        given = [name for name in _UPSTREAM_VARIABLES if environ.get(name, "").strip()]
        return cls(
            redis_url=settings.redis_url if environ.get("REDIS_URL", "").strip() else None,
            local_model=not given,
            upstream=_describe(given, settings.base_url),
            _environ=environ,
        )

    def for_worker(self, redis_url: str, base_url: str | None) -> dict[str, str]:
        """The worker's environment, and so the client's; `base_url` is the local model's."""
        environ = {**self._environ, "REDIS_URL": redis_url, "PYTHONUNBUFFERED": "1"}  # so that a killed one has logged
        if base_url is None:
            if not environ.get("OPENAI_API_KEY"):
                environ["OPENAI_API_KEY"] = "none"  # an upstream without keys, such as a server on this machine
            return environ
        environ |= {"OPENAI_BASE_URL": base_url, "OPENAI_API_KEY": "local", "MILLSTREAM_MODEL": model.NAME}
        # What has no slot waits in the queue and says so, instead of running out its clock for the first token.
        environ.setdefault("MILLSTREAM_STREAMS", str(model.SLOTS))
        for name in ("NO_PROXY", "no_proxy"):
            environ[name] = ",".join(filter(None, [environ.get(name, ""), model.HOST]))
        return environ


def _describe(given: list[str], base_url: str) -> str:
    """One line for people."""
    if not given:
        return f"{model.NAME} on this machine, because neither OPENAI_API_KEY nor OPENAI_BASE_URL is set"
    if "MILLSTREAM_UPSTREAMS" in given:
        return "those of MILLSTREAM_UPSTREAMS"
    return f"{base_url}, because {' and '.join(given)} {'is' if len(given) == 1 else 'are'} set"
