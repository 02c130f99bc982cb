"""How good the judge is: against labels by people, and against gibberish made from real answers.

Knows text and labels. Does not know models.
"""

import numpy as np
import pandas as pd

from ssah_utils import extras
from ssah_utils.judge.rules import MAX_DEGENERACY, REPETITION_WEIGHT, degeneracy, repetition
from ssah_utils.stats import auc_interval, case_interval, proportion_interval

with extras.needed("eval"):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import cohen_kappa_score

PARTS = ("development", "test")
CORRUPTIONS = ("words shuffled", "words looped", "characters replaced")


def corrupted(text: str, kind: str, rng: np.random.Generator) -> str:
    """Gibberish made from a real answer, of one of the kinds of ``CORRUPTIONS``.

    Of about its length; loops are of 32 words at least.
    """
    words = text.split()
    if not words:
        return text
    if kind == "words shuffled":
        return " ".join(rng.permutation(words))
    if kind == "words looped":
        period = min(int(rng.integers(1, 5)), len(words))
        return " ".join(words[position % period] for position in range(max(len(words), 32)))
    if kind == "characters replaced":
        letters = np.array(list("abcdefghijklmnopqrstuvwxyz0123456789#%&*"))
        replace = lambda char: rng.random() < 0.4 and char != " "  # noqa: E731
        return "".join(str(rng.choice(letters)) if replace(char) else char for char in text)
    raise ValueError(f"unknown kind of gibberish '{kind}' (there: {', '.join(CORRUPTIONS)})")


def fit_degeneracy(cases: pd.DataFrame) -> tuple[float, float]:
    """Weight of repetition and threshold, in nats per token, that tell gibberish best.

    ``cases``: text, base_nll, gibberish (True/False). Both are coefficients of a logistic
    regression on base_nll and repetition, divided by that of the NLL.
    """
    cases = cases[cases["base_nll"].notna()]
    features = np.column_stack([cases["base_nll"], cases["text"].map(repetition)])
    scale = features.std(0)  # so that the penalty treats both alike
    fitted = LogisticRegression(class_weight="balanced").fit(features / scale, cases["gibberish"])
    (slope, weight), offset = fitted.coef_[0] / scale, fitted.intercept_[0]
    return float(weight / slope), float(-offset / slope)


def gibberish_table(cases: pd.DataFrame) -> pd.DataFrame:
    """How well ``degeneracy`` tells each kind of gibberish from real answers.

    ``cases``: part, kind, text, base_nll, gibberish. A row per part and kind of gibberish, and one
    for "all" of them; a part without gibberish has one row, its specificity. Columns: part, kind,
    n, n_real, auc, low, high, and at the threshold ``MAX_DEGENERACY`` sensitivity and specificity,
    each with its Wilson interval (_low, _high).
    """
    answers = zip(cases["text"], cases["base_nll"], strict=True)
    cases = cases.assign(score=[degeneracy(*answer) for answer in answers])
    records = []
    for part, rows in cases.groupby("part", sort=False):
        real, broken = rows[~rows["gibberish"]], rows[rows["gibberish"]]
        for kind, group in [("all", broken), *broken.groupby("kind", sort=False)]:
            scores = np.concatenate([group["score"], real["score"]])
            area = auc_interval(scores, np.arange(len(scores)) < len(group))
            kind = kind if len(group) else real["kind"].iloc[0]
            record = {"part": part, "kind": kind, "n": len(group), "n_real": len(real)}
            record |= dict(zip(("auc", "low", "high"), area, strict=True))
            found = {
                "sensitivity": group["score"] > MAX_DEGENERACY,
                "specificity": real["score"] <= MAX_DEGENERACY,
            }
            for name, right in found.items():
                share = proportion_interval(right) if len(right) else (float("nan"),) * 3
                record |= dict(zip((name, f"{name}_low", f"{name}_high"), share, strict=True))
            records.append(record)
    return pd.DataFrame(records)


def constants_table(cases: pd.DataFrame) -> pd.DataFrame:
    """The constants of ``degeneracy`` as stored, and as the development half of ``cases`` has them.

    Columns: constant, stored, chosen, tolerance, agrees. Agreement is to be expected on the
    embedded model only.
    """
    chosen = fit_degeneracy(cases[cases["part"] == PARTS[0]])
    rows = [
        ("REPETITION_WEIGHT", REPETITION_WEIGHT, chosen[0], 1.5),
        ("MAX_DEGENERACY", MAX_DEGENERACY, chosen[1], 0.5),
    ]
    table = pd.DataFrame(rows, columns=["constant", "stored", "chosen", "tolerance"])
    return table.assign(agrees=(table["stored"] - table["chosen"]).abs() <= table["tolerance"])


def refusal_table(labelled: pd.DataFrame, judges: list[str]) -> pd.DataFrame:
    """Precision, recall and F1 of judges against labels by people.

    ``labelled``: part, label (True: refusal) and one True/False column per judge. Columns: judge,
    part, n, precision, recall, f1, and low and high of F1, a bootstrap over answers.
    """
    records = []
    for judge in judges:
        for part in (*PARTS, "all"):
            rows = labelled if part == "all" else labelled[labelled["part"] == part]
            found, label = rows[judge].to_numpy(dtype=bool), rows["label"].to_numpy(dtype=bool)
            hits = (found & label).sum()
            precision, recall = hits / max(found.sum(), 1), hits / max(label.sum(), 1)
            f1 = case_interval(_f1, found, label)
            records.append((judge, part, len(rows), precision, recall, *f1))
    columns = ["judge", "part", "n", "precision", "recall", "f1", "low", "high"]
    return pd.DataFrame(records, columns=columns)


def _f1(found: np.ndarray, label: np.ndarray) -> float:
    return 2 * (found & label).sum() / max(found.sum() + label.sum(), 1)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How often two judges say the same, also beyond chance.

    Returns n, agreement (Wilson: agreement_low, agreement_high), and Cohen's kappa with its
    bootstrap interval over answers (kappa, low, high); NaN where both judges say one thing only.
    """
    first, second = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    same, same_low, same_high = proportion_interval(first == second)
    kappa, low, high = case_interval(_kappa, first, second)
    return {
        "n": len(first),
        "agreement": same,
        "agreement_low": same_low,
        "agreement_high": same_high,
        "kappa": kappa,
        "low": low,
        "high": high,
    }


def _kappa(first: np.ndarray, second: np.ndarray) -> float:
    if len(set(first) | set(second)) < 2:
        return float("nan")
    return float(cohen_kappa_score(first, second))
