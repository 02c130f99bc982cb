"""One run at a time in a folder: a lock that dies with its process. Knows files and processes
only.
"""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InUse(RuntimeError):
    """Another process holds the lock; the message says which."""


class Lock:
    """An exclusive lock on a file, held from ``acquire`` to ``release`` or to the end of the
    process, however it ends.

    The system releases it (``flock``), so that nothing is left to clean up after a kill. The file
    says who holds it.
    """

    def __init__(self, path: Path | str, what: str = "") -> None:
        """``what``: what the holder does, for others to read; its command line unless said."""
        self.path, self.what = Path(path), what or " ".join(["python", *sys.argv])[:200]
        self._file: int | None = None

    def acquire(self, wait: float = 0.0) -> None:
        """Raises ``InUse`` when somebody else still has it after ``wait`` seconds."""
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(
            self.path, os.O_RDWR | os.O_CREAT, 0o666
        )  # not inherited by child processes
        until = time.monotonic() + wait
        while not _taken(descriptor):
            if time.monotonic() >= until:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise InUse(
                    f"{self.path.parent} is in use by {holder}: wait for it, stop it, or use"
                    " another SSAH_RUNS"
                )
            time.sleep(0.2)
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "what": self.what,
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(content).encode(), 0)
        self._file = descriptor

    def release(self) -> None:
        if self._file is not None:
            os.ftruncate(self._file, 0)
            os.close(
                self._file
            )  # releases the lock; the empty file stays, as removing it would let two have it
            self._file = None


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {told['pid']} on {told['host']} ({told['what']}, since {told['since']})"
    except (ValueError, KeyError):
        return "another process"


@contextmanager
def locked(lock: Lock, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock inside the block; ``InUse`` says who has it."""
    lock.acquire(wait)
    try:
        yield
    finally:
        lock.release()
