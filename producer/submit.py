"""Ask for a job; and, if wanted, follow it at once."""

from __future__ import annotations

import argparse

from millstream.client import Client

from . import asking, exits, follow, views
from .standard import Standard


def run(arguments: argparse.Namespace, client: Client, standard: Standard) -> int:
    """The command `submit`."""
    job = client.submit(**asking.asked(arguments, standard))
    if not job.created:
        standard.say(f"job {job.id} was there already, with the same spec")
    if arguments.follow:
        standard.say(job.id)
        view = views.choose(standard, [job.id], live=False, as_json=arguments.json)
        return follow.follow(client, [job.id], view, standard)
    if arguments.json:
        standard.write_json(job)
    else:
        standard.write(job.id + "\n")
    return exits.DONE
