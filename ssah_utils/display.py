"""What people see of a running notebook: progress, and completions cut before anything harmful.

Knows text. Does not know models or runs.
"""

import os
from collections.abc import Iterable, Iterator

from ssah_utils.files import complete_only

REDACTED_LENGTH = 80  # characters: in a text without spaces, every word is one


def redact(text: str, words: int = 4) -> str:
    """The first words of a completion: enough to see its direction, never its content.

    >>> redact("I'm sorry, but I can't help with that.")
    "I'm sorry, but I [...]"
    """
    whole = " ".join(text.split())
    opening = " ".join(text.split()[:words])[:REDACTED_LENGTH]
    return opening + (" [...]" if opening != whole else "")


def first_line(error: Exception) -> str:
    """What a library says at length, in one line; the kind of error where it says nothing.

    A line that ends in a colon only announces the next.

    >>> first_line(ValueError("no such file\\n in line 3")), first_line(ValueError())
    ('no such file', 'ValueError')
    """
    said = f"unknown name {error}" if isinstance(error, KeyError) else str(error)
    lines = said.strip().splitlines() or [type(error).__name__]
    while len(lines) > 1 and lines[0].rstrip().endswith(":"):
        lines[:2] = [f"{lines[0].rstrip()} {lines[1].strip()}"]
    return lines[0]


def say(text: str) -> None:
    """Show a sentence of Markdown below a notebook's cell: what a result says, computed from it."""
    from IPython.display import Markdown, display  # only notebooks have it

    display(Markdown(text))


def show_progress(label: str, done: int, total: int) -> None:
    """Say how far a long step is.

    On the runner's status line if there is one, else on one line of the notebook that overwrites
    itself.
    """
    status = os.environ.get("SSAH_PROGRESS")
    if status:
        with complete_only(status) as unfinished:
            unfinished.write_text(f"{label} {done}/{total}")
    else:
        print(f"\r{label} {done}/{total}", end="" if done < total else "\n", flush=True)


def progress(items: Iterable, label: str) -> Iterator:
    """Iterate over ``items`` while showing how many are done."""
    items = list(items)
    for done, item in enumerate(items, 1):
        show_progress(label, done, len(items))
        yield item
