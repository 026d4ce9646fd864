"""The documentation beside the code it describes: tables that a change in the code must not leave behind."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from millstream.job import Spec
from millstream.keys import Keys
from millstream.scripts import NAMES
from millstream.settings import describe

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LEVELS = ("info", "warning", "error")


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text()


def _section(page: str, title: str) -> str:
    """From a heading to the next one."""
    return re.split(r"^#+ ", page.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


def _rows(text: str) -> list[list[str]]:
    """The cells of every row of a table but its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def _codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_every_setting_stands_in_its_table_with_its_default() -> None:
    """Operators read the table, not the class."""
    shown = [(f"`{name}`", f"`{default}`" if default else "unset", about) for name, default, about in describe()]
    assert [tuple(row) for row in _rows(_section(_page("operations.md"), "Settings"))] == shown


def _emitted() -> Iterator[tuple[str, str, frozenset[str]]]:
    """Event, level and fields of every line that the worker's code logs."""
    for path in sorted((ROOT / "worker").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in LEVELS):
                continue
            logger, first = ast.unparse(node.func.value), node.args[0] if node.args else None
            if logger in ("log", "self._log") and isinstance(first, ast.Constant):
                fields = {"exception" if each.arg == "exc_info" else str(each.arg) for each in node.keywords}
                bound = {"job"} if logger == "self._log" else set()
                yield str(first.value), node.func.attr, frozenset(fields | bound)


def test_every_log_event_stands_in_its_table_with_its_fields() -> None:
    """Alerts are written from the table."""
    rows = _rows(_section(_page("operations.md"), "Log events"))
    shown = {(_codes(event)[0], level, frozenset(_codes(fields))) for event, level, fields, _ in rows}
    assert shown == set(_emitted())
    assert len(rows) == len(shown)


def test_every_code_of_an_error_of_ours_stands_in_the_wire() -> None:
    """Programs decide by the code."""
    calls = [node for path in (ROOT / "worker").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    given = [
        node.args[0]
        for node in calls
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "UpstreamFailure" and node.args
    ]
    codes = {str(each.value) for each in given if isinstance(each, ast.Constant)}
    assert len(codes) > 8
    assert {code for code in codes if f"`{code}`" not in _page("wire.md")} == set()


def test_every_script_stands_in_the_wires_table() -> None:
    """A client in another language calls them by this page."""
    rows = _rows(_section(_page("wire.md"), "Scripts"))
    assert {re.findall(r"\[(\w+)\]", row[0])[0] for row in rows} == set(NAMES)


def test_every_field_of_a_spec_stands_in_the_wires_table_in_its_order() -> None:
    """The same spec is the same bytes, so the order is part of the format."""
    rows = _rows(_section(_page("wire.md"), "Spec"))
    assert tuple(_codes(row[0])[0] for row in rows) == Spec.__struct_fields__


def test_the_wire_spells_the_names_as_the_code_does() -> None:
    """keys.py is the one place where they are spelled; the page copies it."""
    keys = Keys()
    shown = {name for row in _rows(_section(_page("wire.md"), "Names")) for name in _codes(row[0])}
    ours = {keys.spec("JOB"), keys.state("JOB"), keys.log("JOB"), keys.building("JOB"), keys.chunks("JOB")}
    ours |= {keys.open, keys.repack, keys.ended}
    ours |= {re.sub(r":line:.*", ":line:LANE", name) for name in keys.meter("METER")}
    assert {name for name in shown if name.startswith("millstream:")} == ours
    assert f"rq:queue:{keys.queue('LANE')}" in shown


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_no_link_leads_nowhere(page: Path) -> None:
    """A file that was moved takes its links along."""
    targets = re.findall(r"\]\((?!https?://)([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
