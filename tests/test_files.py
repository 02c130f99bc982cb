"""Files and folders that are whole or absent."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import files
from ssah_utils.files import complete_only


def content_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------ complete_only


def test_new_file_in_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with complete_only(path) as partial:
        partial.write_text("new")
        assert partial.name == path.name
        assert partial.stat().st_dev == path.parent.stat().st_dev
        assert not path.exists()
    assert content_of(tmp_path) == {"a/b/file.txt": "new"}
    assert entries(path.parent) == ["file.txt"]


def test_file_is_replaced_when_the_block_ends(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with complete_only(str(path)) as partial:
        partial.write_text("half")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert content_of(tmp_path) == {"file.txt": "new"}
    assert entries(tmp_path) == ["file.txt"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "folder"
    (path / "inner").mkdir(parents=True)
    (path / "only-old.txt").write_text("old")
    (path / "inner" / "both.txt").write_text("old")
    with complete_only(path) as partial:
        (partial / "inner").mkdir(parents=True)
        (partial / "inner" / "both.txt").write_text("new")
        assert content_of(path) == {"inner/both.txt": "old", "only-old.txt": "old"}
    assert content_of(path) == {"inner/both.txt": "new"}
    assert entries(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [False, True])
def test_exception_leaves_what_was_there_and_nothing_else(tmp_path, error, existed):
    for name in ("file", "folder"):
        path = tmp_path / name
        if existed and name == "file":
            path.write_text("old")
        elif existed:
            path.mkdir()
            (path / "part").write_text("old")
        with pytest.raises(error), complete_only(path) as partial:
            if name == "folder":
                partial.mkdir()
                partial /= "part"
            partial.write_text("half")
            raise error
    assert content_of(tmp_path) == ({"file": "old", "folder/part": "old"} if existed else {})
    assert entries(tmp_path) == (["file", "folder"] if existed else [])


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_block_that_writes_nothing_is_an_error_and_keeps_the_old(tmp_path, kind):
    path = tmp_path / "old"
    if kind == "folder":
        path.mkdir()
    (path / "part" if kind == "folder" else path).write_text("old")
    before = content_of(tmp_path)
    with pytest.raises(FileNotFoundError), complete_only(path):
        pass
    assert content_of(tmp_path) == before


def test_new_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("x")
    (tmp_path / "plain-folder").mkdir()
    with complete_only(tmp_path / "file") as partial:
        partial.write_text("x")
    with complete_only(tmp_path / "folder") as partial:
        partial.mkdir()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain-folder").stat().st_mode


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file"
    with complete_only(path) as first, complete_only(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the outer block ends last
    assert entries(tmp_path) == ["file"]


def test_json_is_readable_and_keeps_its_letters(tmp_path):
    content = {"b": [1, 2.5, None], "a": "größer → ≥"}
    files.write_json(tmp_path / "x" / "y.json", content)
    text = (tmp_path / "x" / "y.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "größer → ≥" in text
    assert text.endswith("\n")


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    files.write_json(tmp_path / "y.json", [1])
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "y.json", [1, object()])
    assert json.loads((tmp_path / "y.json").read_text()) == [1]
    assert entries(tmp_path) == ["y.json"]


# ------------------------------------------------------------------------------------------- hashes


def test_hash_of_a_file(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert files.sha256_of_file(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_hash_of_content_depends_on_values_but_not_on_the_order_of_keys():
    first = files.sha256_of({"a": 1, "b": {"c": [1, 2], "d": "x"}})
    assert first == files.sha256_of({"b": {"d": "x", "c": [1, 2]}, "a": 1})
    for other in (
        {"a": 1, "b": {"c": [2, 1], "d": "x"}},
        {"a": 2, "b": {"c": [1, 2], "d": "x"}},
        {"a": 1},
    ):
        assert files.sha256_of(other) != first


def middle_changed(values):
    values[1500] += 1e-7
    return values


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.zeros(3000),
        lambda: torch.zeros(3000, dtype=torch.float64),
        lambda: pd.Series(np.zeros(3000)),
        lambda: torch.zeros(3000),
    ],
)
def test_hash_of_content_sees_every_entry_of_an_array(make):
    assert files.sha256_of({"a": [make()]}) == files.sha256_of({"a": [make()]})
    assert files.sha256_of({"a": [make()]}) != files.sha256_of({"a": [middle_changed(make())]})


def test_hash_of_content_takes_numbers_of_other_libraries_for_what_they_are():
    assert files.sha256_of([np.int64(3), np.float64(0.1), Path("a/b")]) == files.sha256_of(
        [3, 0.1, "a/b"]
    )


@pytest.mark.parametrize(
    "content",
    [pd.DataFrame({"a": range(100)}), object(), {1, 2}, b"bytes"],
    ids=lambda c: type(c).__name__,
)
def test_content_without_an_exact_text_has_no_hash(content):
    with pytest.raises(TypeError, match=f"a {type(content).__name__} cannot be part of a key"):
        files.sha256_of({"key": content})


# -------------------------------------------------------------------------------- space and folders


@pytest.mark.parametrize("inside", ["", "not/there/yet"])
def test_lack_of_space_is_one_line_that_names_the_folder(tmp_path, inside):
    with pytest.raises(OSError, match=r"GiB free and 1073741824\.0 GiB are needed") as raised:
        files.require_space(tmp_path / inside, 2**60)
    message = str(raised.value)
    assert "\n" not in message
    assert str(tmp_path) in message
    assert "SSAH_CACHE" in message
    assert not list(tmp_path.iterdir())


def test_lack_of_space_says_what_for_and_what_else_helps(tmp_path):
    with pytest.raises(OSError, match="are needed for a model: free some space or move"):
        files.require_space(tmp_path, 2**60, "a model", "move")


def test_enough_space_is_silent(tmp_path, monkeypatch):
    files.require_space(tmp_path / "not" / "there", 1)
    monkeypatch.chdir(tmp_path)
    files.require_space("relative/folder", 1)


def test_a_place_that_cannot_be_written_is_one_line_that_names_it(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in ("file", "file/a/b"):
        with pytest.raises(NotADirectoryError, match=f"^{tmp_path}/file is a file: name a folder$"):
            files.require_writable(tmp_path / place)
    with pytest.raises(IsADirectoryError, match=f"^{tmp_path} is a folder: name a file in it$"):
        files.require_target(tmp_path)
    for path in (tmp_path / "file", tmp_path / "new" / "folder" / "file"):
        files.require_target(path)
    monkeypatch.setattr(files.os, "access", lambda place, how: False)
    with pytest.raises(PermissionError, match=f"^nothing can be written into {tmp_path}: name"):
        files.require_target(tmp_path / "new" / "file")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    """``ssah report --to FOLDER`` once did away with all that was in it."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "mine").write_text("kept")
    message = "results is a folder: name a file in it"
    with (
        pytest.raises(IsADirectoryError, match=message),
        complete_only(tmp_path / "results") as partial,
    ):
        partial.write_text("a page")
    assert content_of(tmp_path) == {"results/mine": "kept"}


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("SSAH_CACHE", raising=False)
    assert files.cache_dir() == tmp_path / "xdg" / "ssah"
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "own" / "cache"))
    assert files.cache_dir() == tmp_path / "own" / "cache"
    assert files.cache_dir().is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SSAH_CACHE", "~/at-home")
    assert files.cache_dir() == tmp_path / "at-home"


def test_folder_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old").write_text("kept", encoding="utf-8")

    def fail(self, target):
        raise OSError("device is gone")

    with pytest.raises(OSError, match="device is gone"), complete_only(folder) as partial:
        partial.mkdir()
        monkeypatch.setattr(Path, "replace", fail)
    assert (folder / "old").read_text(encoding="utf-8") == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_empty_cache_variable_means_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("SSAH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / "ssah"


@pytest.fixture
def homeless(monkeypatch):
    """A user without HOME and without an entry in the table of users, as in many containers."""
    for name in ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "SSAH_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.parametrize(
    "variables",
    [
        {"SSAH_CACHE": "own"},
        {"XDG_CACHE_HOME": "own"},
        {"SSAH_CACHE": "own", "XDG_CACHE_HOME": "x"},
    ],
)
def test_a_home_folder_is_not_asked_for_where_none_is_needed(
    tmp_path, monkeypatch, homeless, variables
):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    assert files.cache_dir() == tmp_path / "own" / ("" if "SSAH_CACHE" in variables else "ssah")


def test_a_missing_home_folder_is_one_line_where_it_is_needed(monkeypatch, homeless):
    for value in ("", "~/cache"):
        monkeypatch.setenv("SSAH_CACHE", value)
        with pytest.raises(OSError, match="no home folder: set SSAH_CACHE") as raised:
            files.cache_dir()
        assert "\n" not in str(raised.value)


def test_a_relative_cache_folder_and_an_empty_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSAH_CACHE", "here/cache")
    assert files.cache_dir() == tmp_path / "here" / "cache"
    monkeypatch.setenv("SSAH_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_dir() == tmp_path / ".cache" / "ssah"
