"""From what was typed to what `Client.submit` takes. What is wrong is said before Redis is asked for anything."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any, Final, NoReturn

from millstream import parameters
from millstream.errors import SpecError
from millstream.job import MAX_SPEC_BYTES

from .standard import Standard

OPTIONS: Final = ("model", "lane", "id", "timeout", "expires", "retention", "on_break", "max_attempts")
NOT_JSON: Final = ("NaN", "Infinity", "-Infinity")  # Python's json reads them, JSON has no such numbers


def asked(arguments: argparse.Namespace, standard: Standard) -> dict[str, Any]:
    """The arguments of `Client.submit`. Reads stdin or the file of messages. Raises SpecError."""
    wanted: dict[str, Any] = {name: value for name in OPTIONS if (value := getattr(arguments, name)) is not None}
    wanted |= _params(arguments.param)
    if arguments.metadata:
        wanted["metadata"] = dict(_pairs("--metadata", arguments.metadata))
    return {**wanted, "messages": _messages(arguments, standard)}


def _messages(arguments: argparse.Namespace, standard: Standard) -> Any:
    if (arguments.prompt is None) == (arguments.messages is None):
        raise SpecError("submit needs one of: a PROMPT, - for a prompt on stdin, --messages FILE")
    system = [] if arguments.system is None else [{"role": "system", "content": _utf8("--system", arguments.system)}]
    if arguments.messages is None:
        prompt = _read(None, standard) if arguments.prompt == "-" else _utf8("PROMPT", arguments.prompt)
        if not prompt.strip():
            raise SpecError("the prompt is empty; say what the model is to complete")
        return [*system, {"role": "user", "content": prompt}]
    where = "stdin" if arguments.messages == "-" else arguments.messages
    text = _read(None if arguments.messages == "-" else arguments.messages, standard)
    found = _parse(f"--messages {where}", text)
    if not isinstance(found, list):
        raise SpecError(f'--messages {where}: expected a JSON array such as [{{"role": "user", "content": "..."}}]')
    return [*system, *found]


def _read(path: str | None, standard: Standard) -> str:
    """The text of a file, or of stdin."""
    where = "stdin" if path is None else f"--messages {path}"
    try:
        body = _bytes(path, standard)
    except SpecError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise SpecError(f"{where}: cannot be read ({getattr(error, 'strerror', error)}); check the name") from None
    if len(body) > MAX_SPEC_BYTES:
        raise SpecError(f"{where}: found more than {MAX_SPEC_BYTES:,} bytes, which is all a job may hold; split it")
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{where}: byte {error.start:,} (0x{body[error.start]:02x}) is not UTF-8; convert it, as by iconv -t UTF-8"
        ) from None


def _bytes(path: str | None, standard: Standard) -> bytes:
    """No more than one byte beyond what a job may hold: the rest need not be read to refuse it."""
    if path is not None:
        with Path(path).open("rb") as file:
            return file.read(MAX_SPEC_BYTES + 1)
    if standard.stdin is None:
        raise SpecError("stdin is closed; give the prompt as an argument or the messages in a file")
    if standard.stdin.isatty():
        standard.say("reading from the terminal; Ctrl-D on an empty line ends it")
    return standard.stdin.read(MAX_SPEC_BYTES + 1)


def _utf8(what: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of the command line that were no UTF-8 arrive as lone surrogates
        raise SpecError(f"{what}: found bytes that are not UTF-8; convert it, as by iconv -t UTF-8") from None
    return text


def _params(given: list[str]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, text in _pairs("--param", given):
        if name in (*OPTIONS, "messages", "metadata"):
            raise SpecError(f"--param {name}: it is not a parameter of the model; use --{name.replace('_', '-')}")
        params[name] = text if text in NOT_JSON else _value(f"--param {name}", text)
    parameters.check(params)
    return params


def _value(what: str, text: str) -> Any:
    """JSON, else text."""
    try:
        return _parse(what, _utf8(what, text))
    except _NoJsonError:
        return text


def _pairs(option: str, given: list[str]) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not (name and equals):
            raise SpecError(f"{option}: found {each[:60]!r}, expected NAME=VALUE")
        if name in pairs:
            raise SpecError(f"{option} {name[:60]!r} is given twice; leave one out")
        pairs[name] = value
    return list(pairs.items())


class _NoJsonError(SpecError):
    """The text is not JSON at all, as opposed to JSON with something in it that a job cannot carry."""


def _parse(what: str, text: str) -> Any:
    """Strict JSON: what no JSON can say is refused here, because it would be written as null. Raises SpecError."""

    def refuse(found: str) -> NoReturn:
        raise SpecError(f"{what}: found {found[:40]}, which is no number that JSON knows")

    def finite(digits: str) -> float:
        number = float(digits)
        return number if math.isfinite(number) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=finite)
    except RecursionError:
        raise SpecError(f"{what}: it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _NoJsonError(f"{what}: line {error.lineno}, column {error.colno}: {error.msg}; expected JSON") from None
    except SpecError:
        raise
    except ValueError:  # a whole number of more than 4,300 digits
        raise SpecError(f"{what}: it holds a number that is too long") from None
