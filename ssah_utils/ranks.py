"""What the processes of one training must agree on, held against each other before they start.

Data parallelism sums gradients of whatever each process computes. So processes with other units,
other data or another version of this package would train something that nobody meant, in silence.
Knows torch.distributed. Does not know models.
"""

import functools
import hashlib
import itertools
import json
import platform
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from ssah_utils import files

PATIENCE = 600  # seconds in which all processes must have come to the same place
_PLACES = itertools.count()  # all processes come to these in the same order


def n_ranks() -> int:
    """Processes of this training; 1 where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@functools.cache
def code_and_libraries() -> str:
    """Of this package, by its code, and of what it trains with."""
    code = hashlib.sha256()
    for path in sorted(files.PACKAGE.glob("*.py")):
        code.update(path.read_bytes())
    libraries = files.installed_versions(files.LIBRARIES)
    return f"code {code.hexdigest()[:8]}, {platform.python_version()}, {libraries}"


def require_agreement(what: Mapping[str, object]) -> None:
    """``ValueError`` in every process unless all have come here with the same.

    ``what``: values by what they are, as in a sentence: "the ranks differ in the units". Nothing is
    computed and no collective is used: texts go through the store of the process group.
    """
    if n_ranks() == 1:
        return
    mine = {name: files.sha256_of(value)[:8] for name, value in what.items()}
    all_of_them = [json.loads(text) for text in _texts_of_all(json.dumps(mine), PATIENCE)]
    for name in dict.fromkeys(itertools.chain(*all_of_them)):
        found = [one.get(name, "nothing") for one in all_of_them]
        if len(set(found)) > 1:
            said = ", ".join(f"rank {rank} has {one}" for rank, one in enumerate(found))
            raise ValueError(
                f"the ranks differ in {name}: {said} (hashes); start all of them with the same"
            )


def all_come(seconds: float) -> bool:
    """Whether every process comes to this place within some seconds."""
    try:
        _texts_of_all("", seconds)
    except ValueError:
        return False
    return True


def _texts_of_all(text: str, seconds: float) -> list[str]:
    """The text with which every process came here; ``ValueError`` for one that did not come."""
    store, place = dist.distributed_c10d._get_default_store(), f"ssah_utils/{next(_PLACES)}"
    store.set(f"{place}/{dist.get_rank()}", text)
    found = []
    for rank in range(n_ranks()):
        try:
            store.wait([f"{place}/{rank}"], timedelta(seconds=seconds))
        except RuntimeError as error:
            raise ValueError(
                f"rank {rank} has not come to the block in which some units are trained within"
                f" {seconds:.0f} s: enter and leave it in every process"
            ) from error
        found.append(store.get(f"{place}/{rank}").decode())
    return found
