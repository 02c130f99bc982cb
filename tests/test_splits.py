"""What is nearly the same request in any script, and splits that are neither empty nor leak."""

import hashlib
import json
import tracemalloc

import numpy as np
import pandas as pd
import pytest

from ssah_utils.prompts import datasets, splits

FOLDS = {"alignment": 5, "calibration": 2, "evaluation": 3}


def same(one: str, other: str) -> bool:
    return bool(splits.near_duplicates([one], [other])[0, 0])


# own sentences: a request, the same one a little changed, and another one
UNSPACED = {
    "Chinese": (
        "请写一封邮件，请邻居把音乐声音调小一点",
        "请写一封邮件，请我的邻居把音乐声音调小一点",
        "请告诉我怎样在家里种番茄和黄瓜",
    ),
    "Japanese": (
        "週末に家族と行ける公園を三つ教えてください",
        "週末に家族で行ける公園を三つ教えてください",
        "パンを焼くときの温度と時間は何ですか",
    ),
    "Thai": (
        "ช่วยเขียนจดหมายขอบคุณครูของฉัน",
        "ช่วยเขียนจดหมายขอบคุณครูของฉันด้วย",
        "วิธีปลูกมะเขือเทศในกระถางทำอย่างไร",
    ),
    "Khmer": ("សូមសរសេរសំបុត្រអរគុណគ្រូរបស់ខ្ញុំ", "សូមសរសេរសំបុត្រអរគុណដល់គ្រូរបស់ខ្ញុំ", "តើដាំប៉េងប៉ោះក្នុងផើងដោយរបៀបណា"),
    "Lao": ("ກະລຸນາຂຽນຈົດໝາຍຂອບໃຈຄູຂອງຂ້ອຍ", "ກະລຸນາຂຽນຈົດໝາຍຂອບໃຈຄູຂອງຂ້ອຍແດ່", "ວິທີປູກໝາກເລັ່ນໃນກະຖາງ"),
    "Burmese": ("ဆရာ့ကို ကျေးဇူးတင်စာရေးပေးပါ", "ဆရာ့ကို ကျေးဇူးတင်စာ ရေးပေးပါ", "ခရမ်းချဉ်သီး ဘယ်လိုစိုက်ရမလဲ"),
}


@pytest.mark.parametrize("language", UNSPACED)
def test_near_duplicates_are_found_in_scripts_without_spaces(language):
    request, changed, other = UNSPACED[language]
    assert same(request, changed) and not same(request, other) and not same(changed, other)


def test_words_are_pairs_of_characters_only_where_a_script_has_no_spaces():
    assert splits.content_words("烤面包") == {"烤面", "面包"}
    assert splits.content_words("用Python烤面包") == {"用", "python", "烤面", "面包"}
    assert splits.content_words("Bake rye bread") == {"bake", "rye", "bread"}
    assert splits.content_words("Как испечь хлеб") == {"как", "испечь", "хлеб"}
    assert splits.content_words("빵을 굽는 방법") == {"빵을", "굽는", "방법"}  # Korean has spaces


def test_a_combining_mark_belongs_to_its_word():
    assert splits.content_words("हिन्दी सीखना") == {"हिन्दी", "सीखना"}  # Hindi
    assert splits.content_words("தமிழ் மொழி") == {"தமிழ்", "மொழி"}  # Tamil
    assert splits.content_words("كَتَبَ الولد") == {"كَتَبَ", "الولد"}  # Arabic
    # an emoji is no word
    assert splits.content_words("I ❤️ rye") == {"rye"} | ({"i"} - splits.STOP_WORDS)


def test_requests_without_a_word_are_told_apart_by_their_signs():
    signs = ["\U0001f600", "\U0001f355\U0001f355", "?!", "\u2014", "+ 1"]
    assert np.array_equal(splits.near_duplicates(signs, signs), np.eye(len(signs), dtype=bool))
    assert same("\u2764\ufe0f", "\u2764")  # but for what is invisible


def test_names_that_differ_by_their_signs_are_different_words():
    names = ["Explain C++", "explain C#", "Explain F#!", "Explain C", "explain F"]
    assert np.array_equal(splits.near_duplicates(names, names), np.eye(len(names), dtype=bool))
    assert same("Explain C++.", "(explain c++)") and same("Explain C#?", "Explain C#")
    assert splits.content_words("a#b 1+1 # title") == {"b", "1", "title"}


@pytest.mark.parametrize(
    "form",
    [
        "Cafe\u0301 au lait",
        "ＣＡＦÉ ａｕ ｌａｉｔ",
        "caf\u00e9 au la\u200bit",
        "Ca\u00adfé au\u00a0lait",
    ],
)
def test_forms_of_unicode_make_no_other_request(form):
    assert splits.content_words(form) == splits.content_words("Café au lait")


def by_definition(texts: list[str], others: list[str]) -> np.ndarray:
    words = [[splits.content_words(text) for text in side] for side in (texts, others)]
    return np.array([[len(a & b) / len(a | b) >= 0.6 for b in words[1]] for a in words[0]])


@pytest.mark.parametrize("chunk", [1, 50, 2**22])
def test_near_duplicates_do_not_depend_on_how_many_are_compared_at_once(monkeypatch, chunk):
    monkeypatch.setattr(splits, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice([f"word{n}" for n in range(9)], 5)) for _ in range(40)]
    expected = by_definition(texts, texts[:25])
    assert 0 < expected.mean() < 1
    assert np.array_equal(splits.near_duplicates(texts, texts[:25]), expected)
    links = by_definition(texts, texts)
    group = splits.groups_of(texts)
    reached = np.linalg.matrix_power(links.astype(float), 40) > 0
    assert np.array_equal(group[:, None] == group, reached) and set(group) == set(
        range(group.max() + 1)
    )
    assert splits.near_duplicates([], texts).shape == (0, 40)


def test_many_requests_are_compared_in_little_memory():
    texts = [f"topic{n % 997} detail{n} place{n % 31} colour{n % 7}" for n in range(4000)]
    tracemalloc.start()
    assert len(set(splits.groups_of(texts))) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # whole, the products alone would take 3 x 64 MB and the words 2 x 80 MB
    assert peak < 150 * 2**20


# of the ids, in their order
STORED = {
    "evaluation-harmful": "fd7e9f8732f5",
    "evaluation-other_harmful": "27a4bb75a677",
    "evaluation-helpful": "4c9d205593bc",
    "evaluation-safe_twin": "4f6f51cd87d6",
    "evaluation-harmful_twin": "4f6f51cd87d6",
    "calibration-harmful": "605760a706db",
    "calibration-helpful": "4e0a8a52ff0b",
    "alignment-harmful": "a7db35644364",
    "alignment-helpful": "e44c7dfae525",
    "alignment-safe_twin": "19d89227142e",
    "alignment-harmful_twin": "19d89227142e",
}


def test_splits_of_shipped_data_are_those_of_the_stored_results():
    parts = datasets.study_splits("advbench", "harmbench", "helpful")
    found = {
        f"{part}-{name}": hashlib.sha256(json.dumps(table["id"].tolist()).encode()).hexdigest()[:12]
        for part, tables in parts.items()
        for name, table in tables.items()
    }
    assert found == STORED


# ------------------------------------------------------------------------------------------- splits


def table_of(texts: list[str], **columns) -> pd.DataFrame:
    return pd.DataFrame(
        {"id": [f"id-{n}" for n in range(len(texts))], "prompt": texts, "category": "x"} | columns
    )


def fillings(n_templates: int, n_each: int = 12) -> list[str]:
    forms = [" ".join(f"form{t}part{k}" for k in range(9)) for t in range(n_templates)]
    return [f"{form} place{n}" for form in forms for n in range(n_each)]


@pytest.mark.parametrize("n_templates", [10, 14])
def test_templates_with_many_fillings_are_split_whole_where_there_are_enough(n_templates):
    parts = splits.split(table_of(fillings(n_templates)), FOLDS, seed=0)
    owner = [{text.split()[0] for text in part["prompt"]} for part in parts.values()]
    assert all(owner) and sum(map(len, owner)) == len(set().union(*owner)) == n_templates


def test_another_seed_puts_the_largest_groups_elsewhere():
    """The splitter alone would not: it places them by size, whatever its seed."""
    texts = [f"alpha{n} beta{n} gamma{n}" for n in range(240)]
    for form, size in (("a", 26), ("b", 22), ("c", 18)):
        words = " ".join(f"{form}part{k}" for k in range(9))
        texts += [f"{words} place{n}" for n in range(size)]
    table = table_of(texts, category=["x", "y"] * (len(texts) // 2))
    found: dict[str, set] = {}
    for seed in range(1, 25):
        for name, part in splits.split(table, FOLDS, seed).items():
            for first_word in {text.split()[0] for text in part["prompt"]}:
                found.setdefault(first_word, set()).add(name)
    for form in "abc":
        assert found[f"{form}part0"] == set(FOLDS), "each part has had it"


@pytest.mark.parametrize("n_templates", [1, 4, 9])
def test_too_few_groups_of_near_duplicates_are_one_line(n_templates):
    with pytest.raises(
        ValueError, match=rf"data set 'mine': its \d+ requests are {n_templates} groups of near dup"
    ) as caught:
        splits.split(table_of(fillings(n_templates)), FOLDS, 0, "mine")
    text = str(caught.value)
    assert (
        "the largest: 12 requests like 'form" in text
        and "add requests" in text
        and "\n" not in text
    )


@pytest.mark.parametrize(
    "category",
    [None, float("nan"), 3, True, ["one", "two"]],
    ids=["null", "nan", "number", "bool", "list"],
)
def test_any_category_can_be_split_by(category):
    texts = [f"alpha{n} beta{n} gamma{n}" for n in range(30)]
    parts = splits.split(table_of(texts, category=[category] * 30), FOLDS, seed=0)
    assert {name: len(part) for name, part in parts.items()} == {
        "alignment": 15,
        "calibration": 6,
        "evaluation": 9,
    }


def test_one_large_group_leaves_no_part_empty():
    texts = fillings(1, 60) + [f"alpha{n} beta{n} gamma{n}" for n in range(12)]
    parts = splits.split(table_of(texts, category=["x"] * 60 + ["y"] * 12), FOLDS, seed=0)
    assert all(len(part) for part in parts.values()) and sum(map(len, parts.values())) == 72


def test_nothing_left_is_an_error_that_says_of_what():
    table = table_of(["red fox runs", "blue whale swims"])
    with pytest.raises(ValueError, match="data set 'mine': nothing is left of 2 requests"):
        splits.without_near_duplicates(table, table, name="data set 'mine'")
    assert len(splits.without_near_duplicates(table, table[:1])) == 1


# -------------------------------------------------------------------------------- splits of a study


@pytest.fixture
def write(tmp_path):
    def write_file(name: str, texts: list[str]) -> str:
        path = tmp_path / f"{name}.jsonl"
        path.write_text(
            "\n".join(json.dumps({"prompt": text, "id": n}) for n, text in enumerate(texts)),
            encoding="utf-8",
        )
        return str(path)

    return write_file


def distinct(word: str, n: int) -> list[str]:
    return [f"{word}{k} other{word}{k} third{word}{k}" for k in range(n)]


def test_files_of_a_user_are_split_for_a_study_although_their_numbers_are_the_same(write):
    names = [
        write("harm", distinct("h", 30)),
        write("more", distinct("m", 9)),
        write("help", distinct("p", 40)),
    ]
    datasets.check_splits(*names)
    parts = datasets.study_splits(*names)
    assert (
        len(parts["alignment"]["harmful"]) == 15 and len(parts["evaluation"]["other_harmful"]) == 9
    )
    everything = pd.concat(
        [
            table
            for found in parts.values()
            for name, table in found.items()
            if name != "harmful_twin"
        ]
    )
    assert everything["id"].is_unique


def test_study_that_cannot_be_split_is_said_in_one_line_with_its_data_set(write):
    harm = write("harm", distinct("h", 30))
    more = write("more", distinct("m", 9))
    helps = write("help", distinct("p", 40))
    for names, message in (
        ((harm, harm, helps), "share the id 'harm-0'"),
        (
            (harm, write("copy", distinct("h", 30)), helps),
            r"harm\.jsonl' \(harmful, calibration\): nothing is left of 6 requests",
        ),
        (
            (harm, more, write("few", distinct("p", 12))),
            r"few\.jsonl' of 12 requests is too small to split into 20 folds",
        ),
        (
            (write("alike", fillings(4)), more, helps),
            r"alike\.jsonl': its 48 requests are 4 groups",
        ),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            datasets.check_splits(*names)
        assert "\n" not in str(caught.value)


def test_pairs_that_cannot_be_split_are_said_with_their_data_set(tmp_path):
    path = tmp_path / "pairs.jsonl"
    for texts, message in (
        (distinct("h", 4), "of 4 requests is too small"),
        (fillings(4), "its 48 requests are 4 groups"),
    ):
        path.write_text(
            "\n".join(json.dumps({"prompt": text, "response": "yes"}) for text in texts),
            encoding="utf-8",
        )
        with pytest.raises(ValueError, match=rf"pairs\.jsonl'?:? {message}"):
            datasets.adaptation_split(str(path))
