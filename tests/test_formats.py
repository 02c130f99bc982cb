"""Files of users: each works, or one line says which file, which line and what to do."""

import json
import os
import re
from pathlib import Path

import pytest

from ssah_utils import assets
from ssah_utils.prompts import datasets, formats

GOOD = '{"prompt": "first question"}\n'


@pytest.fixture
def load(tmp_path):
    """Write bytes or text under a name and load them as a data set."""

    def write_and_load(name: str, content: str | bytes):
        (tmp_path / name).write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        )
        return datasets.load_dataset(str(tmp_path / name))

    return write_and_load


REFUSED = {
    "half of a surrogate pair": (
        "a.jsonl",
        GOOD + '{"prompt": "how \\ud83d"}',
        r"line 2: column 'prompt' .*U\+D83D",
    ),
    "its second half, in a response": (
        "a.jsonl",
        '{"prompt": "a", "response": "\\ude00"}',
        r"line 1: column 'response' .*U\+DE00",
    ),
    "half of a pair in a category": (
        "a.jsonl",
        '{"prompt": "a", "category": "\\ud83d"}',
        r"line 1: column 'category' .*U\+D83D",
    ),
    "half of a pair in an id": (
        "a.jsonl",
        '{"prompt": "a", "id": "\\ud83d"}',
        r"line 1: column 'id'",
    ),
    "NUL as an escape": (
        "a.jsonl",
        GOOD + '{"prompt": "a\\u0000b"}',
        r"line 2: column 'prompt' .*NUL",
    ),
    "NUL as a byte": ("a.csv", "prompt\na\nb\0c\n", r"line 3: a NUL character"),
    "UTF-16 with its mark": (
        "a.csv",
        "prompt\nfirst\n".encode("utf-16"),
        r"line 1: not UTF-8 text.*save the file as UTF-8",
    ),
    "UTF-16 without": ("a.jsonl", GOOD.encode("utf-16-le"), r"line 1: a NUL character.*UTF-8"),
    "Latin 1": ("a.csv", b"prompt\nfirst\ncaf\xe9\n", r"line 3: not UTF-8 text"),
    "one name twice in CSV": (
        "a.csv",
        "prompt,prompt\na,b\n",
        r"line 1: two columns are named 'prompt': keep one",
    ),
    "one name twice but for case and space": (
        "a.csv",
        "prompt, Prompt\na,b\n",
        r"two columns are named 'prompt'",
    ),
    "one key twice in JSON": (
        "a.jsonl",
        GOOD + '{"prompt": "a", "prompt": "b"}',
        r"line 2: two columns are named 'prompt'",
    ),
    "NaN": (
        "a.jsonl",
        GOOD + '{"prompt": "a", "category": NaN}',
        r"line 2: NaN is no JSON: write null",
    ),
    "Infinity": ("a.jsonl", '{"prompt": "a", "score": -Infinity}', r"line 1: -Infinity is no JSON"),
    "nested beyond measure": ("a.jsonl", '{"prompt": ' + "[" * 100_000, r"line 1: "),
    "a number of 5,000 digits": (
        "a.jsonl",
        '{"prompt": "a", "n": ' + "1" * 5000 + "}",
        r"line 1: ",
    ),
    "one array": (
        "a.jsonl",
        '[{"prompt": "a"},\n{"prompt": "b"}]',
        r"line 1: not JSON .*every line holds one whole JSON object",
    ),
    "one array on one line": (
        "a.jsonl",
        '[{"prompt": "a"}]',
        r"line 1: expected an object .* on every line, found list",
    ),
    "a pretty-printed object": (
        "a.jsonl",
        '{\n "prompt": "a"\n}',
        r"line 1: not JSON .*every line holds one whole JSON object",
    ),
    "two objects on a line": (
        "a.jsonl",
        '{"prompt": "a"} {"prompt": "b"}',
        r"line 1: not JSON \(Extra data\)",
    ),
    "only a header": ("a.csv", "prompt,category\n", r"is empty, but for one line of names"),
    "no header": (
        "a.csv",
        "How do I bake?\nHow do I cook?\n",
        r"line 2: no column 'prompt' \(found: How do I bake\?\)",
    ),
    "semicolons": (
        "a.csv",
        "prompt;category\na;b\n",
        r"no column 'prompt'.*separated by ';', not by commas",
    ),
    "tabs": (
        "a.csv",
        "prompt\tcategory\na\tb\n",
        r"no column 'prompt'.*separated by '\\t', not by commas",
    ),
    "a quote never closed": (
        "a.csv",
        'prompt\nfirst\n"second\nthird\n',
        r"line 3: .*is a quote opened here and not closed",
    ),
    "a cell too many": (
        "a.csv",
        "prompt,category\na,b\na, b, c\n",
        r"line 3: 2 columns expected, 3 found \(quote commas\)",
    ),
    "a cell too few": (
        "a.csv",
        "prompt,category\na,b\nc\n",
        r"line 3: 2 columns expected, 1 found",
    ),
    "a value without a name": (
        "a.csv",
        "prompt,\na,\nb,c\n",
        r"line 3: a value in a column without a name",
    ),
    "the line after a cell of two lines": (
        "a.csv",
        'prompt\n"a\nb"\n""\n',
        r"line 4: column 'prompt' is missing or empty",
    ),
    "another suffix": (
        "a.json",
        '[{"prompt": "a"}]',
        r"a\.json': needed is a \.jsonl file .* or a \.csv file",
    ),
    "another suffix, TSV": (
        "a.tsv",
        "prompt\tx\na\tb\n",
        r"a\.tsv': needed is a \.jsonl file .* or a \.csv file",
    ),
    "a prompt that is a number": (
        "a.jsonl",
        GOOD + '{"prompt": 5}',
        r"line 2: column 'prompt' holds no text but int",
    ),
    "a prompt that is a list": (
        "a.jsonl",
        GOOD + '{"prompt": [{"role": "user"}]}',
        r"line 2: .*holds no text but list",
    ),
    "a prompt nobody sees": (
        "a.jsonl",
        GOOD + '{"prompt": "\\u200b\\u00a0\\ufeff"}',
        r"line 2: column 'prompt' is missing or empty",
    ),
    "a category with parts": (
        "a.jsonl",
        '{"prompt": "a", "category": {"x": 1}}',
        r"line 1: column 'category' holds no text but dict",
    ),
    "an id that is a list": (
        "a.jsonl",
        '{"prompt": "a", "id": [1]}',
        r"line 1: column 'id' holds no text and no number",
    ),
    "one id twice": (
        "a.jsonl",
        '{"prompt": "a", "id": 7}\n\n{"prompt": "b", "id": "7"}',
        r"line 3: the id 'a-7' is that of line 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_file_that_cannot_be_used_is_refused_with_its_line(load, tmp_path, case):
    name, content, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        load(name, content)
    text = str(caught.value)
    assert (
        "\n" not in text and str(tmp_path / name) in text and len(text) < 400 + len(str(tmp_path))
    )


ROWS = ["first question", "second one"]
ACCEPTED = {
    "a byte-order mark": (
        "a.jsonl",
        "\ufeff" + '{"prompt": "first question"}\n{"prompt": "second one"}',
    ),
    "a byte-order mark in CSV": ("a.csv", "\ufeffprompt\nfirst question\nsecond one\n"),
    "ends of lines of Windows": ("a.csv", "prompt\r\nfirst question\r\nsecond one\r\n"),
    "ends of lines of old": ("a.csv", "prompt\rfirst question\rsecond one\r"),
    "ends of lines of old in JSON": (
        "a.jsonl",
        '{"prompt": "first question"}\r{"prompt": "second one"}\r',
    ),
    "a suffix in capitals": ("a.JSONL", '{"prompt": "first question"}\n{"prompt": "second one"}'),
    "a header with case and spaces": (
        "a.csv",
        " Prompt , CATEGORY\nfirst question,a\nsecond one,b\n",
    ),
    "keys with case and spaces": (
        "a.jsonl",
        '{"Prompt": "first question"}\n{" PROMPT ": "second one"}',
    ),
    "trailing empty columns": ("a.csv", "prompt,category,,\nfirst question,a,,\nsecond one,b,,\n"),
    "blank lines": ("a.csv", "\nprompt\n\nfirst question\n\nsecond one\n\n"),
    "a key of ours": (
        "a.jsonl",
        '{"prompt": "first question", "_line": 9}\n{"prompt": "second one", "file": 3}',
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_file_that_can_be_read_is(load, case):
    assert load(*ACCEPTED[case])["prompt"].tolist() == ROWS


def test_separators_inside_a_line_and_control_characters_are_kept(load):
    odd = "a\u2028b\u2029c\x85d\x0be\x1bf\tg"
    assert load("a.jsonl", json.dumps({"prompt": odd}, ensure_ascii=False))["prompt"].tolist() == [
        odd
    ]
    assert load("a.csv", f'prompt\n"{odd}"\n')["prompt"].tolist() == [odd]


@pytest.mark.parametrize("length", [131_072, 131_073, 1_000_000])
def test_long_fields_are_read_whole_and_the_limit_of_the_process_is_restored(load, length):
    import csv

    before = csv.field_size_limit()
    text = "word " * (length // 5) + "x" * (length % 5)
    assert load("a.csv", f"prompt\n{text}\n")["prompt"].str.len().tolist() == [len(text.strip())]
    assert load("a.jsonl", json.dumps({"prompt": text}))["prompt"].str.len().tolist() == [
        len(text.strip())
    ]
    assert csv.field_size_limit() == before


def test_path_that_is_no_file_is_said(tmp_path):
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "to-nothing.csv").symlink_to(tmp_path / "nothing")
    for name, kind, message in (
        ("folder.csv", OSError, "cannot be read: Is a directory"),
        ("to-nothing.csv", FileNotFoundError, "does not exist"),
        ("nowhere.jsonl", FileNotFoundError, "does not exist"),
        ("x" * 300 + ".csv", OSError, "[Nn]ame too long"),
    ):
        with pytest.raises(kind, match=message) as caught:
            datasets.load_dataset(str(tmp_path / name))
        assert name in str(caught.value)


def test_file_that_may_not_be_read_is_said(load, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, os.strerror(13), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # a superuser may read everything
    with pytest.raises(
        PermissionError, match=r"data file '.*mine\.csv' cannot be read: Permission denied"
    ):
        datasets.load_dataset(str(tmp_path / "mine.csv"))


CATEGORIES = {
    "null everywhere": (["null", "null"], ["a", "a"]),
    "null or empty in some": (
        ["null", '"x"', '""', '" "', "[]", "[null]"],
        ["a", "x", "a", "a", "a", "a"],
    ),
    "numbers": (["1", "2.5", "true"], ["1", "2.5", "True"]),
    "lists": (['["x", "y"]', '[["z"]]', "[3]"], ["x", "z", "3"]),
    "outer spaces": (['" x "', '"x"'], ["x", "x"]),
}


@pytest.mark.parametrize("case", CATEGORIES)
def test_category_is_text_of_its_own_or_the_name_of_the_data(load, case):
    given, expected = CATEGORIES[case]
    lines = [f'{{"prompt": "question {n}", "category": {value}}}' for n, value in enumerate(given)]
    assert load("a.jsonl", "\n".join(lines))["category"].tolist() == expected


def test_request_that_comes_again_counts_once_and_the_first_is_kept(load):
    forms = [
        "Bake a cake",
        "bake  a CAKE ",
        "Bake a\u00a0cake",
        "Ｂake a cake",
        "Bake a ca\u200bke",
    ]
    lines = [
        json.dumps({"prompt": text, "category": n, "id": "same"})
        for n, text in enumerate([*forms, "Other"][:5])
    ]
    table = load("a.jsonl", "\n".join(lines))
    assert table[["id", "prompt", "category"]].to_numpy().tolist() == [
        ["a-same", "Bake a cake", "0"]
    ]
    composed = [json.dumps({"prompt": f"caf{sign}"}) for sign in ("\u00e9", "e\u0301")]
    assert len(load("a.jsonl", "\n".join(composed))) == 1
    answered = [
        {"prompt": "a", "response": "b"},
        {"prompt": "A", "response": "b"},
        {"prompt": "a", "response": "c"},
    ]
    assert load("a.jsonl", "\n".join(map(json.dumps, answered)))["response"].tolist() == ["b", "c"]


def test_ids_are_text_and_unlike_those_of_another_file(load):
    ids = [
        load(f"{name}.jsonl", '{"prompt": "a", "id": 1}\n{"prompt": "b"}')["id"].tolist()
        for name in ("one", "two")
    ]
    assert ids == [["one-1", "one-001"], ["two-1", "two-001"]]


def test_files_inside_wheels_are_read_as_the_csv_module_reads_them():
    import csv
    import io

    member = "pyrit/datasets/scorer_evals/refusal_scorer/refusal.csv"
    text = assets.read_member("pyrit", member)
    expected = list(csv.DictReader(io.StringIO(re.sub(r"\A(?:#.*\n)+", "", text), newline="")))
    rows = formats.parse_rows(text, ".csv", member)
    assert [
        {name: value for name, value in row.items() if name != "_line"} for row in rows
    ] == expected
    assert rows[0]["_line"] == 3  # after a line for the version and the header
