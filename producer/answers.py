"""The commands that ask once: result, cancel, forget."""

from __future__ import annotations

import argparse

from millstream.client import Client
from millstream.events import Cancelled

from . import exits
from .follow import interrupted
from .notices import BESIDE_TEXT, how_it_ended
from .standard import Standard
from .unclaimed import Unclaimed


def result(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """Wait for the end and print the text, or everything as one JSON object."""
    try:
        with Unclaimed(client, [arguments.id], standard):
            found, transcript = client.outcome(arguments.id, arguments.timeout)
    except KeyboardInterrupt:
        return interrupted([arguments.id], standard)
    if arguments.json:
        standard.write_json(found)
        return exits.ENDINGS[found.status]
    standard.write(found.text)
    if standard.terminal and found.text and not found.text.endswith("\n"):
        standard.write("\n")
    choices = found.completion["choices"]
    if len(choices) > 1:
        standard.say(f"the answer has {len(choices)} choices; only the first is written, --json has them all")
    if choices and (kinds := [kind for kind in BESIDE_TEXT if choices[0]["message"].get(kind)]):
        standard.say(f"besides its text the answer holds {', '.join(kinds)}: see --json")
    if transcript.end and (ending := how_it_ended(transcript.end)):
        standard.say(ending)
    return exits.ENDINGS[found.status]


def cancel(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """End a job. The first terminal event wins, and it is no error to come late."""
    status = client.cancel(arguments.id)
    standard.write(status + "\n")
    if status != Cancelled.__struct_config__.tag:
        standard.say(f"job {arguments.id} had ended before, as {status}")
    return exits.DONE


def forget(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """Let an ended job go."""
    client.forget(arguments.id)
    standard.say(f"job {arguments.id} will be gone in a minute")
    return exits.DONE
