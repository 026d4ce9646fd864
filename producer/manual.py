"""What `--help` says beyond the options: examples, exit statuses, settings."""

from __future__ import annotations

from millstream import settings

from . import exits


def epilog(prog: str) -> str:
    """The end of the main help, for a command that is called `prog`."""
    return "\n\n".join((_examples(prog), _exit_statuses(), _settings()))


def _examples(prog: str) -> str:
    return f"""examples:
  {prog} submit "Write a quicksort" --follow
  id=$({prog} submit - --model gpt-4o-mini --param temperature=0.2 < prompt.txt)
  {prog} follow "$id" > answer.txt          # the final text, once, after the end
  {prog} follow "$id" --live | tee live.txt # as it comes; restarts are reported on stderr
  {prog} follow "$id" --json --after 7      # one event a line, from seq 8 on
  {prog} result "$id" --timeout 60 --json   # the whole answer as an OpenAI chat.completion
  {prog} list --state failed
  {prog} batch prompts.jsonl --out answers.jsonl --dry-run; then without --dry-run; after a crash the same again
  {prog} submit --follow -- "- a prompt that begins with a dash" """.rstrip()


def _exit_statuses() -> str:
    rows = [f"  {code:<4} {meaning}" for code, meaning in exits.MEANINGS]
    order = " < ".join(map(str, exits.BEST_FIRST))
    return "\n".join(["exit status:", *rows, f"  of several jobs the worst one counts: {order}"])


def _settings() -> str:
    """The settings, whose names alone fix the width: a long default must not push the table off the page."""
    rows = settings.describe()
    width = max(len(variable) for variable, _, _ in rows)
    lines = [f"  {variable:<{width}}  {about}{f' [{default}]' if default else ''}" for variable, default, about in rows]
    return "\n".join(["settings (environment) and their defaults, times in seconds:", *lines])
