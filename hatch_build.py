"""Keeps an editable install editable: `millstream_worker` is then the checkout's `worker/`, not a copy of it.

Hatchling copies everything under force-include, in editable wheels too. There this hook replaces the copies by packages
of one line each, whose `__path__` is the folder in the checkout.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.config import BuilderConfig
from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface[BuilderConfig]):
    """Found by hatchling as the one hook class of this file."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version != "editable":
            return
        # Removed with this object, at the end of the build, once hatchling has read the files.
        self._aliases = tempfile.TemporaryDirectory()
        for folder, package in self.build_config.get_force_include().items():
            alias = Path(self._aliases.name, package) / "__init__.py"
            alias.parent.mkdir()
            alias.write_text(f"__path__ = [{folder!r}]\n")
            build_data["force_include_editable"][str(alias)] = f"{package}/__init__.py"
