"""One run at a time in a folder: a lock that dies with its process."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK_TIMEOUT = 24 * 3600  # seconds to wait for another process that makes what is needed here


class InUse(RuntimeError):
    """Another process holds the lock; the message says which."""


class Lock:
    """A lock on a file, held from ``acquire`` until ``release`` or the process's end.

    The operating system releases it (``flock``), however the process ends, so a kill leaves nothing
    to clean up. The file says who holds the lock.
    """

    def __init__(self, path: Path | str, what: str = "", shared: bool = False) -> None:
        """``what`` tells others what the holder is doing; by default its command line.

        A ``shared`` lock is held beside other shared ones, and excludes those that are not.
        """
        self.path, self.what = Path(path), what or " ".join(["python", *sys.argv])[:200]
        self._mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._file: int | None = None

    def acquire(self, wait: float = 0.0) -> None:
        """Take the lock; ``InUse`` when somebody else still holds it after ``wait`` seconds."""
        if self._file is not None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + wait
        while not _taken(descriptor, self._mode):
            if time.monotonic() >= until:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise InUse(
                    f"{self.path.parent} is in use by {holder}:"
                    " wait for it, stop it, or use another SSAH_RUNS"
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
        """Let others have the lock.

        Its file stays: on a file that is removed, two could hold the lock.
        """
        if self._file is not None:
            if _content(self._file).get("pid") == os.getpid():  # not that of another who shares it
                os.ftruncate(self._file, 0)
            os.close(self._file)  # this releases the lock
            self._file = None


def _taken(descriptor: int, mode: int) -> bool:
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _content(descriptor: int) -> dict:
    try:
        return json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}


def _holder(descriptor: int) -> str:
    holder = _content(descriptor)
    try:
        process = f"process {holder['pid']} on {holder['host']}"
        return f"{process} ({holder['what']}, since {holder['since']})"
    except KeyError:
        return "another process"


@contextmanager
def locked(lock: Lock, wait: float = 0.0) -> Iterator[None]:
    """Hold a lock inside the block; ``InUse`` says who has it."""
    lock.acquire(wait)
    try:
        yield
    finally:
        lock.release()
