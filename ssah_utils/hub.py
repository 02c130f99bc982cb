"""The Hugging Face hub: which commit a name means, what is there, and a whole copy of it.

A name is ``org/name`` or ``org/name@revision``: a branch, a tag or a commit. Every name is resolved
to a commit once in a process, and everything is fetched at that commit. Without a network the
local cache answers. Knows names, files and hashes. Does not know architectures or data sets.
"""

import difflib
import glob
import hashlib
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import disable_progress_bars

from ssah_utils import checkpoints
from ssah_utils.display import first_line
from ssah_utils.files import cache_dir, free_space, require_space
from ssah_utils.room import n_parameters_in

disable_progress_bars()

NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
PATIENCE = 60  # seconds for which an answer of the hub, or none, is taken as the present state
# What is read beside the weights: configurations, tokenizers, chat templates. Nothing in folders.
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
WAITS = (1, 3)  # seconds before the hub is asked again
PASSING = (429, 500, 502, 503, 504)  # answers that may be others a moment later
BYTES = 2  # of a number, as most models are stored
T = TypeVar("T")

# -------------------------------------------------------------------------------------------- names


def is_name(name: str) -> bool:
    """Whether a model's name is shaped like one of the hub, and no folder of that name is there."""
    return bool(NAME.fullmatch(name)) and not Path(name).exists()


def split_name(name: str) -> tuple[str, str]:
    """Repository and revision of a name; '' where it names none.

    >>> split_name("org/name@v1.0"), split_name("org/name")
    (('org/name', 'v1.0'), ('org/name', ''))
    """
    repository, _, revision = name.partition("@")
    return repository, revision


_asked: dict[str, tuple[float, bool]] = {}  # by endpoint: when, and whether it answered


def answers() -> bool:
    """Whether the hub can be reached; a minute old knowledge will do.

    One short request: the hub's own loaders would retry for half a minute.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    when, answered = _asked.get(constants.ENDPOINT, (-PATIENCE, False))
    if time.monotonic() - when > PATIENCE:
        answered = _answers_now()
        _asked[constants.ENDPOINT] = time.monotonic(), answered
    return answered


def _answers_now() -> bool:
    try:
        urllib.request.urlopen(
            urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=5
        ).close()
    except urllib.error.HTTPError:
        return True  # it answered, if only to complain
    except (OSError, HTTPException, ValueError):  # also no answer in HTTP, or no address
        return False
    return True


def _patiently(ask: Callable[[], T]) -> T:
    """What is asked of the hub, once more where it is busy or in trouble for a moment.

    Its clients do so themselves as they fetch files, but not as they ask what is there.
    """
    for seconds in WAITS:
        try:
            return ask()
        except (HfHubHTTPError, RevisionResolutionError) as error:
            response = getattr(error, "response", None) or getattr(
                error.__cause__, "response", None
            )
            if response is None or response.status_code not in PASSING:
                raise
        time.sleep(seconds)
    return ask()


def commit_of(name: str, kind: str = "model") -> str:
    """The commit that a name means; without a network, the one that it meant in the local cache.

    ``kind``: "model" or "dataset". Raises ``ValueError`` for a repository or revision that is not
    there, with the nearest that is, and ``ConnectionError`` where nobody can tell.
    """
    repository, revision = split_name(name)
    return revision if COMMIT.fullmatch(revision) else _commit_of(repository, revision, kind)


@cache
def _commit_of(repository: str, revision: str, kind: str) -> str:
    options = {"repo_type": kind, "revision": revision or None, "local_files_only": not answers()}
    with in_one_line(repository, revision, kind):
        return _patiently(lambda: HfApi().resolve_revision(repository, **options)).resolved


@cache
def pinned(name: str) -> str:
    """The name with the commit that it means now, so that it means the same for ever.

    As it is where nobody can tell. Raises ``ValueError`` as ``commit_of`` does.
    """
    try:
        return f"{split_name(name)[0]}@{commit_of(name)}"
    except ConnectionError:
        return name


def pinned_here(name: str) -> str:
    """``pinned`` by the local cache alone, which asks nobody."""
    repository, revision = split_name(name)
    ref = _kept(repository) / "refs" / (revision or constants.DEFAULT_REVISION)
    if COMMIT.fullmatch(revision) or not ref.is_file():
        return name
    return f"{repository}@{ref.read_text(encoding='utf-8').strip()}"


def _kept(repository: str, kind: str = "model") -> Path:
    """Folder of a repository in the hub's local cache."""
    return Path(constants.HF_HUB_CACHE) / "--".join([f"{kind}s", *repository.split("/")])


# ------------------------------------------------------------------------------------------- models


@cache
def folder(name: str) -> Path:
    """A model's snapshot in the local cache, with all of it but the weights.

    Raises as ``commit_of`` does; ``PermissionError`` for a gated model.
    """
    commit, repository = commit_of(name), split_name(name)[0]
    with in_one_line(repository, commit, "model"):
        found = snapshot_download(
            repository,
            revision=commit,
            allow_patterns=list(SMALL),
            ignore_patterns=["*/*"],
            local_files_only=not answers(),
        )
    snapshot = Path(found)
    if not snapshot.is_dir() or not any(snapshot.iterdir()):
        raise ValueError(f"{_named('model', repository)} holds no config.json, so no model")
    for path in snapshot.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            check_hash(path, repository)
    return snapshot


def weight_files(name: str) -> list[str]:
    """Names of a model's files of weights; ``ValueError`` where they are no safetensors."""
    snapshot = folder(name)
    is_single = (snapshot / checkpoints.SINGLE).exists()
    if not is_single and (snapshot / checkpoints.INDEX).exists():
        return checkpoints.files_in_index(snapshot / checkpoints.INDEX)
    if is_single or not answers() or checkpoints.SINGLE in _sizes(name):
        return [checkpoints.SINGLE]
    why = checkpoints.why_no_safetensors(_sizes(name))
    raise ValueError(f"{_named('model', split_name(name)[0])} has no safetensors: {why}")


@cache
def _sizes(name: str) -> dict[str, int]:
    """Bytes of every file of a model."""
    repository, commit = split_name(name)[0], commit_of(name)
    options = {"recursive": True, "revision": commit}
    with in_one_line(repository, commit, "model"):
        listing = _patiently(lambda: list(HfApi().list_repo_tree(repository, **options)))
    return {entry.path: entry.size for entry in listing if hasattr(entry, "size")}


def check_weights(name: str) -> None:
    """Raise before anything large is fetched, when a model's weights cannot be had.

    ``ValueError`` where they are not there or are no safetensors, ``ConnectionError`` without a
    network, ``OSError`` for too little disk.
    """
    missing = _missing(name)
    if not missing:
        return
    if not answers():
        repository = split_name(name)[0]
        raise ConnectionError(
            f"{_named('model', repository)} is in the local cache without {missing[0]},"
            f" and {_silent()}"
        )
    sizes = _sizes(name)
    if absent := [one for one in missing if one not in sizes]:
        raise ValueError(
            f"{_named('model', split_name(name)[0])} lacks {len(absent)} of its files of weights:"
            f" {', '.join(absent[:3])}"
        )
    billions = free_space(constants.HF_HUB_CACHE) / BYTES / 1e9
    require_space(
        constants.HF_HUB_CACHE,
        sum(sizes[one] for one in missing),
        f"the weights of '{name}'",
        "point HF_HOME to another disk;"
        f" a model of up to {billions:.1f} billion parameters would fit",
    )


def _missing(name: str) -> list[str]:
    snapshot = folder(name)
    return [one for one in weight_files(name) if not (snapshot / one).exists()]


@cache
def n_parameters(name: str) -> int:
    """How many numbers the weights of a model on the hub hold, by the heads of their files."""
    if not _missing(name):
        return n_parameters_in(folder(name) / one for one in weight_files(name))
    repository, commit = split_name(name)[0], commit_of(name)
    with in_one_line(repository, commit, "model"):
        found = HfApi().get_safetensors_metadata(repository, revision=commit)
    return sum(found.parameter_count.values())


def n_bytes(name: str) -> int:
    """Size of the files that hold a model's weights."""
    if not _missing(name):
        return sum((folder(name) / one).stat().st_size for one in weight_files(name))
    return sum(_sizes(name)[one] for one in weight_files(name))


def fetch(name: str) -> Path:
    """A model's whole snapshot, its weights fetched where they are absent, every file verified.

    Raises as ``check_weights`` does, and ``ValueError`` for a file that is not what the hub says.
    """
    check_weights(name)
    snapshot, missing = folder(name), _missing(name)
    if missing:
        repository, commit = split_name(name)[0], commit_of(name)
        n_bytes = sum(_sizes(name)[one] for one in missing)
        print(f"fetching {repository}: {n_bytes / 1e6:,.0f} MB, once", flush=True)
        with in_one_line(repository, commit, "model"):
            wanted = [glob.escape(one) for one in missing]
            snapshot_download(repository, revision=commit, allow_patterns=wanted)
    for one in weight_files(name):
        check_hash(snapshot / one, split_name(name)[0])
    return snapshot


# ------------------------------------------------------------------------------------ single files


def fetch_file(repository: str, commit: str, file: str, kind: str = "dataset") -> Path:
    """A verified file of a data set or model at a commit; from the local cache where it is there.

    Raises ``ValueError`` for a repository, commit or file that is not there and for a damaged file,
    ``PermissionError`` for a gated one, ``ConnectionError`` without a network.
    """
    path = _kept(repository, kind) / "snapshots" / commit / file
    if not path.exists():
        with in_one_line(repository, commit, kind, file):
            hf_hub_download(
                repository,
                file,
                repo_type=kind,
                revision=commit,
                local_files_only=not answers(),
            )
    check_hash(path, repository)
    return path


# ------------------------------------------------------------------------------------------- hashes


def check_hash(path: Path, repository: str) -> None:
    """``ValueError``, and the file is gone, unless a cached file is what the hub says it is.

    The cache names a file's content by the hub's hash of it: SHA-256 for large files, git's SHA-1
    for small ones. A large file is read once; a note beside our own cache says that it was.
    """
    blob = path.resolve()
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
        return  # a cache without links does not say
    about = blob.stat()
    state, note = f"{about.st_size} {about.st_mtime_ns}", cache_dir() / "verified" / blob.name
    if note.exists() and note.read_text(encoding="utf-8") == state:
        return
    found = _hash_of(blob)
    if found != blob.name:
        path.unlink()
        blob.unlink(missing_ok=True)
        raise ValueError(
            f"'{path.name}' of '{repository}' came damaged from the hub: its hash is"
            f" {found[:12]}..., but {blob.name[:12]}... is right: it was deleted, fetch it again"
        )
    note.parent.mkdir(exist_ok=True)
    note.write_text(state, encoding="utf-8")


def _hash_of(blob: Path) -> str:
    with open(blob, "rb") as file:
        if len(blob.name) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


# ------------------------------------------------------------------------------------------- errors


@contextmanager
def in_one_line(repository: str, revision: str, kind: str, file: str = "") -> Iterator[None]:
    """Say in one line what the hub's clients, or the lack of a hub, say at length.

    ``ValueError`` for what is not there, ``PermissionError`` for what is gated, ``ConnectionError``
    for what cannot be had now.
    """
    what = _named(kind, repository)
    try:
        yield
    except GatedRepoError as error:
        page = "/".join([constants.ENDPOINT, *(["datasets"] if kind == "dataset" else [])])
        raise PermissionError(
            f"{what} is gated: accept its terms on {page}/{repository},"
            " and log in with that account: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{what} is not on the hub, or private{_nearest_repository(repository, kind)};"
            " for a private one log in: hf auth login"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(
            f"{what} has no revision '{revision}'{_nearest_revision(repository, revision, kind)}"
        ) from error
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"{what} has no file '{file}' at {revision[:12]}") from error
    except SafetensorsParsingError as error:
        raise ValueError(
            f"{what} has weights that are no safetensors: {first_line(error)}"
        ) from error
    except (RevisionResolutionError, LocalEntryNotFoundError) as error:
        raise ConnectionError(f"{what} is not in the local cache, and {_silent()}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        known = {
            401: "a token that is not valid: hf auth login",
            429: "too many requests: wait some minutes, or log in: hf auth login",
        }
        why = known.get(status, f"error {status}")
        raise ConnectionError(f"{what} cannot be had: the hub answers with {why}") from error
    except (HTTPError, OSError, RuntimeError) as error:
        raise ConnectionError(f"{what} was not fetched: {first_line(error)}") from error


def _named(kind: str, repository: str) -> str:
    return f"{'data set' if kind == 'dataset' else kind} '{repository}'"


def _silent() -> str:
    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, as HF_HUB_OFFLINE is set"
    fails = "is in trouble" if answers() else "does not answer"
    return f"the hub {fails} ({constants.ENDPOINT})"


def _nearest_repository(repository: str, kind: str) -> str:
    """What might be meant: a repository of the same owner, or one of the same name."""
    owner, _, title = repository.partition("/")
    api = HfApi()
    listed = api.list_models if kind == "model" else api.list_datasets
    try:
        own = [one.id for one in listed(author=owner, limit=200)]
        near = difflib.get_close_matches(repository, own, n=1)
        near = near or [one.id for one in listed(search=title, limit=1)]
    except (HTTPError, OSError, ValueError):
        near = []
    return f"; nearest is '{near[0]}'" if near else ""


def _nearest_revision(repository: str, revision: str, kind: str) -> str:
    try:
        refs = HfApi().list_repo_refs(repository, repo_type=kind)
    except (HTTPError, OSError, ValueError):
        return ""
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    near = difflib.get_close_matches(revision, names, n=1, cutoff=0)
    return f"; nearest is '{near[0]}' (all: {', '.join(names[:12])})" if near else ""
