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
    """Gibberish made from a real answer, as one of ``KINDS``, of about its length; loops are of 32
    words at least.
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
        return "".join(
            str(rng.choice(letters)) if rng.random() < 0.4 and char != " " else char
            for char in text
        )
    raise ValueError(f"unknown kind of gibberish '{kind}' (there: {', '.join(CORRUPTIONS)})")


def fit_degeneracy(cases: pd.DataFrame) -> tuple[float, float]:
    """(weight of repetition, threshold) of a logistic regression of gibberish on base_nll and
    repetition, in nats per token.

    ``cases``: text, base_nll, gibberish (True/False). The two coefficients of the boundary, divided
    by that of the NLL.
    """
    cases = cases[cases["base_nll"].notna()]
    features = np.column_stack([cases["base_nll"], cases["text"].map(repetition)])
    scale = features.std(0)  # so that the penalty treats both alike
    fitted = LogisticRegression(class_weight="balanced").fit(features / scale, cases["gibberish"])
    (slope, weight), offset = fitted.coef_[0] / scale, fitted.intercept_[0]
    return float(weight / slope), float(-offset / slope)


def gibberish_table(cases: pd.DataFrame) -> pd.DataFrame:
    """How well ``degeneracy`` tells each kind of gibberish from real answers, and what
    ``MAX_DEGENERACY`` gets right.

    ``cases``: part, kind, text, base_nll, gibberish. A row per part and kind of gibberish, and one
    for "all" of them; a part without gibberish has one row, its specificity. Columns: part, kind,
    n, n_real, auc, low, high, and sensitivity and specificity, each with its Wilson interval (_low,
    _high).
    """
    cases = cases.assign(
        score=[degeneracy(*case) for case in zip(cases["text"], cases["base_nll"], strict=True)]
    )
    records = []
    for part, rows in cases.groupby("part", sort=False):
        real, broken = rows[~rows["gibberish"]], rows[rows["gibberish"]]
        for kind, group in [("all", broken), *broken.groupby("kind", sort=False)]:
            scores = np.concatenate([group["score"], real["score"]])
            area = auc_interval(scores, np.arange(len(scores)) < len(group))
            record = {
                "part": part,
                "kind": kind if len(group) else real["kind"].iloc[0],
                "n": len(group),
                "n_real": len(real),
            }
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
    """The constants of ``degeneracy`` as stored here and as the development half of ``cases``
    chooses them.

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
    """Precision, recall and F1 (with its bootstrap interval over answers) of judges against labels
    by people.

    ``labelled``: part, label (True: refusal) and one True/False column per judge. Columns: judge,
    part, n, precision, recall, f1, low, high.
    """
    records = []
    for judge in judges:
        for part in (*PARTS, "all"):
            rows = labelled if part == "all" else labelled[labelled["part"] == part]
            found, label = rows[judge].to_numpy(dtype=bool), rows["label"].to_numpy(dtype=bool)
            f1, low, high = case_interval(_f1, found, label)
            hits = (found & label).sum()
            records.append(
                {
                    "judge": judge,
                    "part": part,
                    "n": len(rows),
                    "precision": hits / max(found.sum(), 1),
                    "recall": hits / max(label.sum(), 1),
                    "f1": f1,
                    "low": low,
                    "high": high,
                }
            )
    return pd.DataFrame(records)


def _f1(found: np.ndarray, label: np.ndarray) -> float:
    return 2 * (found & label).sum() / max(found.sum() + label.sum(), 1)


def agreement(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """How often two judges say the same, beyond chance: n, agreement (Wilson: agreement_low,
    agreement_high), kappa, low, high.

    Cohen's kappa with a bootstrap interval over answers; NaN where both judges say one thing only.
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
