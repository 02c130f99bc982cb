"""Where the project's files are, and files that are either complete or absent.

Only here it is known how the project is laid out: in a clone, or inside an installed wheel. Knows
paths and bytes. Does not know models, data sets or notebooks.
"""

import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGE = Path(__file__).parent
IN_WHEEL = (PACKAGE / "project").is_dir()
# A wheel carries data/ and notebooks/ inside the package; in a clone they stand beside it.
ROOT = PACKAGE / "project" if IN_WHEEL else PACKAGE.parent
DATA = ROOT / "data"
REFERENCE = DATA / "reference"
NOTEBOOKS = ROOT / "notebooks"
# The libraries on whose versions a result can depend; the second row reads models stored as codes.
LIBRARIES = (
    *("torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "lm_eval", "numpy"),
    *("bitsandbytes", "gptqmodel", "optimum", "torchao", "compressed_tensors"),
)


def workplace() -> Path:
    """Where runs/ and figures/ go: the clone, or the current folder when a wheel is installed."""
    return Path.cwd() if IN_WHEEL else ROOT


def installed_versions(names: Iterable[str]) -> dict[str, str]:
    """Version of every library; empty for one that is not installed, as extras are optional."""
    return {name: _version(name) for name in names}


@functools.cache  # a metadata file is parsed each time, and keys ask often
def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def cache_dir() -> Path:
    """Folder for downloads and trained models: ``SSAH_CACHE``, else the user's cache folder.

    Raises ``OSError`` when neither it nor XDG_CACHE_HOME is set and the user has no home folder.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(os.environ.get("SSAH_CACHE") or f"{caches}/ssah").expanduser().resolve()
    except RuntimeError as error:
        raise OSError(
            "this user has no home folder:"
            " set SSAH_CACHE to a folder for downloads and trained models"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def complete_only(path: Path | str) -> Iterator[Path]:
    """Write a file or a folder as a whole or not at all.

    Yields a temporary sibling of ``path`` to write; it is renamed to ``path`` when the block
    succeeds. So a reader of ``path`` sees the old content or all of the new one, also after a kill
    or on a full disk. A file never takes the place of a folder: ``IsADirectoryError``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workspace = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        unfinished = workspace / path.name
        yield unfinished
        if not unfinished.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        if not unfinished.is_dir():
            _refuse_folder(path)
        if path.is_dir():  # a folder cannot be renamed onto a non-empty one
            path.rename(workspace / "replaced")
        try:
            unfinished.replace(path)
        except OSError:
            if (workspace / "replaced").exists():
                (workspace / "replaced").rename(path)
            raise
    finally:
        shutil.rmtree(workspace, ignore_errors=True)


def write_json(path: Path | str, content: object) -> None:
    """Write JSON that people can read and compare line by line, whole or not at all."""
    text = json.dumps(content, indent=1, ensure_ascii=False)
    with complete_only(path) as unfinished:
        unfinished.write_text(text + "\n", encoding="utf-8")


def sha256_of_file(path: Path | str) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(content: object) -> str:
    """Hash of a JSON-like value, whatever the order of its keys.

    Arrays and tensors count entry by entry. Raises ``TypeError`` for a table or an object: it has
    no exact text, so the hash would leave something out.

    >>> sha256_of({"a": 1, "b": 2}) == sha256_of({"b": 2, "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, default=_as_json)
    return hashlib.sha256(text.encode()).hexdigest()


def _as_json(value: object) -> object:
    if hasattr(value, "tolist"):  # of NumPy, PyTorch or pandas, also a single number
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"a {type(value).__name__} cannot be part of a key:"
        " give its content as numbers, strings, lists and dicts"
    )


def free_space(folder: Path | str) -> int:
    """Bytes that are free on the disk of a folder, which need not be there yet."""
    return shutil.disk_usage(_existing(folder)).free


def require_space(
    folder: Path | str,
    n_bytes: int,
    what: str = "",
    way_out: str = "point SSAH_CACHE (models) or SSAH_RUNS (results) to another disk",
) -> None:
    """Raise ``OSError`` before work starts when ``folder``'s disk cannot hold ``n_bytes``.

    The message names ``what`` they are needed for, and the ``way_out`` beside freeing some space.
    """
    free = free_space(folder)
    if free < n_bytes:
        purpose = f" for {what}" if what else ""
        raise OSError(
            f"{_existing(folder)} has {free / 2**30:.1f} GiB free and {n_bytes / 2**30:.1f} GiB"
            f" are needed{purpose}: free some space or {way_out}"
        )


def require_writable(folder: Path | str) -> None:
    """Raise ``OSError`` before work starts when nothing can be written into ``folder``.

    It need not be there yet.
    """
    place = _existing(folder)
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file: name a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"nothing can be written into {place}: name another folder")


def require_target(path: Path | str) -> None:
    """Raise ``OSError`` before work starts when ``path`` cannot be written as a file."""
    _refuse_folder(Path(path))
    require_writable(Path(path).parent)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it")


def _existing(folder: Path | str) -> Path:
    """A folder, or the nearest around it that is there."""
    return next(path for path in [Path(folder), *Path(folder).parents] if path.exists())
