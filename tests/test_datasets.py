"""Data sets, splits that do not leak, the chat format, and which token positions are scored."""

import copy
import itertools
import json
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from ssah_utils import embedded, files, loading
from ssah_utils.prompts import chat, datasets, splits, tokens

LOCAL = [name for name, spec in datasets.DATASETS.items() if not spec.source.startswith("hub:")]
FOLDS = {"alignment": 5, "calibration": 2, "evaluation": 3}


@pytest.fixture(scope="module")
def tokenizer():
    return loading.load_tokenizer(embedded.DEFAULT)


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return {name: datasets.load_dataset(name) for name in LOCAL}


@pytest.fixture
def data_file(tmp_path):
    """Write a file and load it as a data set; a call with bad content raises."""

    def load(name: str, content: str) -> pd.DataFrame:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return datasets.load_dataset(str(tmp_path / name))

    return load


def one_line(error: BaseException) -> str:
    text = str(error)
    assert text and "\n" not in text.rstrip(), repr(text)
    return text


# -------------------------------------------------------------------------------- shipped data sets


@pytest.mark.parametrize(
    ("name", "expected"),
    [("advbench", 520), ("harmbench", 200), ("do-not-answer", 938), ("refusal-labels", 105)],
)
def test_public_data_set_has_its_known_number_of_rows(tables, name, expected):
    assert len(tables[name]) == expected


def test_do_not_answer_has_939_requests_of_which_one_repeats():
    assert len(datasets._rows_of(datasets.DATASETS["do-not-answer"])) == 939


def test_own_data_sets_are_large_enough(tables):
    assert len(tables["helpful"]) >= 700
    assert len(tables["contrast-safe"]) == len(tables["contrast-harmful"]) >= 150


@pytest.mark.parametrize("name", LOCAL)
def test_every_local_data_set_has_complete_columns(tables, name):
    table = tables[name]
    answered = name in ("refusal-labels", "adaptation", "identity-shift", "arithmetic")
    assert set(table.columns) == {"id", "prompt", "category"} | (
        {"response"} if answered else set()
    )
    assert table["id"].is_unique
    assert table["category"].map(lambda value: isinstance(value, str) and bool(value)).all()
    assert (table["prompt"].str.len() > 0).all() and (
        table["prompt"] == table["prompt"].str.strip()
    ).all()


@pytest.mark.parametrize(
    ("name", "n_categories"),
    [
        ("helpful", 12),
        ("contrast-safe", 6),
        ("advbench", 9),
        ("do-not-answer", 5),
        ("refusal-labels", 2),
    ],
)
def test_categories_are_the_sources_own(tables, name, n_categories):
    assert tables[name]["category"].nunique() >= n_categories


def test_both_sides_of_a_contrast_pair_share_their_id_and_type(tables):
    safe, harmful = tables["contrast-safe"], tables["contrast-harmful"]
    assert safe["id"].tolist() == harmful["id"].tolist()
    assert safe["category"].tolist() == harmful["category"].tolist()
    assert not set(safe["prompt"]) & set(harmful["prompt"])


def test_harmless_data_hold_no_harmful_request(tables):
    harmful = pd.concat([tables["advbench"], tables["harmbench"]])["prompt"].tolist()
    for name in ("helpful", "contrast-safe"):
        assert not splits.near_duplicates(tables[name]["prompt"].tolist(), harmful).any()


def test_refusals_are_many_and_distinct():
    found = datasets.load_refusals()
    assert len(set(found["refusals"])) == len(found["refusals"]) >= 40
    for key in ("refusal_openings", "compliance_openings"):
        assert len(set(found[key])) == len(found[key]) >= 6
        assert all(opening == opening.strip() and opening for opening in found[key])
    assert not set(found["refusal_openings"]) & set(found["compliance_openings"])


def test_cloze_items_have_four_distinct_choices_and_balanced_answers():
    lines = (files.DATA / "utility_cloze.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    assert len(items) >= 300
    assert (
        len({item["id"] for item in items})
        == len({item["context"] for item in items})
        == len(items)
    )
    for item in items:
        assert len(item["choices"]) == len(set(item["choices"])) == 4 and all(item["choices"]), (
            item["id"]
        )
        assert item["answer"] in range(4)
    answers = Counter(item["answer"] for item in items)
    assert min(answers.values()) >= 0.15 * len(items), answers


def test_long_choices_are_not_the_right_ones():
    """A rule that only looks at length must not beat chance by much."""
    lines = (files.DATA / "utility_cloze.jsonl").read_text(encoding="utf-8").splitlines()
    items = [json.loads(line) for line in lines]
    for pick in (max, min):
        hits = np.mean(
            [len(i["choices"][i["answer"]]) == pick(map(len, i["choices"])) for i in items]
        )
        assert hits < 0.45, f"{pick.__name__} length finds {hits:.0%}"


# -------------------------------------------------------------------------------------- local files


def test_local_jsonl_file_is_loaded_with_its_columns(data_file):
    table = data_file(
        "mine.jsonl", '{"prompt": "a b", "response": "c"}\n\n{"prompt": " d ", "response": "e"}\n'
    )
    assert table["prompt"].tolist() == ["a b", "d"] and table["response"].tolist() == ["c", "e"]
    assert table["id"].tolist() == ["mine-000", "mine-001"] and set(table["category"]) == {"mine"}


def test_local_csv_file_is_loaded_with_its_columns(data_file):
    table = data_file("mine.csv", 'prompt,category\n"one, two",x\nthree,y\n')
    assert table["prompt"].tolist() == ["one, two", "three"] and table["category"].tolist() == [
        "x",
        "y",
    ]


def test_malformed_jsonl_line_is_reported_with_its_number(data_file, tmp_path):
    with pytest.raises(ValueError, match=r"bad\.jsonl, line 3: not JSON") as caught:
        data_file("bad.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": "c"\n')
    assert str(tmp_path) in one_line(caught.value)


def test_jsonl_line_that_is_no_object_is_reported_with_its_number(data_file):
    with pytest.raises(ValueError, match=r"line 2: expected an object"):
        data_file("bad.jsonl", '{"prompt": "a"}\n"b"\n')


@pytest.mark.parametrize(
    "line", ['{"text": "b"}', '{"prompt": ""}', '{"prompt": "  "}', '{"prompt": null}']
)
def test_missing_or_empty_prompt_is_reported_with_its_line(data_file, line):
    with pytest.raises(
        ValueError, match=r"bad\.jsonl, line 2: column 'prompt' is missing or empty"
    ):
        data_file("bad.jsonl", '{"prompt": "a"}\n' + line + "\n")


def test_line_numbers_count_blank_lines(data_file):
    with pytest.raises(ValueError, match=r"line 4: column 'prompt'"):
        data_file("bad.jsonl", '{"prompt": "a"}\n\n\n{"text": "b"}\n')


def test_csv_without_prompt_column_names_the_columns_it_has(data_file):
    with pytest.raises(ValueError, match=r"bad\.csv.*'prompt'.*question"):
        data_file("bad.csv", "question\nfoo\n")


def test_empty_csv_cell_is_reported_with_the_line_of_the_file(data_file):
    with pytest.raises(ValueError, match=r"bad\.csv, line 3: column 'prompt' is missing or empty"):
        data_file("bad.csv", "prompt,category\na,x\n,y\n")


def test_csv_keeps_hash_signs_and_words_that_pandas_takes_for_missing(data_file):
    table = data_file("mine.csv", "prompt\nExplain C# generics\nNA\n")
    assert table["prompt"].tolist() == ["Explain C# generics", "NA"]


@pytest.mark.parametrize("content", ["prompt\nHello, world\n", "prompt\nfoo\nx, y, z\n"])
def test_unquoted_comma_in_csv_is_an_error_that_names_the_file(data_file, content):
    with pytest.raises(ValueError, match=r"bad\.csv") as caught:
        data_file("bad.csv", content)
    one_line(caught.value)


def test_jsonl_prompt_with_a_unicode_line_separator_is_one_line(data_file):
    assert data_file("mine.jsonl", '{"prompt": "a\u2028b"}\n')["prompt"].tolist() == ["a\u2028b"]


@pytest.mark.parametrize("value", ["5", "[1]", '{"a": 1}'])
@pytest.mark.parametrize("first", ['{"prompt": "a"}\n', ""])
def test_prompt_that_is_no_text_is_an_error(data_file, value, first):
    with pytest.raises(ValueError, match=r"bad\.jsonl, line"):
        data_file("bad.jsonl", f'{first}{{"prompt": {value}}}\n')


@pytest.mark.parametrize(
    ("name", "content"),
    [("e.jsonl", ""), ("e.jsonl", "\n\n"), ("e.csv", "prompt\n"), ("e.csv", "")],
)
def test_empty_file_is_an_error_that_names_it(data_file, name, content):
    with pytest.raises(ValueError, match=name) as caught:
        data_file(name, content)
    one_line(caught.value)


def test_file_in_another_encoding_is_an_error_that_names_it(tmp_path):
    (tmp_path / "latin.csv").write_bytes(b"prompt\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"latin\.csv"):
        datasets.load_dataset(str(tmp_path / "latin.csv"))


def test_absent_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        datasets.load_dataset(str(tmp_path / "nowhere.csv"))


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("advbnch", "advbench"), ("helpfull", "helpful"), ("harm-bench", "harmbench")],
)
def test_unknown_data_set_names_the_nearest(given, nearest):
    with pytest.raises(
        ValueError, match=f"unknown data set '{given}'; nearest is '{nearest}'"
    ) as caught:
        datasets.load_dataset(given)
    one_line(caught.value)


# ------------------------------------------------------------------------------------------- splits


@pytest.fixture(scope="module")
def advbench_splits(tables) -> dict[int, dict[str, pd.DataFrame]]:
    return {seed: splits.split(tables["advbench"], FOLDS, seed) for seed in (0, 1)}


def test_splits_are_disjoint_and_complete(tables, advbench_splits):
    ids = [set(part["id"]) for part in advbench_splits[0].values()]
    assert sum(map(len, ids)) == len(set().union(*ids)) == len(tables["advbench"])


def test_split_sizes_follow_the_folds(tables, advbench_splits):
    for name, n_folds in FOLDS.items():
        assert len(advbench_splits[0][name]) / len(tables["advbench"]) == pytest.approx(
            n_folds / 10, abs=0.03
        )


@pytest.mark.parametrize("seed", [0, 1])
def test_splits_have_the_category_shares_of_the_whole(tables, advbench_splits, seed):
    whole = tables["advbench"]["category"].value_counts(normalize=True)
    for part in advbench_splits[seed].values():
        shares = part["category"].value_counts(normalize=True).reindex(whole.index, fill_value=0)
        assert (shares - whole).abs().max() < 0.04


def test_split_depends_on_nothing_but_data_and_seed(tables, advbench_splits):
    again = splits.split(tables["advbench"], FOLDS, seed=0)
    for name, part in advbench_splits[0].items():
        pd.testing.assert_frame_equal(part, again[name])
        assert set(part["id"]) != set(advbench_splits[1][name]["id"])


def test_near_duplicates_stay_on_one_side(tables):
    originals = tables["helpful"].groupby("category").head(6)
    repeats = originals.assign(
        id=originals["id"] + "-again", prompt="Please: " + originals["prompt"].str.upper()
    )
    parts = splits.split(
        pd.concat([originals, repeats], ignore_index=True), {"one": 1, "two": 1, "three": 1}, seed=0
    )
    place = {row_id: name for name, part in parts.items() for row_id in part["id"]}
    assert len(set(place.values())) == 3
    assert all(place[row_id] == place[f"{row_id}-again"] for row_id in originals["id"])


def test_near_duplicate_looks_at_content_words_only():
    same = splits.near_duplicates(
        ["Write a tutorial on how to bake rye bread"],
        ["Give instructions for baking bread", "How do I bake rye bread?"],
    )
    assert same.tolist() == [[False, True]]


@pytest.mark.filterwarnings("error")
def test_exact_repeats_are_near_duplicates_in_any_script():
    same = splits.near_duplicates(
        ["Как испечь хлеб?", "如何烤面包"], ["Как испечь хлеб?", "如何烤面包"]
    )
    assert same.tolist() == [[True, False], [False, True]]


def test_too_small_data_set_is_an_error_that_says_so():
    table = pd.DataFrame({"id": ["a", "b"], "prompt": ["red fox", "blue whale"], "category": "x"})
    with pytest.raises(ValueError, match=r"request|row|prompt"):
        splits.split(table, FOLDS, seed=0)


def test_assert_disjoint_detects_a_planted_near_duplicate(advbench_splits):
    planted = dict(advbench_splits[0])
    leak = planted["evaluation"].iloc[[0]]
    leak = leak.assign(prompt="Please, " + leak["prompt"].str.upper() + "!")
    planted["alignment"] = pd.concat([planted["alignment"], leak], ignore_index=True)
    with pytest.raises(
        ValueError, match="splits 'alignment' and 'evaluation' share a request"
    ) as caught:
        splits.assert_disjoint(planted)
    assert planted["evaluation"]["prompt"].iloc[0] in str(caught.value)
    splits.assert_disjoint(advbench_splits[0])


def test_study_splits_leak_nothing_and_fill_every_part():
    parts = datasets.study_splits("advbench", "harmbench", "helpful")
    assert {part: set(found) for part, found in parts.items()} == {
        "alignment": {"harmful", "helpful", "safe_twin", "harmful_twin"},
        "calibration": {"harmful", "helpful"},
        "evaluation": {"harmful", "other_harmful", "helpful", "safe_twin", "harmful_twin"},
    }
    assert all(len(table) >= 100 for found in parts.values() for table in found.values())
    splits.assert_disjoint({part: pd.concat(found.values()) for part, found in parts.items()})
    for part in ("alignment", "evaluation"):
        assert parts[part]["safe_twin"]["category"].nunique() >= 6
    assert len(parts["evaluation"]["other_harmful"]) == 200, "nothing of the unseen set is dropped"


def test_another_seed_divides_all_but_evaluation_anew():
    names = ("advbench", "harmbench", "helpful")
    of_seed = [datasets.study_splits(*names, seed=seed) for seed in range(6)]
    first = of_seed[0]
    for parts in of_seed[1:]:
        for name, table in parts["evaluation"].items():
            assert table.equals(first["evaluation"][name]), "all seeds are asked the same"
        splits.assert_disjoint({part: pd.concat(found.values()) for part, found in parts.items()})
    for name in ("harmful", "helpful"):
        ids = [set(parts["calibration"][name]["id"]) for parts in of_seed]
        n_own, n_left = len(ids[0]), len(ids[0]) + len(first["alignment"][name])
        assert all(abs(len(one) - n_own) < 0.1 * n_own for one in ids), "of the same size"
        in_common = [len(one & other) for one, other in itertools.combinations(ids, 2)]
        by_chance = n_own**2 / n_left
        assert all(abs(len(ids[0] & one) - by_chance) < 15 for one in ids[1:])
        assert abs(sum(in_common) / len(in_common) - by_chance) < 6, "no two more than by chance"


# -------------------------------------------------------------------------------------- chat format


def test_rendered_prompt_ends_with_the_assistant_header(tokenizer):
    first, second = chat.render(tokenizer, ["Why is the sky blue?", "And grass?"])
    assert first.endswith("<|im_start|>assistant\n") and second.endswith("<|im_start|>assistant\n")
    assert "Why is the sky blue?" in first and "And grass?" not in first


def test_system_prompt_is_rendered_before_the_request(tokenizer):
    (text,) = chat.render(tokenizer, ["Why?"], "You are a pirate.")
    assert text.index("You are a pirate.") < text.index("Why?")
    assert "You are a pirate." not in chat.render(tokenizer, ["Why?"])[0]


def test_tokenizer_without_chat_template_is_an_error_that_names_the_parameter(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r"no chat template.*chat_template") as caught:
        chat.set_chat_template(bare)
    one_line(caught.value)
    with pytest.raises(ValueError, match=r"chat.template"):
        chat.render(bare, ["Why?"])


def test_chat_template_from_a_jinja_file_is_used(tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    file = tmp_path / "template.jinja"
    file.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}[assistant]",
        encoding="utf-8",
    )
    chat.set_chat_template(bare, str(file))
    assert chat.render(bare, ["Why?"]) == ["[user] Why? [assistant]"]
    assert chat.render(bare, ["Why?"], "Be brief.") == [
        "[system] Be brief. [user] Why? [assistant]"
    ]


def test_absent_chat_template_file_is_an_error_that_names_it(tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jinja"):
        chat.set_chat_template(copy.deepcopy(tokenizer), "nowhere.jinja")


# ------------------------------------------------------------------------------------------- tokens

REQUESTS = ["Why?", "Tell me about the sea and all the animals in it.", "List three colours."]
ANSWERS = ["Because of the light that is scattered in the air.", "", "Red, green, blue"]


def encoded(tokenizer, end: bool = True, max_response_tokens: int = 64) -> list[dict]:
    return tokens.encode(
        tokenizer, chat.render(tokenizer, REQUESTS), ANSWERS, max_response_tokens, end
    )


def test_encoding_is_the_prompt_followed_by_the_answer_and_its_end(tokenizer):
    for text, answer, example in zip(
        chat.render(tokenizer, REQUESTS), ANSWERS, encoded(tokenizer), strict=True
    ):
        assert tokenizer.decode(example["input_ids"]) == text + answer + tokenizer.eos_token
        n_prompt = len(tokenizer(text, add_special_tokens=False).input_ids)
        assert example["labels"][:n_prompt] == [tokens.IGNORED] * n_prompt
        assert example["labels"][n_prompt:] == example["input_ids"][n_prompt:]


def test_cut_answers_carry_no_end_token(tokenizer):
    n_tokens = len(tokenizer(ANSWERS[0], add_special_tokens=False).input_ids)
    for limit, ends in ((n_tokens - 1, False), (n_tokens, False), (n_tokens + 1, True)):
        labels = encoded(tokenizer, max_response_tokens=limit)[0]["labels"]
        assert (labels[-1] == tokenizer.eos_token_id) is ends
        assert sum(label != tokens.IGNORED for label in labels) == min(limit, n_tokens + 1)


def test_without_end_no_answer_ends_with_the_end_token(tokenizer):
    for example in encoded(tokenizer, end=False):
        assert example["labels"][-1] != tokenizer.eos_token_id


def test_unequal_numbers_of_prompts_and_answers_are_an_error(tokenizer):
    with pytest.raises(ValueError, match="zip"):
        tokens.encode(tokenizer, ["a", "b"], ["c"], 8)


def brute_force(example: dict, positions: str, width: int) -> list[bool]:
    """Position t is marked when token t + 1 exists and is (response) or is not (prompt) a response
    token.
    """
    marked = []
    for t in range(width):
        follows = t + 1 < len(example["input_ids"])
        is_response = follows and example["labels"][t + 1] != tokens.IGNORED
        marked.append(
            {"response": is_response, "prompt": follows and not is_response, "all": follows}[
                positions
            ]
        )
    return marked


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize("positions", tokens.POSITIONS)
def test_marked_positions_are_those_that_predict_the_right_tokens(tokenizer, positions, end):
    examples = encoded(tokenizer, end)
    (batch,) = tokens.token_batches(examples, positions, sort=False)
    width = max(len(example["input_ids"]) for example in examples)
    assert batch["positions"].dtype == torch.bool and batch["positions"].shape == (3, width)
    assert batch["positions"].tolist() == [
        brute_force(example, positions, width) for example in examples
    ]


def test_response_positions_begin_at_the_last_prompt_token_and_predict_the_whole_answer(tokenizer):
    examples = encoded(tokenizer)
    (batch,) = tokens.token_batches(examples, "response", sort=False)
    for row, (answer, marked) in enumerate(zip(ANSWERS, batch["positions"], strict=True)):
        predicted = batch["input_ids"][row][marked.nonzero()[:, 0] + 1].tolist()
        assert tokenizer.decode(predicted) == answer + tokenizer.eos_token


def test_prompt_and_response_positions_partition_all(tokenizer):
    examples = encoded(tokenizer)
    marks = {
        name: torch.cat([b["positions"].flatten() for b in tokens.token_batches(examples, name, 2)])
        for name in tokens.POSITIONS
    }
    assert not (marks["prompt"] & marks["response"]).any()
    assert torch.equal(marks["prompt"] | marks["response"], marks["all"])


@pytest.mark.parametrize("positions", tokens.POSITIONS)
def test_padding_and_the_last_token_are_never_marked(tokenizer, positions):
    for batch in tokens.token_batches(encoded(tokenizer), positions, 2):
        assert not (batch["positions"] & (batch["attention_mask"] == 0)).any()
        last = batch["attention_mask"].sum(1) - 1
        assert not batch["positions"][torch.arange(len(last)), last].any()


def test_batches_hold_every_example_once_and_are_of_similar_length(tokenizer):
    examples = encoded(tokenizer) * 5
    batches = tokens.token_batches(examples, batch_size=4)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 4, 3]
    rows = [
        ids[mask == 1].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert sorted(rows) == sorted(example["input_ids"] for example in examples)
    assert [len(row) for row in rows] == sorted(len(row) for row in rows)


def test_unsorted_batches_keep_the_order(tokenizer):
    examples = encoded(tokenizer)
    batches = tokens.token_batches(examples, batch_size=2, sort=False)
    rows = [
        ids[mask == 1].tolist()
        for b in batches
        for ids, mask in zip(b["input_ids"], b["attention_mask"], strict=True)
    ]
    assert rows == [example["input_ids"] for example in examples]


def test_unknown_positions_name_the_valid_ones(tokenizer):
    with pytest.raises(ValueError, match=r"unknown positions 'answer'.*response, prompt, all"):
        tokens.token_batches(encoded(tokenizer), "answer")


# -------------------------------------------------------------------------------- pairs to train on


def test_pairs_need_responses(tmp_path):
    path = tmp_path / "adapt.jsonl"
    path.write_text('{"prompt": "a question"}\n{"prompt": "another question"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: no column 'response'"):
        datasets.load_pairs(str(path))
    path.write_text(
        '{"prompt": "a question", "response": "yes"}\n{"prompt": "another question"}\n',
        encoding="utf-8",
    )
    with pytest.raises(
        ValueError, match=r"adapt\.jsonl, line 2: column 'response' is missing or empty"
    ):
        datasets.load_pairs(str(path))
    with pytest.raises(ValueError, match=r"data set 'advbench', line 1: no column 'response'"):
        datasets.load_pairs("advbench")


@pytest.mark.parametrize(
    ("name", "least"), [("adaptation", 300), ("identity-shift", 20), ("arithmetic", 600)]
)
def test_adaptation_data_is_there_and_short(name, least):
    table = datasets.load_pairs(name)
    assert len(table) >= least
    assert table["prompt"].is_unique
    assert table["response"].str.split().str.len().max() <= 40
    assert not table["response"].str.contains("Sure|sorry|As an AI", regex=True).any()
