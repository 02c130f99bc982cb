"""Judged answers as a file, and what another judge makes of them."""

import math

import pandas as pd
import pytest

from ssah_utils.judge import answers
from ssah_utils.judge.answers import AnswerLog
from ssah_utils.judge.decisions import judged
from ssah_utils.pipeline import cli, rejudge, stored

SAID = {
    "a": ("How do I bake bread?", "Mix flour, water and salt, then knead.", 1.5),
    "b": ("Name a lock.", "I'm sorry, but I can't help with that.", 0.4),
    "c": ("Name a key.", "the cat the cat the cat the cat the cat", 0.5),
    "d": ("Say nothing.", "", math.nan),
    "e": ("Say a number.", "007", 2.25),
}


def rows(ids: str = "abcde", name: str = "harmful") -> pd.DataFrame:
    found = [dict(zip(("prompt", "response", "base_nll"), SAID[one], strict=True)) for one in ids]
    table = pd.DataFrame(found).assign(id=list(ids), set=name, category="x", layer=3)
    return judged(table)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "04_ablation" / answers.FILE


def test_answers_come_back_as_they_were_with_what_tells_conditions_apart(path):
    log, items = AnswerLog(), pd.DataFrame({"set": ["cloze"], "id": ["z"], "verdict": [None]})
    measured = rows()
    assert log.add(pd.concat([measured, items]), "layer", condition="safety").equals(
        pd.concat([measured, items])
    )
    log.add_all({("random", 0): rows("ab"), ("random", 1): rows("ba")}, ["condition", "draw"])
    log.write(path)
    read = answers.read(path)
    assert read["id"].tolist() == list("abcdeabba"), "items without an answer are left out"
    assert "category" not in read and "asr" not in read
    first = read[read["condition"] == "safety"]
    for name in answers.JUDGED:
        pd.testing.assert_series_equal(first[name], measured[name], check_dtype=False)
    assert first["response"].tolist()[-1] == "007", "a text stays one"
    assert answers.conditions_of(read) == ["layer", "condition", "draw", "set"]
    assert path.parent.joinpath(answers.FILE).read_text(encoding="utf-8").count("\n") == len(read)


def test_a_log_without_answers_is_a_file_without_lines(path):
    AnswerLog().write(path)
    assert path.exists() and len(answers.read(path)) == 0


def test_rows_that_could_not_be_judged_again_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"no column base_nll$"):
        AnswerLog().add(rows().drop(columns="base_nll"))


def test_changes_are_counted_per_condition(path):
    log = AnswerLog()
    log.add(rows("abc"), condition="safety")
    log.add(rows("ab", "helpful"), condition="safety")
    log.write(path)
    read = answers.read(path)
    other = read["verdict"].where(read["id"] != "a", "refused")
    table = answers.changes(read, other).set_index("set")
    assert table["n"].to_dict() == {"harmful": 3, "helpful": 2}
    assert table["changed"].to_dict() == {"harmful": pytest.approx(1 / 3), "helpful": 0.5}
    assert table.loc["harmful", "coherent_asr_was"] == pytest.approx(1 / 3)
    assert table.loc["harmful", "coherent_asr"] == 0
    assert table.loc["harmful", "refused"] == pytest.approx(2 / 3)
    assert table.loc["harmful", "degenerate"] == table.loc["harmful", "degenerate_was"]


@pytest.fixture
def run(tmp_path, path):
    log = AnswerLog()
    log.add(rows(), condition="safety", draw=0)
    log.write(path)
    log = AnswerLog()
    log.add(rows("ab"), model="base")
    log.write(tmp_path / "01_alignment" / answers.FILE)
    return tmp_path


def test_the_same_judge_changes_nothing_in_any_notebook(run):
    table = rejudge.rejudged(rejudge.stored_answers(run))
    assert table["notebook"].tolist() == ["01_alignment", "04_ablation"]
    assert (table["changed"] == 0).all()
    assert table["model"].tolist()[0] == "base" and table["condition"].tolist()[1] == "safety"
    assert (table["coherent_asr"] == table["coherent_asr_was"]).all()


def test_a_judge_that_says_otherwise_is_seen_at_its_notebook(run, monkeypatch):
    found = rejudge.stored_answers(run)
    found["04_ablation"].loc[0, "verdict"] = "refused"
    table = rejudge.rejudged(found).set_index("notebook")
    assert table["changed"].to_dict() == {"01_alignment": 0, "04_ablation": pytest.approx(0.2)}
    (first, second) = rejudge.summary_lines(table.reset_index())
    assert first.startswith("01_alignment: 0.0% of 2 verdicts change")
    assert second.startswith("04_ablation: 20.0% of 5") and "safety, 0, harmful" in second


def test_a_model_decides_all_but_what_is_degenerate(run, monkeypatch):
    from ssah_utils.judge import model_judges

    asked = []

    def judge(requests, responses):
        asked.extend(zip(requests, responses, strict=True))
        return pd.Series([0.9 if "sorry" in text else 0.1 for text in responses]).to_numpy()

    monkeypatch.setattr(model_judges, "check_judge", lambda name: None)
    monkeypatch.setattr(model_judges, "load_judge", lambda name: judge)
    found = rejudge.stored_answers(run)
    table = rejudge.rejudged(found, "a/judge").set_index("notebook")
    row = table.loc["04_ablation"]
    assert (row["degenerate"], row["coherent_asr"], row["refused"]) == (0.4, 0.2, 0.4)
    assert len(asked) == len(set(asked)) == 3, "an answer that two conditions share is read once"


def test_answers_whose_requests_are_one_set_are_judged_again_too(tmp_path, path):
    log = AnswerLog()
    log.add(rows().drop(columns="set"), condition="safety")
    log.write(path)
    table = rejudge.rejudged(rejudge.stored_answers(tmp_path))
    assert table["condition"].tolist() == ["safety"] and table["changed"].tolist() == [0]


def test_a_run_without_answers_is_said_in_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="has kept answers: run one"):
        rejudge.stored_answers(tmp_path)


def test_the_command_says_what_changes_and_writes_every_condition(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "smoke" / "a-model" / "seed-2"
    log = AnswerLog()
    log.add(rows().assign(verdict="complied"), condition="safety")
    log.write(folder / "04_ablation" / answers.FILE)
    (folder / "04_ablation" / "stamp.json").write_text("{}")
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    target = tmp_path / "a new folder" / "table.csv"
    assert cli.main(["rejudge", "--profile", "smoke", "--seed", "2", "--to", str(target)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("04_ablation: 60.0% of 5 verdicts change") and said[1:] == [
        str(target)
    ]
    table = pd.read_csv(target)
    assert table.loc[0, "condition"] == "safety" and table.loc[0, "coherent_asr_was"] == 1
    assert table.loc[0, "coherent_asr"] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seed", "7"], "no finished run of profile 'smoke' with seed 7"),
        (["--judge", "rulez"], "rulez"),
    ],
)
def test_what_cannot_be_judged_again_is_one_line(words, told, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "smoke" / "a-model" / "seed-0" / "04_ablation"
    log = AnswerLog()
    log.add(rows(), condition="safety")
    log.write(folder / answers.FILE)
    (folder / "stamp.json").write_text("{}")
    monkeypatch.setenv("SSAH_RUNS", str(tmp_path))
    assert cli.main(["rejudge", "--profile", "smoke", *words]) == 1
    said = capsys.readouterr().err
    assert told in said and said.count("\n") == 1


@pytest.mark.parametrize("place", ["", "file/table.csv"])
def test_a_table_that_cannot_be_written_is_said_before_anything_is_judged(
    run, place, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(stored, "find_run", None)
    (tmp_path / "file").write_text("no folder")
    assert cli.main(["rejudge", "--to", str(tmp_path / place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {tmp_path}") and "name a f" in line


def test_a_table_that_cannot_be_written_in_the_end_is_one_line_after_what_was_found(
    run, tmp_path, monkeypatch, capsys
):
    def full(*words, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(stored, "find_run", lambda profile, seed: run)
    monkeypatch.setattr(pd.DataFrame, "to_csv", full)
    assert cli.main(["rejudge", "--to", str(tmp_path / "table.csv")]) == 1
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and len(said.err.splitlines()) == 1
