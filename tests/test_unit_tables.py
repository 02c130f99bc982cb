"""Unit files as tables: one row per unit that says where it is, read back whatever became of the
order of rows.
"""

import sys

import pandas as pd
import pytest
import torch
from torch import nn

from ssah_utils import models, unit_files, unit_tables
from ssah_utils.architectures import ModelShape
from ssah_utils.files import REFERENCE
from ssah_utils.per_unit import KINDS, PerUnit
from ssah_utils.pipeline import cli
from ssah_utils.unit_files import ModelInfo, ScoreInfo, SetInfo, UnitFileInfo
from tests.conftest import writers_by_name
from tests.test_unit_files import MODEL, SHAPE, random_scores, random_set, same

SETS = {"safety": random_set(0), "top 5%, other": random_set(1)}
SCORES = {"z": random_scores(2), "tenths": random_scores(3).map(torch.round) / 10}
ENDINGS = ("csv", "parquet")


def saved(path, model: ModelInfo = MODEL, sets=SETS, scores=SCORES):
    about = UnitFileInfo(
        model,
        {name: SetInfo("drawn") for name in sets},
        {name: ScoreInfo("drawn", "none") for name in scores},
    )
    unit_files.save_units(path, sets, scores, about=about)
    return path


@pytest.fixture
def file(tmp_path):
    return saved(tmp_path / "units.safetensors")


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_exported_is_read_back_bit_by_bit(file, tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    unit_tables.export_units(file, tmp_path / f"units.{ending}")
    sets, scores = unit_tables.read_table(tmp_path / f"units.{ending}")
    assert same(sets, SETS) and same(scores, SCORES)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("ending", ENDINGS)
def test_units_without_a_score_have_none_in_the_table(tmp_path, ending):
    if ending == "parquet":
        pytest.importorskip("pyarrow")
    score = random_scores(0)
    score["mlp"][0, 0], score["attention"][2, 1], score["mlp"][1, 1] = -torch.inf, torch.nan, 1e-30
    path = saved(tmp_path / "units.safetensors", scores={"z": score})
    unit_tables.export_units(path, tmp_path / f"units.{ending}")
    found = unit_tables.read_table(tmp_path / f"units.{ending}")[1]["z"]
    for kind in KINDS:
        assert torch.equal(found[kind].isnan(), score[kind].isnan())
        assert torch.equal(found[kind].nan_to_num(7), score[kind].nan_to_num(7))


def test_the_order_of_rows_and_columns_means_nothing(file, tmp_path):
    unit_tables.export_units(file, tmp_path / "units.csv")
    table = pd.read_csv(tmp_path / "units.csv", dtype=str, keep_default_na=False)
    table = table.sample(frac=1, random_state=0).iloc[:, ::-1].drop(columns=["hook", "head"])
    table.to_csv(tmp_path / "sorted.csv", index=False)
    sets, scores = unit_tables.read_table(tmp_path / "sorted.csv")
    assert all(sets[name].equals(values) for name, values in SETS.items())
    assert all(scores[name].equals(values) for name, values in SCORES.items())


def test_every_row_says_where_its_unit_is(any_model, tmp_path):
    info = ModelInfo.of(any_model, "tiny")
    chosen = random_set(0, info.shape)
    path = saved(tmp_path / "units.safetensors", info, {"safety": chosen}, {})
    table = unit_tables.unit_table(unit_files.load_units(path))
    assert tuple(table.columns) == (*unit_files.COLUMNS, "safety")
    assert len(table) == info.shape.n_units == len(table.drop_duplicates(["module", "channel"]))
    places = {name: module for name, module in any_model.named_modules()}
    writers = {kind: writers_by_name(any_model, kind) for kind in KINDS}
    by_head = torch.arange(info.shape.n_channels("attention")).view(info.shape.n_heads, -1)
    for row in table.itertuples():
        module: nn.Module = places[row.module]
        assert module is writers[row.kind][row.layer]
        assert 0 <= row.channel < models.column_weight(module).shape[1]
        assert row.safety == chosen[row.kind][row.layer, row.channel]
        if row.kind == "attention":
            assert by_head[row.head, row.index_in_head] == row.channel
            assert row.hook == f"blocks.{row.layer}.attn.hook_z"
        else:
            assert row.head is row.index_in_head is pd.NA
            assert row.hook == f"blocks.{row.layer}.mlp.hook_post"


def test_an_empty_head_is_an_empty_cell(file, tmp_path):
    unit_tables.export_units(file, tmp_path / "units.csv")
    header, first, *_, last = (tmp_path / "units.csv").read_text(encoding="utf-8").splitlines()
    assert header.startswith("kind,layer,channel,head,index_in_head,module,hook,safety,")
    assert first.startswith(
        "attention,0,0,0,0,model.layers.0.self_attn.o_proj,blocks.0.attn.hook_z,"
    )
    assert last.startswith("mlp,2,9,,,model.layers.2.mlp.down_proj,blocks.2.mlp.hook_post,")


def test_a_file_of_version_1_is_exported_once_its_shape_is_given(tmp_path):
    path = REFERENCE / "06_freezing" / "frozen_units.safetensors"
    file = unit_files.load_units(path)
    (chosen,) = file.sets.values()
    if file.info.version == 1:
        with pytest.raises(
            ValueError, match="version 1 does not say its model's shape: give shape"
        ):
            unit_tables.export_units(path, tmp_path / "units.csv")
        with pytest.raises(ValueError, match=r"'set' has \(30, 576\) attention units"):
            unit_tables.export_units(path, tmp_path / "units.csv", SHAPE)
    shape = ModelShape("llama", 30, 576, 9, 3, 64, 1536)
    unit_tables.export_units(path, tmp_path / "units.csv", shape)
    (found,) = unit_tables.read_table(tmp_path / "units.csv")[0].values()
    assert found.equals(chosen)


# ------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("name", ["units.xlsx", "units", "units.csv.gz"])
def test_another_ending_is_refused_before_anything_is_read(tmp_path, name):
    for call in (lambda path: unit_tables.export_units("gone", path), unit_tables.read_table):
        with pytest.raises(ValueError, match=r"its name has to end in \.csv or \.parquet"):
            call(tmp_path / name)


def test_parquet_without_its_library_is_refused_in_one_line(file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for call in (lambda path: unit_tables.export_units(file, path), unit_tables.read_table):
        with pytest.raises(ModuleNotFoundError, match="needs pyarrow, which is not installed"):
            call(tmp_path / "units.parquet")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.drop(columns="layer"), "it has no column 'layer'"),
        (lambda table: table.iloc[1:], "attention: not every unit is there once"),
        (lambda table: pd.concat([table, table.iloc[-1:]]), "mlp: not every unit is there once"),
        (lambda table: table.assign(note="why"), "column 'note' is neither of true and false nor"),
        (lambda table: table.assign(kind="neuron"), "neuron"),
    ],
)
def test_a_table_that_is_not_one_of_units_is_refused(file, tmp_path, change, message):
    unit_tables.export_units(file, tmp_path / "units.csv")
    change(pd.read_csv(tmp_path / "units.csv")).to_csv(tmp_path / "changed.csv", index=False)
    with pytest.raises(ValueError, match=message):
        unit_tables.read_table(tmp_path / "changed.csv")


def test_a_table_of_one_kind_gives_values_of_one_kind(file, tmp_path):
    unit_tables.export_units(file, tmp_path / "units.csv")
    table = pd.read_csv(tmp_path / "units.csv")
    table[table["kind"] == "mlp"].to_csv(tmp_path / "mlp.csv", index=False)
    sets, _ = unit_tables.read_table(tmp_path / "mlp.csv")
    assert sets["safety"].equals(PerUnit({"mlp": SETS["safety"]["mlp"]}))


# -------------------------------------------------------------------------------------- the command


def test_a_unit_file_is_exported_by_the_command(file, tmp_path, capsys):
    assert cli.main(["export", str(file), "--to", str(tmp_path / "units.csv")]) == 0
    assert capsys.readouterr().out.strip().endswith("units.csv")
    sets, scores = unit_tables.read_table(tmp_path / "units.csv")
    stored = unit_files.load_units(file)
    assert sets.keys() == stored.sets.keys() and scores.keys() == stored.scores.keys()


@pytest.mark.parametrize("name", ["units.txt", "units"])
def test_a_table_of_another_kind_is_refused_before_anything_is_written(
    file, tmp_path, capsys, name
):
    assert cli.main(["export", str(file), "--to", str(tmp_path / name)]) == 1
    assert "error: " in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_file_that_is_not_there_is_one_line(tmp_path, capsys):
    to = str(tmp_path / "units.csv")
    assert cli.main(["export", str(tmp_path / "none.safetensors"), "--to", to]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "none.safetensors does not exist" in line
