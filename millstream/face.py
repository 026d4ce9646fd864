"""What both clients are before any of them asks Redis: their settings, names and calls. No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from . import calls, job
from .batch.course import WINDOW, Course
from .calls import Call
from .job import Spec
from .settings import Settings


class Face:
    """Made alike by `Client` and `AsyncClient`; `_connect` opens the kind of connection each of them wants."""

    def __init__(
        self,
        redis_url: str | None = None,
        *,
        settings: Settings | None = None,
        connection: Any = None,
        clock: Callable[[], float] = time.monotonic,
        script_header: bool = True,
    ) -> None:
        """Use `redis_url`, else the settings' (whose default is redis://127.0.0.1:6379/0).

        `connection`, `clock` and `script_header` are for tests: see `millstream.testing`.
        """
        self.settings = settings or (Settings(redis_url=redis_url) if redis_url else Settings())
        self.keys = self.settings.keys
        self._url = redis_url or self.settings.redis_url
        self.redis: Any = connection if connection is not None else self._connect(self._url)
        self._clock = clock
        self._header = script_header

    @classmethod
    def from_env(cls, **options: Any) -> Self:
        """A client with the settings of the environment."""
        return cls(settings=Settings.from_env(), **options)

    @staticmethod
    def _connect(url: str) -> Any:
        raise NotImplementedError

    def course(self, window: int = WINDOW, **options: Any) -> Course:
        """A batch that can be watched and stopped, for `run_batch`."""
        return Course(self.keys, self.settings, window, header=self._header, clock=self._clock, **options)

    def _submission(self, request: Mapping[str, Any]) -> tuple[str, Call[bool]]:
        """The id of a job and the call that submits it, from the arguments of `submit`. Raises SpecError."""
        asked = {**request, "model": self.settings.model if request.get("model") is None else request["model"]}
        given = asked.pop("id", None)
        spec: Spec = job.build(**asked)
        job_id = job.new_id() if given is None else job.check_id(given)
        return job_id, calls.submit(self.keys, self.settings, job_id, spec)

    def _submissions(self, requests: Iterable[Mapping[str, Any]]) -> tuple[Sequence[str], Sequence[Call[bool]]]:
        made = [self._submission(request) for request in requests]
        return [job_id for job_id, _ in made], [call for _, call in made]
