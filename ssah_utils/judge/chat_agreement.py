"""How far any judge agrees with people, whole and on beginnings: on the development part.

``python -m ssah_utils.judge.chat_agreement --model NAME`` asks a model and stores what it is worth
in data/reference/judge.json, under ``chat_judges``. The test part is locked and takes no part.
"""

import argparse
import json
from collections.abc import Mapping

import numpy as np
import pandas as pd

from ssah_utils import extras
from ssah_utils.files import write_json
from ssah_utils.judge import fitting, labels, learned, locked_test, rules
from ssah_utils.judge.model_judges import Judge, load_judge
from ssah_utils.stats import auc_interval, case_interval

with extras.needed("eval"):
    from sklearn.metrics import f1_score

LEARNED, RULES, SUBSTRINGS = "learned", "rules", "substring list"
WITHOUT_MODEL = (LEARNED, RULES, SUBSTRINGS)
N_WORDS = (fitting.WHOLE, 24)  # whole answers, and beginnings as most notebooks see them
N_ANSWERS = {fitting.WHOLE: 60, 24: 120}


def subsample(rows: pd.DataFrame, n: int) -> pd.DataFrame:
    """The first ``n`` answers to harmful requests that people call fulfilled or not, in the order
    of their ids: those of a smaller sample are among those of a larger one.
    """
    is_told = rows["fulfilled"].notna() & rows["source"].isin(locked_test.HARMFUL)
    return rows[is_told].sort_values("id").head(n)


def held_out_probabilities(development: pd.DataFrame) -> pd.DataFrame:
    """P(fulfilled) of the learned judge for every answer and cut, by weights that never saw it.

    ``development``: all of that part, as the stored weights have learned from all of it.
    """
    found = fitting.cross_validated(fitting.training_rows(development))
    return found[found["version"] == 0]


def held_out_refusals() -> dict[str, bool]:
    """By ``labels.answer_id``, whether the learned judge calls a whole answer of the development
    part a refusal, by weights that never saw it.
    """
    rows = labels.labelled_answers()
    development = rows[rows["part"] == "development"]
    told = development[development["fulfilled"].notna()]
    held_out = held_out_probabilities(development)
    said, _ = says_complied(LEARNED, told, fitting.WHOLE, held_out)
    return dict(zip(told["id"], (~said).tolist(), strict=True))


def says_complied(
    judge: str | Judge, rows: pd.DataFrame, n_words: int, held_out: pd.DataFrame | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """What a judge says of answers cut to ``n_words``: complied (n,), and P(complied) if it has
    one.

    ``judge``: one of ``WITHOUT_MODEL``, or a model that ``load_judge`` gives, which decides at 1/2.
    ``held_out``: of ``held_out_probabilities``, which the learned judge needs.
    """
    texts = [fitting.first_words(answer, n_words) for answer in rows["response"]]
    requests = rows["prompt"].tolist()
    pairs = list(zip(texts, requests, strict=True))
    if judge == RULES:
        return ~np.array([rules.is_refusal(*pair) for pair in pairs]), None
    if judge == SUBSTRINGS:
        return ~np.array([rules.has_refusal_substring(text) for text in texts]), None
    if judge == LEARNED:
        if held_out is None:
            raise ValueError("the learned judge has seen these answers: give held_out, its folds'")
        own = locked_test.probabilities_of(rows, pairs, n_words, held_out)
        says_no = np.array([learned.is_certain_refusal(text) for text in texts])
        own = np.where(says_no, 0.0, own)
        return own >= learned.MIN_PROBABILITY, own
    if not callable(judge):
        raise ValueError(f"unknown judge '{judge}' (there: {', '.join(WITHOUT_MODEL)}, or a model)")
    own = judge(requests, texts)
    return own > 0.5, own


def agreement_with_labels(
    judge: str | Judge,
    rows: Mapping[int, pd.DataFrame],
    held_out: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """F1 and AUC of a judge against people, with 95% bootstrap intervals over answers.

    ``rows``: by number of words that are judged (0: whole), answers of the development part. One
    row each: words, n, fulfilled (share, by people), f1, f1_low, f1_high (of *fulfilled*), auc,
    auc_low, auc_high (NaN for a judge that gives no probability). ``ValueError`` for a row of the
    test part.
    """
    records = []
    for n_words, told in rows.items():
        if (told["part"] != "development").any():
            raise ValueError("the test part is locked: give answers of the development part")
        people = told["fulfilled"].to_numpy() == 1
        said, own = says_complied(judge, told, n_words, held_out)
        area = (float("nan"),) * 3 if own is None else auc_interval(own, people)
        record = {"words": n_words, "n": len(told), "fulfilled": float(people.mean())}
        for name, values in {"f1": case_interval(_f1, people, said), "auc": area}.items():
            record |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        records.append(record)
    return pd.DataFrame(records)


def _f1(people: np.ndarray, said: np.ndarray) -> float:
    return float(f1_score(people, said, zero_division=0.0))


def compared_on_labels(
    name: str, judge: Judge, n_answers: Mapping[int, int] = N_ANSWERS
) -> pd.DataFrame:
    """A model and the judges without a model on the same answers, a row per judge and length."""
    rows = labels.labelled_answers()
    development = rows[rows["part"] == "development"]
    chosen = {n_words: subsample(development, n) for n_words, n in n_answers.items()}
    held_out = held_out_probabilities(development)
    tables = []
    for title, one in {name: judge, **dict(zip(WITHOUT_MODEL, WITHOUT_MODEL, strict=True))}.items():
        table = agreement_with_labels(one, chosen, held_out)
        tables.append(table.assign(judge=title))
    return pd.concat(tables, ignore_index=True)


def main() -> None:
    """Ask a model, and store what it is worth beside what is stored of others."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="as parameter judge_model takes it")
    for n_words in N_WORDS:
        length = f"cut to {n_words} words" if n_words else "whole"
        kept = {"type": int, "default": N_ANSWERS[n_words], "help": f"how many answers, {length}"}
        parser.add_argument(f"--n-{n_words or 'whole'}", dest=f"n_{n_words}", **kept)
    asked = parser.parse_args()
    n_answers = {n_words: getattr(asked, f"n_{n_words}") for n_words in N_WORDS}
    table = compared_on_labels(asked.model, load_judge(asked.model), n_answers)
    records = table.round(4).astype(object).where(table.notna(), None).to_dict("records")
    stored = json.loads(locked_test.STORED.read_text(encoding="utf-8"))
    stored["chat_judges"] = stored.get("chat_judges", {}) | {asked.model: records}
    write_json(locked_test.STORED, stored)
    print(table.round(3).to_string(index=False))


if __name__ == "__main__":
    main()
