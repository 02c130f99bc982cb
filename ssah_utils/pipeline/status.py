"""What is seen of a notebook while it is executed: one line on the terminal, and a log file.

Knows the clock and the environment that a kernel starts with. Does not know stages or parameters.
"""

import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ssah_utils.files import cache_dir
from ssah_utils.pipeline.stored import runs_root


@contextmanager
def log_to(path: Path) -> Iterator[None]:
    """Send what the notebook prints, and papermill's own messages, to a file."""
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("papermill")
    logger.handlers, logger.propagate = [handler], False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        handler.close()


@contextmanager
def status_line(name: str, left: float) -> Iterator[None]:
    """Keep one line on the terminal current while a notebook runs; in a log, print one a minute.

    ``left``: seconds to the end of the whole run.
    """
    started, done = time.monotonic(), threading.Event()
    live = sys.stdout.isatty()
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        # The kernel starts in another folder, where a relative path would mean another place.
        told = {
            "SSAH_PROGRESS": str(status),
            "SSAH_RUNS": str(runs_root()),
            "SSAH_CACHE": str(cache_dir()),
        }
        before = {name: os.environ.get(name) for name in told}
        os.environ.update(told)

        def show() -> None:
            while not done.wait(1 if live else 60):
                what = status.read_text() if status.exists() else "starting"
                elapsed = time.monotonic() - started
                rest = "longer than expected"
                if elapsed < left:
                    rest = f"about {clock(left - elapsed)} left in all"
                line = f"{name}  {clock(elapsed)} elapsed, {rest} · {what}"
                print(f"\r\033[K{line}" if live else line, end="" if live else "\n", flush=True)

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
            print("\r\033[K" if live else "", end="", flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, from an hour on with hours."""
    minutes, rest = divmod(int(seconds), 60)
    hours, past_hour = divmod(minutes, 60)
    return f"{hours}:{past_hour:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
