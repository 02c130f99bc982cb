"""Unit files: what is written is read back with all that is said about it, also what version 1
wrote; what does not belong is refused in one line; docs/unit-files.md says how they are, and its
code runs.
"""

import dataclasses
import json
import re
import runpy
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ssah_utils import (
    architectures,
    files,
    fingerprints,
    interventions,
    models,
    scoring,
    unit_files,
)
from ssah_utils.architectures import ModelShape
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.unit_files import ModelInfo, ScoreInfo, SetInfo, UnitFileInfo
from ssah_utils.units import GROUPS, UnitPartition, partition
from tests.conftest import LAYOUTS

SHAPE = ModelShape("llama", n_layers=3, d_model=12, n_heads=3, n_kv_heads=1, head_dim=2, d_ff=10)
MODEL = ModelInfo("org/tiny", "a1b2c3", "0123456789abcdef", SHAPE)
COMMITTED = sorted((files.DATA / "reference").rglob("*.safetensors"))


def random_scores(seed: int, shape: ModelShape = SHAPE) -> PerUnit:
    generator = torch.Generator().manual_seed(seed)
    sizes = {kind: (shape.n_layers, shape.n_channels(kind)) for kind in KINDS}
    return PerUnit({kind: torch.randn(size, generator=generator) for kind, size in sizes.items()})


def random_set(seed: int, shape: ModelShape = SHAPE) -> PerUnit:
    return random_scores(seed, shape) < -0.5


SETS = {"safety": random_set(0), "category: a.b/c": random_set(1), "none": random_set(0) < False}
SCORES = {"z": random_scores(2), "log.p": random_scores(3)}
ABOUT = UnitFileInfo(
    MODEL,
    {
        "safety": SetInfo("lowest scores", "by hand", {"safety": 0.3}, {"harmful": "x"}, "all", 7),
        "category: a.b/c": SetInfo('Größe > 0, "in words"'),
        "none": SetInfo("no unit"),
    },
    {"z": ScoreInfo("drawn", "standard deviations"), "log.p": ScoreInfo("drawn, too", "nats")},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "units.safetensors"


@pytest.fixture
def saved(path: Path) -> Path:
    unit_files.save_units(path, SETS, SCORES, about=ABOUT)
    return path


def rewritten(path: Path, **metadata: str | None) -> Path:
    """The same tensors with other metadata; None leaves a key out."""
    with safe_open(path, "pt") as file:
        merged = file.metadata() | metadata
    save_file(
        load_file(path), path, {key: text for key, text in merged.items() if text is not None}
    )
    return path


def same(found: dict[str, PerUnit], expected: dict[str, PerUnit]) -> bool:
    return list(found) == list(expected) and all(
        found[name].equals(values) for name, values in expected.items()
    )


# ----------------------------------------------------------------------------------- write and read


@pytest.mark.parametrize("fingerprint", ["", MODEL.fingerprint])
def test_everything_that_is_written_is_read_back(saved, fingerprint):
    file = unit_files.load_units(saved, fingerprint)
    assert same(file.sets, SETS) and same(file.scores, SCORES)
    assert (file.info.model, file.info.sets, file.info.scores) == (MODEL, ABOUT.sets, ABOUT.scores)
    assert file.info.version == 2
    assert abs((datetime.now(UTC).date() - datetime.fromisoformat(file.info.date).date()).days) < 2
    assert re.fullmatch(r"\d+\.\d+\S*|unknown", file.info.ssah_utils)
    assert [entry.name for entry in saved.parent.iterdir()] == [saved.name]


def test_scores_are_stored_as_float32_whatever_they_were(path):
    wide = SCORES["z"].map(torch.Tensor.double)
    about = UnitFileInfo(MODEL, scores={"z": ScoreInfo("drawn", "none")})
    unit_files.save_units(path, {}, {"z": wide}, about=about)
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.float32}
    assert unit_files.load_units(path).scores["z"].equals(SCORES["z"])


def test_scores_that_some_units_have_not_survive(path):
    score = random_scores(4)
    score["mlp"][0, 0], score["attention"][2, 1] = -torch.inf, torch.nan
    about = UnitFileInfo(MODEL, scores={"z": ScoreInfo("drawn", "none")})
    unit_files.save_units(path, {}, {"z": score}, about=about)
    found = unit_files.load_units(path).scores["z"]
    for kind in KINDS:
        assert torch.equal(found[kind].nan_to_num(-1), score[kind].nan_to_num(-1))


def test_tensors_that_are_not_contiguous_can_be_saved(path):
    turned = SETS["safety"].map(lambda chosen: chosen.T.contiguous().T)
    assert not turned["mlp"].is_contiguous()
    unit_files.save_set(path, turned, MODEL, "a set")
    assert unit_files.load_set(path).equals(SETS["safety"])


def test_one_set_can_have_two_names(path):
    sets = {"safety": SETS["safety"], "frozen": SETS["safety"]}
    about = UnitFileInfo(MODEL, {name: SetInfo("a set") for name in sets})
    unit_files.save_units(path, sets, about=about)
    assert same(unit_files.load_units(path).sets, sets)


def test_a_set_is_taken_away_and_read_again(path):
    unit_files.save_set(path, SETS["safety"], MODEL, "three units", method="drawn", seed=3)
    assert unit_files.load_set(path, MODEL.fingerprint).equals(SETS["safety"])
    file = unit_files.load_units(path)
    assert file.info.sets == {"set": SetInfo("three units", "drawn", seed=3)}
    assert not file.scores


def test_one_of_several_sets_is_read_by_its_name(saved):
    assert unit_files.load_set(saved, name="category: a.b/c").equals(SETS["category: a.b/c"])
    with pytest.raises(ValueError, match=r"has 3 sets, safety, category: a\.b/c, none: say which"):
        unit_files.load_set(saved)


def test_a_partition_survives_its_file(path):
    z = {"z_safety": random_scores(0), "z_utility": random_scores(1)}
    parted = partition(*z.values(), 0.2, 0.2, 0.2, fingerprint=MODEL.fingerprint)
    unit_files.save_partition(
        path,
        parted,
        MODEL,
        z,
        scoring.Z_SCORES,
        fractions={"safety": 0.2},
        data={"safety": "x"},
        seed=5,
    )
    found, scores = unit_files.load_partition(path, MODEL.fingerprint)
    assert found.fingerprint == parted.fingerprint
    assert found.group_index.equals(parted.group_index)
    assert same(scores, z)
    said = unit_files.load_units(path).info.sets
    assert list(said) == list(GROUPS)
    assert unit_files.load_units(path).info.scores == scoring.Z_SCORES
    assert {
        (info.seed, info.fractions["safety"], info.data["safety"]) for info in said.values()
    } == {(5, 0.2, "x")}
    assert len({info.what for info in said.values()}) == len(GROUPS)


def test_a_partition_of_another_model_than_described_is_not_written(path):
    parted = UnitPartition(random_set(0).map(torch.Tensor.char), "fedcba")
    with pytest.raises(
        ValueError, match="partition belongs to model fedcba, not to 0123456789abcdef"
    ):
        unit_files.save_partition(path, parted, MODEL)
    assert not path.exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ({"safety": SETS["safety"]}, "it has no set 'utility', but safety"),
        ({group: SETS["safety"] for group in GROUPS}, "not every unit is in exactly one group"),
        ({group: SETS["none"] for group in GROUPS}, "not every unit is in exactly one group"),
    ],
)
def test_sets_that_are_no_partition_are_not_read_as_one(path, sets, message):
    about = UnitFileInfo(MODEL, {name: SetInfo("a set") for name in sets})
    unit_files.save_units(path, sets, about=about)
    with pytest.raises(ValueError, match=f"holds no partition: {message}"):
        unit_files.load_partition(path)


def test_a_model_is_described_by_what_it_is(any_model):
    found = ModelInfo.of(any_model, "org/name", "a1b2")
    assert found == ModelInfo(
        "org/name", "a1b2", fingerprints.fingerprint(any_model), models.shape_of(any_model)
    )


def test_a_model_is_named_by_where_it_came_from_but_never_by_a_path(llama, saved_llama, tmp_path):
    assert ModelInfo.of(type(llama).from_pretrained(saved_llama)).id == saved_llama.name
    assert ModelInfo.of(llama, str(tmp_path / "gone")).id == "gone"
    llama.config._name_or_path, llama.config._commit_hash = "org/name", "c0ffee"
    assert (ModelInfo.of(llama).id, ModelInfo.of(llama).revision) == ("org/name", "c0ffee")


# ------------------------------------------------------------------------------------------ refused


def test_a_name_that_is_not_there_is_answered_with_the_nearest(saved):
    file = unit_files.load_units(saved)
    with pytest.raises(KeyError, match=r"no 'safty': the nearest is 'safety' of safety, category"):
        file.sets["safty"]
    with pytest.raises(KeyError, match="no 'safty': the nearest is 'safety'"):
        unit_files.load_set(saved, name="safty")
    with pytest.raises(KeyError, match=r"no 'logp': the nearest is 'log\.p'"):
        file.scores["logp"]


def test_units_of_another_model_are_refused(saved):
    message = "belongs to model 0123456789abcdef \\(org/tiny\\), not to the loaded fedcba"
    for load in (unit_files.load_units, unit_files.load_set, unit_files.load_partition):
        with pytest.raises(ValueError, match=message):
            load(saved, "fedcba")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors does not exist"):
        unit_files.load_units(tmp_path / "nowhere.safetensors")


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_refused(saved, kept):
    content = saved.read_bytes()
    saved.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        unit_files.load_units(saved)


@pytest.mark.parametrize(
    "metadata", [None, {"format": "pt"}, {"format": "ssah-units-0"}, {"format": "ssah-units-x"}]
)
def test_a_foreign_safetensors_file_is_refused(path, metadata):
    save_file({"weight": torch.zeros(3)}, path, metadata)
    with pytest.raises(ValueError, match=r"is no unit file: its format is '\S+', not ssah-units-2"):
        unit_files.load_units(path)


@pytest.mark.parametrize("version", [3, 12])
def test_a_version_that_is_newer_than_the_package_is_refused(saved, version):
    rewritten(saved, format=f"ssah-units-{version}", sets=None)
    with pytest.raises(ValueError, match=rf"is of version {version}; this ssah_utils .* update it"):
        unit_files.load_units(saved)


NO_JSON = [
    (key, text)
    for key in ("model", "sets", "scores", "ssah_utils", "date")
    for text in (None, "", "{")
]
NO_DESCRIPTION = [("model", "{}")] + [
    (key, text) for key in ("model", "sets", "scores") for text in ("[1]", '{"safety": 1}')
]


@pytest.mark.parametrize(("key", "text"), NO_JSON + NO_DESCRIPTION)
def test_metadata_that_cannot_be_read_are_refused_in_one_line(saved, key, text):
    rewritten(saved, **{key: text})
    with pytest.raises(ValueError, match="is damaged") as error:
        unit_files.load_units(saved)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["d_ff", "n_layers", "head_dim", "n_heads"])
def test_shapes_that_differ_from_the_metadata_are_refused(saved, field):
    with safe_open(saved, "pt") as file:
        said = json.loads(file.metadata()["model"])
    rewritten(saved, model=json.dumps(said | {field: said[field] + 1}))
    with pytest.raises(ValueError, match=r"is damaged \('safety' has .* where the model has"):
        unit_files.load_units(saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_without_one_of_its_tensors_is_refused(saved, kind):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(saved)
    del tensors[f"sets.safety.{kind}"]
    save_file(tensors, saved, metadata)
    with pytest.raises(ValueError, match=rf"is damaged \('sets\.safety\.{kind}' is missing\)"):
        unit_files.load_units(saved)


def test_what_a_later_package_adds_to_this_version_is_left_alone(saved):
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    added = {key: json.loads(metadata[key]) for key in ("model", "sets")}
    added["model"]["licence"] = added["sets"]["safety"]["colour"] = "new"
    tensors = load_file(saved) | {"means.mlp": torch.zeros(3)}
    texts = {key: json.dumps(value) for key, value in added.items()}
    save_file(tensors, saved, metadata | texts | {"note": "new"})
    file = unit_files.load_units(saved)
    assert same(file.sets, SETS) and file.info.sets == ABOUT.sets and file.info.model == MODEL


def about(**changes: object) -> UnitFileInfo:
    return dataclasses.replace(ABOUT, **changes)


@pytest.mark.parametrize(
    ("sets", "scores", "said", "message"),
    [
        ({**SETS, "more": SETS["none"]}, SCORES, ABOUT, "set 'more' is not described: add it to"),
        ({"none": SETS["none"]}, SCORES, ABOUT, "describes 'safety', which is not among the sets"),
        (SETS, {}, ABOUT, "about.scores describes 'z', which is not among the scores"),
        (SETS, SCORES, about(model=dataclasses.replace(MODEL, shape=None)), "needs the shape"),
        (SETS, SCORES, about(model=dataclasses.replace(MODEL, fingerprint="")), "the fingerprint"),
        ({"": SETS["none"]}, {}, UnitFileInfo(MODEL, {"": SetInfo("a")}), "'' cannot be the name"),
        (
            {"layer": SETS["none"]},
            {},
            UnitFileInfo(MODEL, {"layer": SetInfo("a")}),
            "'layer' cannot be the name of a set",
        ),
        (
            {"z": SETS["none"]},
            SCORES,
            about(sets={"z": SetInfo("a")}),
            "'z' is the name of a set and of a score",
        ),
        (
            {**SETS, "none": PerUnit({"mlp": SETS["none"]["mlp"]})},
            SCORES,
            ABOUT,
            r"'none' has no attention units, where the model has \(3, 6\)",
        ),
        (
            {**SETS, "none": random_set(0, dataclasses.replace(SHAPE, d_ff=11))},
            SCORES,
            ABOUT,
            r"'none' has \(3, 11\) mlp units, where the model has \(3, 10\)",
        ),
        ({**SETS, "none": SCORES["z"]}, SCORES, ABOUT, "'none' is of float32: a set"),
        (SETS, {**SCORES, "z": SETS["none"]}, ABOUT, "'z' is of bool: a set of units is of bool"),
    ],
)
def test_what_cannot_be_told_apart_later_is_not_written(path, sets, scores, said, message):
    with pytest.raises((ValueError, TypeError), match=message):
        unit_files.save_units(path, sets, scores, about=said)
    assert not path.exists()


@pytest.mark.parametrize("existed", [False, True])
def test_a_failed_save_leaves_the_folder_as_it_was(tmp_path, monkeypatch, existed):
    path = tmp_path / "new" / "units.safetensors"
    if existed:
        unit_files.save_set(path, SETS["safety"], MODEL, "the old set")

    def half_written(content, target, metadata):
        save_file(content, target, metadata)
        Path(target).write_bytes(Path(target).read_bytes()[:200])
        raise OSError("no space left on device")

    monkeypatch.setattr(unit_files, "save_file", half_written)
    with pytest.raises(OSError, match="no space left"):
        unit_files.save_set(path, SETS["none"], MODEL, "the new set")
    assert [entry.name for entry in path.parent.iterdir()] == [path.name] * existed
    if existed:
        assert unit_files.load_set(path).equals(SETS["safety"])


# ---------------------------------------------------------------------------------------- version 1


def tensors_of(named: dict[str, PerUnit]) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{kind}": tensor
        for name, values in named.items()
        for kind, tensor in values.items()
    }


def old_partition(path: Path) -> PerUnit:
    index = random_scores(5).map(lambda values: (values.abs() * 2).clamp(max=3).char())
    metadata = {
        "format": "ssah-units-1",
        "groups": json.dumps(GROUPS),
        "fingerprint": MODEL.fingerprint,
    }
    save_file(tensors_of({"group": index, **SCORES}), path, metadata)
    return index


def test_a_partition_of_version_1_is_read(path):
    index = old_partition(path)
    file = unit_files.load_units(path, MODEL.fingerprint)
    expected = {group: index.map(lambda i, n=n: i == n) for n, group in enumerate(GROUPS)}
    assert same(file.sets, expected)
    assert {name: scores.equals(SCORES[name]) for name, scores in file.scores.items()} == {
        "z": True,
        "log.p": True,
    }
    parted, scores = unit_files.load_partition(path, MODEL.fingerprint)
    assert parted.group_index.equals(index) and scores.keys() == SCORES.keys()
    assert file.info.model == ModelInfo("", "", MODEL.fingerprint, None)
    assert file.info.version == 1


def test_a_set_of_version_1_is_read(path):
    metadata = {"format": "ssah-unit-set-1", "fingerprint": "f", "what": "in words"}
    save_file(tensors_of({"set": SETS["safety"]}), path, metadata)
    assert unit_files.load_set(path, "f").equals(SETS["safety"])
    assert unit_files.load_units(path).info.sets == {"set": SetInfo("in words")}


def test_named_sets_of_version_1_are_read_in_their_order(path):
    sets = {f"seed: {n}": random_set(n) for n in range(12)} | SETS
    metadata = {"format": "ssah-unit-sets-1", "fingerprint": "f", "names": json.dumps(list(sets))}
    save_file(tensors_of({str(n): one for n, one in enumerate(sets.values())}), path, metadata)
    assert same(unit_files.load_units(path, "f").sets, sets)


def test_a_file_of_version_1_can_be_of_another_model_or_damaged(path):
    old_partition(path)
    with pytest.raises(ValueError, match="belongs to model 0123456789abcdef, not to the loaded f:"):
        unit_files.load_units(path, "f")
    rewritten(path, groups=None)
    with pytest.raises(ValueError, match=r"is damaged \('groups' is missing\)"):
        unit_files.load_units(path)


def test_there_are_committed_unit_files():
    assert {path.name for path in COMMITTED} == {"units.safetensors", "frozen_units.safetensors"}


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.parent.name)
def test_every_committed_unit_file_is_read(path):
    file, tensors = unit_files.load_units(path), load_file(path)
    assert re.fullmatch("[0-9a-f]{16}", file.info.model.fingerprint)
    assert file.sets.keys() == file.info.sets.keys()
    assert all(info.what for info in file.info.sets.values())
    for kind in KINDS:
        if path.name == "frozen_units.safetensors":
            ((name, chosen),) = file.sets.items()
            stored = tensors.get(f"sets.{name}.{kind}", tensors.get(f"set.{kind}"))
            assert torch.equal(chosen[kind], stored)
        else:
            for number, group in enumerate(GROUPS):
                stored = tensors.get(f"sets.{group}.{kind}")
                if stored is None:
                    stored = tensors[f"group.{kind}"] == number
                assert torch.equal(file.sets[group][kind], stored)
            assert torch.isfinite(file.scores["z_safety"][kind]).all()
    if path.name == "units.safetensors":
        parted, _ = unit_files.load_partition(path)
        assert parted.counts()["units"].sum() == file.sets["safety"].n_units


# ------------------------------------------------------------------------- what the document says

DOCUMENT = (files.ROOT / "docs" / "unit-files.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)
LIBRARIES = ("ssah_utils", "transformer_lens", "nnsight")
APPLYING = {
    next((name for name in LIBRARIES if name in code), "plain PyTorch"): code
    for code in CODE
    if "logits =" in code
}


def run_code(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **names: object) -> dict:
    """Its names after it ran in a folder, from a file as nnsight reads the source again."""
    script = folder / "from_the_document.py"
    script.write_text(code, encoding="utf-8")
    monkeypatch.chdir(folder)
    return runpy.run_path(str(script), init_globals={"torch": torch, **names})


def test_the_document_shows_every_way_of_applying_a_set():
    assert APPLYING.keys() == {"ssah_utils", "plain PyTorch", "transformer_lens", "nnsight"}
    assert len(CODE) == len(APPLYING) + 1
    assert len(APPLYING["plain PyTorch"].split("\n\n")[1].splitlines()) <= 10


@pytest.mark.parametrize("library", APPLYING)
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_documents_code_ablates_the_same_units(
    tmp_path, tiny_models, tokenizer, token_ids, monkeypatch, library, name
):
    if library in LIBRARIES:
        pytest.importorskip(library)
    model: nn.Module = tiny_models(name)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chosen, others = (random_set(seed, models.shape_of(model)) for seed in range(2))
    about = UnitFileInfo(
        ModelInfo.of(model), {"safety": SetInfo("drawn"), "others": SetInfo("drawn")}
    )
    sets = {"safety": chosen, "others": others}
    unit_files.save_units(tmp_path / "units.safetensors", sets, about=about)
    with torch.no_grad():
        intact = model(token_ids).logits
        with interventions.ablated(model, chosen):
            expected = model(token_ids).logits
    names = {"model": model, "name": str(tmp_path / "model"), "input_ids": token_ids}
    found = run_code(APPLYING[library], tmp_path, monkeypatch, **names)["logits"]
    # TransformerLens adds up in another order: found are 6e-6, of logits that move by 1 and more
    assert torch.allclose(found, expected, rtol=0, atol=1e-4)
    assert (intact - expected).abs().max() > 0.1


@pytest.mark.parametrize("folded", [False, True])
def test_zero_means_something_else_in_transformer_lens_once_value_biases_are_folded(
    tmp_path, tiny_models, tokenizer, token_ids, monkeypatch, folded
):
    pytest.importorskip("transformer_lens")
    model = tiny_models("qwen2")  # it has value biases
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chosen = random_set(0, models.shape_of(model))
    unit_files.save_set(tmp_path / "units.safetensors", chosen, ModelInfo.of(model), "a", "safety")
    boot = "TransformerBridge.boot_transformers(name)"
    mode = f"bridge.enable_compatibility_mode(fold_value_biases={folded})"
    code = APPLYING["transformer_lens"].replace(boot, f"{boot}\n{mode}")
    names = {"name": str(tmp_path / "model"), "input_ids": token_ids}
    found = run_code(code, tmp_path, monkeypatch, **names)["logits"].log_softmax(-1)
    with torch.no_grad(), interventions.ablated(model, chosen):
        expected = model(token_ids).logits.log_softmax(-1)
    assert torch.allclose(found, expected, rtol=0, atol=1e-4) != folded


def test_the_documents_code_writes_an_old_file_again(path, tiny_models, monkeypatch):
    model = tiny_models("llama")
    old = {"safety": random_set(0, models.shape_of(model))}
    metadata = {"format": "ssah-unit-set-1", "fingerprint": "f", "what": "in words"}
    save_file(tensors_of({"set": old["safety"]}), path.parent / "old.safetensors", metadata)
    run_code(CODE[-1], path.parent, monkeypatch, model=model)
    file = unit_files.load_units(path, fingerprints.fingerprint(model))
    assert file.sets["set"].equals(old["safety"])
    assert (file.info.version, file.info.sets["set"].what) == (2, "in words")


def documented(after: str) -> list[str]:
    """First column of the first table after a text."""
    rows = DOCUMENT.split(after, 1)[1].split("\n\n|", 1)[1].split("\n\n", 1)[0].splitlines()
    return [re.match(r"\|? ?`(\w+)`", row)[1] for row in rows[2:]]


def test_the_document_names_every_key_and_field_of_a_file(saved):
    with safe_open(saved, "pt") as file:
        metadata, tensors = file.metadata(), set(file.keys())
    assert documented("## Metadata") == ["format", "model", "sets", "scores", "ssah_utils", "date"]
    assert metadata.keys() == set(documented("## Metadata"))
    assert json.loads(metadata["model"]).keys() == set(documented("**`model`**"))
    assert json.loads(metadata["sets"])["safety"].keys() == set(documented("**`sets`**"))
    assert json.loads(metadata["scores"])["z"].keys() == set(documented("**`scores`**"))
    named = [("sets", name) for name in SETS] + [("scores", name) for name in SCORES]
    assert tensors == {f"{what}.{name}.{kind}" for what, name in named for kind in KINDS}


def test_a_channel_is_a_column_of_a_linear_map_and_a_row_of_a_transposed_one(any_model, token_ids):
    chosen = random_set(0, models.shape_of(any_model))
    with torch.no_grad():
        with interventions.ablated(any_model, chosen):
            expected = any_model(token_ids).logits
        for kind in KINDS:
            path = architectures.writer_path(models.shape_of(any_model), kind)
            for layer, channels in enumerate(chosen[kind]):
                module = any_model.get_submodule(path.format(layer=layer))
                if isinstance(module, nn.Linear):
                    module.weight[:, channels] = 0
                else:
                    module.weight[channels] = 0
        assert torch.allclose(any_model(token_ids).logits, expected, rtol=0, atol=1e-5)
