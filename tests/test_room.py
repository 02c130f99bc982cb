"""Memory: what a model needs, what is free on a machine and in a container, what would fit."""

import weakref

import pytest
import torch
from safetensors.torch import save_file

from ssah_utils import room

GIB = room.GIB


def test_parameters_are_counted_by_the_heads_of_files(tmp_path):
    tensors = {"a": torch.zeros(3, 5), "b": torch.zeros(7, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "one.safetensors", {"format": "pt"})
    save_file({"c": torch.tensor(1.0)}, tmp_path / "two.safetensors")
    files = sorted(tmp_path.iterdir())
    assert room.n_parameters_in(files) == 3 * 5 + 7 + 1
    with open(files[0], "r+b") as file:  # the weights themselves are not read
        file.truncate(files[0].stat().st_size - 60)
    assert room.n_parameters_in(files) == 3 * 5 + 7 + 1


@pytest.mark.parametrize(
    ("dtype", "free", "said"),
    [
        (torch.float32, 28, ""),
        (torch.float32, 27, r"need 28\.0 GiB of memory in float32, and 27\.0 GiB are free: bfl"),
        (torch.float32, 14, r"bfloat16 would fit, with 14\.0 GiB: dtype=bfloat16"),
        (torch.float32, 13, r"a model of up to 7\.0 billion parameters in bfloat16 would fit"),
        (torch.bfloat16, 14, ""),
        (torch.bfloat16, 13, r"need 14\.0 GiB of memory in bfloat16.* up to 7\.0 billion"),
    ],
)
def test_too_little_memory_is_one_line_that_says_what_would_fit(monkeypatch, dtype, free, said):
    monkeypatch.setattr(room, "free_memory", lambda: free * GIB)
    if not said:
        return room.require_memory("org/7b", 7 * GIB, dtype)
    with pytest.raises(OSError, match=said) as raised:
        room.require_memory("org/7b", 7 * GIB, dtype)
    assert "\n" not in str(raised.value) and "'org/7b'" in str(raised.value)


def test_a_gpu_s_memory_counts_too(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda: 64 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (7 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * GIB)
    with pytest.raises(OSError, match=r"14\.0 GiB of GPU memory in bfloat16, and 8\.0 GiB are"):
        room.require_memory("org/7b", 7 * GIB, torch.bfloat16, "cuda:0")
    room.require_memory("org/4b", 4 * GIB, torch.bfloat16, "cuda:0")
    room.require_memory("org/7b", 7 * GIB, torch.bfloat16, "cpu")


def test_what_nobody_uses_any_more_is_let_go_before_a_model_is_refused(monkeypatch):
    class Lost:
        pass

    lost, free = Lost(), []
    lost.itself = lost  # only the collector finds it
    weakref.finalize(lost, free.append, 8 * GIB)
    monkeypatch.setattr(room, "free_memory", lambda: sum(free))
    room.gc.disable()
    try:
        del lost
        assert room.free_memory() == 0
        room.require_memory("org/1b", GIB, torch.float32)
    finally:
        room.gc.enable()


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(room, "_free_on_machine", lambda: None)
    monkeypatch.setattr(room, "_free_in_group", lambda: None)
    assert room.free_memory() is None
    room.require_memory("org/any", 2**60, torch.float32)


def test_free_memory_is_at_most_what_the_machine_has():
    all_of_it = room.os.sysconf("SC_PHYS_PAGES") * room.os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < room.free_memory() <= all_of_it


GROUPS = {
    "version 2": (
        "0::/slurm/job_7\n",
        "slurm/job_7",
        {"memory.max": "1000", "memory.current": "700", "memory.stat": "a 5\ninactive_file 100"},
        400,
    ),
    "version 2, limited above": (
        "0::/slurm/job_7\n",
        "slurm",
        {"memory.max": "900", "memory.current": "700", "memory.stat": "inactive_file 0\n"},
        200,
    ),
    "version 1": (
        "4:cpu:/other\n7:memory:/docker/a\n",
        "memory/docker/a",
        {
            "memory.limit_in_bytes": "500",
            "memory.usage_in_bytes": "450",
            "memory.stat": "total_inactive_file 20\n",
        },
        70,
    ),
    "no limit": (
        "0::/a\n",
        "a",
        {"memory.max": "max", "memory.current": "7", "memory.stat": ""},
        None,
    ),
    "over the limit": (
        "0::/a\n",
        "a",
        {"memory.max": "10", "memory.current": "70", "memory.stat": ""},
        0,
    ),
}


@pytest.mark.parametrize(("own", "place", "content", "left"), GROUPS.values(), ids=GROUPS)
def test_a_container_or_a_batch_job_has_what_its_group_is_allowed(
    tmp_path, monkeypatch, own, place, content, left
):
    (tmp_path / "cgroup").write_text(own)
    (tmp_path / "root" / place).mkdir(parents=True)
    for name, text in content.items():
        (tmp_path / "root" / place / name).write_text(text)
    monkeypatch.setattr(room, "CGROUP", tmp_path / "root")
    monkeypatch.setattr(room, "OWN_CGROUP", tmp_path / "cgroup")
    assert room._free_in_group() == left
    if left is not None:
        assert room.free_memory() == left
