"""What can be seen of a notebook that is executing: one line on the terminal, and a log file.

Knows the clock and the environment a kernel starts with. Does not know stages or parameters.
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
from ssah_utils.pipeline.runs import runs_root


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
    """Keep one terminal line current (or print one a minute to a log) while a notebook runs;
    ``left``: seconds to the end.
    """
    started, done = time.monotonic(), threading.Event()
    live = sys.stdout.isatty()
    with tempfile.TemporaryDirectory() as folder:
        status = Path(folder) / "status"
        # the kernel starts in another folder, where a relative path would mean another place
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
                rest = (
                    f"about {clock(left - elapsed)} left in all"
                    if elapsed < left
                    else "longer than expected"
                )
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
                os.environ.pop(name) if value is None else os.environ.update({name: value})
            print("\r\033[K" if live else "", end="", flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, from an hour on with hours."""
    minutes, rest = divmod(int(seconds), 60)
    return (
        f"{minutes}:{rest:02d}"
        if minutes < 60
        else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
    )
