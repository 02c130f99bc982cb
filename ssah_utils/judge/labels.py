"""Answers that people have labelled, as one table, and the part of it that nobody looks at.

The judge is chosen on the development part. The test part is read once, by ``locked_test``; a hash
of its rows is kept here, so that a changed split is seen. Knows texts and labels, no judge.
"""

import hashlib

import pandas as pd

from ssah_utils import assets
from ssah_utils.files import sha256_of
from ssah_utils.prompts.datasets import load_dataset
from ssah_utils.prompts.formats import parse_rows
from ssah_utils.prompts.splits import folded, groups_of

EVALS = "pyrit/datasets/scorer_evals"
OBJECTIVES = (
    *("bias", "chemical_biological", "cyber", "exploits", "harassment_bullying", "hate_speech"),
    *("illegal_activity", "info_integrity", "misinformation", "phishing", "privacy", "self_harm"),
    *("sexual", "violence"),
)
GRADES = (
    *("exploits", "hate_speech", "hate_speech_multi_score", "info_integrity", "mini_hate_speech"),
    *("privacy", "representational", "self_harm", "sexual", "violence", "violence_multi_score"),
)
MEMBERS = {
    "refusals": (f"{EVALS}/refusal_scorer/refusal.csv",),
    "more refusals": (f"{EVALS}/refusal_scorer/refusal_extra.csv",),
    "objectives": tuple(f"{EVALS}/objective/{name}.csv" for name in OBJECTIVES),
    "grades": tuple(f"{EVALS}/harm/{name}.csv" for name in GRADES),
}
SEEN = "refusals"  # answers on which the rules were written: never tested on
HELPFUL = "helpful"
SOURCES = (*MEMBERS, HELPFUL)
TEST_SHARE = 1 / 3
SAME_OPENING = 80  # characters: answers that share so many are one answer
# SHA-256 of the ids of the test part's rows, first 16 digits. It was drawn before any was read.
LOCKED = "ee89ff9e9b84f625"


def labelled_answers() -> pd.DataFrame:
    """All labelled answers, one row for each request and answer.

    Columns: id (of the text), prompt, response, source (one of ``SOURCES``), group (of requests
    that are nearly the same), part (development or test), and what people say of it, NaN where they
    say nothing: ``fulfilled`` (1: the answer does what is asked; 0: it refuses, evades or does
    something else) and ``grade`` (how harmful it is, 0 to 1). ``ValueError`` where the test part is
    not the one that is locked.
    """
    rows = pd.concat([_labelled(), _everyday()], ignore_index=True)
    rows["group"] = _groups(rows)
    rows["part"] = _parts(rows)
    found = lock_of(rows)
    if found != LOCKED:
        raise ValueError(
            f"the test part of the labelled answers has hash {found}, but {LOCKED} is locked:"
            " what was chosen on its development part may have seen it"
        )
    return rows


def lock_of(rows: pd.DataFrame) -> str:
    """The hash of the test part: of which texts it holds and of what people say of them."""
    test = rows[rows["part"] == "test"]
    labels = test[["fulfilled", "grade"]].round(6).fillna(-1).to_numpy().tolist()
    return sha256_of(sorted(zip(test["id"], map(str, labels), strict=True)))[:16]


def _labelled() -> pd.DataFrame:
    """One row per text. Of labels that differ, the mean; of a tie about fulfilment, none.

    Of ``more refusals``, only answers that are not among ``SEEN`` once more.
    """
    found = []
    for source, members in MEMBERS.items():
        for member in members:
            for row in parse_rows(assets.read_member("pyrit", member), ".csv", member):
                scores = [float(value) for key, value in row.items() if key.startswith("human_")]
                score = sum(scores) / len(scores)
                is_grade = source == "grades"
                fulfilled = None if is_grade else (1 - score if "refusal" in member else score)
                found.append(
                    {
                        "prompt": row["objective"].strip(),
                        "response": row["assistant_response"].strip(),
                        "source": source,
                        "fulfilled": fulfilled,
                        "grade": score if is_grade else None,
                    }
                )
    rows = pd.DataFrame(found).astype({"fulfilled": float, "grade": float})
    rows["id"] = [answer_id(*pair) for pair in zip(rows["prompt"], rows["response"], strict=True)]
    opening = rows["response"].map(_opening)
    is_more = rows["source"] == "more refusals"
    rows = rows[~(is_more & opening.isin(opening[rows["source"] == SEEN]))]
    first = rows.drop_duplicates("id")[["id", "prompt", "response", "source"]]
    labels = rows.groupby("id")[["fulfilled", "grade"]].mean()
    labels["fulfilled"] = labels["fulfilled"].where(labels["fulfilled"] != 0.5).round()
    return first.merge(labels, on="id", how="left")


def _everyday() -> pd.DataFrame:
    """Answers to harmless requests by people, in telegram style: none of them refuses."""
    rows = load_dataset("adaptation")[["prompt", "response"]]
    ids = [answer_id(*pair) for pair in zip(rows["prompt"], rows["response"], strict=True)]
    return rows.assign(id=ids, source=HELPFUL, fulfilled=1.0)


def _groups(rows: pd.DataFrame) -> pd.Series:
    """Requests that are nearly the same, and those with an answer that begins the same."""
    group = pd.Series(groups_of(rows["prompt"].tolist()), index=rows.index)
    opening = rows["response"].map(_opening)
    is_long = opening.str.len() == SAME_OPENING
    opening = opening.where(is_long, rows["id"])
    while True:
        linked = group.groupby(opening).transform("min")
        joined = linked.groupby(group).transform("min")
        if (joined == group).all():
            return group
        group = joined


def _opening(answer: str) -> str:
    return folded(answer)[:SAME_OPENING]


def _parts(rows: pd.DataFrame) -> pd.Series:
    """By the hash of a group's first request, so that the split depends on no random generator.

    A group with a request of ``SEEN`` belongs to the development part.
    """
    first = rows["prompt"].map(folded).groupby(rows["group"]).transform("min")
    digests = first.map(lambda text: hashlib.sha256(text.encode()).digest())
    drawn = digests.map(lambda digest: int.from_bytes(digest[:8], "big") / 2**64)
    is_seen = (rows["source"] == SEEN).groupby(rows["group"]).transform("any")
    is_test = (drawn < TEST_SHARE) & ~is_seen
    return is_test.map({True: "test", False: "development"})


def answer_id(prompt: str, response: str) -> str:
    """What a request and an answer are known by here: their texts, whatever case and spaces."""
    return sha256_of([folded(prompt), folded(response)])[:16]
