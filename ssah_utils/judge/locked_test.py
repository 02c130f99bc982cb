"""The learned judge beside its rivals at every length, and the one reading of the locked test part.

``python -m ssah_utils.judge.locked_test`` writes data/reference/judge.json: once per release, after
all choices. Knows texts, labels and stored weights.
"""

import json

import numpy as np
import pandas as pd

from ssah_utils import extras
from ssah_utils.files import REFERENCE, write_json
from ssah_utils.judge import fitting, labels, learned, rules

with extras.needed("eval"):
    from sklearn.metrics import f1_score, roc_auc_score

STORED = REFERENCE / "judge.json"
LENGTHS = (fitting.WHOLE, *reversed(fitting.CUTS))  # words
HARMFUL = tuple(source for source in labels.SOURCES if source != labels.HELPFUL)


def by_length(rows: pd.DataFrame, probabilities: pd.DataFrame | None = None) -> pd.DataFrame:
    """Every judge at every length against people: one row each.

    ``rows``: of ``labels.labelled_answers``. ``probabilities``: by row and cut, of weights that
    have not seen the row; without it, those of the stored weights. Columns: judge, words (0: whole
    answers), n, f1 (of *fulfilled*, where it is labelled, on answers to harmful requests), auc
    (learned only), unsure, n_helpful, passed (share of everyday answers not taken for a refusal),
    and precision_refused: of ``refused`` where there are as many such answers as unfulfilled ones.
    """
    told = rows[rows["fulfilled"].notna()]
    records = []
    for n_words in LENGTHS:
        texts = [fitting.first_words(answer, n_words) for answer in told["response"]]
        pairs = list(zip(texts, told["prompt"], strict=True))
        own = probabilities_of(told, pairs, n_words, probabilities)
        says_no = np.array([learned.is_certain_refusal(text) for text in texts])
        verdicts = {
            "learned": says_no | (own < learned.MIN_PROBABILITY),
            "rules": np.array([rules.is_refusal(*pair) for pair in pairs]),
            "substring list": np.array([rules.has_refusal_substring(text) for text in texts]),
        }
        own = np.where(says_no, 0.0, own)
        for judge, refused in verdicts.items():
            record = {"judge": judge, "words": n_words} | _quality(told, refused)
            if judge == "learned":
                record |= _ordering(told, own)
            records.append(record)
    return pd.DataFrame(records)


def probabilities_of(
    told: pd.DataFrame,
    pairs: list[tuple[str, str]],
    n_words: int,
    probabilities: pd.DataFrame | None = None,
) -> np.ndarray:
    """P(fulfilled) of answers cut to ``n_words``, and their requests (``pairs``): (n,).

    By the stored weights, or as ``probabilities`` says, by the index of ``told`` and the cut; an
    answer that is no longer than the cut counts as whole.
    """
    if probabilities is None:
        return np.array([learned.probability_fulfilled(*pair) for pair in pairs])
    by_row = probabilities.set_index(["row", "cut"])["probability"]
    whole = [by_row[row, fitting.WHOLE] for row in told.index]
    return np.array(
        [by_row.get((row, n_words), one) for row, one in zip(told.index, whole, strict=True)]
    )


def _quality(told: pd.DataFrame, refused: np.ndarray) -> dict:
    asked = told["source"].isin(HARMFUL).to_numpy()
    fulfilled = told["fulfilled"].to_numpy() == 1
    recall = refused[asked & ~fulfilled].mean()
    passed = 1 - refused[~asked].mean()
    return {
        "n": int(asked.sum()),
        "f1": float(f1_score(fulfilled[asked], ~refused[asked])),
        "f1_refused": float(f1_score(~fulfilled[asked], refused[asked])),
        "n_helpful": int((~asked).sum()),
        "passed": float(passed),
        "precision_refused": float(recall / max(recall + 1 - passed, 1e-9)),
    }


def _ordering(told: pd.DataFrame, own: np.ndarray) -> dict:
    asked = told["source"].isin(HARMFUL).to_numpy()
    low, high = learned.UNSURE
    unsure = (own[asked] > low) & (own[asked] < high)
    fulfilled = told["fulfilled"].to_numpy()[asked]
    error = float(((own[asked] - fulfilled) ** 2).mean())
    auc = float(roc_auc_score(fulfilled, own[asked]))
    return {"auc": auc, "brier": error, "unsure": float(unsure.mean())}


def grade_correlation(rows: pd.DataFrame) -> tuple[int, float]:
    """How many answers people graded, and the rank correlation of ``harmfulness`` with them."""
    graded = rows[rows["grade"].notna()]
    pairs = zip(graded["response"], graded["prompt"], strict=True)
    said = pd.Series([learned.harmfulness(*pair) for pair in pairs], index=graded.index)
    return len(graded), float(said.corr(graded["grade"], method="spearman"))


def stored_reading(part: str = "test") -> pd.DataFrame:
    """``by_length`` as it was stored when the test part was read; reads no answer.

    ``part``: "test", or "development" for the cross-validated figures beside it.
    """
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    return pd.DataFrame(stored[part])


def main() -> None:
    """Cross-validate on the development part, read the test part, and store both."""
    rows = labels.labelled_answers()
    development, test = (rows[rows["part"] == part] for part in ("development", "test"))
    held_out = fitting.cross_validated(fitting.training_rows(development))
    held_out = held_out[held_out["version"] == 0]
    graded = held_out[held_out["grade"].notna() & (held_out["cut"] == fitting.WHOLE)]
    rho = float(graded["grade_said"].corr(graded["grade"], method="spearman"))
    read = by_length(test)
    table = read.set_index(["judge", "words"])
    n_graded, test_rho = grade_correlation(test)
    figures = {
        "test_f1_whole": table["f1"]["learned", 0],
        "test_auc_whole": table["auc"]["learned", 0],
        "substring_f1_whole": table["f1"]["substring list", 0],
        "rules_f1_whole": table["f1"]["rules", 0],
        "precision_refused_helpful": table["precision_refused"]["learned", 0],
        "helpful_passed": table["passed"]["learned", 0],
    }
    for n_words in fitting.CUTS:
        figures[f"test_f1_{n_words}_words"] = table["f1"]["learned", n_words]
        figures[f"test_auc_{n_words}_words"] = table["auc"]["learned", n_words]
        figures[f"substring_f1_{n_words}_words"] = table["f1"]["substring list", n_words]
    stored = {name: round(float(value), 4) for name, value in figures.items()}
    stored |= {"locked": labels.LOCKED, "n": int(read["n"].iloc[0])}
    stored |= {"n_helpful": int(read["n_helpful"].iloc[0]), "n_graded": n_graded}
    stored |= {"grade_correlation": round(test_rho, 4)}
    stored |= {"development_grade_correlation": round(rho, 4)}
    for part, found in {"test": read, "development": by_length(development, held_out)}.items():
        stored[part] = found.round(4).astype(object).where(found.notna(), None).to_dict("records")
    if STORED.exists():  # what other commands have stored beside it
        kept = json.loads(STORED.read_text(encoding="utf-8"))
        stored |= {key: kept[key] for key in ("chat_judges",) if key in kept}
    write_json(STORED, stored)
    print(f"{STORED.name}: test part {labels.LOCKED} read, {stored['n']} answers")


if __name__ == "__main__":
    main()
