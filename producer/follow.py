"""Follow jobs to their end: events from the library to a view, endings to the exit status."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from millstream.client import Client

from . import exits, views
from .standard import Standard
from .unclaimed import Unclaimed


def run(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """The command `follow`."""
    ids = list(dict.fromkeys(arguments.ids))
    view = views.choose(standard, ids, live=arguments.live, as_json=arguments.json)
    return follow(client, ids, view, standard, after=arguments.after)


def follow(client: Client, ids: Sequence[str], view: views.View, standard: Standard, *, after: int = 0) -> int:
    """Show every event until all have ended; the exit status. Ctrl-C stops the following, never the job."""
    endings: dict[str, str] = {}
    try:
        for job_id in ids:  # lest the tenth id's typing error shows after the first nine have ended
            client.status(job_id)
        with view, Unclaimed(client, ids, standard):
            for job_id, event in client.follow_many(ids, after):
                if event.terminal:
                    endings[job_id] = event.type
                view.feed(job_id, event)
    except KeyboardInterrupt:
        return interrupted([job_id for job_id in ids if job_id not in endings], standard)
    for job_id in ids:
        if job_id not in endings:  # `--after` lay at its last event
            endings[job_id] = client.status(job_id).status
    return exits.worst(endings.values())


def interrupted(open_ids: Sequence[str], standard: Standard) -> int:
    """Say that the jobs go on, and how to end them."""
    if len(open_ids) == 1:
        standard.say(
            f"stopped following; job {open_ids[0]} goes on. To cancel it: {standard.prog} cancel {open_ids[0]}"
        )
    elif open_ids:
        standard.say(f"stopped following; {len(open_ids)} jobs go on. To cancel one: {standard.prog} cancel ID")
    return exits.INTERRUPTED
