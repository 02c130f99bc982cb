"""Is there room for a model: how many numbers it holds, how much memory is free, what would fit.

Knows bytes and precisions. Does not know architectures or where models come from.
"""

import gc
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch

from ssah_utils.files import free_space
from ssah_utils.precision import Precision

GIB = 2**30
CGROUP, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def n_parameters_in(files: Iterable[Path]) -> int:
    """How many numbers safetensors files hold, by their heads alone."""
    heads = [_head(path) for path in files]
    tensors = [about for head in heads for name, about in head.items() if name != "__metadata__"]
    return sum(math.prod(about["shape"]) for about in tensors)


def _head(path: Path) -> dict:
    with open(path, "rb") as file:
        (n_bytes,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(n_bytes))


def require_memory(name: str, n_parameters: int, dtype: Precision, device: str = "cpu") -> None:
    """``OSError`` in one line where a model's weights do not fit into the memory that is free.

    They go through the computer's memory also where they end on a GPU. Says what would fit. What a
    training or a long prompt takes beside the weights is not counted.
    """
    needed = n_parameters * dtype.itemsize
    places: dict[str, Callable[[], int | None]] = {"memory": free_memory}
    if device.startswith("cuda"):
        places["GPU memory"] = partial(_free_on_gpu, device)
    for place, look in places.items():
        free = _free_unless_enough(needed, look)
        if free is None:
            continue
        narrow = torch.bfloat16.itemsize * n_parameters
        if narrow <= free and dtype.itemsize > torch.bfloat16.itemsize:
            fits = f"bfloat16 would fit, with {narrow / GIB:.1f} GiB: dtype=bfloat16"
        else:
            billions = free / torch.bfloat16.itemsize / 1e9
            fits = f"a model of up to {billions:.1f} billion parameters in bfloat16 would fit"
        raise OSError(
            f"the weights of '{name}' need {needed / GIB:.1f} GiB of {place} in"
            f" {str(dtype).removeprefix('torch.')}, and {free / GIB:.1f} GiB are free: {fits}"
        )


def require_places(name: str, needed: dict[str, int], dtype: Precision) -> None:
    """``OSError`` in one line where the parts that a device map keeps in a place do not fit there.

    ``needed``: bytes by place, as ``device_maps.bytes_by_place`` counts them. What is kept on disk
    stays in the model's own files.
    """
    for place, n_bytes in needed.items():
        if place == "disk":
            continue
        device = f"cuda:{place}" if place.isdigit() else place
        free = _free_unless_enough(n_bytes, partial(free_on, device))
        if free is not None:
            raise OSError(
                f"device_map puts {n_bytes / GIB:.1f} GiB of '{name}' on {device}, in"
                f" {str(dtype).removeprefix('torch.')}, and {free / GIB:.1f} GiB are free there:"
                " give it fewer blocks"
            )


def require_anywhere(name: str, n_bytes: int, folder: Path) -> None:
    """``OSError`` in one line for a model that does not fit into GPUs, memory and disk together."""
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    found = [*(_free_on_gpu(gpu) for gpu in gpus), free_memory() or 0, free_space(folder)]
    if n_bytes > sum(found):
        raise OSError(
            f"the weights of '{name}' need {n_bytes / GIB:.1f} GiB, and {sum(found) / GIB:.1f} GiB"
            f" are free on {len(gpus)} GPUs, in memory and on disk: take a smaller dtype or model"
        )


def _free_unless_enough(n_bytes: float, look: Callable[[], int | None]) -> int | None:
    """How many bytes are free where that is too little; None where it is enough, or not known."""
    free = look()
    if free is not None and n_bytes > free:
        gc.collect()  # a model that nobody uses any more may still be there
        free = look()
    return None if free is None or n_bytes <= free else free


def free_memory() -> int | None:
    """Bytes of memory that this process may still take; None where the system does not say.

    The lesser of what the machine has and what a container or a batch system allows.
    """
    known = [free for free in (_free_on_machine(), _free_in_group()) if free is not None]
    return min(known) if known else None


def free_on(device: str) -> int | None:
    """``free_memory``, or of a GPU the bytes that are free there."""
    return _free_on_gpu(device) if device.startswith("cuda") else free_memory()


def _free_on_gpu(device: str) -> int:
    """What the device has left, and what torch keeps of it without using it."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


def _free_on_machine() -> int | None:
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        return int(found[1]) * 1024 if found else None
    except OSError:
        pass
    try:  # elsewhere: all that there is, as nobody says what is free
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def _free_in_group() -> int | None:
    """What is left under the limits of this process's control groups, of either version."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        root = CGROUP if not controllers else CGROUP / "memory"
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        place = root / path.lstrip("/")
        for group in (place, *place.parents):
            if group.is_relative_to(root):
                left.append(_left_in(group, *names))
    known = [free for free in left if free is not None]
    return max(0, min(known)) if known else None


def _left_in(group: Path, limit: str, used: str, reclaimable: str) -> int | None:
    try:
        allowed, taken = (group / limit).read_text().strip(), int((group / used).read_text())
        found = re.search(rf"^{reclaimable} (\d+)$", (group / "memory.stat").read_text(), re.M)
    except (OSError, ValueError):
        return None
    if not allowed.isdigit():  # "max"
        return None
    return int(allowed) - taken + (int(found[1]) if found else 0)
