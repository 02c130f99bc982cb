"""Folders of weights that are kept on disk while a model is in use, and gone with it.

transformers reads weights from a model's own files where it can. What it has to save anew, such as
fused experts, goes to a folder here. None is ever used by another process or a second time, so
that a broken one can do no harm; what a killed process left is removed by the next. Knows files and
locks only.
"""

import shutil
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from ssah_utils import placement
from ssah_utils.files import cache_dir
from ssah_utils.locks import InUse, Lock


class Kept:
    """A folder that is removed with what reads from it, or at once where nothing does."""

    def __init__(self, path: Path, lock: Lock) -> None:
        self.path, self.lock, self.is_used = path, lock, False

    def keep_with(self, model: nn.Module) -> None:
        """Keep the folder for as long as a model, or another module over its weights, is there."""
        for store in placement.stores(model):
            if any(self.path.iterdir()):
                self.is_used = True
                weakref.finalize(store, _remove, self.path, self.lock)


@contextmanager
def folder_for_a_model() -> Iterator[Kept]:
    """An empty folder, which is gone after the block unless a model ``keep_with`` uses it."""
    parent = cache_dir() / "offloaded"
    parent.mkdir(exist_ok=True)
    _remove_leftovers(parent)
    path = parent / uuid.uuid4().hex
    lock = Lock(path.with_suffix(".lock"))
    lock.acquire(wait=10)  # another may look at it in this moment
    path.mkdir()
    kept = Kept(path, lock)
    try:
        yield kept
    finally:
        if not kept.is_used:
            _remove(path, lock)


def _remove(path: Path, lock: Lock) -> None:
    shutil.rmtree(path, ignore_errors=True)
    lock.path.unlink(missing_ok=True)  # nobody else ever has a folder of this name
    lock.release()


def _remove_leftovers(parent: Path) -> None:
    """Folders whose process was killed."""
    for file in parent.glob("*.lock"):
        lock = Lock(file)
        try:
            lock.acquire()
        except InUse:
            continue
        _remove(file.with_suffix(""), lock)
